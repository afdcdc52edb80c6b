"""A network cut at its layers: what comes before a layer, what comes after it, and where to cut (ML-Att).

Rao, Boehle and Schiele (CVPR 2022, section 3.2) compare attribution methods fairly by running each of them on the same layer: the
input, a middle or the final one. The activations of that layer are the "input" of the rest of the network. No network is rewritten for
that: while the rest runs, the modules before the layer return what they returned for another image, and compute nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn

from attribution.errors import NotApplicable, UserError, such_as
from attribution.model.classifier import Classifier
from attribution.network.maps import FeatureLayer, find_feature_layer
from attribution.network.segments import Activation, Probe, Segment, module_of, trace

LAYERS = ("input", "middle", "final")
_ACTIVATIONS = tuple(getattr(nn, name) for name in ("ReLU", "ReLU6", "GELU", "SiLU", "Mish", "ELU", "CELU", "SELU", "LeakyReLU", "PReLU"))
_MOST_OF = 2 / 3  # a module with more than this share of all calls is opened to find the middle
_CANNOT_RUN = (UserError, RuntimeError, TypeError, AttributeError)  # raised by a network that is run in part


def find_layer(classifier: Classifier, layer: str) -> FeatureLayer | None:
    """Find the layer "input" (None), "middle" or "final", or a module by name, and check that no information bypasses it.

    Stages are the activations and blocks that are called one after another. A block with over two thirds of all calls of modules is
    replaced by the stages inside it. "final" is the last stage whose positions the logits depend on, and "middle" the stage in the
    middle: for VGG11 and ResNet18 these are the layers of Rao et al. (features.12 and features.19, layer2 and layer4). In a transformer
    that reads its class token the logits do not depend on the patches of the last block, so its final layer is the block before.

    Raises:
        NotApplicable: a black box, no stages, or a layer that information bypasses.
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
                f"choose the output of a whole block{such_as(each.name for each in stages(classifier)[-3:])}"
            )
        return found
    found_stages = stages(classifier)
    if not found_stages:
        raise NotApplicable(f"{classifier.name} has no stages that follow one another: name a module as the layer")
    return found_stages[-1] if layer == "final" else found_stages[middle_of(len(found_stages)) - 1]


def middle_of(count: int) -> int:
    """Number of the middle stage, counted from 1: the fifth of VGG11's eight, the third of ResNet18's five."""
    return max(1, min(count // 2 + 1, count - 1))


def stages(classifier: Classifier) -> list[FeatureLayer]:
    """The layers that "middle" and "final" are chosen from, first to last."""
    probe = Probe(classifier)
    found = [layer for layer in _stages(probe) if _passes_everything(probe, layer)]
    while found and not _positions_count(probe, found[-1]):
        found.pop()
    return found


def last_growing_map(classifier: Classifier, larger: Classifier) -> FeatureLayer:
    """Find the last layer whose map grows with the image. The head pools this map, or slides over it.

    Args:
        classifier: at the size of a cell.
        larger: the same model at the size of the grid; it may fail after that layer.

    Raises:
        NotApplicable: no map grows with the image, the logits depend on more than that map, or a later map grows by another factor.
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
    """Number of positions of each module's output for a grid (``Call.positions``), without the whole network if it fails."""
    images = torch.zeros(1, *larger.preprocessing.shape, device=larger.device)
    return {call.name: call.positions for call in trace(module_of(larger), images, larger.runner.run)}


def at_grid(layer: FeatureLayer, larger: Classifier, n: int) -> FeatureLayer:
    """The same layer of the model at the size of n x n cells."""
    return replace(layer, module=module_of(larger).get_submodule(layer.name), grid=(n * layer.grid[0], n * layer.grid[1]))


def _positions_count(probe: Probe, layer: FeatureLayer) -> bool:
    """Whether the logits depend on the layer's map, and not only on its prefix tokens."""
    given, rest = probe.activation(layer), Segment(probe.classifier, layer, probe=probe)
    return not torch.equal(rest(given).maps, rest(Activation(torch.zeros_like(given.maps), given.output)).maps)


def only_pools(classifier: Classifier, larger: Classifier, layer: FeatureLayer, n: int) -> bool:
    """Whether the part after a layer only averages over positions, so that it computes the same on the larger map of a grid.

    Two tests: n x n copies of a map side by side must give the logits of the map, and shuffling a larger map must not change them.
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
    """Whether the part after a layer depends only on the mean of its map over the positions, at the size of a cell."""
    probe = Probe(classifier)
    given, rest = probe.activation(layer), Segment(classifier, layer, probe=probe)
    flat = given.maps.mean(dim=(2, 3), keepdim=True).expand_as(given.maps)
    return _same_logits(rest(Activation(flat, given.output)).maps, probe.logits, probe)


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
    """Whether the output of a layer alone determines the logits, so that no information about the image bypasses the layer."""
    second = probe.logits[1]
    given, rest = probe.activation(layer), Segment(probe.classifier, layer, probe=probe)
    output = None if given.output is None else given.output[1:]
    try:
        found = rest(Activation(given.maps[1:], output)).maps[0]  # the modules before the layer answer for the first image
    except _CANNOT_RUN:
        return False
    return _same_logits(found, second, probe)


def _same_logits(found: Tensor, expected: Tensor, probe: Probe) -> bool:
    """Whether logits are the same, up to 1 % of the difference between the logits of the probe's two images."""
    first, second = probe.logits
    scale = max(float((first - second).abs().max()), 1e-4 * float(second.abs().max()))
    return bool((found - expected).abs().max() <= 1e-2 * scale)
