"""Every evaluator takes an explanation, a map or an order, and says of one explanation the same in all three forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import SIDE, linear_classifier

import attribution as at
import evaluation as ev
from evaluation.metrics import curves, fidelity, localization, road
from evaluation.metrics.curves import perturbation_steps
from evaluation.metrics.judged import Judged, judged
from evaluation.metrics.protocol import Protocol

IMAGE = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
CLASSIFIER = linear_classifier(3)
REGIONS = at.make_regions(IMAGE, "grid", count=9)
FOUND = at.explain(IMAGE, CLASSIFIER, 0, regions=REGIONS, search="greedy")
MASK = FOUND.order[0] == REGIONS.labels
PIXELS = Protocol(steps="pixels", count=5, output="logit")


def steps_of(explanation: Judged, protocol: Protocol, regions: Any) -> list[float]:
    labels, order = perturbation_steps(explanation, protocol, regions)
    return order.argsort()[labels].flatten().tolist()


def curve_of(explanation: Judged, protocol: Protocol, regions: Any) -> list[float]:
    found = ev.perturbation_curves(IMAGE, CLASSIFIER, explanation, 0, protocol, regions=regions)
    return [*found.insertion.tolist(), *found.deletion.tolist(), *found.insertion_area.tolist()]


EVALUATORS: dict[str, Callable[..., list[float]]] = {
    "perturbation_steps": lambda one, regions=None: steps_of(one, PIXELS, regions),
    "perturbation_steps of regions": lambda one, regions=None: steps_of(one, Protocol(), REGIONS if regions is None else regions),
    "perturbation_curves": lambda one, regions=None: curve_of(one, PIXELS, regions),
    "perturbation_curves of regions": lambda one, regions=None: curve_of(one, Protocol(), REGIONS if regions is None else regions),
    "road": lambda one, regions=None: ev.road(IMAGE, CLASSIFIER, one, 0, regions=regions, percentages=(20, 50)).morf.tolist(),
    "mu_fidelity": lambda one, regions=None: [ev.mu_fidelity(IMAGE, CLASSIFIER, one, 0, regions=regions)],
    "infidelity": lambda one, regions=None: [ev.infidelity(IMAGE, CLASSIFIER, one, 0, regions=regions, samples=8)],
    "pointing_game": lambda one, regions=None: [ev.pointing_game(one, MASK, regions=regions)],
    "energy_pointing_game": lambda one, regions=None: [ev.energy_pointing_game(one, MASK, regions=regions)],
    "relevance_rank_accuracy": lambda one, regions=None: [ev.relevance_rank_accuracy(one, MASK, regions=regions)],
}


def mapped(values: Tensor) -> at.Explanation:
    return at.Explanation(IMAGE, 0, ("a", "b"), torch.tensor([0.5, 0.5]), pixel_map=values)


def test_no_evaluator_is_missing() -> None:
    """A function of these files that takes an explanation stands in ``EVALUATORS``."""
    functions = [value for module in (curves, fidelity, localization, road) for value in vars(module).items()]
    taking = {name for name, value in functions if not name.startswith("_") and "explanation" in getattr(value, "__annotations__", {})}
    assert taking - {"judged", "judged_on"} == {name.split()[0] for name in EVALUATORS}


@pytest.mark.parametrize("name", EVALUATORS)
def test_a_map_scores_as_the_explanation_that_carries_it(name: str) -> None:
    values = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(1)) + 2 * MASK
    expected = EVALUATORS[name](mapped(values))
    assert all(map(math.isfinite, expected))
    for same in (values, values.numpy(), values.double().requires_grad_(), values.numpy()[::-1, ::-1].copy()[::-1, ::-1]):
        assert EVALUATORS[name](same) == expected
    if name != "infidelity":  # which does not see the sign
        assert EVALUATORS[name](-values) != expected


@pytest.mark.parametrize("name", EVALUATORS)
def test_an_order_scores_as_the_explanation_that_carries_it(name: str) -> None:
    """That of a search without its trajectories, which make its heatmap."""
    bare = replace(FOUND, insertion_scores=None, deletion_scores=None)
    order, expected = FOUND.order, EVALUATORS[name](bare)
    labels = REGIONS.labels
    for same in (order, order.int(), order.numpy(), order.tolist(), tuple(order.tolist())):
        assert EVALUATORS[name](same, regions=REGIONS) == expected
    assert EVALUATORS[name](order, regions=labels) == EVALUATORS[name](order, regions=labels.numpy()) == expected
    assert EVALUATORS[name](order.flip(0), regions=REGIONS) != expected


@pytest.mark.parametrize("name", EVALUATORS)
def test_scores_that_a_search_stores_are_no_scores(name: str) -> None:
    """Curves and ROAD depend on the order alone. Metrics of values judge the heatmap, as if it had come from anywhere else."""
    liar = replace(FOUND, insertion_scores=torch.rand(10), deletion_scores=torch.rand(10), probabilities=torch.ones(2), evaluations=0)
    if name.startswith(("perturbation", "road")):
        assert EVALUATORS[name](liar) == EVALUATORS[name](FOUND)
    else:
        assert EVALUATORS[name](FOUND) == EVALUATORS[name](FOUND.heatmap)
        assert EVALUATORS[name](liar) == EVALUATORS[name](liar.heatmap)


def test_an_order_is_judged_as_a_map_by_its_ranks() -> None:
    labels = torch.tensor([[0, 1, 1], [2, 2, 3]])
    claim = judged([2, 0, 3, 1], regions=labels)
    assert torch.equal(claim.values, torch.tensor([[0.75, 0.25, 0.25], [1.0, 1.0, 0.5]]))
    assert claim.order.tolist() == [2, 0, 3, 1]
    both = replace(mapped(torch.randn(SIDE, SIDE)).ranked_over(REGIONS))
    assert torch.equal(judged(both).values, both.pixel_map) and torch.equal(judged(both).order, both.order)


def test_maps_are_signed_where_the_method_is() -> None:
    signed = torch.randn(5, 6)
    assert torch.equal(judged(mapped(signed)).values, signed)
    assert judged(signed.double().requires_grad_()).values.dtype == torch.float32
    big_endian = signed.numpy().astype(">f4")
    assert torch.equal(judged(big_endian).values, signed)


@pytest.mark.parametrize("name", EVALUATORS)
@pytest.mark.parametrize(
    ("given", "regions", "message"),
    [
        ("a map", None, "what is to be judged is 'a map': expected an Explanation, a map of floats"),
        (None, None, "judged is NoneType"),
        (3.5, None, "judged is float"),
        (torch.zeros(3, SIDE, SIDE), None, r"judged is float32 \[3, .*: expected an Explanation, a map of floats \[H, W\], or an order"),
        (torch.zeros(0, 4), None, r"judged is float32 \[0, 4\]"),
        (torch.zeros(SIDE, SIDE, dtype=torch.int64), None, r"judged is int64 \[.*expected .* a map of floats"),
        (np.array([["x"]]), None, "judged is <U1"),
        (torch.rand(9), REGIONS, r"judged is float32 \[9\]: .* whole numbers \[R\], with regions="),
        (torch.full((SIDE, SIDE), torch.nan), None, r"values of the map are not finite"),
        (torch.full((SIDE, SIDE), 1e300, dtype=torch.float64), None, "values of the map are not finite"),
        ([0, 1, 2], REGIONS, "the order has 3 ids: expected each of 0 to 8 once"),
        ([0, 1, 2, 3, 4, 5, 6, 7, 7], REGIONS, "the order has 9 ids: expected each of 0 to 8 once"),
        (
            at.Explanation(IMAGE, 0, ("a", "b"), torch.tensor([0.5, 0.5])),
            None,
            "neither a map of pixels nor an order of regions",
        ),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_anything_else_is_refused_with_what_was_received(name: str, given: Any, regions: Any, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        EVALUATORS[name](given, regions=regions)


def test_an_order_without_its_regions_is_refused() -> None:
    with pytest.raises(at.UserError, match=r"an order of 9 regions was given without them: give regions="):
        judged(torch.arange(9))


@pytest.mark.parametrize("name", [name for name in EVALUATORS if "steps" not in name])
def test_a_map_of_another_size_is_refused(name: str) -> None:
    with pytest.raises(at.UserError, match=f"{SIDE - 1}"):
        EVALUATORS[name](torch.rand(SIDE, SIDE - 1))
