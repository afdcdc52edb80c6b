"""Searches: an objective over subsets of R regions -> an order of the regions, most important first.

A search sees an objective only as a function from subsets to scores, so each works with every objective. Candidates are always
enumerated by increasing region id and ties go to the lowest id. Images forwarded are counted by the objective.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attribution.errors import UserError
from attribution.search.contract import Objective, Progress, first_maximum, refuse_nan, report_progress, with_each


def greedy(objective: Objective, *, count: int | None = None, progress: Progress | None = None) -> Tensor:
    """Naive greedy (Nemhauser et al., 1978), SMDL's search: add the region that raises F most, whether F rises or not.

    Args:
        objective: F.
        count: k, stop after so many regions; all by default.
        progress: called with (regions placed, R) after each.

    Returns:
        int64 [k], region ids. Evaluates 2 * sum_{i<k} (R - i) images when F forwards two per subset: R (R + 1) for all.
    """
    size, count = objective.size, _checked_count(objective, count)
    chosen = torch.zeros(size, dtype=torch.bool)
    order: list[int] = []
    while len(order) < count:
        candidates = (~chosen).nonzero()[:, 0]
        values = objective(with_each(chosen, candidates))
        best = int(candidates[first_maximum(values)])
        chosen[best] = True
        order.append(best)
        report_progress(progress, len(order), size)
    return torch.tensor(order)


def lazy_greedy(objective: Objective, *, count: int | None = None, batch_size: int = 8, progress: Progress | None = None) -> Tensor:
    """Lazy greedy (Minoux, 1978): only regions whose last known gain could still win are evaluated again.

    Equal to ``greedy`` where F is submodular (gains never grow), an approximation elsewhere.

    Args:
        objective: F.
        count: stop after so many regions; all by default.
        batch_size: stale candidates evaluated at once.
        progress: called with (regions placed, R) after each.

    Returns:
        int64 [k], region ids.
    """
    size, count = objective.size, _checked_count(objective, count)
    chosen = torch.zeros(size, dtype=torch.bool)
    order: list[int] = []
    value = float(objective(chosen[None])[0])
    gains = [math.inf] * size
    while len(order) < count:
        fresh: set[int] = set()
        while True:
            # best known gain first, lowest id first among equals: the order in which greedy would prefer them
            ranked = sorted((r for r in range(size) if not chosen[r]), key=lambda r: (-gains[r], r))
            if ranked[0] in fresh:
                break
            # in the first round nothing is known, so all are evaluated together
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
    """Stochastic greedy (Mirzasoleiman et al., AAAI 2015): each step tries a random sample of (R / k) log(1 / epsilon) regions.

    Args:
        objective: F.
        count: k, stop after so many regions; all by default.
        epsilon: in (0, 1); the expected loss against greedy on a monotone submodular F.
        seed: of the samples.
        progress: called with (regions placed, R) after each.

    Returns:
        int64 [k], region ids.
    """
    size, count = objective.size, _checked_count(objective, count)
    if not 0 < epsilon < 1:
        raise UserError(f"epsilon is {epsilon}: expected a number between 0 and 1, such as 0.01")
    sample = max(1, math.ceil(size / count * math.log(1 / epsilon)))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(size, dtype=torch.bool)
    order: list[int] = []
    while len(order) < count:
        candidates = (~chosen).nonzero()[:, 0]
        picked = torch.randperm(len(candidates), generator=generator)[:sample].sort().values
        candidates = candidates[picked]
        values = objective(with_each(chosen, candidates))
        best = int(candidates[first_maximum(values)])
        chosen[best] = True
        order.append(best)
        report_progress(progress, len(order), size)
    return torch.tensor(order)


def _checked_count(objective: Objective, count: int | None) -> int:
    if count is None:
        return objective.size
    if not 1 <= count <= objective.size:
        raise UserError(f"count is {count}: expected 1 to {objective.size}, the number of regions")
    return count
