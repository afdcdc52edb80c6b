"""A network cut at its layers: what comes before a layer, what comes after it, and where to cut (ML-Att).

Rao, Boehle and Schiele (CVPR 2022, section 3.2) compare attribution methods fairly by running each of them on the same layer, the
input, a middle or the final one, whose activations are then the "input" of the rest of the network. No network is rewritten for
that: while the rest runs, what came before answers with what it returned for another image, and nothing of it is computed again.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from attribution.baselines.layers import FeatureLayer, find_feature_layer, map_layers
from attribution.baselines.task import Task
from attribution.classifier import Classifier, Wrapping
from attribution.errors import NotApplicable, UserError
from attribution.hooks import evaluation_mode, removed_after, stand_ins, stopped_after

LAYERS = ("input", "middle", "final")
_ACTIVATIONS = tuple(getattr(nn, name) for name in ("ReLU", "ReLU6", "GELU", "SiLU", "Mish", "ELU", "CELU", "SELU", "LeakyReLU", "PReLU"))
_MOST_OF = 2 / 3  # a module that does more than this share of the work is opened to find the middle
_ANY_BATCH = 2**31
_CANNOT_RUN = (UserError, RuntimeError, TypeError, AttributeError)  # raised by a network that is run in part


@dataclass(frozen=True, eq=False)
class Activation:
    """What a layer returned, as a map.

    Attributes:
        maps: float32 [n, C, h, w]; at the end of the network its logits [n, classes].
        output: the output itself [1 or n, ...]; where it is a sequence of tokens, its prefix tokens go with the maps.
    """

    maps: Tensor
    output: Tensor | None = None


class Segment:
    """The part of a classifier between two of its layers, as a function of maps.

    Args:
        classifier: takes the image size that this part works at.
        start: the layer whose output is given; None for the model input.
        stop: the layer whose output is wanted; None for the logits.
        probe: of this classifier, where it is known already.

    Raises:
        NotApplicable: the start is called more than once in a pass, or after the stop.
    """

    def __init__(
        self, classifier: Classifier, start: FeatureLayer | None, stop: FeatureLayer | None = None, probe: Probe | None = None
    ) -> None:
        if stop is None:
            _settle(classifier)
        self.classifier = _for_parts(classifier)
        self.start, self.stop = start, stop
        self._before: dict[str, list[_Value]] = {}
        if start is not None:
            probe = probe or Probe(self.classifier)
            self._before = probe.values_before(start.name)
            if stop is not None and probe.end_of(stop.name) < probe.end_of(start.name):
                raise NotApplicable(f"layer {stop.name!r} of {classifier.name} does not come after {start.name!r}")

    def __call__(self, given: Activation) -> Activation:
        """From the output of the start to that of the stop; gradients flow where the maps require them."""
        if self.start is not None and self.stop is not None and self.start.name == self.stop.name:
            return given
        images, standing = self._standing(given)
        with standing:
            if self.stop is None:
                return Activation(self.classifier.logits(images))
            module = module_of(self.classifier)
            grad = torch.set_grad_enabled(torch.is_grad_enabled() and given.maps.requires_grad)
            with evaluation_mode(module), grad, stopped_after(module.get_submodule(self.stop.name)) as found:
                module(images)
        return Activation(self.stop.to_map(found[0]), found[0])

    def _standing(self, given: Activation) -> tuple[Tensor, AbstractContextManager[Any]]:
        """Model inputs, and what answers for the modules before the start."""
        if self.start is None:
            return given.maps.contiguous(), nullcontext()
        maps = given.maps
        images = maps.new_zeros(1).requires_grad_(maps.requires_grad and torch.is_grad_enabled())
        images = images.expand(len(maps), *self.classifier.preprocessing.shape)
        output = self.start.from_map(maps, maps if given.output is None else given.output)
        output = output.clone(memory_format=torch.contiguous_format)  # what follows may work in place, or view it
        values = {name: [value.of(len(maps)) for value in each] for name, each in self._before.items()}
        return images, stand_ins(module_of(self.classifier), {**values, self.start.name: [output]})


class Probe:
    """What every module returns for one smooth random image, and for two, from which the structure of a network is read.

    Attributes:
        classifier: the model.
        images: float32 [2, C, h, w], model inputs.
        one, two: every call of a pass with the first image, and with both.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier, self.images = _for_parts(classifier), _two_images(classifier)
        self.one, self.two = (trace(module_of(classifier), images) for images in (self.images[:1], self.images))

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
        """Of both images, [2, classes].

        Raises:
            NotApplicable: they are the same, so that nothing can be told from them.
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
        """What the outermost modules return that end before the start does: module name -> its first calls."""
        end = self.end_of(start)
        found: dict[str, list[_Value]] = {}
        for call, double in zip(self.one, self.two, strict=True):
            inside = call.parent_stop is not None and call.parent_stop <= end
            if call.stop < end and not inside:
                found.setdefault(call.name, []).append(_Value(call.output, double.output, call.edited))
        return found

    def end_of(self, layer: str) -> int:
        """When the layer's only call ends, in events of the pass.

        Raises:
            NotApplicable: it is called more than once, or the network runs other modules for two images than for one.
        """
        name = self.classifier.name
        ends = [call.stop for call in self.one if call.name == layer]
        if len(ends) != 1:
            raise NotApplicable(f"layer {layer!r} of {name} is called {len(ends)} times in a pass: choose one that is called once")
        if [call.name for call in self.one] != [call.name for call in self.two]:
            raise NotApplicable(f"{name} runs other modules for two images than for one: only the layer 'input' can be explained")
        return ends[0]


def module_of(classifier: Classifier) -> nn.Module:
    """The module.

    Raises:
        NotApplicable: the classifier is a black box.
    """
    if not isinstance(classifier.module, nn.Module):
        raise NotApplicable(f"{classifier.name} is a black box: only difull at the layer 'input' is defined for it")
    return classifier.module


def find_layer(classifier: Classifier, layer: str) -> FeatureLayer | None:
    """The layer that ``layer`` names: "input" (None), "middle", "final" or a module; checked to let nothing past.

    "final" is the last of the network's stages whose positions the logits depend on, "middle" the one in their middle (for VGG11 and
    ResNet18 the layers of Rao et al.: features.12 and features.19, layer2 and layer4). Stages are the activations and blocks called one
    after another, coarse ones opened where one does nearly all the work. In a transformer that reads its class token the patches of
    the last block count no more, so the final layer is the block before.

    Raises:
        NotApplicable: a black box, no stages, or a layer past which information flows.
        UserError: no such module, or one that returns no map.
    """
    if layer == "input":
        return None
    if layer not in LAYERS:
        probe = Probe(classifier)
        found = find_feature_layer(probe.task, layer)
        if not _passes_everything(probe, found):
            raise NotApplicable(
                f"layer {found.name!r} of {classifier.name} is bypassed: with its output replaced, the logits still depend on the image; "
                f"choose the output of a whole block, such as {', '.join(each.name for each in stages(classifier)[-3:])}"
            )
        return found
    found_stages = stages(classifier)
    if not found_stages:
        raise NotApplicable(f"{classifier.name} has no stages that follow one another: name a module as the layer")
    return found_stages[-1] if layer == "final" else found_stages[middle_of(len(found_stages)) - 1]


def middle_of(count: int) -> int:
    """Which of so many stages is the middle, counted from 1: the fifth of VGG11's eight, the third of ResNet18's five."""
    return max(1, min(count // 2 + 1, count - 1))


def stages(classifier: Classifier) -> list[FeatureLayer]:
    """The layers that "middle" and "final" are chosen from, first to last."""
    probe = Probe(classifier)
    found = [layer for layer in _stages(probe) if _passes_everything(probe, layer)]
    while found and not _positions_count(probe, found[-1]):
        found.pop()
    return found


def last_growing_map(classifier: Classifier, larger: Classifier) -> FeatureLayer:
    """The last layer whose map grows with the image: what a head pools, or slides over.

    Args:
        classifier: at the size of a cell.
        larger: the same model at the size of the grid; it may fail after that layer.

    Raises:
        NotApplicable: there is none, the logits depend on more than that map, or a later one grows by another factor.
    """
    name, probe = classifier.name, Probe(classifier)
    positions = grid_positions(larger)
    factor = math.prod(larger.preprocessing.size) // math.prod(classifier.preprocessing.size)
    growing: FeatureLayer | None = None
    misfit = ""
    for layer in probe.layers.values():
        cell, grid = math.prod(layer.grid), positions.get(layer.name, {}).get(layer.kind, 0) - layer.prefix
        if isinstance(layer.module, nn.Identity | nn.Dropout):
            continue
        if grid == factor * cell:
            growing, misfit = layer, ""
        elif grid > 0 and grid != cell:
            misfit = f"{layer.name!r} has {cell} positions for a cell and {grid} for a grid of {factor}"
    if misfit:
        raise NotApplicable(f"{misfit} in {name}: a grid is defined for cells whose sides the strides divide; use difull")
    if growing is None:
        raise NotApplicable(f"no layer of {name} has a map that grows with the image: use difull")
    if not _passes_everything(probe, growing):
        raise NotApplicable(f"the logits of {name} depend on more than its last map ({growing.name!r}), so that it has no head: use difull")
    return growing


def grid_positions(larger: Classifier) -> dict[str, dict[str, int]]:
    """Positions of what each module returns for a grid, see ``Call``; the name "" is among them where the pass came to its end."""
    images = torch.zeros(1, *larger.preprocessing.shape, device=larger.device)
    return {call.name: call.positions for call in trace(module_of(larger), images)}


def at_grid(layer: FeatureLayer, larger: Classifier, n: int) -> FeatureLayer:
    """The same layer of the model at the size of n x n cells."""
    return replace(layer, module=module_of(larger).get_submodule(layer.name), grid=(n * layer.grid[0], n * layer.grid[1]))


def _positions_count(probe: Probe, layer: FeatureLayer) -> bool:
    """Whether the logits depend on the layer's map, beside its prefix tokens."""
    given, rest = probe.activation(layer), Segment(probe.classifier, layer, probe=probe)
    return not torch.equal(rest(given).maps, rest(Activation(torch.zeros_like(given.maps), given.output)).maps)


def only_pools(classifier: Classifier, larger: Classifier, layer: FeatureLayer, n: int) -> bool:
    """Whether what follows a layer only averages over its positions, so that it means the same on a grid's larger map.

    Tried: a map laid n x n times side by side must give the logits of the map, and a larger map those of its shuffled positions.
    """
    probe = Probe(classifier)
    given = probe.activation(layer)
    wide = at_grid(layer, larger, n)
    generator = torch.Generator().manual_seed(0)
    pool = given.maps.transpose(0, 1).flatten(1)  # [C, positions of both images]
    drawn = pool[:, torch.randint(pool.shape[1], (math.prod(wide.grid),), generator=generator)]
    pair = torch.stack([drawn, drawn[:, torch.randperm(drawn.shape[1], generator=generator)]]).unflatten(2, wide.grid)
    try:
        rest = Segment(larger, wide)
        tiled, mixed = (rest(Activation(maps, given.output)).maps for maps in (given.maps.repeat(1, 1, n, n), pair))
    except _CANNOT_RUN:
        return False
    return _same_logits(tiled, probe.logits, probe) and _same_logits(mixed[0], mixed[1], probe)


def only_averages(classifier: Classifier, layer: FeatureLayer) -> bool:
    """Whether what follows a layer reads nothing of its map but the mean over the positions, at the size of a cell."""
    probe = Probe(classifier)
    given, rest = probe.activation(layer), Segment(classifier, layer, probe=probe)
    flat = given.maps.mean(dim=(2, 3), keepdim=True).expand_as(given.maps)
    return _same_logits(rest(Activation(flat, given.output)).maps, probe.logits, probe)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module in a forward pass.

    Attributes:
        name: of the module.
        stop: when it ended, in events of the pass.
        parent_stop: when the call ended that it is part of; None where that never did, and for the whole module.
        output: what it returned.
        edited: whether something other than a module changed that in place later in the pass.
    """

    name: str
    stop: int
    parent_stop: int | None
    output: Any
    edited: bool

    @property
    def positions(self) -> dict[str, int]:
        """Positions of the output read as a map of each kind; tokens count their prefix."""
        shape = tuple(self.output.shape) if isinstance(self.output, Tensor) else ()
        if len(shape) == 4:
            return {"nchw": shape[2] * shape[3], "nhwc": shape[1] * shape[2]}
        return {"tokens": shape[1]} if len(shape) == 3 else {}


def trace(module: nn.Module, images: Tensor) -> list[Call]:
    """Every call of a forward pass that came to its end, in the order of their beginnings; a pass that fails leaves those before."""
    names = {each: name for name, each in module.named_modules()}
    begun: list[tuple[str, int | None]] = []  # the module's name, and the call it is part of
    ended: dict[int, tuple[int, Any]] = {}
    versions: dict[int, int] = {}  # of each output when the last module returned it: one that works in place returns what it got
    stack: list[int] = []

    def enter(called: nn.Module, _args: Any) -> None:
        begun.append((names[called], stack[-1] if stack else None))
        stack.append(len(begun) - 1)

    def leave(_called: nn.Module, _args: Any, output: Any) -> None:
        ended[stack.pop()] = (len(ended), output)
        if isinstance(output, Tensor):
            versions[id(output)] = output._version

    handles = [each.register_forward_pre_hook(enter) for each in names] + [each.register_forward_hook(leave) for each in names]
    with removed_after(handles), torch.no_grad(), evaluation_mode(module):
        try:
            module(images)
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
        """What stands for its output for so many images."""
        found = _repeated(self.one, self.two, count)
        return found.clone() if self.edited else found


def _repeated(one: Any, two: Any, count: int) -> Any:
    """Outputs for ``count`` images: what doubled from one image to two is the dimension of the images."""
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


def _stages(probe: Probe) -> list[FeatureLayer]:
    module, layers = module_of(probe.classifier), probe.layers
    work = Counter(call.name for call in probe.one)

    def share(name: str) -> int:
        return sum(count for each, count in work.items() if each == name or each.startswith(f"{name}."))

    names = _opened(module, "", layers)
    while names:
        largest = max(names, key=share)
        if share(largest) <= _MOST_OF * sum(map(share, names)):
            break
        inner = [name for name in _opened(module, largest, layers) if _passes_everything(probe, layers[name])]
        if not inner:
            break
        at = names.index(largest)
        names[at : at + 1] = inner
    return [layers[name] for name in names]


def _opened(module: nn.Module, name: str, layers: dict[str, FeatureLayer]) -> list[str]:
    """The activations and blocks of a container in the order of their calls; containers that return no map are opened too."""
    found: list[str] = []
    for key, child in module.get_submodule(name).named_children():
        inner, leaf = f"{name}.{key}" if name else key, not list(child.children())
        if inner in layers and (not leaf or isinstance(child, _ACTIVATIONS)):
            found.append(inner)
        elif inner not in layers and not leaf:
            found += _opened(module, inner, layers)
    order = list(layers)
    return sorted(found, key=order.index)


def _passes_everything(probe: Probe, layer: FeatureLayer) -> bool:
    """Whether the rest of the network, run on the layer's output for one image and nothing else of it, gives its logits."""
    second = probe.logits[1]
    given, rest = probe.activation(layer), Segment(probe.classifier, layer, probe=probe)
    output = None if given.output is None else given.output[1:]
    try:
        found = rest(Activation(given.maps[1:], output)).maps[0]  # what stands for the modules before is of the first image
    except _CANNOT_RUN:
        return False
    return _same_logits(found, second, probe)


def _settle(classifier: Classifier) -> None:
    """Let a classifier find out what it finds out once: it must not run while stand-ins answer."""
    for each in classifier.chain:
        each._probe  # noqa: B018
    for each in classifier.chain[1:]:
        each._heads  # noqa: B018


def _for_parts(classifier: Classifier) -> Classifier:
    """The classifier without a limit of its own, so that rows of maps and the images that stand for them stay together, in float32.

    What is recorded of parts, and compared with the whole, is computed in float32.
    """
    made = copy.copy(classifier)
    made.batch_size = _ANY_BATCH
    if isinstance(made, Wrapping):
        made._base = _for_parts(made._base)
    made.precision = "float32"
    return made


def _same_logits(found: Tensor, expected: Tensor, probe: Probe) -> bool:
    """Whether logits are the same, measured by how far those of two images lie apart."""
    first, second = probe.logits
    scale = max(float((first - second).abs().max()), 1e-4 * float(second.abs().max()))
    return bool((found - expected).abs().max() <= 1e-2 * scale)
