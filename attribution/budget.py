"""Search by budget: the best order that so many forwarded images can buy, and the polishing of an order that is already there.

Both raise the mean of F along the order, over the share of the image that its first regions cover: with weights 1 and 1 that is
Insertion - Deletion itself. F(S) is the sum of what the image of S gives and what the image of its complement gives, so the first
half alone often shows that a set cannot be better than one already known, and the second is then never forwarded. Every image is
forwarded once and remembered; whatever chain through the sets known is best is the order. With less than about 6 images a region
there is no chain to know: elimination then goes in steps large enough to come to its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.errors import UserError, describe
from attribution.objective import WITH_GRADIENT

_TIE = 1e-9  # gains below this are rounding
_WINDOW = 12  # places of an order that are filled again together
_LANES = 2  # windows filled again side by side
_NEIGHBOURHOODS = 11  # that an image is cut into where regions are hidden with those around them
_LEAST_ROOM = 0.3  # of a window, against the one with most
_SWEEPS = 16  # of neighbours, at most in a row
_PATIENCE = 30  # rounds in which no new image was asked for
_COMPANIONS = 16  # where elimination goes in large steps, one region of so many still shown is hidden at a time, the nearest together
_PACES = ((0.5, 1.0, False), (0.5, 1.0, True), (0.34, 0.6, True), (0.25, 0.6, True))  # of ``halve``, the cheapest first
_UNHURRIED = 6  # images a region, three of each half, from which on elimination goes one by one
_UNBOUNDED = 24  # the same where no bound of F is known
_LEVELS = 4  # prefixes, each with its complement, that a step of ``soften`` looks at
_SOFTNESS = 0.3  # of their borders; the scores of regions run from -2 to 2 at first
_RATE = 0.6  # of Adam
_SOFTENED = 1.5  # images a region of both halves; with more, elimination does better than gradients


@dataclass(frozen=True, eq=False)
class Found:
    """The best order so far.

    Attributes:
        order: int64 [R], region ids, most important first.
        value: mean of F along the order, over the area; NaN while some of its prefixes are unknown.
        evaluations: images forwarded so far.
    """

    order: Tensor
    value: float
    evaluations: int


class _Spent(Exception):
    """The budget does not reach for all images asked for; those that it reached for are known."""


class _Sets:
    """What is known of subsets, each an integer whose bit r says whether region r is shown."""

    def __init__(self, objective: Any, evaluations: int) -> None:
        self.objective = objective if hasattr(objective, "parts") else _Whole(objective)
        self.size = int(objective.size)
        self.full = (1 << self.size) - 1
        self.left = evaluations
        self.used = 0
        area = getattr(objective, "area", None)
        self.area = [1 / self.size] * self.size if area is None else torch.as_tensor(area, dtype=torch.float64).tolist()
        self.needed: tuple[bool, bool] = self.objective.needed
        self._parts: dict[int, tuple[float, float]] = {}
        most = self.objective.highest
        self._most = (float(most[0]), float(most[1]))
        self.range = sum(part for part, needed in zip(self._most, self.needed, strict=True) if needed)

    def forward(self, images: Iterable[int]) -> None:
        """Get to know images; as many as the budget allows, in the order given.

        Raises:
            _Spent: not all of them.
        """
        new = [image for image in dict.fromkeys(images) if image not in self._parts]
        cost = self.objective.cost
        affordable = new[: self.left // cost]
        if affordable:
            shown, hidden = self.objective.parts(self.rows(affordable))
            pairs = torch.stack([shown, hidden], dim=1).double().cpu()
            if pairs.isnan().any():
                raise UserError("the objective returned NaN: expected a finite number for every subset")
            self._parts.update(zip(affordable, map(tuple, pairs.tolist()), strict=True))
            self.left -= cost * len(affordable)
            self.used += cost * len(affordable)
        if len(affordable) < len(new):
            raise _Spent

    def know(self, subsets: Sequence[int]) -> None:
        """Get to know F of subsets."""
        self.forward(image for subset in subsets for image in self._images(subset))

    def reaches(self, subsets: Sequence[int]) -> bool:
        """Whether the budget is enough to get to know F of all these."""
        unknown = {image for subset in subsets for image in self._images(subset)}.difference(self._parts)
        return self.objective.cost * len(unknown) <= self.left

    def known(self, subset: int) -> bool:
        return all(image in self._parts for image in self._images(subset))

    def most(self, subset: int) -> float:
        """F where it is known, and else the highest that it can be."""
        shown, hidden = self._parts.get(subset), self._parts.get(self.full ^ subset)
        first = (self._most[0] if shown is None else shown[0]) if self.needed[0] else 0.0
        second = (self._most[1] if hidden is None else hidden[1]) if self.needed[1] else 0.0
        return first + second

    def first(self, subset: int) -> float:
        """The half of F that ``first_half`` gets to know."""
        return self._parts[subset][0] if self.needed[0] else self._parts[self.full ^ subset][1]

    def room(self, subset: int) -> float:
        """How much higher than F of this subset any F can be."""
        return self.range - self.most(subset)

    def first_half(self, subsets: Sequence[int]) -> None:
        """Forward one image of each: that of the shown regions, where F needs it."""
        self.forward(subsets if self.needed[0] else [self.full ^ subset for subset in subsets])

    def slope(self, scores: Tensor, gates: Tensor) -> Tensor:
        """Gradient of the mean F of soft subsets, gates [n, R] in [0, 1] that are a function of the scores; an image counts as three.

        Raises:
            _Spent: the budget does not reach.
            UserError: no gradients flow through the objective.
        """
        cost = self.slope_cost(len(gates))
        if cost > self.left:
            raise _Spent
        rows = torch.cat([each for each, needed in zip((gates, 1 - gates), self.needed, strict=True) if needed])
        shown, hidden = self.objective.parts(rows)
        self.left -= cost
        self.used += cost
        value = (shown[: len(gates)] + hidden[-len(gates) :]).mean()  # the half that F does not need is 0 throughout
        if not value.requires_grad:
            raise UserError("gradients=True, but none flow through this model: expected an nn.Module; for a black box leave them away")
        return torch.autograd.grad(value, scores)[0]

    def slope_cost(self, count: int) -> int:
        """What the gradient over so many soft subsets counts as, in images."""
        return WITH_GRADIENT * self.objective.cost * count * sum(self.needed)

    def best(self, groups: Sequence[Sequence[int]], together: int = 4) -> list[int]:
        """Index of the subset with the highest F in each group, of equals one that was tried first.

        Second halves are forwarded, a few at a time and those of all groups together, only while they could win.
        """
        self.first_half([subset for group in groups for subset in group])
        ranked = [sorted(range(len(group)), key=lambda at, group=group: -self.most(group[at])) for group in groups]  # type: ignore[misc]
        winners, values = [-1] * len(groups), [-math.inf] * len(groups)
        undecided = list(range(len(groups)))
        while undecided:
            tried = {g: ranked[g][:together] for g in undecided}
            self.know([groups[g][at] for g, part in tried.items() for at in part])
            for g, part in tried.items():
                ranked[g] = ranked[g][together:]
                for at in part:
                    found = self.most(groups[g][at])
                    if found > values[g] or (found == values[g] and at < winners[g]):
                        winners[g], values[g] = at, found
                hopeful = [at for at in ranked[g] if self.most(groups[g][at]) > values[g]]  # others may be known by now
                ranked[g] = sorted(hopeful, key=lambda at, group=groups[g]: -self.most(group[at]))  # type: ignore[misc]
            undecided = [g for g in undecided if ranked[g]]
        return winners

    def mean(self, chain: Sequence[int]) -> float:
        """Mean of F along sets of which each contains the one before, over the area; unknown F count as the highest possible."""
        values = [self.most(subset) for subset in chain]
        return sum(
            (before + after) / 2 * self.share(small, large)
            for small, large, before, after in zip(chain, chain[1:], values, values[1:], strict=False)
        )

    def share(self, small: int, large: int) -> float:
        """Area of the regions that the larger set has and the smaller has not."""
        return sum(self.area[region] for region in members(large ^ small))

    def chain(self, order: Sequence[int]) -> list[int]:
        """The R + 1 prefixes of an order."""
        found = [0]
        for region in order:
            found.append(found[-1] | 1 << region)
        return found

    def best_chain(self, order: Sequence[int]) -> list[int]:
        """The order with the highest mean F among all whose prefixes are known; the given one, known too, where none is better."""
        levels: list[list[int]] = [[] for _ in range(self.size + 1)]
        for image in self._parts:
            subset = image if self.needed[0] else self.full ^ image
            if self.known(subset):
                levels[subset.bit_count()].append(subset)
        reached: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
        for level in levels[1:]:
            found: dict[int, tuple[float, int]] = {}
            for subset in level:
                for before, (total, _) in reached[-1].items():
                    if before & subset == before:
                        step = subset ^ before
                        gained = total + (self.most(before) + self.most(subset)) / 2 * self.area[step.bit_length() - 1]
                        if subset not in found or gained > found[subset][0]:
                            found[subset] = (gained, before)
            reached.append(found)
        if reached[-1][self.full][0] <= self.mean(self.chain(order)) + _TIE:
            return list(order)
        best, subset = [], self.full
        for found in reversed(reached[1:]):
            before = found[subset][1]
            best.append((subset ^ before).bit_length() - 1)
            subset = before
        return best[::-1]

    def all_known(self, chain: Sequence[int]) -> bool:
        return all(map(self.known, chain))

    def found(self, order: Sequence[int]) -> Found:
        chain = self.chain(order)
        value = self.mean(chain) if self.all_known(chain) else math.nan
        return Found(torch.tensor(order, dtype=torch.int64), value, self.used)

    def rows(self, subsets: Sequence[int]) -> Tensor:
        """bool [n, R]."""
        width = (self.size + 7) // 8
        packed = np.frombuffer(b"".join(subset.to_bytes(width, "little") for subset in subsets), dtype=np.uint8)
        bits = np.unpackbits(packed.reshape(-1, width), axis=1, bitorder="little", count=self.size)
        return torch.from_numpy(bits.astype(bool))

    def _images(self, subset: int) -> list[int]:
        return [image for image, needed in zip((subset, self.full ^ subset), self.needed, strict=True) if needed]


class _Whole:
    """An objective of which nothing is known but F: all of F counts as the shown half, without a bound."""

    highest = (math.inf, 0.0)
    needed = (True, False)

    def __init__(self, objective: Callable[[Tensor], Tensor]) -> None:
        self.objective = objective
        self.size = int(objective.size)  # type: ignore[attr-defined]
        self.cost = int(getattr(objective, "cost", 1))

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.as_tensor(self.objective(rows))
        return found, torch.zeros_like(found)


def members(subset: int) -> list[int]:
    """Regions of a subset, ascending."""
    found = []
    while subset:
        lowest = subset & -subset
        found.append(lowest.bit_length() - 1)
        subset ^= lowest
    return found


def survey(sets: _Sets) -> list[int]:
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


def _without(sets: _Sets, candidates: Sequence[int], shown: Sequence[int], count: int, both: bool) -> dict[int, float]:
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


def halve(sets: _Sets, share: float, pool: float, both: bool) -> Iterator[list[int]]:
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


def soften(sets: _Sets, seed: int = 0) -> Iterator[list[int]]:
    """Scores of regions, such that F rises along the soft prefixes of their order: gradient steps (Adam) through gates.

    A prefix that ends with score t shows region r by sigmoid((s_r - t) / softness), a few prefixes a step. The first step is taken
    where all regions are equally shown; the ranks of its gradient over the area are the first scores.

    Yields:
        The order after each step, as long as the budget lasts.
    """
    generator = np.random.default_rng(seed)
    area = torch.tensor(sets.area, dtype=torch.float32)
    scores = torch.zeros(sets.size, requires_grad=True)
    optimiser = torch.optim.Adam([scores], lr=_RATE)
    started = False
    while True:
        places = (torch.arange(_LEVELS) + torch.from_numpy(generator.random(_LEVELS)).float()) / _LEVELS
        with torch.enable_grad():
            if started:
                ends = scores.detach().sort(descending=True).values[(places * sets.size).long()]
                gates = torch.sigmoid((scores - ends[:, None]) / _SOFTNESS)
            else:
                gates = places[:, None] + scores
            slope = sets.slope(scores, gates)
        if started:
            scores.grad = -slope
            optimiser.step()
        else:
            started = True
            with torch.no_grad():
                scores[(slope / area).argsort(descending=True, stable=True)] = torch.linspace(2, -2, sets.size)
        yield scores.detach().argsort(descending=True, stable=True).tolist()


def anytime_from(objective: Any) -> int:
    """The least budget whose search is the beginning of that with any larger one; below, elimination goes in large steps to end in time.

    That is where elimination one by one comes to its end, which takes longer where no bound of F is known that could cut it short.
    """
    halves = sum(getattr(objective, "needed", (True, False)))
    bounded = all(math.isfinite(float(most)) for most in getattr(objective, "highest", (math.inf,)))
    return math.ceil((_UNHURRIED if bounded else _UNBOUNDED) / 2 * halves * int(objective.size)) * int(getattr(objective, "cost", 1))


def _pace(sets: _Sets) -> tuple[float, float, bool]:
    """The most thorough elimination in large steps that what is left of the budget is enough for."""
    fitting = [pace for pace in _PACES if sets.objective.cost * _images_to_halve(sets, *pace) <= sets.left]
    return fitting[-1] if fitting else _PACES[0]


def _images_to_halve(sets: _Sets, share: float, pool: float, both: bool) -> int:
    """The most images that ``halve`` forwards."""
    halves = sum(sets.needed) if both else 1
    images = left = sets.size
    while (left := left - max(1, int(share * left))) > 1:
        images += math.ceil(pool * left) * halves
    return images


def eliminate(sets: _Sets, *, pool: int = 8, refresh: float = 0.75, tolerance: float = 0.02) -> Iterator[list[int]]:
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


def _gone_with(sets: _Sets, shown: int, others: Sequence[int], margin: float) -> Sequence[int]:
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


def swap_neighbours(sets: _Sets, order: list[int], first: int) -> bool:
    """One odd or even sweep: neighbours at first, first + 2, ... change places where the one changed prefix gains, in place.

    Returns:
        Whether any did. All prefixes of the order must be known.
    """
    chain = sets.chain(order)
    places = [at for at in range(first, sets.size - 1, 2) if sets.room(chain[at + 1]) > _TIE]
    swapped = [[chain[at], chain[at] | 1 << order[at + 1], chain[at + 2]] for at in places]
    better = _gains(sets, [(new, chain[at : at + 3]) for new, at in zip(swapped, places, strict=True)])
    for at, gain in zip(places, better, strict=True):
        if gain:
            order[at], order[at + 1] = order[at + 1], order[at]
    return any(better)


def _gains(sets: _Sets, changes: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
    """Which pieces of chains (new, old) gain; second halves are forwarded for those that still can."""
    sets.first_half([subset for new, _ in changes for subset in new])
    hopeful = [sets.mean(new) > sets.mean(old) + _TIE for new, old in changes]
    sets.know([subset for (new, _), hope in zip(changes, hopeful, strict=True) if hope for subset in new])
    return [hope and sets.mean(new) > sets.mean(old) + _TIE for (new, old), hope in zip(changes, hopeful, strict=True)]


def rebuild(sets: _Sets, order: list[int], windows: Sequence[tuple[int, int]], backward: bool) -> None:
    """Fill windows (start, stop) of the order again greedily, from their last place to the first or the other way, in place.

    The windows do not overlap; candidates of all are forwarded together. A window that does not gain stays.
    """
    chain = sets.chain(order)
    left = [sorted(order[start:stop], reverse=backward) for start, stop in windows]
    placed: list[list[int]] = [[] for _ in windows]
    here = [chain[stop] if backward else chain[start] for start, stop in windows]
    while busy := [at for at, regions in enumerate(left) if len(regions) > 1]:
        steps = [[here[at] ^ 1 << region for region in left[at]] for at in busy]
        for at, group, best in zip(busy, steps, sets.best(steps), strict=True):
            placed[at].append(left[at].pop(best))
            here[at] = group[best]
    for (start, stop), rest, found in zip(windows, left, placed, strict=True):
        filled = rest + found[::-1] if backward else found + rest
        new = sets.chain([*order[:start], *filled])[start:]
        if sets.mean(new) > sets.mean(chain[start : stop + 1]) + _TIE:
            order[start:stop] = filled


def improve(sets: _Sets, order: Sequence[int], seed: int = 0) -> Iterator[list[int]]:
    """Local search: neighbours change places, then windows are filled again where F has most room to rise.

    Yields:
        The best order known after each round, until no new set is found to try.
    """
    sets.know(sets.chain(order))
    found = sets.best_chain(order)
    yield list(found)
    generator = np.random.default_rng(seed)
    unchanged = 0
    while unchanged < _PATIENCE:
        used = sets.used
        for _ in _swept(sets, found):
            yield list(found)
        if not any(sets.room(subset) > _TIE for subset in sets.chain(found)):
            return
        windows = _windows(sets, found, generator)
        rebuild(sets, found, windows, backward=bool(generator.integers(2)))
        found = sets.best_chain(found)
        yield list(found)
        unchanged = unchanged + 1 if sets.used == used else 0


def _swept(sets: _Sets, order: list[int]) -> Iterator[None]:
    """Odd and even sweeps in turn, until two in a row change nothing."""
    quiet = 0
    for parity in range(_SWEEPS):
        quiet = 0 if swap_neighbours(sets, order, parity % 2) else quiet + 1
        yield
        if quiet == 2:
            return


def _windows(sets: _Sets, order: Sequence[int], generator: np.random.Generator) -> list[tuple[int, int]]:
    """Windows that do not overlap, drawn by how much F could still rise in them."""
    width = min(_WINDOW, sets.size)
    starts = range(int(generator.integers(width)) - width, sets.size, width)
    tiles = [(max(0, start), min(sets.size, start + width)) for start in starts]
    tiles = [(start, stop) for start, stop in tiles if stop - start > 2]
    chain = sets.chain(order)
    room = np.array([sum(sets.room(subset) for subset in chain[start + 1 : stop]) for start, stop in tiles])
    room = np.where(np.isfinite(room), room.clip(0), 1.0)
    room[room < _LEAST_ROOM * room.max(initial=0)] = 0
    if not room.sum() > 0:
        return []
    drawn = generator.choice(len(tiles), size=min(_LANES, int((room > 0).sum())), replace=False, p=room / room.sum())
    return [tiles[at] for at in sorted(drawn)]


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
    sets = _Sets(objective, evaluations)
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
            if gradients and sets.slope_cost(_LEVELS) <= evaluations <= _SOFTENED / 2 * sum(sets.needed) * sets.size * sets.objective.cost:
                begin = soften(sets, seed)
            else:
                begin = halve(sets, *_pace(sets)) if hurried else eliminate(sets)
            for order in begin:
                yield sets.found(order)
            if hurried and not sets.reaches(sets.chain(order)):
                return
        for better in improve(sets, order, seed):
            order = better
            yield sets.found(order)
    except _Spent:
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
