"""What a search by budget knows about subsets of regions, and what each piece of knowledge costs.

A subset is a Python integer whose bit r says whether region r is shown. F(S) is the sum of two halves, shown(S) and
hidden(complement of S) (see ``DividedObjective``). Each half needs one forwarded image, and no image is forwarded twice.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from attribution.errors import UserError
from attribution.objective import IMAGES_PER_GRADIENT
from attribution.search.contract import DividedObjective, refuse_nan

_RECENT = 4  # batches that tell how long an image takes
_NO_TIME = 1e-9  # seconds
_TOGETHER, _MOST_TOGETHER = 4, 64  # second halves forwarded at once, without a clock and at most
_LOOK_UP = 0.2  # seconds after which the clock is looked at again


class Spent(Exception):
    """The budget is too small for all images asked for. Those that it was enough for are known."""


class Clock:
    """Tells how many more images there is time for, and how many cost hardly more than one, from how long the ones before took.

    Args:
        seconds: from now until the end.

    Attributes:
        reserved: images that are still to be forwarded after the search, whose time is kept free.
    """

    def __init__(self, seconds: float) -> None:
        self.reserved = 0
        self._end = time.perf_counter() + seconds
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)  # (images, seconds) of the last batches
        self._alone = math.inf  # least seconds of an image alone
        self._batch = (1, math.inf)  # (images, least seconds) of the largest batch
        self._short = 0  # images of the largest batch that took no longer than _LOOK_UP

    @property
    def left(self) -> float:
        """Images that there is time for; infinite before any was timed."""
        if not self._recent:
            return math.inf
        images, seconds = (sum(each) for each in zip(*self._recent, strict=True))
        return max(0.0, self._end - time.perf_counter()) * images / max(seconds, _NO_TIME) - self.reserved

    @property
    def at_once(self) -> int:
        """Images to be forwarded before the clock is looked at again: twice as many as were fast enough, one at first."""
        return 2 * self._short or 1

    @property
    def together(self) -> int:
        """Images in a batch that takes twice as long as what it takes in any case, from 4 to 64.

        If a batch of n takes a + c n, that is n = a / c: a few on a CPU, where each image takes its time, many on an accelerator.
        """
        images, seconds = self._batch
        if images == 1 or not math.isfinite(self._alone):
            return _TOGETHER
        each = max((seconds - self._alone) / (images - 1), _NO_TIME)
        return min(_MOST_TOGETHER, max(_TOGETHER, round((self._alone - each) / each)))

    @contextmanager
    def timed(self, images: int) -> Iterator[None]:
        """Measure the time that these images take."""
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self._recent.append((images, spent))
        if images == 1:
            self._alone = min(self._alone, spent)
        elif images >= self._batch[0]:
            self._batch = images, spent if images > self._batch[0] else min(spent, self._batch[1])
        if spent <= _LOOK_UP:
            self._short = max(self._short, images)
        elif images <= self._short:  # the machine has become slower
            self._short = images // 2


class Sets:
    """The images forwarded so far, and what they say about F of subsets.

    Args:
        objective: F.
        evaluations: N, images forwarded at most.
        clock: ends the search like a budget that is spent; None for no limit of time.

    Attributes:
        size: R, the number of regions.
        full: the subset of all regions.
        left, used: images that may still be forwarded, and images forwarded.
        area: share of the image in each region, R values.
        range: the highest value of F minus 0; infinite where no bound is known.
        forwarded: (shown, hidden) of each image that was forwarded.
    """

    def __init__(self, objective: DividedObjective, evaluations: int, clock: Clock | None = None) -> None:
        self.objective, self.clock = objective, clock
        self.size, self.needed = objective.size, objective.needed
        self.full = (1 << self.size) - 1
        self.left, self.used = evaluations, 0
        area = objective.area
        self.area = [1 / self.size] * self.size if area is None else torch.as_tensor(area, dtype=torch.float64).tolist()
        self.forwarded: dict[int, tuple[float, float]] = {}
        self._highest = (float(objective.highest[0]), float(objective.highest[1]))
        self.range = sum(highest for highest, needed in zip(self._highest, self.needed, strict=True) if needed)

    def forward(self, images: Iterable[int]) -> None:
        """Forward the images that are not known yet, in the order given, as far as the budget allows.

        Raises:
            Spent: the budget was not enough for all of them.
        """
        new = [image for image in dict.fromkeys(images) if image not in self.forwarded]
        cost = self.objective.cost
        while new:
            if not (affordable := new[: self._most_at_once() // cost]):
                raise Spent
            with nullcontext() if self.clock is None else self.clock.timed(cost * len(affordable)):
                shown, hidden = self.objective.parts(self.rows(affordable))
                pairs = torch.stack([shown, hidden], dim=1).double().cpu()
            refuse_nan(pairs)
            self.forwarded.update(zip(affordable, map(tuple, pairs.tolist()), strict=True))
            self._pay(cost * len(affordable))
            new = new[len(affordable) :]

    @property
    def affordable(self) -> int:
        """Images that may still be forwarded: what is left of the budget, as far as there is time."""
        return self.left if self.clock is None else int(min(self.left, self.clock.left))

    def _most_at_once(self) -> int:
        most = self.affordable
        return most if self.clock is None else min(most, max(self.objective.cost, self.clock.at_once))

    def keep_time_for(self, subsets: Sequence[int]) -> None:
        """Keep as much time free as the images of these subsets take that are not known: they are forwarded after the search."""
        if self.clock is not None:
            images = {image for subset in subsets for image in (subset, self.full ^ subset)}
            self.clock.reserved = self.objective.cost * len(images.difference(self.forwarded))

    def know(self, subsets: Sequence[int]) -> None:
        """Forward what F of these subsets needs."""
        self.forward(image for subset in subsets for image in self._images(subset))

    def first_half(self, subsets: Sequence[int]) -> None:
        """Forward one image of each subset: the shown one where F needs it, else the hidden one."""
        self.forward(subsets if self.needed[0] else [self.full ^ subset for subset in subsets])

    def reaches(self, subsets: Sequence[int]) -> bool:
        """Whether the budget is enough to know F of all these subsets."""
        unknown = {image for subset in subsets for image in self._images(subset)}.difference(self.forwarded)
        return self.objective.cost * len(unknown) <= self.affordable

    def known(self, subset: int) -> bool:
        """Whether F of the subset is known."""
        return all(image in self.forwarded for image in self._images(subset))

    def most(self, subset: int) -> float:
        """F of the subset where it is known, else its upper bound: unknown halves count with their highest value."""
        shown, hidden = self.forwarded.get(subset), self.forwarded.get(self.full ^ subset)
        first = (self._highest[0] if shown is None else shown[0]) if self.needed[0] else 0.0
        second = (self._highest[1] if hidden is None else hidden[1]) if self.needed[1] else 0.0
        return first + second

    def first(self, subset: int) -> float:
        """The half of F that ``first_half`` makes known."""
        return self.forwarded[subset][0] if self.needed[0] else self.forwarded[self.full ^ subset][1]

    def room(self, subset: int) -> float:
        """How far F of this subset is below the highest value that F can have."""
        return self.range - self.most(subset)

    @property
    def together(self) -> int:
        """Images worth forwarding at once, some of which may turn out not to be needed."""
        return _TOGETHER if self.clock is None else self.clock.together

    def best(self, groups: Sequence[Sequence[int]], together: int | None = None) -> list[int]:
        """Place of the subset with the highest F in each group. Ties go to the first of the subsets whose F became known.

        The first half of every subset is forwarded. The second half is forwarded only while the upper bound is above the best F
        of the group, ``together`` subsets of each group at a time and all groups in one batch.
        """
        together = together or self.together
        self.first_half([subset for group in groups for subset in group])
        waiting = [self._by_bound(group, range(len(group))) for group in groups]
        winners, values = [-1] * len(groups), [-math.inf] * len(groups)
        while undecided := [g for g, places in enumerate(waiting) if places]:
            tried = {g: waiting[g][:together] for g in undecided}
            self.know([groups[g][at] for g, places in tried.items() for at in places])
            for g, places in tried.items():
                for at in places:
                    value = self.most(groups[g][at])
                    if value > values[g] or (value == values[g] and at < winners[g]):
                        winners[g], values[g] = at, value
                rest = [at for at in waiting[g][together:] if self.most(groups[g][at]) > values[g]]
                waiting[g] = self._by_bound(groups[g], rest)  # again, because other groups may have made images of this one known
        return winners

    def slope(self, scores: Tensor, gates: Tensor) -> Tensor:
        """Gradient of the mean F of soft subsets with respect to the scores.

        Args:
            scores: float [R], a leaf.
            gates: float [n, R] in [0, 1], a function of the scores: how much of each region a subset shows.

        Raises:
            Spent: the budget is not enough.
            UserError: no gradients flow through the objective.
        """
        cost = self.slope_cost(len(gates))
        if cost > self.left:
            raise Spent
        rows = torch.cat([each for each, needed in zip((gates, 1 - gates), self.needed, strict=True) if needed])
        shown, hidden = self.objective.parts(rows)
        self._pay(cost)
        value = (shown[: len(gates)] + hidden[-len(gates) :]).mean()  # a half that F does not need is 0 for every row
        if not value.requires_grad:
            raise UserError("gradients=True, but none flow through this model: expected an nn.Module; for a black box leave gradients out")
        return torch.autograd.grad(value, scores)[0]

    def slope_cost(self, count: int) -> int:
        """The number of images that a gradient over ``count`` soft subsets counts as."""
        return IMAGES_PER_GRADIENT * self.objective.cost * count * sum(self.needed)

    def rows(self, subsets: Sequence[int]) -> Tensor:
        """Subsets as bool [n, R]."""
        width = (self.size + 7) // 8
        packed = np.frombuffer(b"".join(subset.to_bytes(width, "little") for subset in subsets), dtype=np.uint8)
        bits = np.unpackbits(packed.reshape(-1, width), axis=1, bitorder="little", count=self.size)
        return torch.from_numpy(bits.astype(bool))

    def _images(self, subset: int) -> list[int]:
        return [image for image, needed in zip((subset, self.full ^ subset), self.needed, strict=True) if needed]

    def _by_bound(self, group: Sequence[int], places: Iterable[int]) -> list[int]:
        return sorted(places, key=lambda at: -self.most(group[at]))

    def _pay(self, images: int) -> None:
        self.left -= images
        self.used += images


def with_all(regions: Iterable[int]) -> int:
    """The subset of these regions."""
    return sum(1 << region for region in regions)


def members(subset: int) -> list[int]:
    """Regions of a subset, ascending."""
    found = []
    while subset:
        lowest = subset & -subset
        found.append(lowest.bit_length() - 1)
        subset ^= lowest
    return found
