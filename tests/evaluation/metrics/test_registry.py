"""METRICS: what every metric must do, and what a null control must not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import SIDE, linear_classifier

import attribution as at
import evaluation as ev
from evaluation.metrics.protocol import Protocol
from evaluation.metrics.registry import METRICS, Case, expand_metrics

PROTOCOL = Protocol(fill="black", output="logit")


def case(method: str, image_seed: int, **options: object) -> Case:
    """A method on a random image under the linear classifier, explained for its predicted class; the object is the left half."""
    classifier = linear_classifier(image_seed)
    image = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(image_seed))
    regions = at.make_regions(image, "grid", count=16)

    def explain(picture: torch.Tensor) -> at.Explanation:
        return at.attribute(picture, classifier, method, 0, fill="black", seed=image_seed, **options)

    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[:, : SIDE // 2] = True
    return Case(classifier, explain(image), 0, regions, lambda picture: explain(picture).pixel_map, mask, seed=image_seed)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if not metric.grid])
def test_contract(name: str) -> None:
    """A finite number, the same again, from the explanation alone and not from scores that it carries."""
    metric = METRICS[name]
    made = case("input_x_gradient", 0)
    value = metric.function(made, PROTOCOL).value
    assert np.isfinite(value)
    assert metric.function(case("input_x_gradient", 0), PROTOCOL).value == value
    assert metric.summary and metric.direction in ("higher", "lower")
    liar = replace(made.explanation, evaluations=0, probabilities=torch.ones(2), provenance={"score": 1.0})
    assert metric.function(replace(made, explanation=liar, curves={}), PROTOCOL).value == value
    assert metric.curve == bool(made.curves)


@pytest.mark.parametrize("name", ["insertion", "deletion", "insertion_deletion", "mu_fidelity", "road", "infidelity"])
def test_the_truth_beats_the_null_controls(name: str) -> None:
    """Input x gradient is exact on a linear model; random, constant and centre know nothing of it."""
    metric = METRICS[name]
    sign = 1 if metric.direction == "higher" else -1
    means = {
        method: sign * np.mean([metric.function(case(method, seed), PROTOCOL).value for seed in range(8)])
        for method in ("input_x_gradient", "random", "constant", "center_prior")
    }
    best = means.pop("input_x_gradient")
    assert all(best > value for value in means.values()), (best, means)


@pytest.mark.parametrize("name", ["insertion_deletion", "mu_fidelity", "road"])
def test_the_reverse_of_the_truth_is_the_worst(name: str) -> None:
    """A metric that took the least important first would not notice."""
    for seed in range(4):
        made = case("input_x_gradient", seed)
        negated = replace(made.explanation, pixel_map=-made.explanation.pixel_map)
        right = METRICS[name].function(made, PROTOCOL).value
        wrong = METRICS[name].function(replace(made, explanation=negated, curves={}), PROTOCOL).value
        assert right > 0 > wrong
        if name != "road":
            assert wrong == pytest.approx(-right, rel=1e-3)


def test_random_maps_score_at_chance() -> None:
    """Their mean insertion lies within the spread of random orders of the same regions, their deletion likewise."""
    made = case("random", 3)
    insertion, deletion = ev.random_order_curves(made.classifier, made.explanation.image, made.regions, 0, PROTOCOL, count=200, seed=1)
    values = []
    for seed in range(60):
        explanation = at.attribute(made.explanation.image, made.classifier, "random", 0, seed=seed)
        values.append(METRICS["insertion"].function(replace(made, explanation=explanation, curves={}), PROTOCOL).value)
    spread = float(insertion.std())
    assert abs(np.mean(values) - float(insertion.mean())) < 3 * spread * np.sqrt(1 / 60 + 1 / 200)
    assert abs(float(insertion.mean() - deletion.mean())) < 3 * 2 * spread / np.sqrt(200)  # on a linear model both are the midpoint


def test_one_curve_serves_every_metric_of_a_protocol() -> None:
    made = case("input_x_gradient", 0)
    for name in ("insertion", "deletion", "highest_confidence_25", "highest_confidence_100"):
        METRICS[name].function(made, PROTOCOL)
    assert len(made.curves) == 1
    METRICS["insertion"].function(made, replace(PROTOCOL, fill="mean"))
    assert len(made.curves) == 2


def test_expanding_names() -> None:
    assert expand_metrics(["deletion", "highest_confidence", "deletion"]) == (
        "deletion",
        *(f"highest_confidence_{share}" for share in (25, 50, 75, 100)),
    )
    with pytest.raises(at.UserError, match="unknown metric 'x'"):
        expand_metrics(["x"])
    with pytest.raises(at.UserError, match="no metric"):
        expand_metrics([])
