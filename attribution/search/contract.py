"""What a search is given: an objective. And what several searches share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from attribution.errors import UserError, describe

Progress = Callable[[int, int], None]


class Objective(Protocol):
    """F, a function of subsets of R regions. A search needs nothing else."""

    @property
    def size(self) -> int:
        """R, the number of regions."""

    def __call__(self, subsets: Tensor, /) -> Tensor:
        """F of each subset: bool [n, R] -> [n]."""


@runtime_checkable
class ScoredObjective(Objective, Protocol):
    """An objective that tells which part of F forwards no image. The bidirectional searches use it."""

    def set_score(self, subsets: Tensor, /) -> Tensor:
        """The part of F that depends on the subset alone: bool [n, R] -> [n]."""


@runtime_checkable
class DividedObjective(Protocol):
    """An objective whose F is a sum over two images: F(S) = shown(image of S) + hidden(image of the complement of S).

    The search by budget forwards the two images one at a time, and the second only where it can change a decision.
    ``SubmodularObjective`` and ``MeanObjective`` are of this kind; ``divided`` makes any other objective into one.
    """

    @property
    def size(self) -> int:
        """R, the number of regions."""

    @property
    def needed(self) -> tuple[bool, bool]:
        """Whether F depends on shown, and whether it depends on hidden."""

    @property
    def highest(self) -> tuple[float, float]:
        """The highest value of shown, and that of hidden; infinite where it is not known."""

    @property
    def cost(self) -> int:
        """What one row of ``parts`` counts as, in forwarded images: 3 for the mean over three fills."""

    @property
    def area(self) -> Tensor | None:
        """float64 [R], the share of the image in each region; None where all regions count alike."""

    @property
    def centres(self) -> Tensor | None:
        """float64 [R, 2], mean row and column of each region; None where regions have no place."""

    def parts(self, rows: Tensor, /) -> tuple[Tensor, Tensor]:
        """Shown and hidden of each image: bool [n, R], the regions in the image -> [n] each.

        A search with gradients gives float rows in [0, 1], how much of each region is in the image.
        """


class UndividedObjective:
    """Any objective as a ``DividedObjective``: all of F counts as shown, without an upper bound.

    Args:
        objective: F. Each subset counts as one image, or as ``objective.cost`` images where there is such an attribute.
            Regions count alike, or by ``objective.area`` where there is one.
    """

    needed = (True, False)
    highest = (math.inf, 0.0)
    centres = None

    def __init__(self, objective: Objective) -> None:
        if not callable(objective) or not hasattr(objective, "size"):
            raise UserError(f"the objective is {describe(objective)}: expected a callable from subsets bool [n, R] to F [n], with size, R")
        self.objective = objective
        self.size = int(objective.size)
        self.cost = int(getattr(objective, "cost", 1))
        self.area: Tensor | None = getattr(objective, "area", None)

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """F of each subset, and zeros."""
        values = torch.as_tensor(self.objective(rows))
        return values, torch.zeros_like(values)


class PartialObjective:
    """A ``DividedObjective`` of some of the regions; the others are never shown.

    Args:
        whole: F over all regions.
        regions: int64 [k], ids; region i of this objective is region ``regions[i]`` of the whole.
    """

    def __init__(self, whole: DividedObjective, regions: Tensor) -> None:
        self._whole, self._regions = whole, regions
        self.size = len(regions)
        self.needed, self.highest, self.cost = whole.needed, whole.highest, whole.cost
        self.area, self.centres = (None if each is None else each[regions] for each in (whole.area, whole.centres))

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Shown and hidden of each image."""
        full = rows.new_zeros(len(rows), self._whole.size)
        full[:, self._regions] = rows
        return self._whole.parts(full)


def divided(objective: Objective | DividedObjective) -> DividedObjective:
    """The objective itself where it is divided, else an ``UndividedObjective`` around it."""
    return objective if isinstance(objective, DividedObjective) else UndividedObjective(objective)


def with_each(members: Tensor, candidates: Tensor) -> Tensor:
    """The set plus each candidate on its own: bool [R], int [n] -> bool [n, R]."""
    subsets = members.repeat(len(candidates), 1)
    subsets[torch.arange(len(candidates)), candidates] = True
    return subsets


def first_maximum(values: Tensor) -> int:
    """Index of the highest value. Ties go to the lowest index."""
    refuse_nan(values)
    return int((values == values.max()).nonzero()[0, 0])


def first_minimum(values: Tensor) -> int:
    """Index of the lowest value. Ties go to the lowest index."""
    refuse_nan(values)
    return int((values == values.min()).nonzero()[0, 0])


def refuse_nan(values: Tensor) -> None:
    """Raise ``UserError`` where an objective returned NaN."""
    if values.isnan().any():
        raise UserError("the objective returned NaN: expected a finite number for every subset")


def report_progress(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
