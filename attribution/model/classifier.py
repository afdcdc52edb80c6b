"""A classifier with everything that belongs to it: preprocessing, module, class names.

Nothing outside this file resizes, crops or normalises. Preprocessing is affine in the image (no rounding, no clipping after a
bicubic resize), which is what lets ``masking`` build the input of any subset of regions from one matrix product.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attribution.errors import UserError, describe
from attribution.hooks import evaluation_mode, hooks_of, is_rebuilt, record_inputs
from attribution.image import ImageSource, load_image
from attribution.model.forwarding import PRECISIONS, automatic_batch_size, even_chunks, is_out_of_memory
from attribution.model.head import pooled_features
from attribution.model.preprocessing import Preprocessing, Resize, checked_sides, checked_triple

T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """What the numbers that a classifier gives depend on.

    Attributes:
        name, weights, preprocessing, class_names: of the classifier; weights as their digest.
        precision: empty for float32.
    """

    name: str
    weights: str | None
    preprocessing: str
    class_names: tuple[str, ...]
    precision: tuple[str, ...]


class Classifier:
    """An image classifier: its preprocessing, its module and its class names.

    Args:
        module: an ``nn.Module``, or any callable from a float32 batch [n, 3, h, w] to scores [n, C] (tensor or array). Its
            output may also be a tuple or list (the first item), a dict or an object with ``logits``.
        size: side of the model input in pixels, or (h, w).
        mean, std: normalisation per channel of an image in [0, 1].
        class_names: C names; "class 0", "class 1" ... when not given.
        resize, resized, interpolation: see ``Preprocessing``.
        scores: what the module returns: "logits", "probabilities", or "auto" (probabilities when the rows of a first output
            are non-negative and sum to 1, else logits).
        head: name of the final layer whose input is the pooled feature; found automatically for linear heads.
        name: what reports call it.
        batch_size: most images forwarded at once; None lets the input size decide. Where a batch does not fit into memory, it is
            halved until it does, unless anybody looks inside the module meanwhile.
        precision: "float32", or "bfloat16" or "float16" for autocast; scores are float32 in any case, and gradients are computed
            in float32. ``tune`` finds out what is fastest.
        channels_last: give the module its inputs in the channels-last memory layout.
        compiled: forward by ``torch.compile``, except where features or gradients are wanted or anybody looks inside the module: where
            it has other hooks than when it was given.

    Raises:
        UserError: settings that contradict each other or the module's output; raised at the first forward where the
            module's output is needed to know.
    """

    def __init__(
        self,
        module: nn.Module | Callable[[Tensor], Any],
        *,
        size: int | tuple[int, int],
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        class_names: Sequence[str] | None = None,
        resize: Resize = "squash",
        resized: tuple[int, int] | None = None,
        interpolation: str = "bilinear",
        scores: Literal["auto", "logits", "probabilities"] = "auto",
        head: str | None = None,
        name: str | None = None,
        batch_size: int | None = None,
        precision: str = "float32",
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        if not callable(module):
            raise UserError(f"the model is {describe(module)}: expected an nn.Module, or a callable from images [n, 3, h, w] to scores")
        if scores not in ("auto", "logits", "probabilities"):
            raise UserError(f"scores={scores!r}: expected 'auto', 'logits' or 'probabilities'")
        sides = checked_sides(size)
        self.module = module
        self.preprocessing = Preprocessing(sides, checked_triple(mean), checked_triple(std), resize, resized, interpolation)
        self.name = name or type(module).__name__
        self.batch_size = batch_size
        self.precision = precision
        self.channels_last, self.compiled = channels_last, compiled
        self._scores = scores
        self._head = head
        self._class_names = tuple(str(n) for n in class_names) if class_names is not None else None
        self._own_hooks = hooks_of(module) if isinstance(module, nn.Module) else frozenset()
        self._compiled_module: tuple[nn.Module, Callable[[Tensor], Any]] | None = None

    def __repr__(self) -> str:
        height, width = self.preprocessing.size
        return f"Classifier({self.name}, input {height}x{width}, device {self.device})"

    @property
    def batch_size(self) -> int:
        """Most images forwarded at once."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int | None) -> None:
        if value is None:
            height, width = self.preprocessing.size
            value = automatic_batch_size(height * width, self.device)
        if value < 1:
            raise UserError(f"batch size {value}: expected at least 1")
        self._batch_size = value

    @property
    def precision(self) -> str:
        """In which the module computes where no gradients are wanted."""
        return self._precision

    @precision.setter
    def precision(self, value: str) -> None:
        if value not in PRECISIONS:
            raise UserError(f"precision {value!r}: expected one of {', '.join(PRECISIONS)}")
        if value != "float32":
            try:
                torch.autocast(self.device.type, getattr(torch, value))
            except RuntimeError as error:
                raise UserError(f"precision {value!r} cannot be had on {self.device} ({error}): expected float32") from None
        self._precision = value

    @contextmanager
    def forwarding(self, batch_size: int | None) -> Iterator[None]:
        """Forward at most so many images at once within the context; None changes nothing."""
        if batch_size is None:
            yield
            return
        own = self._batch_size
        self.batch_size = batch_size
        try:
            yield
        finally:
            self._batch_size = own

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Forward in float32 within the context: where values recorded inside meet gradients, which are computed so."""
        own = self.precision
        self.precision = "float32"
        try:
            yield
        finally:
            self.precision = own

    @property
    def chain(self) -> tuple[Classifier, ...]:
        """This classifier, the one that it has compute, and so on, down to the one that runs the module."""
        return (self,)

    @property
    def device(self) -> torch.device:
        """Where the module's parameters lie; the CPU for a callable without any."""
        if isinstance(self.module, nn.Module):
            for tensor in chain(self.module.parameters(), self.module.buffers()):
                return tensor.device
        return torch.device("cpu")

    @property
    def num_classes(self) -> int:
        """C, the number of scores that the module returns (or the number of class names, where they were given)."""
        return len(self._class_names) if self._class_names is not None else self._probe[0]

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""
        return self._class_names or tuple(f"class {index}" for index in range(self.num_classes))

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
    def identity(self) -> Identity:
        """What numbers depend on; memory layout and compiling change no more than the rounding of float32 and are left out."""
        precision = () if self.precision == "float32" else (self.precision,)
        return Identity(self.name, self.weights_digest, repr(self.preprocessing), self.class_names, precision)

    def target_index(self, target: int | str) -> int:
        """The class index of a name (exact, or unique regardless of case) or of an index.

        Raises:
            UserError: no such class.
        """
        if isinstance(target, bool) or not isinstance(target, int | np.integer | str):
            raise UserError(f"target is {describe(target)}: expected a class name, or an index from 0 to {self.num_classes - 1}")
        if isinstance(target, str):
            exact = [i for i, name in enumerate(self.class_names) if name == target]
            matches = exact or [i for i, name in enumerate(self.class_names) if name.lower() == target.lower()]
            if len(matches) == 1:
                return matches[0]
            if matches:
                raise UserError(f"class name {target!r} stands for classes {matches} of {self.name}: give the index")
            if not target.isdecimal():
                raise UserError(f"{self.name} has no class {target!r}: expected one of {_some(self.class_names)}")
            target = int(target)
        if not 0 <= target < self.num_classes:
            raise UserError(f"class index {target} is out of range: {self.name} has classes 0 to {self.num_classes - 1}")
        return int(target)

    def inputs(self, image: ImageSource) -> Tensor:
        """The model's own preprocessing of one image: float32 [1, 3, h, w] on the model's device; differentiable for a tensor."""
        if isinstance(image, Tensor) and image.requires_grad:
            return self.preprocessing(image.reshape(1, *image.shape[-3:]).to(self.device))
        return self.preprocessing(load_image(image)[None].to(self.device))

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits of model inputs, at most batch_size forwarded at once.

        Gradients flow when inputs require them; otherwise none are recorded. A module that returns probabilities gives
        their logarithm.

        Args:
            inputs: float32 [n, 3, h, w], as ``inputs`` returns them.

        Returns:
            float32 [n, C].

        Raises:
            UserError: the module returned something other than n finite rows of C scores.
        """
        return self._forward(inputs, want_features=False)[0]

    def probabilities(self, inputs: Tensor) -> Tensor:
        """Softmax of the logits, float32 [n, C]."""
        return self.logits(inputs).softmax(dim=1)

    def features(self, inputs: Tensor) -> Tensor:
        """Pooled features, the input of the final layer (the mean of the two for distilled models): float32 [n, D].

        Raises:
            UserError: a black box, or a module whose final layer cannot be told (name it with ``head=``).
        """
        return self._forward(inputs, want_features=True)[1]

    def logits_and_features(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Both, [n, C] and [n, D], from one forward pass."""
        return self._forward(inputs, want_features=True)

    def with_prototypes(
        self, matrix: Tensor, scale: float = 1.0, normalize: bool = False, class_names: Sequence[str] | None = None
    ) -> Classifier:
        """A CLIP-like classifier on the same features: logits = scale * features @ matrix.T.

        Args:
            matrix: [C, D], one embedding per class.
            scale: factor of the logits (100 for CLIP).
            normalize: divide features and embeddings by their L2 norms first (CLIP's cosine).
            class_names: C names; this classifier's own when it has as many classes.

        Raises:
            UserError: not a matrix, or another number of names than rows.
        """
        matrix = torch.as_tensor(matrix, dtype=torch.float32, device=self.device)
        if matrix.ndim != 2:
            raise UserError(f"prototypes are {describe(matrix)}: expected a matrix [classes, features]")
        if class_names is None and self.num_classes == len(matrix):
            class_names = self.class_names
        if class_names is not None and len(class_names) != len(matrix):
            raise UserError(f"{len(matrix)} prototypes, but {len(class_names)} class names were given: give one for each")
        return PrototypeClassifier(self, matrix.detach(), float(scale), normalize, class_names)

    @cached_property
    def _probe(self) -> tuple[int, bool]:
        """(number of classes, whether the module returns probabilities), read off one forward pass of a gray image."""
        with torch.no_grad():
            blank = torch.full((2, *self.preprocessing.shape), 0.5, device=self.device)
            blank[1] = torch.linspace(0, 1, blank.shape[-1], device=self.device)
            offset, scale = blank.new_tensor(self.preprocessing.mean), blank.new_tensor(self.preprocessing.std)
            rows = self._call((blank - offset[:, None, None]) / scale[:, None, None], plainly=True)
        if self._scores != "auto":
            return rows.shape[1], self._scores == "probabilities"
        sums_to_one = bool(((rows.sum(dim=1) - 1).abs() < 1e-4).all())
        return rows.shape[1], rows.shape[1] > 1 and sums_to_one and bool((rows >= 0).all())

    def _forward(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        self._check_inputs(inputs)
        count, returns_probabilities = self._probe
        if self._class_names is not None and len(self._class_names) != count:
            raise UserError(f"{self.name} returns {count} scores, but {len(self._class_names)} class names were given: give one for each")
        with_gradients = torch.is_grad_enabled() and inputs.requires_grad
        return self._fitting(lambda: self._forward_chunks(inputs, want_features, returns_probabilities), len(inputs), with_gradients)

    def _fitting(self, forward: Callable[[], T], rows: int, with_gradients: bool = False) -> T:
        """Forward rows in batches, halved until they fit into memory.

        Not under gradients, which keep every batch, nor under hooks of others, who may count on one call for one batch.
        """
        own = self._batch_size
        while True:
            try:
                return forward()
            except RuntimeError as error:
                tried = min(self._batch_size, rows)
                if tried <= 1 or with_gradients or not is_out_of_memory(error) or self._is_watched:
                    self._batch_size = own
                    raise
            # outside the except block, where the traceback no longer holds the tensors of the failed batch
            self._batch_size = tried // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @property
    def _is_watched(self) -> bool:
        """Whether the module has other hooks than its own, such as those of weight_norm."""
        return isinstance(self.module, nn.Module) and not hooks_of(self.module) <= self._own_hooks

    def _forward_chunks(self, inputs: Tensor, want_features: bool, returns_probabilities: bool) -> tuple[Tensor, Tensor]:
        rows, features = [], []
        with torch.set_grad_enabled(torch.is_grad_enabled() and inputs.requires_grad):
            for chunk in even_chunks(inputs.to(self.device), self.batch_size):
                if want_features:
                    chunk_rows, chunk_features = self._call_with_features(chunk)
                    features.append(chunk_features)
                else:
                    chunk_rows = self._call(chunk)
                rows.append(chunk_rows)
            scores = torch.cat(rows)
            self._check_finite(scores)
            if returns_probabilities:
                self._check_probabilities(scores)
                scores = scores.log()
            return scores, torch.cat(features) if features else scores.new_zeros(len(scores), 0)

    def find_out(self, want_features: bool) -> None:
        """What takes forward passes of its own to know, now: for callers under whose hooks they would be mistaken for others."""
        self._probe  # noqa: B018
        if want_features:
            self._heads  # noqa: B018

    def _check_inputs(self, inputs: Any) -> None:
        expected = self.preprocessing.shape
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or tuple(inputs.shape[1:]) != expected:
            raise UserError(f"model inputs are {describe(inputs)}: expected [n, {', '.join(map(str, expected))}], as inputs() returns them")

    def _call(self, inputs: Tensor, plainly: bool = False) -> Tensor:
        """Checked scores of one batch; plainly: without autocast and compiling, as under gradients."""
        plainly = plainly or torch.is_grad_enabled()
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        lower = None if plainly or self.precision == "float32" else getattr(torch, self.precision)
        with nullcontext() if lower is None else torch.autocast(self.device.type, lower):
            if isinstance(self.module, nn.Module):
                with evaluation_mode(self.module):
                    output = (self.module if plainly else self._fastest(self.module))(inputs)
            else:
                output = self.module(inputs)
        return self._checked_scores(output, len(inputs))

    def _fastest(self, module: nn.Module) -> Callable[[Tensor], Any]:
        """The module, compiled where that is wanted and leaves out nobody who looks inside."""
        if not self.compiled or self._is_watched or is_rebuilt():
            return module
        if self._compiled_module is None or self._compiled_module[0] is not module:
            self._compiled_module = (module, torch.compile(module, dynamic=True))
        return self._compiled_module[1]

    def _call_with_features(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        heads = self._heads
        with record_inputs(heads) as calls:
            rows = self._call(inputs)
        last: dict[nn.Module, Tensor] = dict(calls)  # a head that is called twice counts with its last call
        if not last:
            raise UserError(f"the final layer of {self.name} was never called: name the right one with head=")
        pooled = [pooled_features(value) for value in last.values()]
        return rows, torch.stack(pooled).mean(dim=0).float()

    @cached_property
    def _heads(self) -> list[nn.Module]:
        """The final layers: the one named, else the last linear (or 1x1 convolution) with C outputs; two for distilled models."""
        if not isinstance(self.module, nn.Module):
            raise UserError(f"{self.name} is a black box without features: give an nn.Module, or set the weights that need features to 0")
        modules = dict(self.module.named_modules())
        if self._head is not None:
            if self._head not in modules:
                raise UserError(f"{self.name} has no layer {self._head!r}: its last layers are {', '.join([n for n in modules if n][-4:])}")
            return [modules[self._head]]
        count = self._probe[0]
        for kind, outputs in ((nn.Linear, "out_features"), (nn.Conv2d, "out_channels")):
            candidates = [m for m in modules.values() if isinstance(m, kind) and getattr(m, outputs) == count]
            with torch.no_grad(), record_inputs(candidates) as calls:
                self._call(torch.zeros(1, *self.preprocessing.shape, device=self.device), plainly=True)
            if calls:
                distilled = [m for m in (modules.get("head"), modules.get("head_dist")) if m in candidates]
                return distilled if len(distilled) == 2 else [calls[-1][0]]
        raise UserError(f"no final layer with {count} outputs was found in {self.name}: name it with head=")

    def _checked_scores(self, output: Any, count: int) -> Tensor:
        received = output
        if isinstance(output, dict):
            output = output.get("logits", output)
        elif not isinstance(output, Tensor) and hasattr(output, "logits"):
            output = output.logits
        elif isinstance(output, tuple | list) and len(output):
            output = output[0]
        if isinstance(output, np.ndarray):
            output = torch.from_numpy(output.copy())  # torch takes neither read-only nor flipped arrays
        shaped = isinstance(output, Tensor) and output.ndim == 2 and output.shape[0] == count and output.shape[1] > 0
        if not shaped:
            raise UserError(f"{self.name} returned {_describe_output(received)} for {count} images: expected scores [{count}, classes]")
        return output.float().to(self.device)

    def _check_finite(self, scores: Tensor) -> None:
        bad = scores.isnan() | scores.eq(torch.inf) | scores.isneginf().all(dim=1, keepdim=True)
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            raise UserError(
                f"{self.name} returned {scores[row, column].item()} for class {column} of image {row} in a batch of {len(scores)}: "
                "expected finite scores; check its weights and its preprocessing"
            )

    def _check_probabilities(self, scores: Tensor) -> None:
        bad = (scores < 0).any(dim=1) | (scores.sum(dim=1) <= 0)
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            low, high = scores[row].min().item(), scores[row].max().item()
            raise UserError(
                f"{self.name} returned {low:.4g} to {high:.4g} as the probabilities of image {row}: expected none negative and not all "
                "zero; give scores='logits' if they are logits"
            )


class Wrapping(Classifier):
    """A classifier that has another one compute: in the precision of that one."""

    _base: Classifier

    @property
    def chain(self) -> tuple[Classifier, ...]:
        return (self, *self._base.chain)

    @property
    def precision(self) -> str:
        return self._base.precision

    @precision.setter
    def precision(self, value: str) -> None:
        self._base.precision = value


class PrototypeClassifier(Wrapping):
    """See ``Classifier.with_prototypes``."""

    def __init__(self, base: Classifier, matrix: Tensor, scale: float, normalize: bool, class_names: Sequence[str] | None) -> None:
        way = base.preprocessing
        self._base = base
        super().__init__(
            base.module,
            precision=base.precision,
            size=way.size,
            mean=way.mean,
            std=way.std,
            resize=way.resize,
            resized=way.resized,
            interpolation=way.interpolation,
            class_names=class_names,
            name=f"{base.name} with prototypes",
            batch_size=base.batch_size,
            scores="logits",
        )
        self._matrix, self._scale, self._normalize = matrix, scale, normalize

    @property
    def num_classes(self) -> int:
        return len(self._matrix)

    @property
    def weights_digest(self) -> str | None:
        settings = f"{self._base.weights_digest} {self._scale} {self._normalize}"
        return hashlib.sha256(settings.encode() + self._matrix.cpu().numpy().tobytes()).hexdigest()

    def find_out(self, want_features: bool) -> None:
        self._base.find_out(True)

    def _forward(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        self._check_inputs(inputs)
        features = torch.cat([self._base.features(chunk) for chunk in even_chunks(inputs, self.batch_size)])
        matrix = self._matrix.to(features.device)
        if features.shape[1] != matrix.shape[1]:
            raise UserError(
                f"prototypes have {matrix.shape[1]} features, {self._base.name} has {features.shape[1]}: "
                f"give a matrix [classes, {features.shape[1]}]"
            )
        if self._normalize:
            features, matrix = F.normalize(features, dim=1), F.normalize(matrix, dim=1)
        scores = self._scale * features @ matrix.T
        self._check_finite(scores)
        return scores, features


def _describe_output(output: Any) -> str:
    if isinstance(output, dict):
        return f"a dict with {', '.join(map(str, list(output)[:5])) or 'no keys'}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {', '.join(describe(item) for item in output[:3]) or 'nothing'}"
    logits = inspect.getattr_static(output, "logits", None)
    return describe(output) if logits is None else f"{type(output).__name__} with logits {describe(output.logits)}"


def _some(names: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} ... ({len(names)} classes)"
