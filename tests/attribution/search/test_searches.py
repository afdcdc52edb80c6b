from __future__ import annotations

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
from attribution.search import SEARCHES
from attribution.search.bidirectional import bidirectional_greedy, bidirectional_greedy_v1
from attribution.search.greedy import greedy, lazy_greedy, stochastic_greedy


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


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 8), seed=st.integers(0, 999), levels=st.sampled_from([None, 2]), name=st.sampled_from(sorted(SEARCHES)))
def test_every_search_returns_each_region_once(size: int, seed: int, levels: int | None, name: str) -> None:
    reports: list[tuple[int, int]] = []
    order = SEARCHES[name](Toy(size, random_function(seed, levels)), progress=lambda done, total: reports.append((done, total)))
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(size))
    assert reports[-1] == ((size, size) if name != "budget" else (16 * size, 16 * size))


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
        with pytest.raises(at.UserError, match=f"count is {count}: expected 1 to 10"):
            search(Toy(10, f), count=count)


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
