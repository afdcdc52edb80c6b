"""What evaluators judge: an explanation, a map, or an order of regions. ``judged`` reads all three into one form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.checks import is_whole
from attribution.errors import UserError, describe
from attribution.explanation import Explanation, order_of_means
from attribution.image import ImageSource, load_image
from attribution.regions import Regions

Judged = Explanation | Tensor | np.ndarray | Sequence[int]
Partition = Regions | Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class Claim:
    """What an explanation says of an image. Scores that a method stored are never used as scores.

    Attributes:
        values: float32 [H, W] on the CPU, signed: the map by which pixels and regions are ranked. An order without a map stands as its
            ranks, (R - position) / R in each pixel of a region, which is 1 in the first.
        heat: float32 [H, W] on the CPU, signed: the map whose values count, as in muFidelity and the pointing games. It is the heatmap of
            a search, and otherwise the same as ``values``.
        regions: the partition that ``order`` ranks; None where there is no order.
        order: int64 [R] on the CPU, region ids, most important first; None where there is only a map.
    """

    values: Tensor
    heat: Tensor
    regions: Regions | None = None
    order: Tensor | None = None

    def order_over(self, regions: Partition | None) -> tuple[Tensor, Tensor]:
        """Rank regions: by the order where it ranks the same ones, else by the mean of the map in each, ties by the lowest id.

        Returns:
            Label map int64 [H, W] and order int64 [R], most important first.

        Raises:
            UserError: no regions, or regions of another size than the map.
        """
        if regions is None and self.regions is None:
            raise UserError("region steps of a map of pixels without regions: give regions=, or a protocol with steps='pixels'")
        wanted = self.regions if regions is None else as_regions(regions)
        assert wanted is not None
        labels = wanted.labels.cpu()
        if self.order is not None and self.regions is not None and torch.equal(self.regions.labels.cpu(), labels):
            return labels, self.order
        return labels, order_of_means(self.values, labels)


def judged(explanation: Judged, regions: Partition | None = None) -> Claim:
    """Read an explanation, a map or an order into one form.

    Args:
        explanation: an ``Explanation``; or a map, floats [H, W], tensor or array; or an order, whole numbers [R], each region id once,
            most important first.
        regions: the partition (or label map) of an order; not read otherwise.

    Returns:
        The map, signed where the method's is, and the order. An explanation with a map and an order has both.

    Raises:
        UserError: anything else, values that are not finite, or an order without regions or of other regions.
    """
    if isinstance(explanation, Explanation):
        return _of_explanation(explanation)
    given = _as_tensor(explanation)
    if given is not None and given.ndim == 2 and given.is_floating_point() and given.numel():
        return Claim(_finite(given), _finite(given))
    if given is not None and given.ndim == 1 and given.dtype != torch.bool and not given.is_floating_point():
        return _of_order(given, regions)
    raise UserError(
        f"what is to be judged is {describe(explanation)}: expected an Explanation, a map of floats [H, W], or an order of regions: "
        "whole numbers [R], with regions="
    )


def judged_on(image: ImageSource, explanation: Judged, regions: Partition | None = None) -> tuple[Tensor, Claim]:
    """The image, float32 [3, H, W] on the CPU, and what is judged of it.

    Raises:
        UserError: see ``judged``; an image of another size than the map.
    """
    claim = judged(explanation, regions)
    return image_of_size(image, claim.values), claim


def image_of_size(image: ImageSource, values: Tensor) -> Tensor:
    """The image, float32 [3, H, W] on the CPU, which must have the size of a map or of labels [H, W]."""
    loaded = load_image(image).cpu()
    if loaded.shape[1:] != values.shape:
        raise UserError(
            f"the image is {loaded.shape[2]}x{loaded.shape[1]}, the map or its regions {values.shape[1]}x{values.shape[0]}: "
            "give the image at the resolution of the map, explanation.image"
        )
    return loaded


def as_regions(regions: Partition) -> Regions:
    """``Regions`` from a label map, tensor or array; ``Regions`` are returned unchanged.

    Raises:
        UserError: anything else.
    """
    if isinstance(regions, Regions):
        return regions
    try:
        labels = torch.as_tensor(regions)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"regions are {describe(regions)}: expected Regions, as make_regions cuts them, or a label map [H, W]") from None
    return Regions(labels)


def _of_explanation(explanation: Explanation) -> Claim:
    ordered = explanation.order is not None and explanation.regions is not None
    if explanation.pixel_map is None and not ordered:
        raise UserError("the explanation has neither a map of pixels nor an order of regions: expected one of them")
    values = explanation.to_pixels("rank") if explanation.pixel_map is None else explanation.pixel_map
    heat = _finite(explanation.values)
    if not ordered:
        return Claim(_finite(values), heat)
    assert explanation.order is not None
    return Claim(_finite(values), heat, explanation.regions, explanation.order.cpu())


def _of_order(order: Tensor, regions: Partition | None) -> Claim:
    if regions is None:
        raise UserError(f"an order of {len(order)} regions was given without them: give regions=, the partition whose ids it lists")
    partition, order = as_regions(regions), order.detach().cpu().long()
    if not torch.equal(order.sort().values, torch.arange(partition.count)):
        raise UserError(f"the order has {len(order)} ids: expected each of 0 to {partition.count - 1} once, most important first")
    ranks = 1 - order.argsort().double() / len(order)
    values = ranks.float()[partition.labels.cpu()]
    return Claim(values, values, partition, order)


def _as_tensor(value: Any) -> Tensor | None:
    """A tensor, an array or a sequence of whole numbers as a tensor; None for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    if isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_whole, value)):
        return torch.tensor(list(value), dtype=torch.int64)
    return None


def _finite(values: Tensor) -> Tensor:
    values = values.detach().cpu().float()
    bad = int((~values.isfinite()).sum())
    if bad:
        raise UserError(f"{bad} of the {values.numel()} values of the map are not finite: expected numbers; check the method")
    return values
