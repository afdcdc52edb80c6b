"""A part of a classifier between two of its layers, as a function of maps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from attribution.errors import NotApplicable
from attribution.hooks import evaluation_mode, removed_after, stand_ins, stopped_after
from attribution.model.classifier import Classifier
from attribution.network.maps import FeatureLayer, map_layers
from attribution.task import Task

_ANY_BATCH = 2**31


@dataclass(frozen=True, eq=False)
class Activation:
    """What a layer returned, as a map.

    Attributes:
        maps: float32 [n, C, h, w]; at the end of the network its logits [n, classes].
        output: the output itself, of one image or of n. If it is a sequence of tokens, its prefix tokens are used, which the maps do
            not have.
    """

    maps: Tensor
    output: Tensor | None = None


class Segment:
    """The part of a classifier between two of its layers, as a function of maps.

    Args:
        classifier: at the size of the images that the segment is used for.
        start: the layer whose output is given; None for the model input.
        stop: the layer whose output is wanted; None for the logits.
        probe: the probe of this classifier; None makes one.

    Raises:
        NotApplicable: the start is called more than once in a pass, or after the stop.
    """

    def __init__(
        self, classifier: Classifier, start: FeatureLayer | None, stop: FeatureLayer | None = None, probe: Probe | None = None
    ) -> None:
        if stop is None:
            classifier.find_out(False)  # now: later, stand-ins replace modules
        self.classifier = _for_parts(classifier)
        self.start, self.stop = start, stop
        self._before: dict[str, list[_Value]] = {}
        if start is not None:
            probe = probe or Probe(self.classifier)
            self._before = probe.values_before(start.name)
            if stop is not None and probe.end_of(stop.name) < probe.end_of(start.name):
                raise NotApplicable(f"layer {stop.name!r} of {classifier.name} does not come after {start.name!r}")

    def __call__(self, given: Activation) -> Activation:
        """Compute the output of the stop from that of the start. Gradients flow if the maps require them."""
        if self.start is not None and self.stop is not None and self.start.name == self.stop.name:
            return given
        images, standing = self._standing(given)
        with standing:
            if self.stop is None:
                return Activation(self.classifier.logits(images))
            module = module_of(self.classifier)
            grad = torch.set_grad_enabled(torch.is_grad_enabled() and given.maps.requires_grad)
            with grad, stopped_after(module.get_submodule(self.stop.name)) as found:
                self.classifier.runner.run(images)
        return Activation(self.stop.to_map(found[0]), found[0])

    def _standing(self, given: Activation) -> tuple[Tensor, AbstractContextManager[Any]]:
        """Model inputs, and a context in which the modules before the start return what they returned for the probe."""
        if self.start is None:
            return given.maps.contiguous(), nullcontext()
        maps = given.maps
        images = maps.new_zeros(1).requires_grad_(maps.requires_grad and torch.is_grad_enabled())
        images = images.expand(len(maps), *self.classifier.preprocessing.shape)
        output = self.start.from_map(maps, maps if given.output is None else given.output)
        output = output.clone(memory_format=torch.contiguous_format)  # the modules that follow may work in place or take views
        values = {name: [value.of(len(maps)) for value in each] for name, each in self._before.items()}
        return images, stand_ins(module_of(self.classifier), {**values, self.start.name: [output]})


class Probe:
    """The outputs of every module for one smooth random image and for two. They show the structure of the network.

    Attributes:
        classifier: the model.
        images: float32 [2, C, h, w], model inputs.
        one, two: every call of a pass with the first image, and with both.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier, self.images = _for_parts(classifier), _two_images(classifier)
        self.one, self.two = (trace(module_of(classifier), images, classifier.runner.run) for images in (self.images[:1], self.images))

    @cached_property
    def task(self) -> Task:
        """A task on the first image."""
        blank = torch.zeros(self.classifier.preprocessing.shape)
        return Task(self.classifier, blank, blank, 0, self.images[:1], torch.zeros_like(self.images[:1]))

    @cached_property
    def layers(self) -> dict[str, FeatureLayer]:
        """The layers that return a map, by name."""
        return {layer.name: layer for layer in map_layers(self.task)}

    @cached_property
    def logits(self) -> Tensor:
        """Logits of both images, [2, classes].

        Raises:
            NotApplicable: both images have the same logits, so that the effect of a layer cannot be measured.
        """
        with torch.no_grad():
            logits = self.classifier.logits(self.images)
        if torch.equal(logits[0], logits[1]):
            raise NotApplicable(f"{self.classifier.name} gives any image the same logits (is its head still zero?): load its weights")
        return logits

    def activation(self, layer: FeatureLayer) -> Activation:
        """What a layer returns for both images."""
        self.end_of(layer.name)
        (output,) = [call.output for call in self.two if call.name == layer.name]
        return Activation(layer.to_map(output), output)

    def values_before(self, start: str) -> dict[str, list[_Value]]:
        """Outputs of the modules that end before the start ends, by name. Modules inside such a module are left out."""
        end = self.end_of(start)
        found: dict[str, list[_Value]] = {}
        for call, double in zip(self.one, self.two, strict=True):
            inside = call.parent_stop is not None and call.parent_stop <= end
            if call.stop < end and not inside:
                found.setdefault(call.name, []).append(_Value(call.output, double.output, call.edited))
        return found

    def end_of(self, layer: str) -> int:
        """The number of calls that end before the layer's only call does.

        Raises:
            NotApplicable: the layer is not called exactly once, or the network runs other modules for two images than for one.
        """
        name = self.classifier.name
        ends = [call.stop for call in self.one if call.name == layer]
        if len(ends) != 1:
            raise NotApplicable(f"layer {layer!r} of {name} is called {len(ends)} times in a pass: choose one that is called once")
        if [call.name for call in self.one] != [call.name for call in self.two]:
            raise NotApplicable(f"{name} runs other modules for two images than for one: only the layer 'input' can be explained")
        return ends[0]


def module_of(classifier: Classifier) -> nn.Module:
    """The module of a classifier.

    Raises:
        NotApplicable: the classifier is a black box.
    """
    if not isinstance(classifier.module, nn.Module):
        raise NotApplicable(f"{classifier.name} is a black box: only difull at the layer 'input' is defined for it")
    return classifier.module


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module in a forward pass.

    Attributes:
        name: name of the module.
        stop: number of calls that ended before it.
        parent_stop: the stop of the call that it is part of; None if that call failed, and for the whole network.
        output: what it returned.
        edited: whether the output was changed in place later in the pass, by something other than a module.
    """

    name: str
    stop: int
    parent_stop: int | None
    output: Any
    edited: bool

    @property
    def positions(self) -> dict[str, int]:
        """Number of positions of the output if it is read as a map, by kind of map; prefix tokens are counted."""
        shape = tuple(self.output.shape) if isinstance(self.output, Tensor) else ()
        if len(shape) == 4:
            return {"nchw": shape[2] * shape[3], "nhwc": shape[1] * shape[2]}
        return {"tokens": shape[1]} if len(shape) == 3 else {}


def trace(module: nn.Module, images: Tensor, run: Callable[[Tensor], Any] | None = None) -> list[Call]:
    """The calls of a forward pass, in the order in which they began. If the pass fails, those that ended before.

    Args:
        module: the network.
        images: what it is given.
        run: calls it, such as ``ModuleForward.run``; None calls it directly.
    """
    names = {each: name for name, each in module.named_modules()}
    begun: list[tuple[str, int | None]] = []  # the module's name, and the call it is part of
    ended: dict[int, tuple[int, Any]] = {}
    versions: dict[int, int] = {}  # of each output when a module last returned it; a module in place returns its input
    stack: list[int] = []

    def enter(called: nn.Module, _args: Any) -> None:
        begun.append((names[called], stack[-1] if stack else None))
        stack.append(len(begun) - 1)

    def leave(_called: nn.Module, _args: Any, output: Any) -> None:
        ended[stack.pop()] = (len(ended), output)
        if isinstance(output, Tensor):
            versions[id(output)] = output._version

    handles = [each.register_forward_pre_hook(enter) for each in names] + [each.register_forward_hook(leave) for each in names]
    with evaluation_mode(module), removed_after(handles), torch.no_grad():
        try:
            (run or module)(images)
        except (RuntimeError, ValueError, AssertionError):  # a head of fixed size, after the maps
            if not ended:
                raise
    calls = []
    for place, (stop, output) in sorted(ended.items()):
        name, parent = begun[place]
        edited = isinstance(output, Tensor) and output._version > versions[id(output)]
        calls.append(Call(name, stop, ended[parent][0] if parent in ended else None, output, edited))
    return calls


@dataclass(frozen=True, eq=False)
class _Value:
    """What a module returned for one image and for two, and whether that was edited afterwards."""

    one: Any
    two: Any
    edited: bool

    def of(self, count: int) -> Any:
        """The output for ``count`` copies of the first image."""
        found = _repeated(self.one, self.two, count)
        return found.clone() if self.edited else found


def _repeated(one: Any, two: Any, count: int) -> Any:
    """Outputs for ``count`` images: the dimensions that double from one image to two grow with the number of images."""
    if isinstance(one, tuple | list):
        items = [_repeated(a, b, count) for a, b in zip(one, two, strict=True)]
        return type(one)(*items) if hasattr(one, "_fields") else type(one)(items)
    if isinstance(one, dict):
        made = copy.copy(one)  # of its own type, which may give its items as attributes too
        for key, value in one.items():
            made[key] = _repeated(value, two[key], count)
        return made
    if not isinstance(one, Tensor) or one.shape == two.shape:
        return one
    doubled = [b == 2 * a for a, b in zip(one.shape, two.shape, strict=True)]
    if all(size == 1 for size, grows in zip(one.shape, doubled, strict=True) if grows):
        return one.expand([count if grows else -1 for grows in doubled])
    return one.repeat([count if grows else 1 for grows in doubled])


def _two_images(classifier: Classifier) -> Tensor:
    """Two smooth random model inputs, float32 [2, C, h, w]."""
    channels, height, width = classifier.preprocessing.shape
    coarse = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False).to(classifier.device)


def _for_parts(classifier: Classifier) -> Classifier:
    """The classifier in float32 and with batches of any size, so that all rows of maps are forwarded at once."""
    runner = classifier.runner.changed(batch_size=_ANY_BATCH, precision="float32")
    return classifier.with_forward(classifier.forward.on(runner))
