"""What a search is given, and what all searches share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

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


def with_each(members: Tensor, candidates: Tensor) -> Tensor:
    """The set plus each candidate on its own: bool [R], int [n] -> bool [n, R]."""
    subsets = members.repeat(len(candidates), 1)
    subsets[torch.arange(len(candidates)), candidates] = True
    return subsets


def first_maximum(values: Tensor) -> int:
    refuse_nan(values)
    return int((values == values.max()).nonzero()[0, 0])


def refuse_nan(values: Tensor) -> None:
    if values.isnan().any():
        raise UserError("the objective returned NaN: expected a finite number for every subset")


def report_progress(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
