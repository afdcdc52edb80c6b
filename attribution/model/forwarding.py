"""How model inputs become scores and features: devices, precisions, memory layouts, batches, and what fits into memory."""

from __future__ import annotations

import copy
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from attribution.checks import check_choice, check_whole
from attribution.errors import NotApplicable, UserError, describe
from attribution.hooks import evaluation_mode, exclusive, frozen_parameters, hooks_of, is_rebuilt, record_inputs, uncompiled
from attribution.model.digest import weights_digest
from attribution.model.folding import folded
from attribution.model.head import features_of, find_heads
from attribution.model.outputs import OutputChoice, Outputs, made_by, read_scores
from attribution.model.preprocessing import Preprocessing

T = TypeVar("T")
PRECISIONS = ("float32", "bfloat16", "float16")
_UNMASKED = 0.7  # quantile of the scores' distances from their median that tells how far they spread, whatever one in four of them is
_USUAL_FIXED = (3, 4, 5, 6, 7, 8, 16, 32)  # batch sizes that are tried where the module takes neither one nor two images
_MOST_FIXED = 256
_FOLDED_FROM = 128 * 128  # pixels of an input
_FOLDED_WITHIN = 1e-4  # largest difference of the scores, as a share of their spread or size
_CHECKED = 3  # batches of which the first image is forwarded by the module too, to see that its copy gives the same scores


@dataclass
class _Twin:
    """A module and the copy that is forwarded in its place; None once the scores of an image differed."""

    module: nn.Module
    copy: nn.Module | None
    unchecked: int = _CHECKED


_twins: ContextVar[_Twin | None] = ContextVar("twins", default=None)
_LONGEST = 300  # characters that are shown of what another library says
_temporary: ContextVar[dict[tuple[ModuleForward, str], Any]] = ContextVar("temporary")  # settings of this thread only


class Forward(Protocol):
    """Computes the scores of a ``Classifier``: a ``ModuleForward``, or a ``Relay`` to one."""

    @property
    def runner(self) -> ModuleForward:
        """The ``ModuleForward`` that runs the module. It holds module, device, batch size and precision."""

    @property
    def outputs(self) -> Outputs:
        """What the scores mean."""

    @property
    def weights_digest(self) -> str | None:
        """sha256 of all that the scores of an input depend on; None for a black box."""

    def find_out(self, want_features: bool) -> None:
        """Run now the forward passes that are needed only once. Callers whose hooks must not record them call this first."""

    def on(self, runner: ModuleForward) -> Forward:
        """The same computation with another runner."""

    def folding(self) -> AbstractContextManager[None]:
        """A context in which the module may be forwarded in a faster form; see ``ModuleForward.folding``."""

    def __call__(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        """Scores [n, C] and features [n, D] of inputs [n, channels, h, w]; [n, 0] unless features are wanted."""


@dataclass(frozen=True, eq=False)
class Relay:
    """A ``Forward`` that passes every call on to another one. Subclasses override what differs."""

    base: Forward

    @property
    def runner(self) -> ModuleForward:
        return self.base.runner

    @property
    def outputs(self) -> Outputs:
        return self.base.outputs

    @property
    def weights_digest(self) -> str | None:
        return self.base.weights_digest

    def find_out(self, want_features: bool) -> None:
        self.base.find_out(want_features)

    def on(self, runner: ModuleForward) -> Self:
        return replace(self, base=self.base.on(runner))

    def folding(self) -> AbstractContextManager[None]:
        return self.base.folding()

    def __call__(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        return self.base(inputs, want_features)


class ModuleForward:
    """The ``Forward`` that runs a module, in evaluation mode and in batches.

    Args:
        module, scores, output, head, batch_size, precision, channels_last, compiled, forward_kwargs: see ``Classifier``.
        classes: number of class names, if known.
        preprocessing: makes the inputs; it gives their shape, and the input that a gray image becomes.
        name: of the classifier, for messages.
        outputs: what the scores mean, if known; otherwise this is determined from the scores of a gray image.
    """

    def __init__(
        self,
        module: nn.Module | Callable[[Tensor], Any],
        preprocessing: Preprocessing,
        *,
        name: str,
        scores: str = "auto",
        output: OutputChoice | None = None,
        classes: int | None = None,
        head: str | None = None,
        batch_size: int | None = None,
        precision: str = "float32",
        channels_last: bool = False,
        compiled: bool = False,
        forward_kwargs: Mapping[str, Any] | None = None,
        outputs: Outputs | None = None,
    ) -> None:
        self.preprocessing, self.name, self.scores, self.head = preprocessing, name, scores, head
        self.output, self.classes = output, classes
        inner = eager_module(module)
        if isinstance(inner, nn.Module) and any(each.is_meta for each in (*inner.parameters(), *inner.buffers())):
            raise UserError(f"{name} has weights on the meta device, which hold no numbers: load them first")
        self.module = inner
        self.forward_kwargs = dict(forward_kwargs or {})
        self.fixed_batch: int | None = None  # how many images the module takes at once, where it takes no other number
        self.batch_size = batch_size
        self.precision = precision
        self.channels_last, self.compiled = channels_last, compiled or inner is not module
        self._outputs = outputs
        self._own_hooks = hooks_of(inner) if isinstance(inner, nn.Module) else frozenset()
        self._compiled_module: tuple[Any, Callable[..., Any]] | None = None if inner is module else (inner, module)

    @property
    def module(self) -> nn.Module | Callable[[Tensor], Any]:
        """The module, or the function given in its place. Whatever replaces it must return scores of the same meaning."""
        return self._module

    @module.setter
    def module(self, value: nn.Module | Callable[[Tensor], Any]) -> None:
        self._module = value
        self._heads: list[nn.Module] | None = None

    @property
    def batch_size(self) -> int:
        """Most images forwarded at once."""
        return self.fixed_batch or int(self._setting("batch_size"))

    @batch_size.setter
    def batch_size(self, value: int | None) -> None:
        if value is None:
            height, width = self.preprocessing.size
            value = automatic_batch_size(height * width, self.device)
        check_whole("batch_size", value, 1)
        self._set("batch_size", int(value))

    @property
    def precision(self) -> str:
        """The precision of forward passes without gradients."""
        return str(self._setting("precision"))

    @precision.setter
    def precision(self, value: str) -> None:
        check_choice("precision", value, PRECISIONS)
        if value != "float32":
            try:
                torch.autocast(self.device.type, getattr(torch, value))
            except RuntimeError as error:
                raise UserError(f"precision {value!r} is not available on {self.device} ({error}): expected float32") from None
        self._set("precision", value)

    @contextmanager
    def temporarily(self, **settings: Any) -> Iterator[None]:
        """Forward with another batch size or precision within the context. Other threads do not see it."""
        token = _temporary.set({**_temporary.get({}), **{(self, name): None for name in settings}})
        try:
            for name, value in settings.items():
                setattr(self, name, value)
            yield
        finally:
            _temporary.reset(token)

    def _setting(self, name: str) -> Any:
        return _temporary.get({}).get((self, name), vars(self).get(f"_{name}"))

    def _set(self, name: str, value: Any) -> None:
        temporary = _temporary.get({})
        if (self, name) in temporary:
            temporary[self, name] = value
        else:
            vars(self)[f"_{name}"] = value

    @property
    def device(self) -> torch.device:
        """Where the module's parameters lie; the CPU for a callable without any."""
        return next((tensor.device for tensor in self._tensors()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the module's parameters, in which it takes its inputs; float32 for a callable without any."""
        return next((tensor.dtype for tensor in self._tensors() if tensor.is_floating_point()), torch.float32)

    def _tensors(self) -> Iterator[Tensor]:
        module = self.module
        return chain(module.parameters(), module.buffers()) if isinstance(module, nn.Module) else iter(())

    @property
    def runner(self) -> ModuleForward:
        return self

    @property
    def outputs(self) -> Outputs:
        if self._outputs is None:
            first = self._first_scores()
            found = Outputs.of(*first, self.classes, self.name)
            self._check_repeatable(first[0])
            self._outputs = found
        return self._outputs

    @property
    def heads(self) -> list[nn.Module]:
        """The final layers, see ``find_heads``."""
        if self._heads is None:
            self.outputs  # noqa: B018  finds out how many images the module takes at once
            if self.opaque:
                raise UserError(f"{self.name} shows no features, {self.opaque}: give the nn.Module that it was made from")
            blank = torch.zeros(1, *self.preprocessing.shape, device=self.device, requires_grad=True)
            with frozen_parameters(self.module) if isinstance(self.module, nn.Module) else nullcontext():
                self._heads = find_heads(self.module, self.head, self.outputs.count, lambda: self._scores(blank, plainly=True), self.name)
        return self._heads

    @property
    def opaque(self) -> str | None:
        """Why the layers of the module cannot be looked at; None where they can, as far as is known before the first forward pass."""
        module = self.module
        if isinstance(module, nn.Module) and (self.fixed_batch or 1) > 1:
            return f"as it takes {self.fixed_batch} images at once, neither more nor fewer"
        while isinstance(module, nn.Module) and not isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
            children = list(module.children())
            if len(children) != 1:
                return None
            module = children[0]
        if isinstance(module, torch.jit.ScriptModule):
            return "as TorchScript runs its layers out of sight"
        if isinstance(module, torch.fx.GraphModule):
            called = [module.get_submodule(node.target) for node in module.graph.nodes if node.op == "call_module"]
            if not any(True for each in called for _ in each.parameters()):
                return "as torch.export turned its layers into plain operations"
        return None

    @property
    def differentiable(self) -> bool:
        """Whether gradients of the scores reach the input; tried with a gray image."""
        with torch.enable_grad():
            leaf = self.preprocessing.gray_inputs(self.device)[:1].requires_grad_()
            scores = self._scores(leaf, plainly=True)
            return scores.requires_grad and torch.autograd.grad(scores.sum(), leaf, allow_unused=True)[0] is not None

    @property
    def weights_digest(self) -> str | None:
        return weights_digest(self.module, self.forward_kwargs) if isinstance(self.module, nn.Module) else None

    @property
    def is_watched(self) -> bool:
        """Whether hooks were added to the module. Hooks that it came with, such as those of weight_norm, do not count."""
        return isinstance(self.module, nn.Module) and not hooks_of(self.module) <= self._own_hooks

    def find_out(self, want_features: bool) -> None:
        self.outputs  # noqa: B018
        if want_features:
            self.heads  # noqa: B018

    def on(self, runner: ModuleForward) -> ModuleForward:
        return runner

    def changed(self, **settings: Any) -> ModuleForward:
        """A copy with other attributes, such as ``batch_size`` or ``module``; it keeps what is known about the outputs."""
        made = copy.copy(self)
        for name, value in {"batch_size": self.batch_size, "precision": self.precision, **settings}.items():
            setattr(made, name, value)
        return made

    def __call__(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        with exclusive(*([self.module] if isinstance(self.module, nn.Module) else modules_inside(self.module))):
            self.find_out(want_features)
            with_gradients = torch.is_grad_enabled() and inputs.requires_grad

            def forward() -> tuple[Tensor, Tensor]:
                with torch.set_grad_enabled(with_gradients):
                    parts = [self._batch(chunk, want_features) for chunk in even_chunks(inputs, self.batch_size)]
                scores, features = zip(*parts, strict=True)
                return torch.cat(scores), torch.cat(features)

            scores, features = self.fitting(forward, len(inputs), with_gradients)
        if with_gradients and not scores.requires_grad and not self.is_watched:  # a hook may have cut the layers below off
            raise no_gradient(self.name)
        return scores, features

    def fitting(self, forward: Callable[[], T], rows: int, with_gradients: bool = False) -> T:
        """Call a function that forwards rows in batches, with the batch size halved until they fit into memory.

        Batches are not split under gradients, which keep every batch in memory anyway. They are not split either while the caller has
        hooks on the module, which may rely on one call for each batch.
        """
        own = self.batch_size
        while True:
            try:
                return forward()
            except RuntimeError as error:
                tried = min(self.batch_size, rows)
                if tried <= 1 or self.fixed_batch or with_gradients or not is_out_of_memory(error) or self.is_watched:
                    self.batch_size = own
                    raise
            # outside the except block, where the traceback no longer holds the tensors of the failed batch
            self.batch_size = tried // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _batch(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        with record_inputs(self.heads) if want_features else nullcontext() as calls:
            scores = self._scores(inputs, torch.is_grad_enabled())
        if scores.shape[1] != self.outputs.count:
            raise UserError(
                f"{self.name} returned {scores.shape[1]} scores for an image, but {self.outputs.count} for the first one: expected one "
                "for each class, whatever the image"
            )
        return scores, scores.new_zeros(len(scores), 0) if calls is None else features_of(calls, self.name)[: len(scores)]

    def _first_scores(self) -> tuple[Tensor, str, frozenset[str] | None]:
        """Scores of the gray inputs, what the settings say that they are, and the operations that made them, if known.

        Where the module takes only one number of images at once, that is found here, and kept in ``fixed_batch``.
        """
        inputs = self.preprocessing.gray_inputs(self.device)
        failed: list[Exception] = []
        try:
            parts = self._first_parts(inputs)
        except Exception as error:  # a module may raise anything
            failed.append(error)
        for rows in self._other_batches(failed):
            self.fixed_batch = rows
            with suppress(Exception):
                parts = self._first_parts(inputs)
                if rows == 1 or self._keeps_apart(inputs, torch.cat(parts)):
                    break
            self.fixed_batch = None
        if failed and self.fixed_batch is None:
            raise self._failure(failed[0], inputs)
        return torch.cat(parts).detach(), self.scores, made_by(parts[0])

    def _check_repeatable(self, first: Tensor) -> None:
        """Refuse scores that depend on chance. Forward one image at a time where they depend on the other images of a batch.

        A module that took both inputs at once, but takes none alone, always gets two.

        Args:
            first: [2, count], scores of the gray inputs.
        """
        inputs = self.preprocessing.gray_inputs(self.device)
        try:
            alone = torch.cat([self._plainly(row[None]) for row in inputs])
        except Exception:  # a module may raise anything
            self.fixed_batch = self.fixed_batch or len(inputs)
            alone = torch.cat([self._plainly(row[None]) for row in inputs])
        again = self._plainly(inputs[:1])
        if (gap := _differ(again, alone[:1], 1e-4, torch.finfo(self.dtype).eps)) > 0:
            raise UserError(
                f"{self.name} returned scores that differ by {gap:.3g} for the same image: it draws random numbers in evaluation "
                "mode (such as F.dropout without training=self.training), or keeps a state that each call changes; give a model, or a "
                "function of it, that returns the same scores at every call"
            )
        if _differ(alone, first, 1e-3, 32 * torch.finfo(self.dtype).eps) == 0:
            return
        depends = f"the scores of {self.name} depend on the other images of a batch"
        if (self.fixed_batch or 1) > 1:
            raise UserError(f"{depends}, and it takes no single image: give a model whose scores of an image are its own")
        self.fixed_batch = 1
        warnings.warn(
            f"{depends}, as with batch normalisation without running statistics or dynamic quantisation: each image is forwarded alone",
            stacklevel=2,
        )

    def _first_parts(self, inputs: Tensor) -> list[Tensor]:
        return [self._looked_into(part) for part in even_chunks(inputs, self.batch_size)]

    def takes(self, inputs: Tensor) -> bool:
        """Whether the module runs on a batch of inputs without an error."""
        try:
            self._plainly(inputs)
        except Exception:
            return False
        return True

    def _other_batches(self, failed: list[Exception]) -> list[int]:
        """Numbers of images at once that may work where another failed: one, those that the message names, and usual ones."""
        if not failed or isinstance(failed[0], UserError):
            return []
        if is_out_of_memory(failed[0]):
            return [1]
        named = {int(number) for number in re.findall(r"\b\d{1,3}\b", str(failed[0]))}
        return sorted({1, *(number for number in named if 2 <= number <= _MOST_FIXED), *_USUAL_FIXED})

    def _keeps_apart(self, inputs: Tensor, scores: Tensor) -> bool:
        """Whether the scores of two images change places with them."""
        return torch.allclose(self._plainly(inputs.flip(0)), scores.flip(0), rtol=1e-3, atol=1e-4)

    def _failure(self, error: Exception, inputs: Tensor) -> Exception:
        """What to raise where the module fails on its first inputs."""
        if isinstance(error, UserError) or is_out_of_memory(error):
            return error
        first = ""
        with suppress(TypeError, ValueError):  # not written in Python
            named = next(iter(inspect.signature(getattr(self.module, "forward", self.module)).parameters), None)
            first = f"; the images are given as {named!r}, its first argument" if named else ""
        failure = UserError(
            f"{self.name} fails on {describe(inputs)} ({type(error).__name__}: {first_line(error)}): check size, channels (mean "
            f"and std have one number for each) and forward_kwargs{first}"
        )
        failure.__cause__ = error
        return failure

    def _looked_into(self, inputs: Tensor) -> Tensor:
        """Scores with their gradient where it helps to find out what they are and the module has one."""
        if self.scores in ("auto", "sigmoid"):
            with suppress(Exception), torch.enable_grad():  # a module without gradients fails in many ways
                return self._scores(inputs.detach().requires_grad_(), plainly=True)
        return self._plainly(inputs.detach())

    def _plainly(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return self._scores(inputs, plainly=True)

    def _scores(self, inputs: Tensor, plainly: bool) -> Tensor:
        """Scores of one batch; plainly: in the module's own precision and not compiled."""
        lower = None if plainly or self.precision == "float32" else getattr(torch, self.precision)
        given = self._filled_up(inputs)
        with nullcontext() if lower is None else torch.autocast(self.device.type, lower):
            output = self._ran(given, plainly)
        return self._read(output, len(given))[: len(inputs)]

    def _ran(self, given: Tensor, plainly: bool) -> Any:
        """What the module returns. Whatever it raises on an image after the first, which tells what it is, is the failure of that image."""
        try:
            return self.run(given, plainly)
        except SystemExit as error:
            ended = RuntimeError(f"it ends the process by SystemExit: {error}")
            raise ended if self._outputs is None else self._failure(ended, given) from None
        except Exception as error:
            handled = isinstance(error, UserError | RuntimeError | ArithmeticError) or is_out_of_memory(error)
            if self._outputs is None or handled or type(error).__module__.startswith("attribution."):
                raise
            raise self._failure(error, given) from error

    def _read(self, output: Any, images: int) -> Tensor:
        """The scores in what the module returned of so many images."""
        classes = self.classes if self._outputs is None else self._outputs.count
        return read_scores(output, images, self.device, self.name, self.output, classes)

    def _filled_up(self, inputs: Tensor) -> Tensor:
        """Inputs, and the last of them again until there are as many as the module takes."""
        lacking = (self.fixed_batch or len(inputs)) - len(inputs)
        return inputs if lacking <= 0 else torch.cat([inputs, inputs[-1:].expand(lacking, -1, -1, -1)])

    def run(self, inputs: Tensor, plainly: bool = True) -> Any:
        """Call the module on one batch, in evaluation mode, and return whatever it returns.

        It gets a copy of the inputs, in its own precision: a module that writes into its input changes nothing that the caller holds.
        """
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        given = inputs.to(self.device, self.dtype, copy=True, memory_format=layout)
        if not isinstance(self.module, nn.Module):
            with ExitStack() as evaluated:
                for inner in modules_inside(self.module):
                    evaluated.enter_context(evaluation_mode(inner))
                return self.module(given, **self.forward_kwargs)
        with evaluation_mode(self.module):
            if not plainly and (twin := self._twin(given)) is not None:
                return twin(given, **self.forward_kwargs)
            if plainly or self.is_watched or is_rebuilt():  # compiled code passes by hooks and replaced modules
                with uncompiled(self.module):
                    return self.module(given, **self.forward_kwargs)
            return self._fastest(self.module)(given, **self.forward_kwargs)

    def _twin(self, given: Tensor) -> nn.Module | None:
        """The copy of the module that is forwarded now in its place (see ``folding``), unless somebody looks into the module."""
        known = _twins.get()
        if known is None or known.module is not self.module or self.compiled or self.is_watched or is_rebuilt():
            return None
        if known.copy is not None and known.unchecked > 0:
            known.unchecked -= 1
            if not self._gives_the_same(known.module, known.copy, given[:1]):
                known.copy = None
        return known.copy

    def _gives_the_same(self, module: nn.Module, twin: nn.Module, given: Tensor) -> bool:
        """Whether a copy of a module gives the same scores of one batch up to the rounding of float32."""

        def scores(module: Any) -> Tensor:
            return self._read(module(given.clone(), **self.forward_kwargs), len(given)).double()

        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), uncompiled(module):
            plain, found = scores(module), scores(twin)
        alike = bool((plain.isfinite() == found.isfinite()).all())
        return alike and _differ(found, plain, _FOLDED_WITHIN, _FOLDED_WITHIN) == 0

    @contextmanager
    def folding(self) -> Iterator[None]:
        """Forward a copy of the module within the context, in which batch normalisation is a part of the convolutions (see ``folded``).

        It is made for inputs of at least 128 x 128 pixels, where it is faster, and only if its scores are those of the module up to the
        rounding of float32. Gradients, features and hooks reach the module itself. The weights must not change within the context.
        """
        module, known = self.module, _twins.get()
        large = math.prod(self.preprocessing.size) >= _FOLDED_FROM
        if not isinstance(module, nn.Module) or not large or self.compiled or (known is not None and known.module is module):
            yield
            return
        with exclusive(module):
            twin = self._checked_twin(module)
        with _forwarded_instead(module, twin):
            yield

    def _checked_twin(self, module: nn.Module) -> nn.Module | None:
        if self.is_watched or self.fixed_batch or not any(isinstance(each, nn.BatchNorm2d) for each in module.modules()):
            return None
        noise = torch.randn(1, *self.preprocessing.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        inputs = torch.cat([self.preprocessing.gray_inputs(self.device)[:1], noise])
        with torch.no_grad(), evaluation_mode(module), suppress(Exception):  # a module may do anything, and then it is not folded
            if (twin := folded(module, lambda: self._plainly(inputs))) is None:
                return None
            given = inputs.to(self.dtype)
            if all(self._gives_the_same(module, twin, each) for each in given.split(1)):
                return twin
        return None

    def _fastest(self, module: nn.Module) -> Callable[..., Any]:
        """The module, compiled if wanted."""
        if not self.compiled:
            return module
        if self._compiled_module is None or self._compiled_module[0] is not module:
            self._compiled_module = (module, torch.compile(module, dynamic=True))
        return self._compiled_module[1]


@contextmanager
def _forwarded_instead(module: nn.Module, twin: nn.Module | None) -> Iterator[None]:
    """Run the block with a copy forwarded in the place of a module, or with none."""
    before = _twins.set(None if twin is None else _Twin(module, twin))
    try:
        yield
    finally:
        _twins.reset(before)


def _differ(some: Tensor, others: Tensor, share: float, rounding: float) -> float:
    """The largest difference of finite scores [n, count], 0 where it is within what rounding explains.

    Args:
        some, others: of the same images.
        share: of the spread of an image's scores, which a class that is masked by a large negative score does not widen.
        rounding: share of the size of the scores.
    """
    gaps = (some - others).abs()
    gaps, finite = gaps[gaps.isfinite()], others[others.isfinite()]
    if not len(gaps):
        return 0.0
    centre = finite.median()
    spread = float((finite - centre).abs().quantile(_UNMASKED, interpolation="nearest"))
    size = float(centre.abs()) + spread
    largest = float(gaps.max())
    return largest if largest > max(share * (spread or size), rounding * size) else 0.0


def modules_inside(function: Callable[..., Any]) -> list[nn.Module]:
    """The modules that a function visibly runs: the owner of a bound method, and those that a Python function refers to by name."""
    known: list[Any] = [getattr(function, "__self__", None)]
    with suppress(TypeError, ValueError):  # not written in Python, or cells that are still empty
        names = inspect.getclosurevars(getattr(function, "__func__", function))
        known += [*names.nonlocals.values(), *names.globals.values()]
    return [each for each in known if isinstance(each, nn.Module)]


def no_gradient(name: str) -> NotApplicable:
    return NotApplicable(
        f"{name} passes no gradient from its scores to its input (quantised layers, NumPy or torch.no_grad stop it): use "
        "occlusion, rise, lime, kernel_shap, hsic, sobol or a region search"
    )


def eager_module(module: Any) -> Any:
    """The module that ``torch.compile`` wrapped; anything else as it is."""
    return getattr(module, "_orig_mod", module) if isinstance(module, nn.Module) else module


def first_line(error: BaseException | str) -> str:
    """What an error says, in one line of at most 300 characters, without the codes that colour a terminal."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    line = text.splitlines()[0].rstrip(" :.") if text else type(error).__name__
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def automatic_batch_size(pixels: int, device: torch.device) -> int:
    """Images forwarded at once: on a CPU few enough for the caches, on an accelerator enough to fill it."""
    least, budget = (16, 2**16) if device.type == "cpu" else (32, 2**23)
    return max(least, min(512, budget // max(1, pixels)))


def is_out_of_memory(error: Exception) -> bool:
    """Whether a forward pass failed because memory ran out, on an accelerator or on the CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def even_chunks(rows: Tensor, most: int) -> tuple[Tensor, ...]:
    """Cut rows into as few parts of at most ``most`` rows as possible, of nearly equal size: a small last batch wastes a pass."""
    return rows.tensor_split(max(1, -(-len(rows) // most)))


def resolve_device(device: str | torch.device) -> torch.device:
    """A device by name; "auto" is CUDA, else Apple's GPU, else the CPU.

    Raises:
        UserError: a name that torch does not know or a device that this machine does not have.
    """
    if str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.zeros(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"device {str(device)!r} cannot be used ({reason}): expected auto, cpu, cuda, cuda:N or mps") from None
    return resolved
