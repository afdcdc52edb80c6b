"""Localization: whether the map points at the object. Pointing game, its energy form and rank accuracy, against a mask of the object.

An image without an object has no answer: an empty mask gives NaN, which a benchmark counts and leaves out of the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.checks import check_number
from attribution.errors import UserError, describe
from evaluation.metrics.judged import Judged, Partition, judged

Mask = Tensor | np.ndarray

_LEAST_ENERGY = 1e-7


def pointing_game(
    explanation: Judged, mask: Mask, *, tolerance: float = 0, strict: bool = False, regions: Partition | None = None
) -> float:
    """Whether the maximum of the map lies on the object: 1.0 for a hit, 0.0 for a miss.

    Zhang et al., "Top-down neural attention by excitation backprop", IJCV 2018.

    Args:
        explanation: an ``Explanation``, a map [H, W], or an order of ``regions`` (see ``judged``); negative values are not clipped.
        mask: bool [H, W], True on the object.
        tolerance: a maximum at most this many pixels (Euclidean) from the object is still a hit; 15 in the paper.
        strict: judge only the first maximum, row by row; otherwise any pixel that attains the maximum may hit.
        regions: of an order; not read otherwise.

    Returns:
        NaN for an empty mask, and for a constant map: every pixel is a maximum, so it would hit every object.

    Raises:
        UserError: a mask that is not bool or of another size than the map, a map that is not finite, a negative tolerance.
    """
    values, mask = _map_and_mask(explanation, mask, regions)
    check_number("tolerance", tolerance, 0)
    if not mask.any() or values.min() == values.max():
        return math.nan
    maxima = values == values.max()
    if strict:
        maxima = maxima & (maxima.flatten().cumsum(0).reshape(maxima.shape) == 1)
    return float((maxima & _dilated(mask, tolerance)).any())


def energy_pointing_game(explanation: Judged, mask: Mask, *, regions: Partition | None = None) -> float:
    """Share of the positive attribution that lies on the object, in [0, 1]; higher is better, a random map gets ``chance_level``.

    Wang et al., "Score-CAM", CVPR workshops 2020, section 4.3, with the negative part of a signed map clipped away.

    Args:
        explanation: an ``Explanation``, a map [H, W], or an order of ``regions`` (see ``judged``).
        mask: bool [H, W], True on the object.
        regions: of an order; not read otherwise.

    Returns:
        NaN for an empty mask, and where the positive attribution sums to at most 1e-7.

    Raises:
        UserError: as ``pointing_game``.
    """
    values, mask = _map_and_mask(explanation, mask, regions)
    positive = values.double().clamp(min=0)
    total = float(positive.sum())
    return float(positive[mask].sum()) / total if mask.any() and total > _LEAST_ENERGY else math.nan


def relevance_rank_accuracy(explanation: Judged, mask: Mask, *, regions: Partition | None = None) -> float:
    """Share of the |mask| highest pixels that lie on the object, in [0, 1]; higher is better, a random map gets ``chance_level``.

    Arras et al., "CLEVR-XAI", Information Fusion 2022, equation 4. Ties go to the first pixel, row by row. The score of a map with few
    distinct values, such as one of a few regions, therefore depends on where its ties lie.

    Args:
        explanation: an ``Explanation``, a map [H, W], or an order of ``regions`` (see ``judged``); negative values are not clipped.
        mask: bool [H, W], True on the object.
        regions: of an order; not read otherwise.

    Returns:
        NaN for an empty mask.

    Raises:
        UserError: as ``pointing_game``.
    """
    values, mask = _map_and_mask(explanation, mask, regions)
    size = int(mask.sum())
    top = values.flatten().argsort(descending=True, stable=True)[:size]
    return float(mask.flatten()[top].sum()) / size if size else math.nan


def chance_level(mask: Mask) -> float:
    """Share of the image that the object covers: the mean score of random maps in all three measures (tolerance 0).

    Args:
        mask: bool [H, W].
    """
    return float(_checked_mask(mask).double().mean())


def box_mask(boxes: Sequence[Any] | np.ndarray | Tensor, height: int, width: int) -> Tensor:
    """The pixels in at least one box: bool [H, W].

    Args:
        boxes: (x0, y0, x1, y1), or several of them; edges in pixels from the top left corner of the image, so that (0, 0, W, H) is
            the whole image. A pixel that a fractional edge cuts belongs to the box; what reaches beyond the image is cut off.
        height, width: of the image, pixels.

    Raises:
        UserError: no box, a reversed or empty one (x1 <= x0 or y1 <= y0), one wholly outside the image, or other than four numbers.
    """
    try:
        corners = np.atleast_2d(np.asarray(boxes, dtype=np.float64))
    except (TypeError, ValueError):
        raise UserError(f"boxes are {boxes!r}: expected four numbers (x0, y0, x1, y1) each") from None
    if corners.ndim != 2 or corners.shape[1] != 4 or not len(corners) or not np.isfinite(corners).all():
        raise UserError(f"boxes of shape {list(corners.shape)} were given: expected at least one box of four numbers (x0, y0, x1, y1)")
    mask = torch.zeros(height, width, dtype=torch.bool)
    for x0, y0, x1, y1 in corners.tolist():
        box = f"box ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
        if x1 <= x0 or y1 <= y0:
            raise UserError(f"{box} is empty or reversed: expected x0 < x1 and y0 < y1")
        if min(x1, y1) <= 0 or x0 >= width or y0 >= height:
            raise UserError(f"{box} lies outside the image of {width}x{height} pixels")
        mask[max(0, math.floor(y0)) : math.ceil(y1), max(0, math.floor(x0)) : math.ceil(x1)] = True
    return mask


def _map_and_mask(explanation: Judged, mask: Mask, regions: Partition | None) -> tuple[Tensor, Tensor]:
    values, mask = judged(explanation, regions).heat, _checked_mask(mask)
    if mask.shape != values.shape:
        raise UserError(f"the mask is {list(mask.shape)}, the map {list(values.shape)}: give a mask at the resolution of the map")
    return values, mask


def _checked_mask(mask: Any) -> Tensor:
    mask = torch.from_numpy(mask.copy()) if isinstance(mask, np.ndarray) and mask.dtype == np.bool_ else mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2 or not mask.numel():
        raise UserError(f"the mask is {describe(mask)}: expected bool [H, W], True on the object")
    return mask.cpu()


def _dilated(mask: Tensor, radius: float) -> Tensor:
    """The pixels whose centre is at most this far from the centre of one in the mask."""
    from scipy.ndimage import distance_transform_edt

    return torch.from_numpy(distance_transform_edt(~mask.numpy()) <= radius)
