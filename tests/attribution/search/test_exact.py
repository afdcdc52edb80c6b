"""The exact search: no order is better, by trying all of them."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

import attribution as at
from attribution.search.budget import budget_search
from attribution.search.exact import exact_search


class Halves:
    """F(S) = shown(S) + hidden(complement) of random halves; which halves count, and areas of the regions, are given."""

    highest = (1.0, 1.0)
    cost = 1
    centres: Tensor | None = None

    def __init__(self, size: int, seed: int, needed: tuple[bool, bool] = (True, True), area: list[float] | None = None) -> None:
        self.size, self.seed, self.needed, self.images = size, seed, needed, 0
        self.area = None if area is None else torch.tensor(area, dtype=torch.float64)

    def half(self, name: str, image: frozenset[int]) -> float:
        counted = image if self.area is None else frozenset(region for region in image if self.area[region] > 0)
        return random.Random(f"{self.seed} {name} {sorted(counted)}").random()

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        self.images += len(rows)
        images = [frozenset(row.nonzero()[:, 0].tolist()) for row in rows]
        return tuple(torch.tensor([self.half(name, image) for image in images]) for name in ("shown", "hidden"))

    def mean(self, order: list[int]) -> float:
        area = [1 / self.size] * self.size if self.area is None else self.area.tolist()
        values = []
        for k in range(self.size + 1):
            first, rest = frozenset(order[:k]), frozenset(order[k:])
            values.append(self.needed[0] * self.half("shown", first) + self.needed[1] * self.half("hidden", rest))
        return sum(area[order[k]] * (values[k] + values[k + 1]) / 2 for k in range(self.size))


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("area", [None, [0.1, 0.3, 0.05, 0.25, 0.2, 0.1], [0.4, 0.0, 0.1, 0.3, 0.0, 0.2]])
def test_no_order_is_better(needed: tuple[bool, bool], area: list[float] | None) -> None:
    for seed in range(4):
        objective = Halves(6, seed, needed, area)
        order = exact_search(objective).tolist()
        assert objective.images == (64 if area is None or min(area) > 0 else 16)
        assert sorted(order) == list(range(6))
        if area is not None and min(area) == 0:
            assert order[-2:] == [1, 4]
        best = max(objective.mean(list(each)) for each in itertools.permutations(range(6)))
        assert objective.mean(order) == pytest.approx(best, abs=1e-6)


def test_a_search_by_budget_does_not_beat_it_and_comes_near() -> None:
    gaps = []
    for seed in range(5):
        objective = Halves(10, seed)
        best = objective.mean(exact_search(objective).tolist())
        found = objective.mean(budget_search(objective, evaluations=400).tolist())
        assert found <= best + 1e-6
        gaps.append(best - found)
    assert max(gaps) > 0  # so that the comparison is one


def test_several_batches_and_their_progress() -> None:
    objective, seen = Halves(12, 0), list[tuple[int, int]]()
    assert sorted(exact_search(objective, progress=lambda *each: seen.append(each)).tolist()) == list(range(12))
    assert (objective.images, seen) == (4096, [(3, 12), (6, 12), (9, 12), (12, 12)])


def test_too_many_regions_are_refused_before_anything_is_forwarded() -> None:
    objective = Halves(15, 0)
    with pytest.raises(at.UserError, match=r"there are 15 regions: expected at most 14; cut coarser \(region_options"):
        exact_search(objective)
    assert objective.images == 0


def test_explain_reaches_the_highest_difference_of_curves(cat: Tensor, cnn: at.Classifier) -> None:
    options = {"regions": "grid", "region_options": {"rows": 3}, "fill": "black"}
    exact, *others = (at.explain(cat, cnn, search=name, **options) for name in ("exact", "greedy", "budget", "bidirectional"))
    assert exact.evaluations == 512
    for other in others:
        assert exact.insertion_auc - exact.deletion_auc >= other.insertion_auc - other.deletion_auc - 1e-6
