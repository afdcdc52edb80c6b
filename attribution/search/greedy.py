"""Greedy search and its lazy and stochastic forms.

Candidates are tried by increasing region id, and ties go to the lowest id. The objective counts the images that it forwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from attribution.checks import check_seed, check_whole, is_number
from attribution.errors import UserError
from attribution.search.contract import Objective, Progress, first_maximum, refuse_nan, report_progress, with_each


def greedy(objective: Objective, *, count: int | None = None, progress: Progress | None = None) -> Tensor:
    """Naive greedy (Nemhauser et al., 1978), SMDL's search: add the region with which F is highest, until all are added.

    Args:
        objective: F.
        count: k, stop after this many regions; all by default.
        progress: called with (regions placed, R) after each.

    Returns:
        int64 [k], region ids. Evaluates 2 * sum_{i<k} (R - i) images when F forwards two per subset: R (R + 1) for all.
    """
    return _grown(objective, count, progress, lambda left: left)


def lazy_greedy(objective: Objective, *, count: int | None = None, batch_size: int = 8, progress: Progress | None = None) -> Tensor:
    """Lazy greedy (Minoux, 1978): only regions whose last known gain could still be the highest are evaluated again.

    Equal to ``greedy`` where F is submodular (gains never grow), an approximation elsewhere.

    Args:
        objective: F.
        count: stop after this many regions; all by default.
        batch_size: stale candidates evaluated at once.
        progress: called with (regions placed, R) after each.

    Returns:
        int64 [k], region ids.
    """
    check_whole("batch_size", batch_size, 1)
    size, count = objective.size, _checked_count(objective, count)
    chosen = torch.zeros(size, dtype=torch.bool)
    order: list[int] = []
    value = float(objective(chosen[None])[0])
    gains = [math.inf] * size
    while len(order) < count:
        fresh: set[int] = set()
        while True:
            # highest known gain first, and lowest id first where gains are equal, as greedy prefers them
            ranked = sorted((r for r in range(size) if not chosen[r]), key=lambda r: (-gains[r], r))
            if ranked[0] in fresh:
                break
            # in the first round no gain is known, so all regions are evaluated together
            stale = [r for r in ranked if r not in fresh][: batch_size if order else size]
            values = objective(with_each(chosen, torch.tensor(stale)))
            refuse_nan(values)
            for region, new in zip(stale, values.tolist(), strict=True):
                gains[region] = new - value
            fresh.update(stale)
        best = ranked[0]
        value += gains[best]
        chosen[best] = True
        order.append(best)
        report_progress(progress, len(order), size)
    return torch.tensor(order)


def stochastic_greedy(
    objective: Objective,
    *,
    count: int | None = None,
    epsilon: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Stochastic greedy (Mirzasoleiman et al., AAAI 2015): each step evaluates (R / k) log(1 / epsilon) random regions.

    Args:
        objective: F.
        count: k, stop after this many regions; all by default.
        epsilon: in (0, 1). On a monotone submodular F, the expected value is at least (1 - 1/e - epsilon) of the optimum.
        seed: of the samples.
        progress: called with (regions placed, R) after each.

    Returns:
        int64 [k], region ids.
    """
    if not is_number(epsilon) or not 0 < epsilon < 1:
        raise UserError(f"epsilon is {epsilon!r}: expected a number between 0 and 1, such as 0.01")
    check_seed(seed)
    sample = max(1, math.ceil(objective.size / _checked_count(objective, count) * math.log(1 / epsilon)))
    generator = torch.Generator().manual_seed(int(seed))

    def drawn(left: Tensor) -> Tensor:
        return left[torch.randperm(len(left), generator=generator)[:sample].sort().values]

    return _grown(objective, count, progress, drawn)


def _grown(objective: Objective, count: int | None, progress: Progress | None, candidates_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Add one region after the other, each the best of its candidates: ids left int [n] -> ids evaluated int [m], ascending."""
    chosen = torch.zeros(objective.size, dtype=torch.bool)
    order: list[int] = []
    for _ in range(_checked_count(objective, count)):
        candidates = candidates_of((~chosen).nonzero()[:, 0])
        best = int(candidates[first_maximum(objective(with_each(chosen, candidates)))])
        chosen[best] = True
        order.append(best)
        report_progress(progress, len(order), objective.size)
    return torch.tensor(order)


def _checked_count(objective: Objective, count: int | None) -> int:
    if count is None:
        return objective.size
    check_whole("count", count, 1, objective.size)
    return count
