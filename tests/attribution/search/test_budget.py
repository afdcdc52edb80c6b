"""Search by budget: exact about what it knows, never over its budget, never worse with more of it."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attribution as at
from attribution.search.budget import anytime_from, budget_search, default_budget, search_orders
from attribution.search.chains import Found, best_chain
from attribution.search.contract import DividedObjective, ScoredObjective, UndividedObjective, divided
from attribution.search.elimination import PACES, Pace, halve, images_to_halve
from attribution.search.sets import Sets, members

WEIGHTS = at.ScoreWeights(consistency=1.0, collaboration=1.0, confidence=0.0)


class Halves:
    """An objective of two random halves in [0, 1]: F(S) = shown(S) + hidden(complement); remembers every image forwarded."""

    highest = (1.0, 1.0)
    needed = (True, True)
    cost = 1
    centres: Tensor | None = None

    def __init__(self, size: int, seed: int = 0, area: list[float] | None = None) -> None:
        self.size, self.seed, self.images = size, seed, list[frozenset[int]]()
        self.area = None if area is None else torch.tensor(area, dtype=torch.float64)

    def half(self, name: str, shown: frozenset[int]) -> float:
        return random.Random(f"{self.seed} {name} {sorted(shown)}").random()

    def f(self, subset: frozenset[int]) -> float:
        return self.half("shown", subset) + self.half("hidden", frozenset(range(self.size)) - subset)

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        images = [frozenset(row.nonzero()[:, 0].tolist()) for row in rows]
        self.images += images
        return tuple(torch.tensor([self.half(name, image) for image in images], dtype=torch.float64) for name in ("shown", "hidden"))


def mean_along(objective: Halves, order: list[int], area: list[float]) -> float:
    """The area under F over the share of the image, by the trapezoid rule, written out."""
    total, before = 0.0, objective.f(frozenset())
    for k, region in enumerate(order):
        after = objective.f(frozenset(order[: k + 1]))
        total += area[region] * (before + after) / 2
        before = after
    return total


def run(objective: Halves, evaluations: int, **options: object) -> list[Found]:
    return list(search_orders(objective, evaluations=evaluations, **options))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 14), evaluations=st.integers(1, 300), seed=st.integers(0, 99), given_start=st.booleans())
def test_the_budget_holds_and_no_image_is_forwarded_twice(size: int, evaluations: int, seed: int, given_start: bool) -> None:
    objective = Halves(size, seed)
    found = run(objective, evaluations, start=list(range(size)) if given_start else None)
    assert found and all(sorted(each.order.tolist()) == list(range(size)) for each in found)
    assert len(objective.images) == len(set(objective.images)) == found[-1].evaluations <= evaluations


@settings(max_examples=20, deadline=None)
@given(size=st.integers(2, 12), seed=st.integers(0, 99))
def test_values_are_means_along_the_order_and_never_fall(size: int, seed: int) -> None:
    generator = random.Random(seed)
    area = [generator.uniform(0.5, 2) for _ in range(size)]
    area = [each / sum(area) for each in area]
    objective = Halves(size, seed, area)
    found = run(objective, 400, start=generator.sample(range(size), size))
    known = [each for each in found if not math.isnan(each.value)]
    assert known[-1] is found[-1]
    for each in known:
        assert each.value == pytest.approx(mean_along(objective, each.order.tolist(), area))
    assert all(later.value >= earlier.value - 1e-9 for earlier, later in itertools.pairwise(known))


@pytest.mark.parametrize("start", [None, [5, 1, 0, 6, 4, 3, 2]])
def test_regions_without_area_are_not_searched(start: list[int] | None) -> None:
    """A model crops regions 1 and 4 away. The search is that of the others alone, none of its images shows the two, and they come last."""
    whole, alone = Halves(7, 3, [0.1, 0, 0.3, 0.2, 0, 0.3, 0.1]), Halves(5, 3, [0.1, 0.3, 0.2, 0.3, 0.1])
    seen = [0, 2, 3, 5, 6]
    alone.half = lambda name, shown: Halves.half(whole, name, frozenset(seen[region] for region in shown))  # type: ignore[method-assign]
    begin = None if start is None else [seen.index(region) for region in start if region in seen]
    found, expected = run(whole, 60, start=start), run(alone, 60, start=begin)
    last = [1, 4] if start is None else [region for region in start if region not in seen]
    assert [each.order.tolist() for each in found] == [[seen[region] for region in each.order] + last for each in expected]
    assert [each.value for each in found] == pytest.approx([each.value for each in expected], nan_ok=True)
    assert [each.evaluations for each in found] == [each.evaluations for each in expected]
    assert all(image <= set(seen) for image in whole.images)
    assert anytime_from(whole) == anytime_from(alone)
    assert default_budget(whole) == 8 * 7


def test_an_area_of_zero_says_nothing_of_an_objective_that_is_not_divided() -> None:
    class Plain:
        size, area = 3, torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)

        def __call__(self, subsets: Tensor) -> Tensor:
            return subsets[:, 1].double() + 0.1 * subsets[:, 2]

    assert budget_search(Plain(), evaluations=50).tolist() == [1, 2, 0]


@pytest.mark.parametrize("seed", range(2))
def test_a_larger_budget_begins_like_a_smaller_one(seed: int) -> None:
    whole = run(Halves(12, seed), 500)
    least = anytime_from(Halves(12, seed))
    assert least == 72
    for each in [each for each in whole[:-1:3] if each.evaluations >= least]:
        part = run(Halves(12, seed), each.evaluations + 1)
        for ours, theirs in zip(part[:-1], whole, strict=False):
            assert torch.equal(ours.order, theirs.order) and ours.evaluations == theirs.evaluations
        assert math.isnan(each.value) or part[-1].value >= each.value - 1e-9


class Additive(Halves):
    """What is shown counts by its weights, and so does what is missing from the rest."""

    def half(self, name: str, shown: frozenset[int]) -> float:
        share = sum((region * 7 + 3) % self.size + 1 for region in shown) / (self.size * (self.size + 1) / 2)
        return share if name == "shown" else 1 - share


@pytest.mark.parametrize("pace", PACES)
def test_elimination_in_large_steps_ends_within_its_budget_with_the_right_order(pace: Pace) -> None:
    size = 23  # shares 7 r + 3 mod 23 are all different
    budget = images_to_halve(Sets(Additive(size), 1), pace)
    objective = Additive(size)
    found = run(objective, budget)
    assert found[-1].order.tolist() == sorted(range(size), key=lambda region: -((region * 7 + 3) % size))
    spent = [images_to_halve(Sets(Additive(size), 1), each) for each in PACES]
    assert spent == sorted(spent) and spent[-1] < anytime_from(objective)
    assert 0.8 * budget < found[-1].evaluations <= budget


class Placed(Additive):
    """Regions in a row, the important ones side by side."""

    def __init__(self, size: int, cost: int = 1) -> None:
        super().__init__(size)
        self.cost = cost
        self.centres = torch.stack([torch.zeros(size), torch.arange(size)], dim=1).double()

    def half(self, name: str, shown: frozenset[int]) -> float:
        share = sum(region + 1 for region in shown) / (self.size * (self.size + 1) / 2)
        return share if name == "shown" else 1 - share


@pytest.mark.parametrize("cost", [1, 3])
@pytest.mark.parametrize("images", [12, 20, 31, 40, 70, 130, 200, 239])
def test_every_budget_finds_which_half_matters_more(images: int, cost: int) -> None:
    """Also one below an image for each region, where fewer neighbourhoods are looked at; several fills cost as much each."""
    objective = Placed(40, cost)
    found = run(objective, images * cost)[-1]
    assert cost * len(objective.images) == found.evaluations <= images * cost < anytime_from(objective) == 240 * cost
    order = found.order.tolist()
    assert sum(region >= 20 for region in order[:20]) >= (17 if images < 40 else 19)
    if images > 200:
        assert order == list(range(40))[::-1]


def test_less_than_one_image_still_gives_an_order() -> None:
    """Of three fills an image costs three."""
    found = run(Placed(40, 3), 2)[-1]
    assert sorted(found.order.tolist()) == list(range(40)) and found.evaluations == 0 and math.isnan(found.value)


def test_what_is_left_after_large_steps_is_used_where_it_reaches() -> None:
    objective = Halves(3)
    found = run(objective, 17)
    assert anytime_from(objective) == 18 and not math.isnan(found[-1].value)
    assert found[-1].order.tolist() == run(Halves(3), 10**6)[-1].order.tolist()


def test_without_a_bound_elimination_takes_longer() -> None:
    class Unbounded(Halves):
        highest = (math.inf, 1.0)

    assert anytime_from(Unbounded(10)) == 240 and anytime_from(Halves(10)) == 60
    assert anytime_from(bare_objective(10)) == 120
    assert [default_budget(each) for each in (Halves(10), Unbounded(10), Placed(40, 3))] == [80, 240, 960]
    assert [default_budget(each, 127 * 128) for each in (Halves(10), Unbounded(10))] == [320, 320]
    for images in (119, 120, 400):
        objective = bare_objective(20)
        order = run(objective, images)[-1].order.tolist()
        assert sorted(order[:10]) == list(range(10)), images


def test_an_objective_is_divided_or_made_so() -> None:
    """The protocol is checked in one place; a bare callable counts whole, without a bound, by its own cost and area if it has them."""
    halves = Halves(4)
    assert divided(halves) is halves
    bare = bare_objective(3)
    whole = divided(bare)
    assert isinstance(whole, UndividedObjective) and isinstance(whole, DividedObjective)
    assert (whole.size, whole.cost, whole.area, whole.centres) == (3, 1, None, None)
    assert (whole.needed, whole.highest) == ((True, False), (math.inf, 0.0))
    shown, hidden = whole.parts(torch.eye(3, dtype=torch.bool))
    assert (shown.tolist(), hidden.tolist()) == ([3.0, 2.0, 1.0], [0.0, 0.0, 0.0])
    bare.cost, bare.area = 3, torch.tensor([0.5, 0.25, 0.25])
    assert (divided(bare).cost, Sets(divided(bare), 9).area) == (3, [0.5, 0.25, 0.25])
    assert default_budget(bare) == 3 * default_budget(bare_objective(3))
    with pytest.raises(at.UserError, match="the objective is int: expected a callable from subsets"):
        divided(7)  # type: ignore[arg-type]


def test_the_objectives_of_this_package_are_divided(cnn: at.Classifier, small_cat: Tensor) -> None:
    labels = at.make_regions(small_cat, "grid", count=4).labels
    objective = at.SubmodularObjective(cnn, at.MaskedInputs(cnn, small_cat, labels, torch.zeros_like(small_cat)), 3)
    for each in (objective, at.MeanObjective([objective, objective])):
        assert divided(each) is each and isinstance(each, ScoredObjective)


def bare_objective(size: int) -> Any:
    """A bare callable: F counts the regions shown by weights that fall."""

    class Bare:
        def __init__(self) -> None:
            self.size = size

        def __call__(self, rows: Tensor) -> Tensor:
            return (rows * torch.arange(size, 0, -1)).sum(dim=1).double()

    return Bare()


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 40), share=st.floats(0.01, 1), pool=st.floats(0.01, 1), both=st.booleans(), seed=st.integers(0, 99))
def test_elimination_in_large_steps_forwards_no_more_than_is_said(size: int, share: float, pool: float, both: bool, seed: int) -> None:
    objective = Halves(size, seed)
    sets = Sets(objective, 10**6)
    pace = Pace(share, pool, both)
    orders = list(halve(sets, pace))
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert len(objective.images) <= images_to_halve(sets, pace)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_chain_through_all_sets_is_the_best_of_all_orders(seed: int) -> None:
    objective = Halves(6, seed, area := [0.1, 0.3, 0.1, 0.2, 0.2, 0.1])
    sets = Sets(objective, 10**6)
    sets.know(range(2**6))
    best = max(itertools.permutations(range(6)), key=lambda order: mean_along(objective, list(order), area))
    assert mean_along(objective, best_chain(sets, list(range(6))), area) == pytest.approx(mean_along(objective, list(best), area))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), together=st.integers(1, 6))
def test_pruned_candidates_could_not_have_won(seed: int, together: int) -> None:
    generator = random.Random(seed)
    objective = Halves(7, seed)
    sets = Sets(objective, 10**6)
    groups = [generator.sample(range(1, 127), generator.randint(1, 12)) for _ in range(3)]
    for group, winner in zip(groups, sets.best(groups, together), strict=True):
        values = [objective.f(frozenset(members(subset))) for subset in group]
        assert winner == values.index(max(values))
    assert len(objective.images) <= 2 * sum(map(len, groups))


def test_half_of_the_images_is_saved_where_the_first_half_decides() -> None:
    class Decided(Halves):
        def half(self, name: str, shown: frozenset[int]) -> float:
            return 0.0 if name == "hidden" else len(shown) / self.size + (0 in shown) / 100

    class Tight(Decided):
        highest = (1.01, 0.0)

    loose, tight = Decided(20), Tight(20)
    for objective in (loose, tight):
        Sets(objective, 10**6).best([[1 << region for region in range(20)]])
    assert len(tight.images) == 20 + 4 < len(loose.images)


@pytest.mark.parametrize("side", [0, 1])
def test_a_half_that_f_does_not_need_costs_nothing(side: int) -> None:
    """Every image is then one subset: with all of them known the order is the best of all."""

    class OneSided(Halves):
        needed = (side == 0, side == 1)

        def f(self, subset: frozenset[int]) -> float:
            own = subset if side == 0 else frozenset(range(self.size)) - subset
            return self.half(("shown", "hidden")[side], own)

    objective = OneSided(5)
    found = run(objective, 2**5, start=list(range(5)))[-1]
    assert found.value == pytest.approx(mean_along(objective, found.order.tolist(), [0.2] * 5))
    best = max(mean_along(objective, list(order), [0.2] * 5) for order in itertools.permutations(range(5)))
    assert len(objective.images) <= 2**5 and found.value >= best - 0.1
    sets = Sets(objective, 10**6)
    sets.know(range(2**5))
    assert mean_along(objective, best_chain(sets, list(range(5))), [0.2] * 5) == pytest.approx(best)


def test_weights_of_one_half(cnn: at.Classifier, small_cat: Tensor) -> None:
    regions = at.make_regions(small_cat, "grid", rows=3, columns=3)
    for weights in (at.ScoreWeights(1.0, 0.0, 0.0), at.ScoreWeights(0.0, 1.0, 0.0)):
        found = at.explain(small_cat, cnn, regions=regions, search="budget", weights=weights, evaluations=80)
        both = at.explain(small_cat, cnn, regions=regions, search="budget", evaluations=80)
        if weights.consistency:
            assert found.insertion_auc >= both.insertion_auc - 1e-3
        else:
            assert found.deletion_auc <= both.deletion_auc + 1e-3


def test_regions_around_one_centre(cnn: at.Classifier) -> None:
    labels = torch.zeros(16, 16, dtype=torch.int64)
    labels[2:14, 2:14] = 1
    labels[4:12, 4:12] = 2
    labels[6:10, 6:10] = 3
    found = at.explain(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)), cnn, regions=labels, search="budget")
    assert sorted(found.order.tolist()) == [0, 1, 2, 3]


class Spread(nn.Module):
    """Class 1 by how bright each of 64 cells is, with weights that no two share; the model of a white box."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randperm(64, generator=torch.Generator().manual_seed(3)).float() / 64 - 0.2)

    def forward(self, x: Tensor) -> Tensor:
        score = 0.75 * nn.functional.avg_pool2d(x.mean(dim=1), 2).flatten(1) @ self.weights
        return torch.stack([torch.zeros_like(score), score - 2], dim=1)


def white_box(module: nn.Module, evaluations: int, **options: Any) -> at.Explanation:
    classifier = at.Classifier(module, size=16)
    options = {"search_options": {"gradients": True}, "regions": "grid", "region_options": {"rows": 8, "columns": 8}, **options}
    return at.explain(torch.ones(3, 16, 16), classifier, 1, search="budget", evaluations=evaluations, **options)


@pytest.mark.parametrize("evaluations", [24, 50, 96])
def test_gradients_find_the_order_with_fewer_images_than_halving(evaluations: int) -> None:
    module = Spread()
    wanted = module.weights.detach().argsort(descending=True).tolist()
    with torch.no_grad():  # a caller's mode does not matter
        found = white_box(module, evaluations)
    assert evaluations > 24 or found.order.tolist() == wanted
    assert found.evaluations == evaluations // 24 * 24
    assert module.weights.grad is None and module.weights.requires_grad
    halved = white_box(Spread(), evaluations, search_options={})
    assert found.insertion_auc - found.deletion_auc >= halved.insertion_auc - halved.deletion_auc


@pytest.mark.parametrize(
    "weights", [WEIGHTS, at.ScoreWeights(1.0, 0.0, 0.0), at.ScoreWeights(0.0, 1.0, 0.0), at.ScoreWeights(2.0, 1.0, 0.5)]
)
def test_a_slope_is_that_of_finite_differences(vit: at.Classifier, small_cat: Tensor, weights: at.ScoreWeights) -> None:
    labels = at.make_regions(small_cat, "grid", rows=2, columns=2).labels
    masked = at.MaskedInputs(vit, small_cat, labels, torch.full_like(small_cat, 0.5))
    objective = at.SubmodularObjective(vit, masked, 3, weights)
    sets = Sets(objective, 1000)
    places = torch.tensor([[0.3], [0.6]])

    def value(scores: Tensor) -> float:
        with torch.no_grad():
            shown, hidden = objective.parts(places + scores), objective.parts(1 - places - scores)
        return float((shown[0].double() + hidden[1].double()).mean())

    scores = torch.zeros(4, requires_grad=True)
    before = objective.evaluations
    slope = sets.slope(scores, places + scores)
    assert objective.evaluations - before == sets.used == 1000 - sets.left == 6 * sum(objective.needed)
    steps = 0.002 * torch.eye(4)
    expected = torch.tensor([(value(step) - value(-step)) / 0.004 for step in steps])
    assert torch.allclose(slope, expected, rtol=0.05, atol=5e-3)
    assert float(slope.abs().max()) > 0.05


def test_gradients_of_several_fills_and_larger_budgets(vit: at.Classifier, small_cat: Tensor) -> None:
    options = {"regions": "grid", "region_options": {"rows": 6, "columns": 6}, "search": "budget"}
    for fill, cost in (("gray", 1), ("black+blur", 2)):
        for images, softened in ((20, False), (50, True), (54, True), (55, False)):
            white, black = (
                at.explain(small_cat, vit, fill=fill, evaluations=images * cost, search_options={"gradients": gradients}, **options)
                for gradients in (True, False)
            )
            assert (white.order.tolist() != black.order.tolist()) == softened and white.evaluations <= images * cost
            assert not softened or white.evaluations == images // 24 * 24 * cost


def test_gradients_are_refused_where_there_are_none(vit: at.Classifier, small_cat: Tensor) -> None:
    for model, options, message in (
        (lambda x: Spread()(x).detach().numpy(), {}, "passes no gradient from its scores to its input"),
        (Spread(), {"search_options": {"gradients": True, "start": list(range(64))}}, "gradients=True and a start"),
    ):
        with pytest.raises(at.UserError, match=message):
            white_box(model, 48, **options)
    cells: dict[str, Any] = {"regions": "grid", "region_options": {"rows": 8, "columns": 8}, "search_options": {"gradients": True}}
    with pytest.raises(at.UserError, match="without a weight on the effectiveness"):
        at.explain(small_cat, vit, search="budget", evaluations=90, weights=at.ScoreWeights(1.0, 1.0, 0.0, 1.0), **cells)
    with pytest.raises(at.NotApplicable, match="fill 'drop' shows a patch or not"):
        at.explain(small_cat, vit, fill="drop", search="budget", evaluations=90, **cells)
    with pytest.raises(at.UserError, match="an objective that has none"):
        run(bare_objective(10), 30, gradients=True)
    with torch.inference_mode(), pytest.raises(at.UserError, match="call it outside"):
        white_box(Spread(), 48)


def test_scores_below_zero_do_not_turn_the_order_round() -> None:
    class Negative(Halves):
        highest = (math.inf, 0.0)
        needed = (True, False)

        def half(self, name: str, shown: frozenset[int]) -> float:
            return -100.0 + 10 * sum(2.0**-region for region in shown)

    objective = Negative(12)
    for evaluations in (14, 20, 26, 40, 200):
        order = budget_search(Negative(12), evaluations=evaluations).tolist()
        assert order.index(0) < 6 and order.index(11) >= 6, (evaluations, order)
    assert budget_search(objective, evaluations=10**4).tolist() == list(range(12))


@pytest.mark.parametrize("start", ["integrated_gradients", "random"])
def test_polish_never_loses(vit: at.Classifier, small_cat: Tensor, start: str) -> None:
    regions = at.make_regions(small_cat, "grid", rows=4, columns=4)
    heatmap = at.attribute(small_cat, vit, start, fill="gray")
    before = at.explain(
        small_cat, vit, regions=regions, search=lambda objective: heatmap.ranked_over(regions).order, weights=WEIGHTS, fill="gray"
    )
    gains = []
    for evaluations in (34, 60, 120, 240):
        after = at.polish(heatmap, vit, regions=regions, evaluations=evaluations, fill="gray")
        assert after.target == heatmap.target and torch.equal(after.regions.labels, regions.labels)
        gains.append(after.insertion_auc - after.deletion_auc - (before.insertion_auc - before.deletion_auc))
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise([0.0, *gains])) and gains[-1] > 0
    again = at.polish(before, vit, evaluations=240, fill="gray")
    assert again.order.tolist() == after.order.tolist()


def test_polish_refuses_what_it_cannot_keep(vit: at.Classifier, small_cat: Tensor) -> None:
    heatmap = at.attribute(small_cat, vit, "saliency")
    with pytest.raises(at.UserError, match="a heatmap without regions: give regions="):
        at.polish(heatmap, vit)
    with pytest.raises(at.UserError, match="polish takes no target"):
        at.polish(heatmap, vit, regions=at.make_regions(small_cat, "grid", count=9), target=1)


def test_the_callback_sees_every_order_and_stops_the_search() -> None:
    seen: list[Found] = []

    def enough(found: Found) -> bool:
        seen.append(found)
        return found.evaluations > 60

    objective = Halves(10)
    order = budget_search(objective, evaluations=10**4, callback=enough)
    assert torch.equal(order, seen[-1].order) and seen[-1].evaluations == len(objective.images)
    assert [each.evaluations > 60 for each in seen] == [False] * (len(seen) - 1) + [True]


def test_the_search_ends_by_itself_when_nothing_is_left_to_try() -> None:
    objective = Halves(5)
    budget_search(objective, evaluations=10**9)
    assert len(objective.images) <= 2**5


def test_no_images_are_spent_where_f_cannot_rise() -> None:
    class Full(Halves):
        def half(self, name: str, shown: frozenset[int]) -> float:
            return 1.0

    objective = Full(40)
    order = budget_search(objective, evaluations=10**6)
    assert order.tolist() == list(range(40))
    assert len(objective.images) < 40 * 8  # plain greedy forwards 1640


@pytest.mark.parametrize("bad", [0, -3, True, 2.5])
def test_a_budget_is_a_positive_number_of_images(bad: object) -> None:
    with pytest.raises(at.UserError, match=f"evaluations is {bad!r}: expected a whole number of at least 1"):
        budget_search(Halves(4), evaluations=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [[0, 1], [0, 1, 2, 2], [1, 2, 3, 4]])
def test_a_start_names_each_region_once(start: list[int]) -> None:
    with pytest.raises(at.UserError, match="expected each region from 0 to 3 once"):
        budget_search(Halves(4), start=start)


def test_nan_is_refused() -> None:
    class Broken(Halves):
        def half(self, name: str, shown: frozenset[int]) -> float:
            return math.nan

    with pytest.raises(at.UserError, match="returned NaN"):
        budget_search(Broken(4))


def test_evaluations_belong_to_the_search_by_budget(cnn: at.Classifier, small_cat: Tensor) -> None:
    with pytest.raises(at.UserError, match="search options evaluations are unknown"):
        at.explain(small_cat, cnn, regions="grid", region_options={"count": 9}, search="greedy", evaluations=50)
    found = at.explain(small_cat, cnn, regions="grid", region_options={"count": 9})
    settings = found.provenance["settings"]
    assert settings["search_options"]["evaluations"] == 288 and found.evaluations <= 288
    assert settings["weights"] == {"consistency": 1.0, "collaboration": 1.0, "confidence": 0.0, "effectiveness": 0.0}
