"""Orders as chains of subsets: the mean of F along an order, and the best order through all subsets that are known.

The chain of an order has the R + 1 subsets of its first k regions, k = 0 to R.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from attribution.search.sets import Sets, members

TIE = 1e-9  # a difference of F up to this is rounding, and no gain


@dataclass(frozen=True, eq=False)
class Found:
    """The best order so far.

    Attributes:
        order: int64 [R], region ids, most important first.
        value: mean of F along the order, over the area; NaN while F of some of its prefixes is unknown.
        evaluations: images forwarded so far.
        within: the same and those that budget and time are still enough for.
    """

    order: Tensor
    value: float
    evaluations: int
    within: int


def found(sets: Sets, order: Sequence[int]) -> Found:
    """The order with its value and the images used."""
    chain = chain_of(order)
    value = mean_along(sets, chain) if all_known(sets, chain) else math.nan
    return Found(torch.tensor(order, dtype=torch.int64), value, sets.used, sets.used + max(0, sets.affordable))


def chain_of(order: Sequence[int]) -> list[int]:
    """The subsets of the first k regions of an order, k = 0 to R."""
    chain = [0]
    for region in order:
        chain.append(chain[-1] | 1 << region)
    return chain


def all_known(sets: Sets, chain: Sequence[int]) -> bool:
    """Whether F of every subset of the chain is known."""
    return all(map(sets.known, chain))


def mean_along(sets: Sets, chain: Sequence[int]) -> float:
    """Mean of F along a chain, over the area, by the trapezoid rule. Unknown F counts with its upper bound.

    The chain may be a piece of a longer one and may add several regions in one step.
    """
    values = [sets.most(subset) for subset in chain]
    steps = zip(pairwise(chain), pairwise(values), strict=True)
    return sum((before + after) / 2 * _area(sets, small ^ large) for (small, large), (before, after) in steps)


def best_chain(sets: Sets, order: Sequence[int]) -> list[int]:
    """The order with the highest mean F among all orders whose prefixes are known.

    Args:
        sets: what is known.
        order: an order whose prefixes are known. It is returned where no other order is better.
    """
    reached = _reached(sets)
    if reached[-1][sets.full][0] <= mean_along(sets, chain_of(order)) + TIE:
        return list(order)
    best, subset = [], sets.full
    for ways in reversed(reached[1:]):
        before = ways[subset][1]
        best.append((subset ^ before).bit_length() - 1)
        subset = before
    return best[::-1]


def _reached(sets: Sets) -> list[dict[int, tuple[float, int]]]:
    """For each number of regions, the known subsets that known chains reach: the highest sum of F up to there, and the subset before."""
    reached: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for subsets in _known_by_count(sets)[1:]:
        ways: dict[int, tuple[float, int]] = {}
        for subset in subsets:
            for before, (total, _) in reached[-1].items():
                if before & subset == before:
                    area = sets.area[(subset ^ before).bit_length() - 1]
                    gained = total + (sets.most(before) + sets.most(subset)) / 2 * area
                    if subset not in ways or gained > ways[subset][0]:
                        ways[subset] = (gained, before)
        reached.append(ways)
    return reached


def _known_by_count(sets: Sets) -> list[list[int]]:
    """The subsets whose F is known, by their number of regions, 0 to R."""
    levels: list[list[int]] = [[] for _ in range(sets.size + 1)]
    for image in sets.forwarded:
        subset = image if sets.needed[0] else sets.full ^ image
        if sets.known(subset):
            levels[subset.bit_count()].append(subset)
    return levels


def _area(sets: Sets, regions: int) -> float:
    return sum(sets.area[region] for region in members(regions))
