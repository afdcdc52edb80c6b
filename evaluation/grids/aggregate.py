"""AggAtt: what a method does on all grids at once, from the grids on which it localises best to those on which it does worst.

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

from attribution.errors import UserError
from evaluation.grids.scores import cell_shares, cell_totals, checked_maps, enlarged_chunks

FRACTIONS = (0, 0.02, 0.05, 0.5, 0.95, 0.98, 1)  # of the paper
_ROUNDING = 1e-6  # an edge this near to a whole number of maps is that number: 0.29 * 100 is 28.999999999999996


@dataclass(frozen=True, eq=False)
class Aggregate:
    """The maps of one head, sorted by localisation, cut into bins and averaged bin by bin.

    Attributes:
        order: int64 [N], the maps from the best localised to the worst.
        scores: float32 [N], localisation of each map, in the order in which the maps came.
        bins: for each bin the indices of its maps, int64, best first; B bins, none empty.
        maps: float32 [B, H, W], mean of the bin's positive enlarged maps, at their raw scale: strong maps dominate.
        scale: the value at which a figure of all bins saturates, exceeded by 0.5 % of the pixels of all bin maps; 0 where hardly
            any attribution is positive.
        fractions: B + 1 edges, the shares of N at which the bins were really cut: (0, 0.02, 0.05, ...) where N allows it.
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
    """Sort the maps of one head by localisation and average them in bins (AggAtt).

    Sorted by score (as float32), highest first; equal scores by the positive attribution inside the cell, largest first; maps that are
    equal in both keep their order. Perfect maps do tie, as scores come from float64 sums; the authors' program adds up in float32 and
    sorts them by rounding noise.

    A bin holds the maps from position ``fraction * N`` to the next, rounded down, so any N will do: a bin that gets no map is left
    out, and ``fractions`` of the result says where the cuts are. The paper's bins need a multiple of 100.

    Args:
        maps: float [N, h, w], signed maps of one head, one for each grid.
        cell: the head's cell, row by row from the top left.
        n: cells along each side.
        size: height and width of the grid in pixels, multiples of n.
        fractions: edges of the bins, rising from 0 to 1.
        compat: divide and cut as the authors' program: the divisor is ``int(N * (f[b+1] - f[b]))``, which is 44 instead of 45 for
            N = 100 and the bin from 50 to 95 %, so that this bin map is too bright. Otherwise the divisor is the number of maps.

    Raises:
        UserError: maps, cell, n or size as ``localization_scores``; no map; edges that do not rise from 0 to 1; with compat, a
            number of maps for which the authors' program would divide by 0.
    """
    maps, edges = checked_maps(maps), _checked_fractions(fractions)
    if not len(maps):
        raise UserError("no maps were given: AggAtt needs at least one")
    shares, inside = cell_shares(cell_totals(maps, n, size), [cell] * len(maps))
    scores = shares.float()
    order = torch.from_numpy(np.lexsort((-inside.numpy(), -scores.numpy())))
    cuts = _cuts(edges, len(maps), compat)
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
    """Maps that stand for each bin: the one at its median position, then in turn the one before, the one after, two before, ...

    Args:
        aggregate: of ``aggregate``.
        count: how many of each bin; a smaller bin gives all that it has.

    Returns:
        For each bin int64 [at most count], indices of maps (not positions in the order).

    Raises:
        UserError: a count below 1.
    """
    if not isinstance(count, int) or count < 1:
        raise UserError(f"count is {count!r}: expected the number of examples of each bin, 1 or more")
    return tuple(bin_[_around_median(len(bin_))[:count]] for bin_ in aggregate.bins)


def saturation(values: Tensor) -> float:
    """The value that 0.5 % of all values exceed: at index int(0.995 of their number) in ascending order."""
    flat = values.detach().cpu().numpy().ravel()
    index = int(len(flat) * 0.01 * 99.5)  # in this order, so that the index is the authors' to the last digit
    return float(np.partition(flat, index)[index])


def _cuts(edges: Sequence[float], count: int, compat: bool) -> list[int]:
    """Positions in the order at which the bins begin and end."""
    return [int(edge * count) if compat else math.floor(edge * count + _ROUNDING) for edge in edges]


def _authors_divisors(edges: Sequence[float], cuts: Sequence[int]) -> list[int]:
    """What the authors' program divides the sum of each bin by: the width of the bin times N, rounded down after a rounding error."""
    count = cuts[-1]
    divisors = [int(count * (high - low)) for (low, high), (start, end) in zip(pairwise(edges), pairwise(cuts), strict=True) if start < end]
    if 0 in divisors:
        raise UserError(f"compat with {count} maps divides by 0: give a number that the bins divide (a multiple of 100), or compat=False")
    return divisors


def _sum(maps: Tensor, members: Tensor, size: tuple[int, int]) -> Tensor:
    """Positive enlarged maps added up: float64 [H, W], on the CPU."""
    total = torch.zeros(*size, dtype=torch.float64)
    for _, positive in enlarged_chunks(maps[members.to(maps.device)], size, torch.float32):
        total += positive.sum(dim=0, dtype=torch.float64).cpu()
    return total


def _around_median(length: int) -> list[int]:
    """All positions of a bin, nearest to the median first, of two equally near the earlier: for 4 it is 2, 1, 3, 0."""
    return sorted(range(length), key=lambda position: (abs(position - length // 2), position))


def _checked_fractions(fractions: Any) -> tuple[float, ...]:
    try:
        edges = tuple(float(edge) for edge in fractions)
    except (TypeError, ValueError):
        edges = ()
    rising = all(low < high for low, high in pairwise(edges))
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or not rising:
        raise UserError(f"fractions are {fractions!r}: expected the edges of the bins, rising from 0 to 1, such as {FRACTIONS}")
    return edges
