from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attribution as at
from attribution.search import SEARCHES, Search
from attribution.search.bidirectional import bidirectional_greedy, bidirectional_greedy_v1
from attribution.search.contract import Objective, Progress, refuse_nan, report_progress
from attribution.search.greedy import greedy, lazy_greedy, stochastic_greedy
from evaluation.benchmark.methods import MethodSpec


class Toy:
    """A set function as an objective that counts two images a subset, as the submodular objective does."""

    def __init__(self, size: int, f: reference.SetFunction, free: reference.SetFunction | None = None) -> None:
        self.size, self.f, self.subsets = size, f, 0
        if free is not None:
            self.set_score = lambda subsets: torch.tensor([free(members(row)) for row in subsets], dtype=torch.float64)

    def __call__(self, subsets: Tensor) -> Tensor:
        self.subsets += len(subsets)
        return torch.tensor([self.f(members(row)) for row in subsets], dtype=torch.float64)


def members(row: Tensor) -> frozenset[int]:
    return frozenset(row.nonzero()[:, 0].tolist())


def random_function(seed: int, levels: int | None = None) -> reference.SetFunction:
    """An arbitrary set function; few levels make many ties."""

    def f(subset: frozenset[int]) -> float:
        value = random.Random(f"{seed} {sorted(subset)}").random()
        return value if levels is None else int(value * levels) / levels

    return f


def coverage(seed: int, size: int, universe: int = 40) -> reference.SetFunction:
    """Weighted coverage, monotone and submodular."""
    rng = random.Random(seed)
    covers = [{rng.randrange(universe) for _ in range(rng.randint(1, 9))} for _ in range(size)]
    weights = [rng.randint(1, 5) for _ in range(universe)]
    return lambda subset: float(sum(weights[u] for u in set().union(*(covers[r] for r in subset))))


CASES = [(size, seed, levels) for size in (1, 2, 3, 5, 9, 14) for seed in (0, 1) for levels in (None, 3)]


@pytest.mark.parametrize(("size", "seed", "levels"), CASES)
def test_greedy_equals_the_naive_loop(size: int, seed: int, levels: int | None) -> None:
    f = random_function(seed, levels)
    toy = Toy(size, f)
    assert greedy(toy).tolist() == reference.greedy(f, size)
    assert 2 * toy.subsets == size * (size + 1)


@pytest.mark.parametrize("pending", [1, 2, 3, 8, 50])
@pytest.mark.parametrize(("size", "seed", "levels"), CASES)
def test_bidirectional_equals_the_naive_loop(size: int, seed: int, levels: int | None, pending: int) -> None:
    f, free = random_function(seed, levels), random_function(seed + 100, levels)
    toy = Toy(size, f)
    order, scored = reference.bidirectional(f, size, pending)
    assert bidirectional_greedy(toy, pending=pending).tolist() == order
    assert toy.subsets == scored
    assert sorted(order) == list(range(size))
    order, scored = reference.bidirectional(f, size, pending, free)
    toy = Toy(size, f, free)
    assert bidirectional_greedy(toy, pending=pending).tolist() == order
    assert toy.subsets == scored


@pytest.mark.parametrize(("size", "seed", "levels"), CASES)
def test_v1_equals_the_naive_loop_and_loses_no_region(size: int, seed: int, levels: int | None) -> None:
    f, free = random_function(seed, levels), random_function(seed + 100, levels)
    assert bidirectional_greedy_v1(Toy(size, f)).tolist() == reference.bidirectional_v1(f, size)
    order = bidirectional_greedy_v1(Toy(size, f, free)).tolist()
    assert order == reference.bidirectional_v1(f, size, free)
    assert sorted(order) == list(range(size))


@pytest.mark.parametrize(("size", "count", "seed"), [(9, 9, 0), (14, 5, 1), (14, 14, 2), (1, 1, 0)])
def test_stochastic_greedy_equals_the_naive_loop(size: int, count: int, seed: int) -> None:
    f = random_function(seed)
    wanted = reference.stochastic_greedy(f, size, count, 0.05, seed)
    assert stochastic_greedy(Toy(size, f), count=count, epsilon=0.05, seed=seed).tolist() == wanted


def test_stochastic_greedy_with_all_candidates_is_greedy() -> None:
    f = random_function(5)
    assert stochastic_greedy(Toy(9, f), epsilon=1e-9).tolist() == greedy(Toy(9, f)).tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("seed", range(6))
def test_lazy_greedy_equals_greedy_on_a_submodular_function(seed: int, batch_size: int) -> None:
    f = coverage(seed, 15)
    lazy = Toy(15, f)
    assert lazy_greedy(lazy, batch_size=batch_size).tolist() == reference.greedy(f, 15)
    if batch_size == 1:
        assert lazy.subsets < 15 * 16 / 2


def modular(seed: int, size: int) -> reference.SetFunction:
    """A sum of weights, no two of which are equal."""
    weights = random.Random(seed).sample(range(1, 10 * size + 1), size)
    return lambda subset: float(sum(weights[region] for region in subset))


def by_weight(f: reference.SetFunction, size: int) -> list[int]:
    """The closed form on a modular function: descending by F of the single regions."""
    return sorted(range(size), key=lambda region: -f(frozenset([region])))


def best_of_all(f: reference.SetFunction, size: int) -> list[int]:
    """The permutation with the highest mean of F along it."""

    def mean(order: tuple[int, ...]) -> float:
        values = [f(frozenset(order[:k])) for k in range(size + 1)]
        return sum((before + after) / 2 for before, after in itertools.pairwise(values))

    return list(max(itertools.permutations(range(size)), key=mean))


FAMILIES: dict[str, Callable[[int, int], reference.SetFunction]] = {
    "arbitrary": lambda seed, size: random_function(seed),
    "with ties": lambda seed, size: random_function(seed, 3),
    "submodular": coverage,
    "modular": modular,
}
# Each search, the functions on which a second derivation gives its order, and this derivation.
DERIVATIONS: dict[str, tuple[tuple[str, ...], Callable[[reference.SetFunction, int], list[int]]]] = {
    "bidirectional": (tuple(FAMILIES), lambda f, size: reference.bidirectional(f, size, 8)[0]),
    "bidirectional_v1": (tuple(FAMILIES), reference.bidirectional_v1),
    "greedy": (tuple(FAMILIES), reference.greedy),
    "lazy_greedy": (("submodular", "modular"), reference.greedy),
    "stochastic_greedy": (("arbitrary", "submodular", "modular"), lambda f, size: reference.stochastic_greedy(f, size, size, 0.01, 0)),
    "budget": (("modular",), by_weight),
    "exact": (("arbitrary", "modular"), lambda f, size: best_of_all(f, size) if size < 8 else by_weight(f, size)),
}


def test_every_search_has_a_second_derivation() -> None:
    """A new entry of SEARCHES needs one of DERIVATIONS: a naive loop of ``reference``, or a closed form."""
    assert set(DERIVATIONS) == set(SEARCHES)


@pytest.mark.parametrize(("name", "family"), [(name, family) for name, (families, _) in DERIVATIONS.items() for family in families])
def test_every_search_equals_its_second_derivation(name: str, family: str) -> None:
    sizes = (1, 2, 3, 7, 12, 21)
    if name == "exact":  # all permutations of few regions
        sizes = (1, 2, 3, 6, 12) if family == "modular" else (1, 2, 3, 6)
    for size, seed in itertools.product(sizes, range(3)):
        f = FAMILIES[family](seed, size)
        assert SEARCHES[name](Toy(size, f)).tolist() == DERIVATIONS[name][1](f, size), (size, seed)


def check_order(name: str, size: int, f: reference.SetFunction) -> None:
    """Each region once, the same again, and the progress ends where the search does. What a search does not take is not given."""
    entry, reports = SEARCHES[name], list[tuple[int, int]]()
    options = entry.taken(progress=lambda done, total: reports.append((done, total)), seed=3)
    order = entry(Toy(size, f), **options)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(size))
    total = size if entry.default_budget is None else entry.default_budget(Toy(size, f), 128**2)
    if "progress" in entry.options:
        assert reports[-1] == (total, total)
        assert reports == sorted(reports)
    assert torch.equal(order, entry(Toy(size, f), **options))


def check_options(name: str) -> None:
    """What an entry says of itself is what its function takes."""
    entry = SEARCHES[name]
    assert isinstance(entry, Search)
    assert list(inspect.signature(entry).parameters) == [next(iter(inspect.signature(entry.function).parameters)), *entry.options]
    assert entry.stochastic == ("seed" in entry.options)
    assert entry.budgeted == ("evaluations" in entry.options)
    assert entry.default_budget is None or entry.budgeted
    if entry.budgeted:
        for budget in (1, 7, 40):
            toy = Toy(9, random_function(0))
            entry(toy, evaluations=budget)
            assert toy.subsets <= budget


def check_nan(name: str) -> None:
    with pytest.raises(at.UserError, match="objective returned NaN"):
        SEARCHES[name](Toy(3, lambda subset: float("nan")))


def check_explains(name: str) -> None:
    """``explain`` takes it by name, and the provenance holds what it was given."""
    classifier, image, labels, _ = linear_problem(1)
    made = at.explain(image, classifier, 0, regions=labels, search=name, seed=5)
    assert sorted(made.order.tolist()) == list(range(12))
    told = made.provenance["settings"]
    entry = SEARCHES[name]
    assert told["search"] == name
    assert set(told["search_options"]) == {"pending", "evaluations"} & set(entry.options) - (
        set() if entry.default_budget else {"evaluations"}
    )
    assert told["weights"] == vars(entry.weights or at.ScoreWeights())
    assert MethodSpec.parse(name).stochastic == entry.stochastic


CHECKS: dict[str, Callable[[str], None]] = {
    "order": lambda name: check_order(name, 9, random_function(1)),
    "options": check_options,
    "nan": check_nan,
    "explain": check_explains,
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", SEARCHES)
def test_contract_of_every_search(name: str, check: str) -> None:
    CHECKS[check](name)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 8), seed=st.integers(0, 999), levels=st.sampled_from([None, 2]), name=st.sampled_from(sorted(SEARCHES)))
def test_every_search_returns_each_region_once(size: int, seed: int, levels: int | None, name: str) -> None:
    check_order(name, size, random_function(seed, levels))


def single_regions(objective: Objective) -> Tensor:
    """The recipe of a search: rank the regions by F of each alone, highest first. Ties go to the lowest id."""
    alone = objective(torch.eye(objective.size, dtype=torch.bool))
    refuse_nan(alone)
    return alone.argsort(descending=True, stable=True)


def noisy_regions(objective: Objective, seed: int = 0, pending: int = 8, progress: Progress | None = None) -> Tensor:
    """A search that takes what ``explain`` offers, by parameters that need not be keyword-only."""
    order = single_regions(objective)
    ties = torch.randperm(min(pending, objective.size), generator=torch.Generator().manual_seed(seed))
    report_progress(progress, objective.size, objective.size)
    return torch.cat([order[ties], order[len(ties) :]])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("search", [single_regions, noisy_regions])
def test_a_search_of_the_user_keeps_the_contract(search: Callable[..., Tensor], check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEARCHES, "mine", Search(search))
    CHECKS[check]("mine")
    monkeypatch.setitem(at.PRESETS, "mine", at.Preset(at.ScoreWeights(1, 1, 0, 0), "grid", "mine", "here", region_options={"count": 4}))
    classifier, image, _, _ = linear_problem(1)
    made = at.explain(image, classifier, 0, preset="mine")
    assert (made.regions.count, made.provenance["settings"]["search"]) == (4, "mine")
    with pytest.raises(AssertionError):
        test_every_search_has_a_second_derivation()


def test_a_search_of_the_user_gets_what_it_takes_and_no_more() -> None:
    classifier, image, labels, contributions = linear_problem(2)
    options = {"regions": labels, "weights": at.ScoreWeights(1, 0, 0, 0)}
    seen: list[tuple[int, int]] = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    plain = at.explain(image, classifier, 0, search=single_regions, progress=progress, seed=4, **options)
    assert plain.order.tolist() == contributions.argsort(descending=True, stable=True).tolist()
    assert (plain.evaluations, seen) == (12, [])
    assert plain.provenance["settings"]["search_options"] == {}
    noisy = at.explain(image, classifier, 0, search=Search(noisy_regions), progress=progress, pending=3, seed=4, **options)
    ties = torch.randperm(3, generator=torch.Generator().manual_seed(4))
    assert noisy.order.tolist() == [*plain.order[ties].tolist(), *plain.order[3:].tolist()]
    assert seen == [(12, 12)]
    assert noisy.provenance["settings"]["search_options"] == {"pending": 3}
    assert noisy.provenance["settings"]["search"] == "noisy_regions"
    given = at.explain(image, classifier, 0, search=noisy_regions, search_options={"seed": 4, "pending": 3}, seed=9, **options)
    assert torch.equal(given.order, noisy.order)
    with pytest.raises(at.UserError, match="pending is 3, but search single_regions has no p"):
        at.explain(image, classifier, 0, search=single_regions, pending=3, **options)
    with pytest.raises(at.UserError, match="search options evaluations are unknown: expected none"):
        at.explain(image, classifier, 0, search=single_regions, evaluations=9, **options)


def test_an_entry_brings_its_weights_and_its_budget() -> None:
    classifier, image, labels, _ = linear_problem(3)

    def counted(objective: Objective, *, evaluations: int | None = None) -> Tensor:
        return torch.arange(objective.size) if evaluations is None else torch.arange(objective.size).flip(0)

    weights = at.ScoreWeights(1, 2, 0, 0)
    entry = Search(counted, weights=weights, default_budget=lambda objective, pixels: 5 * objective.size)
    for search, order, budget, wanted in ((counted, 0, None, at.ScoreWeights()), (entry, 11, 60, weights)):
        made = at.explain(image, classifier, 0, regions=labels, search=search)
        told = made.provenance["settings"]
        assert made.order[0] == order
        assert (told["search_options"].get("evaluations"), told["weights"]) == (budget, vars(wanted))
    chosen = at.explain(image, classifier, 0, regions=labels, search=entry, preset="lima-single-modal-slico", evaluations=7)
    assert chosen.provenance["settings"]["weights"] == vars(at.PRESETS["lima-single-modal-slico"].weights)
    assert chosen.provenance["settings"]["search_options"] == {"evaluations": 7}


def published_evaluations(m: int, p: int) -> int:
    """Spec: E = 2 [t m - t (t - 1)] + (q (q + 1) - 2) + 2 p t, for m > p and a best region that is never pending."""
    t = -(-(m - p) // 2)
    q = m - 2 * t
    return 2 * (t * m - t * (t - 1)) + (q * (q + 1) - 2) + 2 * p * t


@pytest.mark.parametrize(("m", "p", "images"), [(49, 8, 1608), (50, 8, 1666), (64, 8, 2590), (49, 12, 1764), (100, 8, 5866)])
def test_evaluations_of_the_published_examples(m: int, p: int, images: int) -> None:
    toy = Toy(m, lambda subset: float(sum(subset)))
    bidirectional_greedy(toy, pending=p)
    assert 2 * toy.subsets == published_evaluations(m, p) == images
    naive = Toy(m, lambda subset: float(sum(subset)))
    greedy(naive)
    assert 2 * naive.subsets == m * (m + 1)


@pytest.mark.parametrize("name", ["greedy", "lazy_greedy", "bidirectional", "bidirectional_v1", "budget"])
def test_ties_go_to_the_lowest_id_at_the_front(name: str) -> None:
    order = SEARCHES[name](Toy(6, lambda subset: 1.0)).tolist()
    front = {"bidirectional": [0, 1, 2, 3, 4, 5], "bidirectional_v1": [0, 2, 4, 5, 3, 1]}
    assert order == front.get(name, [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("search", [greedy, lazy_greedy, stochastic_greedy])
def test_count(search: Callable[..., Tensor]) -> None:
    f = coverage(3, 10)
    assert len(search(Toy(10, f), count=4)) == 4
    for count in (0, 11):
        with pytest.raises(at.UserError, match=f"count is {count}: expected a whole number from 1 to 10"):
            search(Toy(10, f), count=count)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5])
def test_bad_batch_size(batch_size: float) -> None:
    with pytest.raises(at.UserError, match=f"batch_size is {batch_size}: expected a whole number of at least 1"):
        lazy_greedy(Toy(4, coverage(0, 4)), batch_size=batch_size)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, -1.0])
def test_bad_epsilon(epsilon: float) -> None:
    with pytest.raises(at.UserError, match="epsilon"):
        stochastic_greedy(Toy(4, coverage(0, 4)), epsilon=epsilon)


def linear_problem(seed: int, size: int = 12) -> tuple[at.Classifier, Tensor, Tensor, Tensor]:
    """A classifier whose logit difference is linear in the pixels: regions, image and the exact contribution of each region."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, 6, 8, generator=generator)
    labels = at.make_regions(image, "grid", rows=3, columns=4).labels
    weights = 0.1 * torch.randn(3, 6, 8, generator=generator)  # small, so that no probability saturates

    def logits(inputs: Tensor) -> Tensor:
        score = (inputs * weights).flatten(1).sum(1)
        return torch.stack([score, -score], dim=1)

    classifier = at.Classifier(logits, size=(6, 8), scores="logits")
    contributions = torch.stack([(image * weights)[:, labels == r].sum() for r in range(size)])
    return classifier, image, labels, contributions


@pytest.mark.parametrize("search", ["greedy", "bidirectional", "bidirectional_v1", "budget"])
@pytest.mark.parametrize("seed", range(4))
def test_linear_classifier_has_the_closed_form(search: str, seed: int) -> None:
    """p = sigmoid(2 sum of contributions) is increasing in the sum: the order is that of the contributions."""
    classifier, image, labels, contributions = linear_problem(seed)
    weights = at.ScoreWeights(consistency=1.0, collaboration=1.0, confidence=0.0)
    explanation = at.explain(image, classifier, target=0, regions=labels, search=search, weights=weights)
    assert explanation.order.tolist() == contributions.argsort(descending=True, stable=True).tolist()
    along = torch.cat([torch.zeros(1), contributions[explanation.order].cumsum(0)])
    assert torch.allclose(explanation.insertion_scores, torch.sigmoid(2 * along), atol=1e-5)
    assert torch.allclose(explanation.deletion_scores, torch.sigmoid(2 * (contributions.sum() - along)), atol=1e-5)


def test_linear_order_is_the_best_of_all() -> None:
    classifier, image, _, _ = linear_problem(7)
    labels = at.make_regions(image, "grid", rows=1, columns=5).labels
    explanation = at.explain(image, classifier, target=0, regions=labels, search="greedy")
    for order in itertools.permutations(range(5)):
        other = at.explain(image, classifier, target=0, regions=labels, search=lambda objective, order=order: order)
        assert other.insertion_auc <= explanation.insertion_auc + 1e-6
        assert other.deletion_auc >= explanation.deletion_auc - 1e-6
