"""Backward elimination: hide regions one after another, least important first. The order is the reverse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from attribution.search.sets import Sets, with_all

# A region alone is often too small to be missed, so that the first survey hides R / 11 regions around each; with fewer than
# 17 regions that is the region alone. Chosen on development images (see budget.py).
NEIGHBOURHOODS_IN_AN_IMAGE = 11
# The later rounds of ``halve`` hide 1 / 16 of the regions still shown around each. Chosen on development images.
NEIGHBOURHOODS_IN_THE_REST = 16


class Pace(NamedTuple):
    """How large the steps of ``halve`` are.

    Attributes:
        share: of the regions still shown, hidden in each round.
        pool: share of the regions left, those that mattered least, that each round evaluates again.
        both: whether they are evaluated by both halves of F. The survey always uses one half.
    """

    share: float
    pool: float
    both: bool


# From the cheapest to the most thorough; ``pace_within`` takes the last one that the budget pays for. Chosen on development images.
PACES = (
    Pace(0.5, 1.0, False),
    Pace(0.5, 0.6, True),
    Pace(0.5, 0.75, True),
    Pace(0.5, 1.0, True),
    Pace(0.34, 0.6, True),
    Pace(0.25, 0.6, True),
)


def survey(sets: Sets) -> list[int]:
    """Rank the regions, least important first.

    Each region is hidden together with its nearest neighbours, and the loss of F is its importance. One half of F is forwarded.
    Forwards R images, or fewer, with larger neighbourhoods around randomly drawn regions, when the budget is smaller. Regions
    that no neighbourhood held get the mean importance.
    """
    everything = range(sets.size)
    count = round(sets.size / NEIGHBOURHOODS_IN_AN_IMAGE)
    hidden: Sequence[int] = everything
    if (affordable := sets.affordable // sets.objective.cost) < sets.size:
        hidden = np.random.default_rng(0).permutation(sets.size)[:affordable].tolist()
        count = max(count, math.ceil(2 * sets.size / max(1, affordable)))  # so that each region is hidden about twice
    values = _without(sets, hidden, everything, count, both=False)
    usual = sum(values.values()) / max(1, len(values))
    return sorted(everything, key=lambda region: (-values.get(region, usual), -region))


def _without(sets: Sets, candidates: Sequence[int], shown: Sequence[int], count: int, both: bool) -> dict[int, float]:
    """F of the shown regions less a neighbourhood, as a mean over the neighbourhoods that each region lies in.

    Args:
        sets: what is known; the images that this needs are forwarded.
        candidates: regions whose neighbourhoods are hidden, one after the other.
        shown: all regions still shown.
        count: regions in a neighbourhood.
        both: whether F is taken from both halves or from the first.
    """
    neighbourhoods = _neighbourhoods(sets, candidates, shown, count)
    everything = with_all(shown)
    rest = [everything ^ with_all(hidden) for hidden in neighbourhoods]
    if both:
        sets.know(rest)
    else:
        sets.first_half(rest)
    values: dict[int, list[float]] = {}
    for hidden, subset in zip(neighbourhoods, rest, strict=True):
        for region in hidden:
            values.setdefault(region, []).append(sets.most(subset) if both else sets.first(subset))
    return {region: sum(found) / len(found) for region, found in values.items()}


def _neighbourhoods(sets: Sets, candidates: Sequence[int], shown: Sequence[int], count: int) -> list[list[int]]:
    """Each candidate with the shown regions whose centres are nearest, ``count`` in all; alone where regions have no place."""
    centres = sets.objective.centres
    if centres is None or count < 2:
        return [[region] for region in candidates]
    here, there = torch.tensor(list(candidates), dtype=torch.int64), torch.tensor(list(shown), dtype=torch.int64)
    distances = torch.cdist(centres[here], centres[there])
    distances[here[:, None] == there[None]] = -1  # a region comes first in its own, also where others have the same centre
    return there[distances.argsort(dim=1, stable=True)[:, :count]].tolist()


def halve(sets: Sets, pace: Pace, ranked: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Backward elimination in large steps: each round hides a share of the regions for good, those that mattered least.

    Args:
        sets: what is known; the images that this needs are forwarded.
        pace: how large the steps are.
        ranked: all regions, least important first; ``survey`` ranks them by default.

    Yields:
        The order after each round.
    """
    left, hidden = list(survey(sets) if ranked is None else ranked)[::-1], list[int]()
    yield left
    while (kept := len(left) - max(1, int(pace.share * len(left)))) > 1:
        left, hidden = left[:kept], left[kept:] + hidden
        unchanged = kept - math.ceil(pace.pool * kept)
        values = _without(sets, left[unchanged:], left, round(kept / NEIGHBOURHOODS_IN_THE_REST), pace.both)
        left[unchanged:] = sorted(left[unchanged:], key=values.__getitem__)
        yield left + hidden


def pace_within(sets: Sets, surveyed: bool = True) -> Pace:
    """The most thorough pace that the rest of the budget pays for; the cheapest where it pays for none."""
    fitting = [pace for pace in PACES if sets.objective.cost * images_to_halve(sets, pace, surveyed) <= sets.affordable]
    return fitting[-1] if fitting else PACES[0]


def images_to_halve(sets: Sets, pace: Pace, surveyed: bool = True) -> int:
    """The most images that ``halve`` forwards, those of the survey among them where there is one."""
    halves = sum(sets.needed) if pace.both else 1
    left = sets.size
    images = left if surveyed else 0
    while (left := left - max(1, int(pace.share * left))) > 1:
        images += math.ceil(pace.pool * left) * halves
    return images


def eliminate(
    sets: Sets, ranked: Sequence[int] | None = None, *, pool: int = 8, refresh: float = 0.75, tolerance: float = 0.02
) -> Iterator[list[int]]:
    """Backward elimination in small steps: hide the region that F loses least by, then the next, until nothing is shown.

    The defaults were chosen on development images (see budget.py).

    Args:
        sets: what is known; the images that this needs are forwarded.
        ranked: all regions, least important first; ``survey`` ranks them by default.
        pool: regions that a round evaluates, those that mattered least when last evaluated; more where large batches cost little.
        refresh: a round evaluates all regions once no more than this share is left of those that there were the last time.
        tolerance: share of the range of F. A round hides 1, then 2, then 4 more regions and so on, as long as F loses no more than
            this.

    Yields:
        The order after each round: the regions still shown, by their last evaluation, then the hidden ones.
    """
    left = survey(sets) if ranked is None else list(ranked)
    yield left[::-1]
    shown, hidden, refreshed = sets.full, [], len(left)
    last = {region: (0, -float(place)) for place, region in enumerate(left)}  # 1 for evaluated regions, which come before surveyed ones
    while len(left) > 1:
        evaluated = left[: max(pool, sets.together)]
        if len(left) <= refresh * refreshed:
            evaluated, refreshed = left, len(left)
        without = {region: shown ^ 1 << region for region in evaluated}
        first = evaluated[sets.best([list(without.values())])[0]]
        last.update((region, (1, sets.most(without[region]))) for region in evaluated)
        others = sorted((region for region in evaluated if region != first), key=lambda region: last[region][1], reverse=True)
        gone = [first, *_gone_with(sets, without[first], others[: len(left) // 4], tolerance * sets.range)]
        shown ^= with_all(gone)
        hidden += gone
        left = sorted((region for region in left if region not in gone), key=last.__getitem__, reverse=True)
        yield left[::-1] + hidden[::-1]


def _gone_with(sets: Sets, shown: int, others: Sequence[int], margin: float) -> Sequence[int]:
    """The first 1, 3, 7 and so on of the other regions: the most that can be hidden as well while F loses no more than the margin."""
    if not 0 < margin < math.inf:
        return []
    least, count, more = sets.most(shown) - margin, 0, 1
    while count + more <= len(others):
        rest = shown ^ with_all(others[: count + more])
        sets.first_half([rest])
        if sets.most(rest) >= least:
            sets.know([rest])
        if sets.most(rest) < least:
            break
        count += more
        more = count + 1
    return others[:count]
