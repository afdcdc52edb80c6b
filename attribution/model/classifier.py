"""A classifier with everything that belongs to it: preprocessing, class names, and how its scores are computed.

Nothing else resizes, crops or normalises. Preprocessing is affine in the image up to the clipping of a bicubic resize (nothing is
rounded), so that ``masking`` can build the input of any subset of regions by one matrix product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from attribution.checks import check_choice, did_you_mean, is_whole
from attribution.errors import UserError, describe
from attribution.image import ImageSource, load_image
from attribution.model.class_names import matching_class, some_classes
from attribution.model.forwarding import Forward, ModuleForward, eager_module
from attribution.model.label import LabelForward
from attribution.model.outputs import SCORES, OutputChoice, Outputs
from attribution.model.preprocessing import Preprocessing, Resize, checked_channels, checked_sides
from attribution.model.prototypes import PrototypeForward

T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """Everything that the numbers of a classifier depend on.

    Attributes:
        name, preprocessing, class_names: of the classifier.
        weights: their digest; None for a black box.
        settings: the precision, the meaning of the scores and the output chosen, where they are not the usual ones; the options of the
            model, and a digest of the file with the function that makes it.
    """

    name: str
    weights: str | None
    preprocessing: str
    class_names: tuple[str, ...]
    settings: tuple[str, ...]


class _OfRunner(Generic[T]):
    """An attribute of a classifier that its runner holds."""

    def __set_name__(self, _owner: type, name: str) -> None:
        self.name = name

    def __get__(self, classifier: Any, _owner: type) -> T:
        return self if classifier is None else getattr(classifier.runner, self.name)  # type: ignore[return-value]

    def __set__(self, classifier: Any, value: T) -> None:
        setattr(classifier.runner, self.name, value)


class Classifier:
    """An image classifier: its preprocessing, its module and its class names.

    Args:
        module: an ``nn.Module``, or any callable from a float32 batch [n, 3, h, w] to scores [n, C] (tensor or array). Its
            output may also be a tuple, list, mapping or object that holds them, see ``output``. A module in another precision
            (``half()``, ``double()``) gets its inputs in that one. A module that fails on two images at once gets one at a time.
        size: side of the model input in pixels, or (h, w).
        mean, std: normalisation per channel of an image in [0, 1], in the order of the channels.
        channels: of the model input: "RGB", "BGR", "L" (one: the image in gray, as Pillow converts it) or "RGBA" (the fourth is an
            alpha of 1). By default "RGB", or "L" where mean or std is a list of one number. Images and regions stay RGB.
        class_names: C names; "class 0", "class 1", "class 2" and so on by default. A module with a single score may have two, such
            as "no" and "yes": the score is then that of the second.
        resize, resized, interpolation, rounding, padding: see ``Preprocessing``.
        scores: what the module returns. "softmax": logits of classes of which one is right ("logits" means the same). "sigmoid": logits
            of independent labels, or a single logit. "probabilities": of classes, where the rows of a first output sum to 1, else of
            labels. "label_probabilities": of independent labels, each in [0, 1]. "auto" decides by a first output (see
            ``Outputs.of``): probabilities where rows sum to 1, probabilities of labels where a sigmoid made them, "sigmoid" for a single
            logit, else "softmax". It cannot know that logits are of independent labels.
        output: which part of the module's output holds the scores: a key or attribute, an index, or a function of the output. By default
            ``logits``, else the only part with a row for each image; of several parts the one with a column for each class name.
        head: name of the final layer whose input is the pooled feature; found automatically for linear heads.
        name: what reports call it; the type of the module by default.
        batch_size: most images forwarded at once; None chooses by the size of the input. A batch that does not fit into memory is
            halved until it does, unless the caller has hooks on the module.
        precision: "float32", or "bfloat16" or "float16" for autocast; scores are float32 in any case, and gradients are computed
            in float32. ``tune`` finds the fastest.
        channels_last: give the module its inputs in the channels-last memory layout.
        compiled: forward by ``torch.compile``, except when features or gradients are needed or the caller has hooks on the module.
        forward_kwargs: further arguments of the module's forward, the same for every batch.

    Attributes:
        forward: computes the scores; see ``with_forward``.
        module, batch_size, precision, channels_last, compiled: may be changed; classifiers made from this one share them.
        device: where the module's parameters lie; the CPU for a black box.
        heads: the final layers of the module.
        recipe: how the module is built again; None where nothing says it. See ``save_classifier``.

    Raises:
        UserError: settings that contradict each other or the module's output; raised at the first forward pass if the
            module's output must be known.
    """

    forward: Forward
    module = _OfRunner[nn.Module | Callable[[Tensor], Any]]()
    batch_size = _OfRunner[int]()
    precision = _OfRunner[str]()
    channels_last = _OfRunner[bool]()
    compiled = _OfRunner[bool]()
    device = _OfRunner[torch.device]()
    heads = _OfRunner[list[nn.Module]]()

    def __init__(
        self,
        module: nn.Module | Callable[[Tensor], Any],
        *,
        size: int | tuple[int, int] | None = None,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        channels: Literal["RGB", "BGR", "L", "RGBA"] | None = None,
        class_names: Sequence[str] | None = None,
        resize: Resize = "squash",
        resized: tuple[int, int] | None = None,
        interpolation: str = "bilinear",
        rounding: Literal["torchvision", "timm", "transformers"] = "torchvision",
        padding: Literal["mean", "black"] = "mean",
        scores: Literal["auto", "softmax", "sigmoid", "probabilities", "label_probabilities", "logits"] = "auto",
        output: OutputChoice | None = None,
        head: str | None = None,
        name: str | None = None,
        batch_size: int | None = None,
        precision: str = "float32",
        channels_last: bool = False,
        compiled: bool = False,
        forward_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(module):
            raise UserError(f"the model is {describe(module)}: expected an nn.Module, or a callable from images [n, 3, h, w] to scores")
        if size is None:
            raise UserError("size is missing: give the side of the model input in pixels, size=224 or size=(h, w), with its mean and std")
        check_choice("scores", scores, SCORES)
        self.name = name or type(eager_module(module)).__name__
        sides = checked_sides(size)
        means, stds, kind = checked_channels(mean, std, channels)
        self.preprocessing = Preprocessing(sides, means, stds, resize, resized, interpolation, kind, rounding, padding)
        self._class_names = tuple(str(n) for n in class_names) if class_names is not None else None
        self.recipe: Any = None
        self.forward = ModuleForward(
            module,
            self.preprocessing,
            name=self.name,
            scores=scores,
            output=output,
            classes=None if self._class_names is None else len(self._class_names),
            head=head,
            batch_size=batch_size,
            precision=precision,
            channels_last=channels_last,
            compiled=compiled,
            forward_kwargs=forward_kwargs,
        )

    def __repr__(self) -> str:
        height, width = self.preprocessing.size
        return f"Classifier({self.name}, input {height}x{width}, device {self.device})"

    @property
    def runner(self) -> ModuleForward:
        """The part of ``forward`` that runs the module."""
        return self.forward.runner

    @property
    def outputs(self) -> Outputs:
        """What the scores mean: how they become logits and probabilities."""
        return self.forward.outputs

    def forwarding(self, batch_size: int | None) -> AbstractContextManager[None]:
        """Forward at most ``batch_size`` images at once within the context; None changes nothing."""
        return nullcontext() if batch_size is None else self.runner.temporarily(batch_size=batch_size)

    def folding(self) -> AbstractContextManager[None]:
        """Forward faster within the context where the model has batch normalisation behind convolutions: it becomes a part of them.

        Scores differ by the rounding of float32. The model stays as it is, and its weights must not change meanwhile.
        """
        return self.forward.folding()

    def in_float32(self) -> AbstractContextManager[None]:
        """Forward in float32 within the context. Gradients are in float32, and values that are combined with them must be so too."""
        return self.runner.temporarily(precision="float32")

    @property
    def num_classes(self) -> int:
        """C: the number of class names if names were given, else the number of scores."""
        return len(self._class_names) if self._class_names is not None else self.outputs.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""
        return self._class_names or tuple(f"class {index}" for index in range(self.num_classes))

    @property
    def weights_digest(self) -> str | None:
        """sha256 over the names, shapes and bytes of all weights; None for a black box."""
        return self.forward.weights_digest

    @property
    def identity(self) -> Identity:
        """What numbers depend on. Memory layout and compiling are left out: they change the rounding of float32 and no more."""
        runner, settings = self.runner, []
        if self.precision != "float32":
            settings.append(self.precision)
        if runner.scores not in ("auto", "softmax", "logits"):
            settings.append(runner.scores)
        if runner.output is not None:
            settings.append(f"output {getattr(runner.output, '__qualname__', runner.output)}")
        if self.recipe is not None:
            settings += self.recipe.further()
        return Identity(self.name, self.weights_digest, repr(self.preprocessing), self.class_names, tuple(settings))

    def target_index(self, target: int | str) -> int:
        """The class index of a name, of a part of a single name, or of an index.

        A name may differ in case. "egyptian" stands for "Egyptian cat" where no other name has it (see ``matching_class``).

        Raises:
            UserError: no such class, or a text that several names fit.
        """
        if not is_whole(target) and not isinstance(target, str):
            raise UserError(f"target is {describe(target)}: expected a class name, or an index from 0 to {self.num_classes - 1}")
        if isinstance(target, str):
            found = matching_class(target, self.class_names)
            if isinstance(found, int):
                if target.isdecimal() and int(target) < self.num_classes and int(target) != found:
                    raise UserError(
                        f"class {target!r} is both the name of class {found} and the index of {self.class_names[int(target)]!r}: give the "
                        "name of the other one, or in Python an int for an index"
                    )
                return found
            if found:
                same = len({self.class_names[each].lower() for each in found}) == 1
                wanted, candidates = "the index" if same else "more of the name, or the index", some_classes(found, self.class_names)
                raise UserError(f"class name {target!r} stands for {len(found)} classes of {self.name}: {candidates}; give {wanted}")
            if not target.isdecimal():
                meant = did_you_mean(target, self.class_names)
                raise UserError(f"{self.name} has no class {target!r}: expected one of {_some(self.class_names)}{meant}")
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
        return self._scored(inputs, want_features=False)[0]

    def probabilities(self, inputs: Tensor) -> Tensor:
        """Probabilities of model inputs, float32 [n, C]: the softmax of the logits, or the sigmoid of each for independent labels."""
        return self.outputs.probabilities(self.logits(inputs))

    def predicted(self, probabilities: Tensor) -> tuple[int, ...]:
        """The classes predicted for an image with probabilities [C]: the most probable one, or all independent labels above 0.5."""
        return self.outputs.predicted(probabilities)

    def features(self, inputs: Tensor) -> Tensor:
        """Pooled features, the input of the final layer (the mean of the two for distilled models): float32 [n, D].

        Raises:
            UserError: a black box, or a module whose final layer cannot be identified (name it with ``head=``).
        """
        return self._scored(inputs, want_features=True)[1]

    def logits_and_features(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, C] and features [n, D] from one forward pass."""
        return self._scored(inputs, want_features=True)

    def with_prototypes(
        self, matrix: Tensor, scale: float = 1.0, normalize: bool = False, class_names: Sequence[str] | None = None
    ) -> Classifier:
        """A CLIP-like classifier on the same features: logits = scale * features @ matrix.T.

        The features are what the final layer takes. Where the matrix has as many columns as the module returns values, as for an image
        tower of CLIP with its projection, they are what it returns.

        Args:
            matrix: [C, D], one embedding per class.
            scale: factor of the logits (100 for CLIP).
            normalize: divide features and embeddings by their L2 norms first (CLIP's cosine).
            class_names: C names; this classifier's own if it has as many classes.

        Raises:
            UserError: not a matrix, or another number of names than rows.
        """
        matrix = torch.as_tensor(matrix, dtype=torch.float32, device=self.device)
        if matrix.ndim != 2:
            raise UserError(f"prototypes are {describe(matrix)}: expected a matrix [classes, features]")
        if class_names is None:
            own = self.num_classes == len(matrix)
            class_names = self.class_names if own else [f"class {index}" for index in range(len(matrix))]
        if len(class_names) != len(matrix):
            raise UserError(f"{len(matrix)} prototypes, but {len(class_names)} class names were given: give one for each")
        forward = PrototypeForward(self.forward, matrix.detach(), float(scale), normalize)
        return self.with_forward(forward, name=f"{self.name} with prototypes", class_names=class_names)

    def of_label(self, label: int | str) -> Classifier:
        """One of several independent labels as a classifier of two classes, "no LABEL" and LABEL, with logits -z and z.

        It says whether the image has the label, so that a label that is missing or false can be debugged like a wrong class.

        Raises:
            UserError: no such label, or classes of which one is right.
        """
        if not self.outputs.independent:
            raise UserError(f"{self.name} has classes of which one is right: of_label is for independent labels, scores='sigmoid'")
        index = self.target_index(label)
        name = self.class_names[index]
        return self.with_forward(LabelForward(self.forward, index), name=f"{self.name}, {name}", class_names=[f"no {name}", name])

    def with_forward(
        self,
        forward: Forward,
        *,
        preprocessing: Preprocessing | None = None,
        name: str | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Classifier:
        """Make a classifier whose scores are computed by another ``Forward``. This classifier is not changed.

        Args:
            forward: computes the scores. A ``Relay`` to this classifier's ``forward`` shares its module, batch size and precision.
            preprocessing, name, class_names: those of this classifier by default.
        """
        made = copy.copy(self)
        made.forward, made.name = forward, name or self.name
        made.preprocessing = preprocessing or self.preprocessing
        made._class_names = tuple(map(str, class_names)) if class_names is not None else self._class_names
        return made

    def find_out(self, want_features: bool) -> None:
        """Run now the forward passes that are needed only once. Callers whose hooks must not record them call this first."""
        self.forward.find_out(want_features)

    def _scored(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        """Checked logits [n, C] and features [n, D]."""
        expected = self.preprocessing.shape
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or tuple(inputs.shape[1:]) != expected:
            raise UserError(f"model inputs are {describe(inputs)}: expected [n, {', '.join(map(str, expected))}], as inputs() returns them")
        count = self.outputs.classes
        if self._class_names is not None and len(self._class_names) != count:
            raise UserError(f"{self.name} returns {count} scores, but {len(self._class_names)} class names were given: give one for each")
        scores, features = self.forward(inputs, want_features)
        return self.outputs.logits(scores, self.name), features


def _some(names: Sequence[str], all_of: int = 40, few: int = 12) -> str:
    """The names, joined by commas; of more than ``all_of`` the first few and the number of all."""
    return ", ".join(names) if len(names) <= all_of else f"{', '.join(names[:few])} ... ({len(names)} classes)"
