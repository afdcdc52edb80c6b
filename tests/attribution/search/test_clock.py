"""A search with a clock: it ends in time, on a clock that only forwarding moves."""

from __future__ import annotations

import math
import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attribution as at
from attribution.search import sets as sets_module
from attribution.search.budget import anytime_from, budget_search, search_orders
from attribution.search.sets import Clock

explain_module = sys.modules["attribution.explain"]


class Watch:
    """A clock that stands still unless something takes time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        for module in (sets_module, explain_module):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


class Slow:
    """An objective of random halves. A batch takes the same time for each image, or whatever ``takes`` says."""

    highest, needed, cost = (1.0, 1.0), (True, True), 1
    centres: Tensor | None = None
    area: Tensor | None = None

    def __init__(self, size: int, watch: Watch, takes: Any = lambda images: 0.01 * images) -> None:
        self.size, self.watch, self.takes, self.images, self.batches = size, watch, takes, 0, list[int]()

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        self.watch.now += self.takes(len(rows))
        self.images += len(rows)
        self.batches.append(len(rows))
        keys = ["".join("01"[int(shown)] for shown in row) for row in rows]
        return tuple(torch.tensor([random.Random(f"{half}{key}").random() for key in keys]) for half in "ab")


@pytest.mark.parametrize("seconds", [0.3, 0.7, 1.5, 4.0])
def test_it_ends_in_time_and_uses_the_time(seconds: float, watch: Watch) -> None:
    objective = Slow(20, watch)
    order = budget_search(objective, seconds=seconds)
    assert sorted(order.tolist()) == list(range(20))
    spent = watch.now - 100
    assert spent <= seconds + 1e-9
    assert spent >= seconds - 0.5  # 2 R prefixes, 0.4 s, are kept free until they are known


def test_more_time_is_not_worse_once_all_prefixes_are_known(watch: Watch) -> None:
    values = []
    for seconds in (4.0, 6.0, 9.0):
        *_, last = search_orders(Slow(20, watch), evaluations=10**6, seconds=seconds)
        values.append(last.value)
    assert values == sorted(values)
    assert not math.isnan(values[0])


def test_a_machine_that_becomes_slow_is_noticed(watch: Watch) -> None:
    """Ten times slower after 100 images; what is asked for at once takes about 0.2 s before the clock is looked at again."""
    objective = Slow(20, watch)
    objective.takes = lambda images: (0.1 if objective.images > 100 else 0.01) * images
    budget_search(objective, seconds=3.0)
    assert watch.now - 100 <= 3.0 + 2.0  # one batch of 20 that was begun at the old speed
    assert objective.images < 150


def test_batches_that_cost_what_one_image_costs_are_used(watch: Watch) -> None:
    objective = Slow(20, watch, takes=lambda images: 0.05)
    budget_search(objective, seconds=4.0)
    assert objective.images > 80  # as many as 4 s of single images
    assert watch.now - 100 <= 4.0 + 1e-9


@pytest.mark.parametrize("seconds", [0, 1e-6, 0.015])
def test_hardly_any_time_gives_some_order(seconds: float, watch: Watch) -> None:
    objective = Slow(9, watch)
    assert sorted(budget_search(objective, seconds=seconds).tolist()) == list(range(9))
    assert objective.images <= 2


@pytest.mark.parametrize("seconds", [0, 0.015, 0.3])
def test_hardly_any_time_gives_the_order_of_the_prior(seconds: float, watch: Watch) -> None:
    order = budget_search(Slow(20, watch), seconds=seconds, prior=[float(region % 7) for region in range(20)])
    assert order.tolist() == sorted(range(20), key=lambda region: (-(region % 7), region))


def test_the_budget_ends_the_search_where_it_is_smaller(watch: Watch) -> None:
    objective = Slow(9, watch)
    reports = list[tuple[int, int]]()
    budget_search(objective, seconds=1e6, evaluations=50, progress=lambda *each: reports.append(each))
    assert objective.images == 50
    assert reports[-1] == (50, 50)


def test_without_a_clock_nothing_changes(watch: Watch) -> None:
    plain, timed = Slow(12, watch), Slow(12, watch)
    budget = anytime_from(plain) + 40
    order = budget_search(plain, evaluations=budget)
    assert torch.equal(budget_search(timed, evaluations=budget, seconds=1e9), order)


def test_reserved_time_is_kept_free(watch: Watch) -> None:
    clock = Clock(1.0)
    assert clock.left == math.inf
    assert clock.at_once == 1
    with clock.timed(2):
        watch.now += 0.1
    assert clock.left == pytest.approx(18)
    assert clock.at_once == 4
    with clock.timed(4):
        watch.now += 0.5
    assert clock.at_once == 4
    assert clock.left == pytest.approx(0.4 / 0.1)
    clock = Clock(1.0)
    with clock.timed(2):
        watch.now += 0.1
    clock.reserved = 15
    assert clock.left == pytest.approx(3)


def test_explain_within_seconds(watch: Watch) -> None:
    """Preprocessing takes no time on this clock; the prefixes of the trajectories do."""

    class Ticking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3 * 64, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            watch.now += 0.01 * len(inputs)
            return self.head(inputs.flatten(1))

    torch.manual_seed(0)
    classifier = at.Classifier(Ticking(), size=8, scores="logits", batch_size=4)
    classifier.find_out(False)
    image = torch.rand(3, 8, 8)
    options: dict[str, Any] = {"regions": "grid", "region_options": {"rows": 4}, "fill": "black"}
    for seconds in (0.6, 1.2, 2.4):
        watch.now = 100.0
        made = at.explain(image, classifier, 0, seconds=seconds, **options)
        assert watch.now - 100 <= 1.2 * seconds
        assert made.provenance["settings"]["seconds"] == seconds
        assert made.evaluations > 20 * seconds
        assert "evaluations" not in made.provenance["settings"]["search_options"]
    watch.now = 100.0
    few = at.explain(image, classifier, 0, seconds=1e9, evaluations=40, **options)
    assert few.evaluations <= 40
    with pytest.raises(at.UserError, match="seconds is 2, but search greedy has no clock: give search='budget', or leave it out"):
        at.explain(image, classifier, 0, seconds=2, search="greedy", **options)
    with pytest.raises(at.UserError, match="seconds is -1: expected a number of at least 0"):
        at.explain(image, classifier, 0, seconds=-1, **options)
    with pytest.raises(at.UserError, match="seconds are those of one image"):
        at.explain_many([image], classifier, 0, seconds=2, **options)


@pytest.mark.parametrize(("fixed", "each", "together"), [(0.0, 0.01, 4), (0.01, 0.01, 4), (0.1, 0.01, 10), (0.1, 0.0001, 64)])
def test_how_many_images_cost_hardly_more_than_one(fixed: float, each: float, together: int, watch: Watch) -> None:
    clock = Clock(100.0)
    assert clock.together == 4
    for images in (1, 20):
        with clock.timed(images):
            watch.now += fixed + each * images
    assert clock.together == together


def test_a_search_fills_batches_that_cost_little(watch: Watch) -> None:
    """As many images in fewer calls than on a machine where each image takes its time."""
    calls = []
    for takes in (lambda images: 0.01 * images, lambda images: 0.1 + 0.0001 * images):
        objective = Slow(20, watch, takes)
        budget_search(objective, seconds=1e6, evaluations=400)
        assert objective.images == 400
        calls.append(len(objective.batches))
    assert calls[1] < 0.7 * calls[0]
