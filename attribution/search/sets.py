"""What a search by budget knows of subsets of regions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.errors import UserError
from attribution.objective import WITH_GRADIENT

TIE = 1e-9  # gains below this are rounding


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


class Spent(Exception):
    """The budget does not reach for all images asked for; those that it reached for are known."""


class Sets:
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
            Spent: not all of them.
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
            raise Spent

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
            Spent: the budget does not reach.
            UserError: no gradients flow through the objective.
        """
        cost = self.slope_cost(len(gates))
        if cost > self.left:
            raise Spent
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
        if reached[-1][self.full][0] <= self.mean(self.chain(order)) + TIE:
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
