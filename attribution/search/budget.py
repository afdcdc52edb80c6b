"""Search by budget: the best order that so many forwarded images can buy, and the polishing of an order that is already there.

Both raise the mean of F along the order, over the share of the image that its first regions cover: with weights 1 and 1 that is
Insertion - Deletion itself. F(S) is the sum of what the image of S gives and what the image of its complement gives, so the first
half alone often shows that a set cannot be better than one already known, and the second is then never forwarded. Every image is
forwarded once and remembered; whatever chain through the sets known is best is the order. With less than about 6 images a region
there is no chain to know: elimination then goes in steps large enough to come to its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attribution.errors import UserError, describe
from attribution.search.elimination import eliminate, halve, pace
from attribution.search.gradients import LEVELS, soften
from attribution.search.improvement import improve
from attribution.search.sets import Found, Sets, Spent

_UNHURRIED = 6  # images a region, three of each half, from which on elimination goes one by one
_UNBOUNDED = 24  # the same where no bound of F is known
_SOFTENED = 1.5  # images a region of both halves; with more, elimination does better than gradients


def anytime_from(objective: Any) -> int:
    """The least budget whose search is the beginning of that with any larger one; below, elimination goes in large steps to end in time.

    That is where elimination one by one comes to its end, which takes longer where no bound of F is known that could cut it short.
    """
    halves = sum(getattr(objective, "needed", (True, False)))
    bounded = all(math.isfinite(float(most)) for most in getattr(objective, "highest", (math.inf,)))
    return math.ceil((_UNHURRIED if bounded else _UNBOUNDED) / 2 * halves * int(objective.size)) * int(getattr(objective, "cost", 1))


def search_orders(
    objective: Any, *, evaluations: int, start: Sequence[int] | None = None, seed: int = 0, gradients: bool = False
) -> Iterator[Found]:
    """Ever better orders, as long as the budget lasts; stop whenever one is good enough.

    Args:
        objective: F, such as ``SubmodularObjective``. Any other callable from subsets to F (with ``size``) will do: each subset
            then counts as one image, or as ``cost`` images where it says so.
        evaluations: N, images forwarded at most.
        start: an order to begin with; by default one is made by backward elimination.
        seed: of the windows.
        gradients: white box: ``soften`` where the budget is at most 1.5 images a region. It may pay where gradients of the model tell
            much, as those of transformers do. Larger budgets are spent as without it.

    Yields:
        ``Found``, at least one. Once all prefixes are known (with ``start``, from the first on) the value never falls. A budget below
        ``anytime_from`` makes a coarser order than the first rounds of a larger one would; it rarely comes to know all prefixes.

    Raises:
        UserError: N below 1, a start that is no order of the regions, an objective that returns NaN, or gradients with one that has
            none.
    """
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < 1:
        raise UserError(f"evaluations is {evaluations!r}: expected a whole number of images, at least 1")
    sets = Sets(objective, evaluations)
    order = list(range(sets.size)) if start is None else [int(region) for region in start]
    if sorted(order) != list(range(sets.size)):
        raise UserError(f"start is {describe(start)}: expected each region from 0 to {sets.size - 1} once")
    if gradients and start is not None:
        raise UserError("gradients=True and a start: give one of them, since gradients are there to make one")
    if gradients and not math.isfinite(sets.range):
        raise UserError(
            "gradients=True with an objective that has none: expected SubmodularObjective without a weight on the effectiveness"
        )
    if gradients and torch.is_inference_mode_enabled():
        raise UserError("gradients=True within torch.inference_mode: call it outside")
    try:
        if start is None:
            hurried = evaluations < anytime_from(sets.objective)
            if gradients and sets.slope_cost(LEVELS) <= evaluations <= _SOFTENED / 2 * sum(sets.needed) * sets.size * sets.objective.cost:
                begin = soften(sets, seed)
            else:
                begin = halve(sets, *pace(sets)) if hurried else eliminate(sets)
            for order in begin:
                yield sets.found(order)
            if hurried and not sets.reaches(sets.chain(order)):
                return
        for better in improve(sets, order, seed):
            order = better
            yield sets.found(order)
    except Spent:
        yield sets.found(sets.best_chain(order) if sets.all_known(sets.chain(order)) else order)


def default_budget(objective: Any) -> int:
    """Images forwarded where no budget is given: 16 for each region, where the curve of quality against budget flattens.

    Of several fills each counts; and where no bound of F is known, it is what elimination one by one takes.
    """
    return max(16 * int(objective.size) * int(getattr(objective, "cost", 1)), anytime_from(objective))


def budget_search(
    objective: Any,
    *,
    evaluations: int | None = None,
    start: Sequence[int] | None = None,
    seed: int = 0,
    gradients: bool = False,
    callback: Callable[[Found], bool | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The best order that a budget of forwarded images can buy: backward elimination, then local search with what is left.

    Args:
        objective, start, seed, gradients: see ``search_orders``.
        evaluations: N, images forwarded at most; see ``default_budget``.
        callback: called with the best order so far after each round; the search ends when it returns True.
        progress: called with (images forwarded, N).

    Returns:
        int64 [R], region ids, most important first.
    """
    budget = default_budget(objective) if evaluations is None else evaluations
    best = torch.arange(int(objective.size))
    for found in search_orders(objective, evaluations=budget, start=start, seed=seed, gradients=gradients):
        best = found.order
        if progress is not None:
            progress(found.evaluations, budget)
        if callback is not None and callback(found):
            break
    if progress is not None:
        progress(budget, budget)
    return best
