"""The best order of few regions, by dynamic programming over all of their subsets."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attribution.errors import UserError
from attribution.search.budget import regions_that_count
from attribution.search.contract import DividedObjective, Objective, PartialObjective, Progress, divided, refuse_nan, report_progress
from attribution.search.sets import Sets

MOST_REGIONS = 14  # 16,384 subsets
_ROWS = 1024  # subsets handed to the objective at once


def exact_search(objective: Objective | DividedObjective, *, progress: Progress | None = None) -> Tensor:
    """The order with the highest mean of F along it: no order is better.

    The value of an order is a sum over its prefixes, so the best order of a subset is the best one of the subset less its last region,
    for the best choice of that region (Bellman; Held and Karp, 1962). Forwards the image of each of the 2^R subsets.

    Args:
        objective: F, of at most 14 regions with an area.
        progress: called with (share of the subsets evaluated, times R, rounded down; R).

    Returns:
        int64 [R], region ids, most important first; those without area last. Of several best orders one is returned, always the same.

    Raises:
        UserError: more than 14 regions, or an objective that returns NaN.
    """
    whole = divided(objective)
    counted = regions_that_count(whole)
    if len(counted) > MOST_REGIONS:
        raise UserError(
            f"the exact search forwards all 2^R subsets, and there are {len(counted)} regions: expected at most {MOST_REGIONS}; "
            "cut coarser (region_options={'count': 12}, --region-count 12), or take another search"
        )
    part = PartialObjective(whole, counted)
    order = _best_order(_all_values(part, progress), np.array(Sets(part, 0).area))
    last = [region for region in range(whole.size) if region not in set(counted.tolist())]
    return torch.cat([counted[order], torch.tensor(last, dtype=torch.int64)])


def _all_values(objective: DividedObjective, progress: Progress | None) -> np.ndarray:
    """F of every subset: float64 [2^R]. Bit r of an index says whether region r is in the subset."""
    subsets = torch.arange(2**objective.size)
    shown, hidden = (np.zeros(len(subsets)) for _ in range(2))
    for numbers in subsets.split(_ROWS):
        rows = (numbers[:, None] >> torch.arange(objective.size)) % 2 == 1
        for known, found in zip((shown, hidden), objective.parts(rows), strict=True):
            refuse_nan(found)
            known[numbers.numpy()] = found.double().cpu().numpy()
        report_progress(progress, objective.size * (int(numbers[-1]) + 1) // len(subsets), objective.size)
    values = np.zeros(len(subsets))
    if objective.needed[0]:
        values += shown
    if objective.needed[1]:
        values += hidden[::-1]  # the complement of subset i is subset 2^R - 1 - i
    return values


def _best_order(values: np.ndarray, area: np.ndarray) -> list[int]:
    """The order whose chain of subsets has the highest mean of values over the area, by the trapezoid rule."""
    count = len(area)
    best = np.full(len(values), -np.inf)
    best[0] = 0.0
    last = np.zeros(len(values), dtype=np.int64)
    sizes = np.array([subset.bit_count() for subset in range(len(values))])
    for size in range(1, count + 1):
        subsets = np.flatnonzero(sizes == size)
        for region in range(count):
            ending = subsets[subsets >> region & 1 == 1]
            before = ending ^ 1 << region
            reached = best[before] + (values[before] + values[ending]) / 2 * area[region]
            better = reached > best[ending]
            best[ending[better]], last[ending[better]] = reached[better], region
    order, subset = [], len(values) - 1
    while subset:
        order.append(int(last[subset]))
        subset ^= 1 << order[-1]
    return order[::-1]
