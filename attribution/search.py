"""Searches: an objective over subsets of R regions -> an order of the regions, most important first.

A search sees an objective only as a function from subsets to scores, so each works with every objective. Candidates are always
enumerated by increasing region id and ties go to the lowest id. Images forwarded are counted by the objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from attribution.budget import budget_search
from attribution.errors import UserError

Progress = Callable[[int, int], None]


class Objective(Protocol):
    """What a search needs to know.

    ``set_score`` may be missing: the part of F that costs no image, else taken as 0. The search by budget saves images where there
    are ``parts``, ``highest``, ``needed`` and ``cost`` (see ``SubmodularObjective``), and uses ``area`` and ``centres`` of the regions.
    """

    @property
    def size(self) -> int:
        """R, the number of regions."""

    def __call__(self, subsets: Tensor, /) -> Tensor:
        """F of each subset: bool [n, R] -> [n]."""


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
        values = objective(_with_each(chosen, candidates))
        best = int(candidates[_first_maximum(values)])
        chosen[best] = True
        order.append(best)
        _report(progress, len(order), size)
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
            values = objective(_with_each(chosen, torch.tensor(stale)))
            _refuse_nan(values)
            for region, new in zip(stale, values.tolist(), strict=True):
                gains[region] = new - value
            fresh.update(stale)
        best = ranked[0]
        value += gains[best]
        chosen[best] = True
        order.append(best)
        _report(progress, len(order), size)
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
        values = objective(_with_each(chosen, candidates))
        best = int(candidates[_first_maximum(values)])
        chosen[best] = True
        order.append(best)
        _report(progress, len(order), size)
    return torch.tensor(order)


def bidirectional_greedy(objective: Objective, *, pending: int = 8, progress: Progress | None = None) -> Tensor:
    """LiMA's efficient bidirectional search (v2): each round adds the best region to the front and the worst to the back.

    The worst is sought among the ``pending`` regions that score lowest as additions to the front (with the set score of the
    back), by F of the back plus each. The last ``pending`` regions are placed by plain greedy.

    Args:
        objective: F.
        pending: p; taken into [2, R].
        progress: called with (regions placed, R) after each round.

    Returns:
        int64 [R], region ids. With t = ceil((R - p) / 2) rounds at both ends and q = R - 2t left, evaluates
        2 (t R - t (t - 1)) + q (q + 1) - 2 + 2 p t images when F forwards two per subset (2 fewer for each round whose best
        region was among the pending).
    """
    size = objective.size
    pending = min(max(pending, 2), size)
    front, back = _Ends(size), _Ends(size)
    while len(front.order) + len(back.order) < size:
        remaining = (~(front.members | back.members)).nonzero()[:, 0]
        if len(remaining) == 1:
            front.add(int(remaining[0]))
            _report(progress, size, size)
            break
        with_front = _with_each(front.members, remaining)
        values = objective(with_front)
        best = int(remaining[_first_maximum(values)])
        if len(remaining) > pending:
            low = _swap_set_score(objective, values, with_front, _with_each(back.members, remaining))
            candidates = remaining[low.cpu().sort(stable=True).indices[:pending]].sort().values
            candidates = candidates[candidates != best]
            worst = int(candidates[_first_minimum(objective(_with_each(back.members, candidates)))])
            back.add(worst)
        front.add(best)
        _report(progress, len(front.order) + len(back.order), size)
    return torch.tensor(front.order + back.order[::-1])


def bidirectional_greedy_v1(objective: Objective, *, progress: Progress | None = None) -> Tensor:
    """LiMA's first bidirectional search: the lowest scorer of the same evaluations goes to the back, with its set score there.

    Where the published code let a tied winner also lose (and so lost a region), the winner never loses here. It was published
    without a confidence term: set that weight to 0 for the same scores.

    Args:
        objective: F.
        progress: called with (regions placed, R) after each round.

    Returns:
        int64 [R], region ids. About half of greedy's evaluations.
    """
    size = objective.size
    front, back = _Ends(size), _Ends(size)
    while len(front.order) + len(back.order) < size:
        remaining = (~(front.members | back.members)).nonzero()[:, 0]
        with_front = _with_each(front.members, remaining)
        values = objective(with_front)
        best = int(remaining[_first_maximum(values)])
        if len(remaining) > 1:
            low = _swap_set_score(objective, values, with_front, _with_each(back.members, remaining))
            keep = remaining != best
            back.add(int(remaining[keep][_first_minimum(low[keep.to(low.device)])]))
        front.add(best)
        _report(progress, len(front.order) + len(back.order), size)
    return torch.tensor(front.order + back.order[::-1])


class _Ends:
    """One end of a bidirectional order: region ids in the order of their choice, and as a set."""

    def __init__(self, size: int) -> None:
        self.order: list[int] = []
        self.members = torch.zeros(size, dtype=torch.bool)

    def add(self, region: int) -> None:
        self.order.append(region)
        self.members[region] = True


def _with_each(members: Tensor, candidates: Tensor) -> Tensor:
    """The set plus each candidate on its own: bool [R], int [n] -> bool [n, R]."""
    subsets = members.repeat(len(candidates), 1)
    subsets[torch.arange(len(candidates)), candidates] = True
    return subsets


def _swap_set_score(objective: Objective, values: Tensor, counted: Tensor, wanted: Tensor) -> Tensor:
    """F with its set score taken for other sets; no image is forwarded."""
    set_score = getattr(objective, "set_score", None)
    return values if set_score is None else values - set_score(counted) + set_score(wanted)


def _first_maximum(values: Tensor) -> int:
    _refuse_nan(values)
    return int((values == values.max()).nonzero()[0, 0])


def _first_minimum(values: Tensor) -> int:
    _refuse_nan(values)
    return int((values == values.min()).nonzero()[0, 0])


def _refuse_nan(values: Tensor) -> None:
    if values.isnan().any():
        raise UserError("the objective returned NaN: expected a finite number for every subset")


def _checked_count(objective: Objective, count: int | None) -> int:
    if count is None:
        return objective.size
    if not 1 <= count <= objective.size:
        raise UserError(f"count is {count}: expected 1 to {objective.size}, the number of regions")
    return count


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


SEEDED = frozenset({"budget", "stochastic_greedy"})  # keys of SEARCHES that draw

SEARCHES: dict[str, Callable[..., Tensor]] = {
    "bidirectional": bidirectional_greedy,
    "budget": budget_search,
    "bidirectional_v1": bidirectional_greedy_v1,
    "greedy": greedy,
    "lazy_greedy": lazy_greedy,
    "stochastic_greedy": stochastic_greedy,
}
