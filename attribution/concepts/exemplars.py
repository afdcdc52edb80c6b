"""The images that excite a unit most, and where in them: the exemplars of MILAN.

Hernandez et al., "Natural language descriptions of deep visual features" (ICLR 2022). The captions of that paper need a trained decoder,
whose weights cannot be passed on. This is the part before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.checks import check_choice, check_number, check_whole
from attribution.errors import UserError
from attribution.image import load_image
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.network.maps import FeatureLayer, find_feature_layer
from attribution.network.segments import Activation, Probe, Segment


@dataclass(frozen=True, eq=False)
class Exemplars:
    """The images that excite units most.

    Attributes:
        units: int64 [U], channels of the layer.
        indices: int64 [U, count], images, those with the largest spatial maximum first; ties go to the earlier image.
        activations: float32 [U, count], these maxima.
        level: float32 [U], the quantile of all activations of the unit at all positions of all images.
        masks: bool [U, count, h, w], where the activation of the image, upsampled to the model input, is above the level.
    """

    units: Tensor
    indices: Tensor
    activations: Tensor
    level: Tensor
    masks: Tensor


def exemplars(
    images: Tensor | Sequence[Any],
    classifier: Classifier | str,
    layer: str,
    units: Sequence[int] | None = None,
    count: int = 15,
    quantile: float = 0.99,
    border: Literal["replicate", "zero"] = "replicate",
) -> Exemplars:
    """Find the images, and the places in them, that excite each unit of a layer most.

    The quantile is exact. Only the values above it are kept, so memory is a share 1 - quantile of all activations.

    Args:
        images: float [N, 3, H, W] in [0, 1], or N sources as ``load_image`` takes them.
        classifier: a ``Classifier``, or a name that ``load_classifier`` takes.
        layer: a module that returns a map or tokens; of tokens those of the image count. Units are its channels.
        units: channels; None takes all.
        count: images of each unit; all where there are fewer.
        quantile: level above which a position counts as excited, 0 to 1 (0.99 in the paper; linear interpolation between values).
        border: beyond the outermost cell centres upsampled maps keep the border's values; with "zero" they fade to 0, as in the
            reference code.

    Raises:
        UserError: no images, no such layer or unit, or values out of range.
    """
    check_whole("count", count, 1)
    check_number("quantile", quantile, 0, 1)
    check_choice("border", border, ("replicate", "zero"))
    number = len(images)
    if not number:
        raise UserError("no images were given: expected at least one")
    classifier = load_classifier(classifier)
    read = _Layer(classifier, layer)
    first = read.maps(images, range(1))
    chosen = _checked_units(units, first.shape[1], layer)
    count = min(count, number)
    positions = number * first.shape[2] * first.shape[3]
    place = quantile * (positions - 1)
    kept = positions - math.floor(place)
    largest, maxima = first.new_zeros(len(chosen), 0), list[Tensor]()
    for maps in read.batches(images):
        of_units = maps[:, chosen]
        maxima.append(of_units.amax(dim=(2, 3)))
        values = torch.cat([largest, of_units.transpose(0, 1).flatten(1)], dim=1)
        largest = values.topk(min(kept, values.shape[1]), dim=1).values
    ascending = largest.sort(dim=1).values.double()
    upper = ascending[:, min(1, kept - 1)]
    level = ascending[:, 0] + (place - math.floor(place)) * (upper - ascending[:, 0])
    sorted_maxima, order = torch.cat(maxima).sort(dim=0, descending=True, stable=True)
    indices = order[:count].T
    masks = torch.zeros(len(chosen), count, *classifier.preprocessing.size, dtype=torch.bool)
    for image in sorted(set(indices.flatten().tolist())):
        upsampled = _upsampled(read.maps(images, range(image, image + 1))[:, chosen], classifier.preprocessing.size, border)[0]
        for unit, rank in (indices == image).nonzero().tolist():
            masks[unit, rank] = upsampled[unit] > level[unit]
    return Exemplars(torch.tensor(chosen), indices.cpu(), sorted_maxima[:count].T.float().cpu(), level.float().cpu(), masks)


class _Layer:
    """The maps of a layer, image by image."""

    def __init__(self, classifier: Classifier, layer: str) -> None:
        self.classifier = classifier
        probe = Probe(classifier)
        found: FeatureLayer = find_feature_layer(probe.task, layer)
        self.segment = Segment(classifier, None, found, probe)

    def maps(self, images: Any, places: range) -> Tensor:
        inputs = torch.cat([self.classifier.inputs(load_image(images[place])) for place in places])
        with torch.no_grad():
            return self.segment(Activation(inputs)).maps.float()

    def batches(self, images: Any) -> Iterator[Tensor]:
        size = self.classifier.batch_size
        for start in range(0, len(images), size):
            yield self.maps(images, range(start, min(start + size, len(images))))


def _checked_units(units: Sequence[int] | None, channels: int, layer: str) -> list[int]:
    chosen = list(range(channels)) if units is None else [int(unit) for unit in units]
    if not chosen or min(chosen) < 0 or max(chosen) >= channels:
        raise UserError(f"units are {chosen}: expected some of 0 to {channels - 1}, the channels of {layer}")
    return chosen


def _upsampled(maps: Tensor, size: tuple[int, int], border: str) -> Tensor:
    """Maps [n, C, h, w] at another size, bilinear between the centres of cells."""
    if border == "replicate":
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    theta = torch.eye(2, 3, dtype=maps.dtype, device=maps.device).expand(len(maps), 2, 3)
    grid = F.affine_grid(theta, [len(maps), 1, *size], align_corners=False)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
