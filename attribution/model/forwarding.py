"""How model inputs become scores and features: devices, precisions, memory layouts, batches, and what fits into memory."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from attribution.checks import check_choice, check_whole
from attribution.errors import UserError
from attribution.hooks import evaluation_mode, hooks_of, is_rebuilt, record_inputs
from attribution.model.head import features_of, find_heads
from attribution.model.outputs import OutputChoice, Outputs, read_scores
from attribution.model.preprocessing import Preprocessing

T = TypeVar("T")
PRECISIONS = ("float32", "bfloat16", "float16")


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

    def __call__(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        return self.base(inputs, want_features)


class ModuleForward:
    """The ``Forward`` that runs a module, in evaluation mode and in batches.

    Args:
        module, scores, output, head, batch_size, precision, channels_last, compiled: see ``Classifier``.
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
        outputs: Outputs | None = None,
    ) -> None:
        self.preprocessing, self.name, self.scores, self.head = preprocessing, name, scores, head
        self.output, self.classes = output, classes
        self.module = module
        self.batch_size = batch_size
        self.precision = precision
        self.channels_last, self.compiled = channels_last, compiled
        self._outputs = outputs
        self._own_hooks = hooks_of(module) if isinstance(module, nn.Module) else frozenset()
        self._compiled_module: tuple[nn.Module, Callable[[Tensor], Any]] | None = None

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
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int | None) -> None:
        if value is None:
            height, width = self.preprocessing.size
            value = automatic_batch_size(height * width, self.device)
        check_whole("batch_size", value, 1)
        self._batch_size = int(value)

    @property
    def precision(self) -> str:
        """The precision of forward passes without gradients."""
        return self._precision

    @precision.setter
    def precision(self, value: str) -> None:
        check_choice("precision", value, PRECISIONS)
        if value != "float32":
            try:
                torch.autocast(self.device.type, getattr(torch, value))
            except RuntimeError as error:
                raise UserError(f"precision {value!r} is not available on {self.device} ({error}): expected float32") from None
        self._precision = value

    @property
    def device(self) -> torch.device:
        """Where the module's parameters lie; the CPU for a callable without any."""
        if isinstance(self.module, nn.Module):
            for tensor in chain(self.module.parameters(), self.module.buffers()):
                return tensor.device
        return torch.device("cpu")

    @property
    def runner(self) -> ModuleForward:
        return self

    @property
    def outputs(self) -> Outputs:
        if self._outputs is None:
            self._outputs = Outputs.of(self._first_scores(), self.scores, self.classes, self.name)
        return self._outputs

    @property
    def heads(self) -> list[nn.Module]:
        """The final layers, see ``find_heads``."""
        if self._heads is None:
            blank = torch.zeros(1, *self.preprocessing.shape)
            self._heads = find_heads(self.module, self.head, self.outputs.count, lambda: self._plainly(blank.to(self.device)), self.name)
        return self._heads

    @property
    def weights_digest(self) -> str | None:
        """sha256 over the names, shapes and bytes of the module's parameters and buffers; None for a black box."""
        if not isinstance(self.module, nn.Module):
            return None
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            if not isinstance(tensor, Tensor):
                continue
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

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
        for name, value in settings.items():
            setattr(made, name, value)
        return made

    def __call__(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        self.find_out(want_features)
        with_gradients = torch.is_grad_enabled() and inputs.requires_grad

        def forward() -> tuple[Tensor, Tensor]:
            with torch.set_grad_enabled(with_gradients):
                parts = [self._batch(chunk, want_features) for chunk in even_chunks(inputs.to(self.device), self.batch_size)]
            scores, features = zip(*parts, strict=True)
            return torch.cat(scores), torch.cat(features)

        return self.fitting(forward, len(inputs), with_gradients)

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
                if tried <= 1 or with_gradients or not is_out_of_memory(error) or self.is_watched:
                    self.batch_size = own
                    raise
            # outside the except block, where the traceback no longer holds the tensors of the failed batch
            self.batch_size = tried // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _batch(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        if not want_features:
            scores = self._scores(inputs, torch.is_grad_enabled())
            return scores, scores.new_zeros(len(scores), 0)
        with record_inputs(self.heads) as calls:
            scores = self._scores(inputs, torch.is_grad_enabled())
        return scores, features_of(calls, self.name)

    def _first_scores(self) -> Tensor:
        """Scores of two plain images; with their gradient if its last operation is of use and the module has one."""
        inputs = self.preprocessing.gray_inputs(self.device)
        if self.scores == "auto":
            with suppress(Exception), torch.enable_grad():  # a module without gradients fails in many ways
                return self._scores(inputs.requires_grad_() * 1, plainly=True)  # not a leaf: the module may write into it
        return self._plainly(inputs.detach())

    def _plainly(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return self._scores(inputs, plainly=True)

    def _scores(self, inputs: Tensor, plainly: bool) -> Tensor:
        """Scores of one batch; plainly: in float32 and not compiled."""
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        lower = None if plainly or self.precision == "float32" else getattr(torch, self.precision)
        with nullcontext() if lower is None else torch.autocast(self.device.type, lower):
            if isinstance(self.module, nn.Module):
                with evaluation_mode(self.module):
                    output = (self.module if plainly else self._fastest(self.module))(inputs)
            else:
                output = self.module(inputs)
        classes = self.classes if self._outputs is None else self._outputs.count
        return read_scores(output, len(inputs), self.device, self.name, self.output, classes)

    def _fastest(self, module: nn.Module) -> Callable[[Tensor], Any]:
        """The module, compiled if wanted, unless hooks look inside it or some of its modules are replaced."""
        if not self.compiled or self.is_watched or is_rebuilt():
            return module
        if self._compiled_module is None or self._compiled_module[0] is not module:
            self._compiled_module = (module, torch.compile(module, dynamic=True))
        return self._compiled_module[1]


def automatic_batch_size(pixels: int, device: torch.device) -> int:
    """Images forwarded at once: on a CPU few enough for the caches, on an accelerator enough to fill it."""
    least, budget = (16, 2**16) if device.type == "cpu" else (32, 2**23)
    return max(least, min(512, budget // max(1, pixels)))


def is_out_of_memory(error: RuntimeError) -> bool:
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
