"""AggAtt: the mean maps of a method over many grids, binned from the best to the worst localisation.

Rao, Boehle and Schiele, "Towards Better Understanding Attribution Methods", CVPR 2022; the same authors, "Better
Understanding Differences in Attribution Methods via Systematic Evaluations", TPAMI 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.checks import check_whole
from attribution.errors import UserError
from evaluation.grids.scores import cell_shares, cell_totals, checked_maps, enlarged_chunks

FRACTIONS = (0, 0.02, 0.05, 0.5, 0.95, 0.98, 1)  # of the paper
_ROUNDING = 1e-6  # an edge this close to a whole number of maps counts as that number: 0.29 * 100 is 28.999999999999996


@dataclass(frozen=True, eq=False)
class Aggregate:
    """The maps of one head, sorted by localisation, divided into bins and averaged within each bin.

    Attributes:
        order: int64 [N], the maps from the best localised to the worst.
        scores: float32 [N], localisation of each map, in the order of the input.
        bins: B tensors int64, the indices of each bin's maps, best first; none is empty.
        maps: float32 [B, H, W], mean of the bin's positive enlarged maps, not normalised: maps with large values dominate.
        scale: the value at which a figure of all bins saturates: 0.5 % of the pixels of all bin maps exceed it. 0 if almost no
            attribution is positive.
        fractions: B + 1 edges, the shares of N at which the bins begin and end; (0, 0.02, 0.05, 0.5, ...) if N is large enough.
    """

    order: Tensor
    scores: Tensor
    bins: tuple[Tensor, ...]
    maps: Tensor
    scale: float
    fractions: tuple[float, ...]


def aggregate(
    maps: Tensor,
    cell: int,
    n: int,
    size: tuple[int, int],
    fractions: Sequence[float] = FRACTIONS,
    *,
    compat: bool = False,
) -> Aggregate:
    """Sort the maps of one head by localisation and average them within bins (AggAtt).

    Maps are sorted by score (as float32), highest first. Ties go to the map with more positive attribution inside the cell, then
    to the earlier map. Perfect maps tie, because scores come from float64 sums; the authors' program sums in float32 and sorts
    such maps by rounding errors.

    A bin starts at position ``fraction * N``, rounded down, and ends where the next one starts. N can be any number: a bin without
    maps is left out, and ``fractions`` of the result holds the actual edges. The paper's bins need a multiple of 100.

    Args:
        maps: float [N, h, w], signed maps of one head, one for each grid.
        cell: the head's cell, row by row from the top left.
        n: cells along each side.
        size: height and width of the grid in pixels, multiples of n.
        fractions: edges of the bins, increasing from 0 to 1.
        compat: divide and cut like the authors' program. Its divisor is ``int(N * (f[b+1] - f[b]))``: for N = 100 and the bin from
            50 to 95 % that is 44 instead of 45, so that this bin's map is too bright. By default the divisor is the number of maps.

    Raises:
        UserError: arguments that ``localization_scores`` refuses; no map; edges that do not increase from 0 to 1; with compat, a
            number of maps for which the authors' program divides by 0.
    """
    maps, edges = checked_maps(maps), _checked_fractions(fractions)
    if not len(maps):
        raise UserError("no maps were given: AggAtt needs at least one")
    shares, inside = cell_shares(cell_totals(maps, n, size), [cell] * len(maps))
    scores = shares.float()
    order = torch.from_numpy(np.lexsort((-inside.numpy(), -scores.numpy())))
    cuts = [int(edge * len(maps)) if compat else math.floor(edge * len(maps) + _ROUNDING) for edge in edges]
    bins = tuple(order[start:end].clone() for start, end in pairwise(cuts) if start < end)
    divisors = _authors_divisors(edges, cuts) if compat else [len(bin_) for bin_ in bins]
    means = torch.stack([_sum(maps, bin_, size) / divisor for bin_, divisor in zip(bins, divisors, strict=True)]).float()
    return Aggregate(
        order=order,
        scores=scores,
        bins=bins,
        maps=means,
        scale=saturation(means),
        fractions=tuple(cut / len(maps) for cut in dict.fromkeys(cuts)),
    )


def examples(aggregate: Aggregate, count: int) -> tuple[Tensor, ...]:
    """Example maps of each bin: the one at its median position, then its neighbours, alternately before and after it.

    Args:
        aggregate: of ``aggregate``.
        count: number of examples of each bin, at least 1; a smaller bin gives all its maps.

    Returns:
        For each bin int64 [at most count], indices of maps (not positions in ``order``).

    Raises:
        UserError: a count below 1.
    """
    check_whole("count", count, 1)
    return tuple(bin_[_around_median(len(bin_))[:count]] for bin_ in aggregate.bins)


def saturation(values: Tensor) -> float:
    """The value that 0.5 % of all values exceed: the one at index int(0.995 * number of values) in ascending order."""
    flat = values.detach().cpu().numpy().ravel()
    index = int(len(flat) * 0.01 * 99.5)  # multiplied in this order, so that rounding gives the authors' index
    return float(np.partition(flat, index)[index])


def _authors_divisors(edges: Sequence[float], cuts: Sequence[int]) -> list[int]:
    """The divisors of the authors' program: the width of each bin times N, rounded down (which turns a rounding error into -1)."""
    count = cuts[-1]
    divisors = [int(count * (high - low)) for (low, high), (start, end) in zip(pairwise(edges), pairwise(cuts), strict=True) if start < end]
    if 0 in divisors:
        raise UserError(f"compat with {count} maps divides by 0: give a multiple of 100 maps, or compat=False")
    return divisors


def _sum(maps: Tensor, members: Tensor, size: tuple[int, int]) -> Tensor:
    """The sum of positive enlarged maps: float64 [H, W], on the CPU."""
    total = torch.zeros(*size, dtype=torch.float64)
    for _, positive in enlarged_chunks(maps[members.to(maps.device)], size, torch.float32):
        total += positive.sum(dim=0, dtype=torch.float64).cpu()
    return total


def _around_median(length: int) -> list[int]:
    """The positions of a bin, nearest to the median first. Ties go to the earlier position: 2, 1, 3, 0 for a length of 4."""
    return sorted(range(length), key=lambda position: (abs(position - length // 2), position))


def _checked_fractions(fractions: Any) -> tuple[float, ...]:
    try:
        edges = tuple(float(edge) for edge in fractions)
    except (TypeError, ValueError):
        edges = ()
    rising = all(low < high for low, high in pairwise(edges))
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or not rising:
        raise UserError(f"fractions are {fractions!r}: expected the edges of the bins, increasing from 0 to 1, such as {FRACTIONS}")
    return edges
