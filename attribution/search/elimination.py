"""Backward elimination: regions are hidden, least important first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from attribution.search.sets import Sets

_NEIGHBOURHOODS = 11  # that an image is cut into where regions are hidden with those around them
_COMPANIONS = 16  # where elimination goes in large steps, one region of so many still shown is hidden at a time, the nearest together
_PACES = ((0.5, 1.0, False), (0.5, 1.0, True), (0.34, 0.6, True), (0.25, 0.6, True))  # of ``halve``, the cheapest first


def survey(sets: Sets) -> list[int]:
    """Regions by how little F minds when their neighbourhood is hidden, the one that matters least first: R images, fewer if need be.

    A region alone is often too small to be missed; where the objective does not say where regions lie, they are hidden one by one.
    """
    everything = range(sets.size)
    count = round(sets.size / _NEIGHBOURHOODS)
    hidden: Sequence[int] = everything
    if (affordable := sets.left // sets.objective.cost) < sets.size:  # fewer and larger neighbourhoods, anywhere
        hidden = np.random.default_rng(0).permutation(sets.size)[:affordable].tolist()
        count = max(count, math.ceil(2 * sets.size / max(1, affordable)))
    values = _without(sets, hidden, everything, count, both=False)
    usual = sum(values.values()) / max(1, len(values))
    return sorted(everything, key=lambda region: (-values.get(region, usual), -region))


def _without(sets: Sets, candidates: Sequence[int], shown: Sequence[int], count: int, both: bool) -> dict[int, float]:
    """Mean F of what is left when each candidate is hidden with the nearest others, ``count`` in all; by one half of F or by both.

    For every region that was hidden, with whichever candidate.
    """
    centres = getattr(sets.objective, "centres", None)
    if centres is None or count < 2:
        around = [[region] for region in candidates]
    else:
        here, there = torch.tensor(list(candidates), dtype=torch.int64), torch.tensor(list(shown), dtype=torch.int64)
        distances = torch.cdist(centres[here], centres[there])
        distances[here[:, None] == there[None]] = -1  # its own first, also where others have the same centre
        around = there[distances.argsort(dim=1, stable=True)[:, :count]].tolist()
    subset = sum(1 << region for region in shown)
    without = [subset ^ sum(1 << region for region in regions) for regions in around]
    if both:
        sets.know(without)
    else:
        sets.first_half(without)
    values: dict[int, list[float]] = {}
    for regions, rest in zip(around, without, strict=True):
        for region in regions:
            values.setdefault(region, []).append(sets.most(rest) if both else sets.first(rest))
    return {region: sum(found) / len(found) for region, found in values.items()}


def halve(sets: Sets, share: float, pool: float, both: bool) -> Iterator[list[int]]:
    """Backward elimination in large steps: what mattered least goes, ``share`` of what is shown at a time, and is not looked at again.

    Args:
        share: of the regions still shown, hidden in each round.
        pool: share of them, those that mattered least, that each round looks at again, each hidden with its neighbours.
        both: whether by both halves of F; the survey has one.

    Yields:
        The order after each round.
    """
    left, hidden = survey(sets)[::-1], list[int]()
    yield left
    while (kept := len(left) - max(1, int(share * len(left)))) > 1:
        left, hidden = left[:kept], left[kept:] + hidden
        stay = kept - math.ceil(pool * kept)
        values = _without(sets, left[stay:], left, round(kept / _COMPANIONS), both)
        left[stay:] = sorted(left[stay:], key=values.__getitem__)
        yield left + hidden


def pace(sets: Sets) -> tuple[float, float, bool]:
    """The most thorough elimination in large steps that what is left of the budget is enough for."""
    fitting = [pace for pace in _PACES if sets.objective.cost * _images_to_halve(sets, *pace) <= sets.left]
    return fitting[-1] if fitting else _PACES[0]


def _images_to_halve(sets: Sets, share: float, pool: float, both: bool) -> int:
    """The most images that ``halve`` forwards."""
    halves = sum(sets.needed) if both else 1
    images = left = sets.size
    while (left := left - max(1, int(share * left))) > 1:
        images += math.ceil(pool * left) * halves
    return images


def eliminate(sets: Sets, *, pool: int = 8, refresh: float = 0.75, tolerance: float = 0.02) -> Iterator[list[int]]:
    """Backward elimination: hide the region whose loss F minds least, then the next, until nothing is shown.

    Only the ``pool`` regions that mattered least when last looked at are looked at again, all of them whenever a quarter is gone
    (1 - ``refresh``). While F keeps what the first loses, up to a share of its range, others go with it: 1, 2, 4 ... more.

    Yields:
        The order after each round: regions still shown, as they mattered when last looked at, then those hidden.
    """
    left = survey(sets)
    yield left[::-1]
    shown, hidden, refreshed = sets.full, [], len(left)
    last = {region: (0, -float(place)) for place, region in enumerate(left)}  # those looked at come before those surveyed
    while len(left) > 1:
        looked_at = left[:pool]
        if len(left) <= refresh * refreshed:
            looked_at, refreshed = left, len(left)
        without = {region: shown ^ 1 << region for region in looked_at}
        first = looked_at[sets.best([list(without.values())])[0]]
        last.update((region, (1, sets.most(without[region]))) for region in looked_at)
        ranked = sorted((region for region in looked_at if region != first), key=lambda region: last[region][1], reverse=True)
        gone = [first, *_gone_with(sets, shown ^ 1 << first, ranked[: len(left) // 4], tolerance * sets.range)]
        for region in gone:
            shown ^= 1 << region
        hidden += gone
        left = sorted((region for region in left if region not in gone), key=last.__getitem__, reverse=True)
        yield left[::-1] + hidden[::-1]


def _gone_with(sets: Sets, shown: int, others: Sequence[int], margin: float) -> Sequence[int]:
    """As many of the others, doubling, as can be hidden too while F loses no more than the margin."""
    if not 0 < margin < math.inf:
        return []
    least, count, more = sets.most(shown) - margin, 0, 1
    while count + more <= len(others):
        rest = shown
        for region in others[: count + more]:
            rest ^= 1 << region
        sets.first_half([rest])
        if sets.most(rest) >= least:
            sets.know([rest])
        if sets.most(rest) < least:
            break
        count += more
        more = count + 1
    return others[:count]
