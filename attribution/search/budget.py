"""Search by budget: the best order for a given number of forwarded images, and improvements of a given order.

Both raise the mean of F along the order, over the share of the image that its first regions cover. With the weights 1 and 1 that is
Insertion - Deletion itself. F(S) is a sum over two images, that of S and that of its complement, so the first of them often shows
that a set cannot be better than one already known. The second is then not forwarded. Every image is forwarded once and remembered,
and the order is the best chain through all sets known. Elimination goes in large steps where the budget is too small to hide the
regions one by one.

The constants of this package that no comment derives were chosen by Insertion - Deletion on development images: CIFAR-10, seeds 11
and 5, both zoo models. None of these images is among those that the README reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attribution.checks import check_number, check_seed, check_whole
from attribution.errors import UserError, describe
from attribution.search.chains import Found, all_known, best_chain, chain_of, found
from attribution.search.contract import (
    DividedObjective,
    Objective,
    PartialObjective,
    Progress,
    UndividedObjective,
    divided,
    report_progress,
)
from attribution.search.elimination import eliminate, halve, pace_within, survey
from attribution.search.gradients import PREFIXES_IN_A_STEP, soften
from attribution.search.improvement import improve
from attribution.search.sets import Clock, Sets, Spent

# Images a region, both halves of F together, with which elimination one by one comes to its end. Chosen on development images.
IMAGES_TO_ELIMINATE = 6
# The same where no upper bound of F is known, which could save second halves. Chosen on development images.
IMAGES_TO_ELIMINATE_UNBOUNDED = 24
# Images a region, both halves together, up to which gradients are used: with more, elimination is better. Chosen on development images.
IMAGES_WITH_GRADIENTS = 1.5
# Images a region where no budget is given. At real resolution, where an image takes long, 8 reach about the quality of the published search
# with a quarter of its images (docs/results/default.md). On smaller inputs images are cheap, and the budget is about that search's cost.
IMAGES_BY_DEFAULT, IMAGES_OF_SMALL_INPUTS = 8, 32
REAL_RESOLUTION = 128 * 128  # pixels of the model input
_ANY_NUMBER = 2**31  # images that no time is enough for


def anytime_from(objective: Objective | DividedObjective) -> int:
    """The least budget whose search is the beginning of the search with any larger budget.

    It is enough to eliminate the regions one by one. Smaller budgets go in large steps, so that they come to an end.
    """
    objective = divided(objective)
    bounded = all(math.isfinite(float(highest)) for highest in objective.highest)
    images = IMAGES_TO_ELIMINATE if bounded else IMAGES_TO_ELIMINATE_UNBOUNDED
    return math.ceil(images / 2 * sum(objective.needed) * len(regions_that_count(objective))) * objective.cost


def default_budget(objective: Objective | DividedObjective, pixels: int = REAL_RESOLUTION) -> int:
    """Images forwarded where no budget is given: 8 for each region and each fill, 32 on inputs below 128 x 128 pixels.

    Where ``anytime_from`` is more, it is that.
    """
    objective = divided(objective)
    images = IMAGES_BY_DEFAULT if pixels >= REAL_RESOLUTION else IMAGES_OF_SMALL_INPUTS
    return max(images * objective.size * objective.cost, anytime_from(objective))


def regions_that_count(objective: DividedObjective) -> Tensor:
    """The regions that the search orders, int64 [k]. Those without area, which a model crops away, change nothing and are left out."""
    if objective.area is None or isinstance(objective, UndividedObjective):
        return torch.arange(objective.size)
    counted = torch.as_tensor(objective.area).cpu().nonzero()[:, 0]
    return counted if len(counted) > 1 else torch.arange(objective.size)


def search_orders(
    objective: Objective | DividedObjective,
    *,
    evaluations: int,
    start: Sequence[int] | None = None,
    prior: Sequence[float] | Tensor | None = None,
    seed: int = 0,
    gradients: bool = False,
    seconds: float | None = None,
) -> Iterator[Found]:
    """Yield better and better orders until the budget is spent. The caller may stop at any of them.

    Args:
        objective: F. A ``DividedObjective``, such as ``SubmodularObjective``, saves images. Of any other objective each subset
            counts as one image (see ``UndividedObjective``).
        evaluations: N, images forwarded at most.
        start: an order to begin with: each region id once. By default backward elimination makes one.
        prior: float [R], a guess of how important each region is, such as the mean of a heatmap in it. Elimination then begins with this
            ranking in place of a survey, which would forward R images. A ``start`` is kept where nothing better is found; a prior only
            says which regions are tried first.
        seed: of the windows of the local search, and of the gradient steps.
        gradients: white box: begin with gradient steps (``soften``) where the budget is at most 1.5 images a region. That may pay
            where the gradients of the model tell much, as those of transformers do. Larger budgets are spent as without it.
        seconds: time after which the search ends, if the budget is not spent before. What it forwards is timed as it goes, and the time
            is kept free to forward those prefixes of the order that it does not come to know.

    Yields:
        At least one order. Once F of all prefixes is known, which with ``start`` holds from the first order on, the value never
        falls. A budget below ``anytime_from`` gives a coarser order than the first rounds of a larger budget, and seldom comes to
        know all prefixes.

    Raises:
        UserError: N below 1, a start that is no order of the regions, a prior that is not R finite numbers, a prior beside a start,
            an objective that returns NaN, or gradients with an objective that has none.
    """
    check_whole("evaluations", evaluations, 1)
    check_seed(seed)
    if seconds is not None:
        check_number("seconds", seconds, 0)
    objective = divided(objective)
    ranked = None if prior is None else _ranked(prior, objective.size, start)
    order = list(range(objective.size)) if ranked is None else ranked[::-1]
    if start is not None:
        order = [int(region) for region in start]
    if sorted(order) != list(range(objective.size)):
        raise UserError(f"start is {describe(start)}: expected each region from 0 to {objective.size - 1} once")
    counted = regions_that_count(objective)
    if len(counted) < objective.size:
        place = {int(region): index for index, region in enumerate(counted)}
        begin = None if start is None else [place[region] for region in order if region in place]
        last = torch.tensor([region for region in order if region not in place], dtype=torch.int64)
        part = PartialObjective(objective, counted)
        guess = None if prior is None else torch.as_tensor(prior)[counted]
        for each in search_orders(part, evaluations=evaluations, start=begin, prior=guess, seed=seed, gradients=gradients, seconds=seconds):
            yield replace(each, order=torch.cat([counted[each.order], last]))
        return
    sets = Sets(objective, evaluations, None if seconds is None else Clock(seconds))
    if gradients:
        _check_gradients(sets, start if prior is None else ranked)
    try:
        sets.keep_time_for(chain_of(order))
        if start is None:
            for order in _first_orders(sets, seed, gradients, ranked):
                sets.keep_time_for(chain_of(order))
                yield found(sets, order)
            if evaluations < anytime_from(sets.objective) and not sets.reaches(chain_of(order)):
                return
        for better in improve(sets, order, seed):
            order = better
            yield found(sets, order)
    except Spent:
        yield found(sets, best_chain(sets, order) if all_known(sets, chain_of(order)) else order)


def _ranked(prior: Sequence[float] | Tensor, size: int, start: Sequence[int] | None) -> list[int]:
    """The regions by a prior, least important first; of equals the highest id first."""
    if start is not None:
        raise UserError("a prior and a start: give one of them, since a prior is there to make a start")
    values = torch.as_tensor(prior).detach().cpu()
    if values.shape != (size,) or not values.isfinite().all():
        raise UserError(f"prior is {describe(prior)}: expected {size} finite numbers, one for each region")
    return values.double().argsort(descending=True, stable=True).flip(0).tolist()


def _check_gradients(sets: Sets, start: Sequence[int] | None) -> None:
    if start is not None:
        raise UserError("gradients=True and a start or a prior: give one of them, since gradients are there to make a start")
    if not math.isfinite(sets.range):
        raise UserError(
            "gradients=True with an objective that has none: expected SubmodularObjective without a weight on the effectiveness"
        )
    if torch.is_inference_mode_enabled():
        raise UserError("gradients=True within torch.inference_mode: call it outside")


def _first_orders(sets: Sets, seed: int, gradients: bool, ranked: Sequence[int] | None) -> Iterator[list[int]]:
    """Orders made from nothing or a ranking: by gradients, or by elimination in steps as small as the budget allows."""
    most = IMAGES_WITH_GRADIENTS / 2 * sum(sets.needed) * sets.size * sets.objective.cost
    if gradients and sets.slope_cost(PREFIXES_IN_A_STEP) <= sets.left <= most:
        return soften(sets, seed)
    if sets.clock is not None:
        sets.know([sets.full])
        ranked = survey(sets) if ranked is None else ranked  # what they take tells how many images there is time for
    if sets.used + sets.affordable < anytime_from(sets.objective):
        return halve(sets, pace_within(sets, surveyed=ranked is None), ranked)
    return eliminate(sets, ranked)


def budget_search(
    objective: Objective | DividedObjective,
    *,
    evaluations: int | None = None,
    start: Sequence[int] | None = None,
    prior: Sequence[float] | Tensor | None = None,
    seed: int = 0,
    gradients: bool = False,
    seconds: float | None = None,
    callback: Callable[[Found], bool | None] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The best order for a budget of forwarded images: backward elimination, then local search with the rest of the budget.

    Args:
        objective, start, prior, seed, gradients, seconds: see ``search_orders``.
        evaluations: N, images forwarded at most; see ``default_budget``. With ``seconds`` any number by default.
        callback: called with the best order so far after each round. The search ends when it returns True.
        progress: called with (images forwarded, N), or with a clock as many as there is time for, which changes.

    Returns:
        int64 [R], region ids, most important first.

    Raises:
        UserError: see ``search_orders``.
    """
    objective = divided(objective)
    budget = evaluations
    if budget is None:
        budget = default_budget(objective) if seconds is None else _ANY_NUMBER
    best, total = torch.arange(objective.size), budget
    for step in search_orders(objective, evaluations=budget, start=start, prior=prior, seed=seed, gradients=gradients, seconds=seconds):
        best, total = step.order, step.within
        report_progress(progress, step.evaluations, total)
        if callback is not None and callback(step):
            break
    report_progress(progress, total, total)
    return best
