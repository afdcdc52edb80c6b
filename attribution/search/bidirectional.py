"""Bidirectional greedy search (LiMA), and its first version."""

from __future__ import annotations

import torch
from torch import Tensor

from attribution.search.contract import Objective, Progress, first_maximum, refuse_nan, report_progress, with_each


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
            report_progress(progress, size, size)
            break
        with_front = with_each(front.members, remaining)
        values = objective(with_front)
        best = int(remaining[first_maximum(values)])
        if len(remaining) > pending:
            low = _swap_set_score(objective, values, with_front, with_each(back.members, remaining))
            candidates = remaining[low.cpu().sort(stable=True).indices[:pending]].sort().values
            candidates = candidates[candidates != best]
            worst = int(candidates[_first_minimum(objective(with_each(back.members, candidates)))])
            back.add(worst)
        front.add(best)
        report_progress(progress, len(front.order) + len(back.order), size)
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
        with_front = with_each(front.members, remaining)
        values = objective(with_front)
        best = int(remaining[first_maximum(values)])
        if len(remaining) > 1:
            low = _swap_set_score(objective, values, with_front, with_each(back.members, remaining))
            keep = remaining != best
            back.add(int(remaining[keep][_first_minimum(low[keep.to(low.device)])]))
        front.add(best)
        report_progress(progress, len(front.order) + len(back.order), size)
    return torch.tensor(front.order + back.order[::-1])


class _Ends:
    """One end of a bidirectional order: region ids in the order of their choice, and as a set."""

    def __init__(self, size: int) -> None:
        self.order: list[int] = []
        self.members = torch.zeros(size, dtype=torch.bool)

    def add(self, region: int) -> None:
        self.order.append(region)
        self.members[region] = True


def _swap_set_score(objective: Objective, values: Tensor, counted: Tensor, wanted: Tensor) -> Tensor:
    """F with its set score taken for other sets; no image is forwarded."""
    set_score = getattr(objective, "set_score", None)
    return values if set_score is None else values - set_score(counted) + set_score(wanted)


def _first_minimum(values: Tensor) -> int:
    refuse_nan(values)
    return int((values == values.min()).nonzero()[0, 0])
