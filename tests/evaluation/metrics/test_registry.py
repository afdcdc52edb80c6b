"""METRICS: what every metric must do, and what a null control must not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import SIDE, linear_classifier

import attribution as at
import evaluation as ev
from attribution.masking import as_seen
from evaluation.metrics.judged import judged
from evaluation.metrics.protocol import Protocol
from evaluation.metrics.registry import METRICS, Case, Measurement, Metric, expand_metrics, measures_of, metric_title

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


def check_contract(name: str) -> None:
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


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if not metric.grid])
def test_contract(name: str) -> None:
    check_contract(name)


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
    insertion, deletion = ev.random_order_curves(made.explanation.image, made.classifier, made.regions, 0, PROTOCOL, count=200, seed=1)
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


def test_a_metric_that_hides_pixels_states_its_fill() -> None:
    """The fill of the first protocol that the metric can use; the one that it is given is the one that it hides by."""
    black, linear, drop, blur = (Protocol(fill=fill) for fill in ("black", "linear", "drop", "blur"))
    found = {
        (name, protocols): [(measure.label, protocol) for measure, protocol in measures_of(name, protocols)]
        for name in ("mu_fidelity", "infidelity", "road", "sensitivity")
        for protocols in ((black, blur), (linear, drop, blur), (linear,))
    }
    for name in ("mu_fidelity", "infidelity"):
        assert found[name, (black, blur)] == [(f"{name} (fill black)", black)]
        assert found[name, (linear,)] == [(f"{name} (fill linear)", linear)]
    assert found["mu_fidelity", (linear, drop, blur)] == [("mu_fidelity (fill drop)", drop)]
    assert found["infidelity", (linear, drop, blur)] == [("infidelity (fill blur)", blur)]
    assert found["road", (linear,)] == [("road", linear)] and found["sensitivity", (black, blur)] == [("sensitivity", black)]
    assert [measure.label for measure, _ in measures_of("insertion", (black, linear))] == [
        "insertion (regions, black, p)",
        "insertion (regions, linear, p)",
    ]
    made = case("input_x_gradient", 0)
    for name, evaluator in (("mu_fidelity", ev.mu_fidelity), ("infidelity", ev.infidelity)):
        for fill in ("black", "blur"):
            expected = evaluator(made.explanation.image, made.classifier, made.explanation, 0, fill=fill, seed=0)
            assert METRICS[name].function(made, Protocol(fill=fill)).value == expected
        with pytest.raises(at.NotApplicable, match=f"{name} cannot hide pixels by fill 'linear': add another fill, such as 'black'"):
            METRICS[name].function(made, linear)
    with pytest.raises(at.NotApplicable, match="infidelity cannot hide pixels by fill 'drop'"):
        METRICS["infidelity"].function(made, drop)


@pytest.mark.parametrize("name", ["mu_fidelity", "road", "energy_pointing_game", "pointing_game"])
def test_what_the_model_crops_away_changes_no_score(name: str) -> None:
    """Whatever the map says there, and whatever the mask; other pixels count."""
    classifier = at.Classifier(linear_classifier(0).module, size=SIDE, resize="short_side")
    image = torch.rand(3, SIDE, SIDE + 10, generator=torch.Generator().manual_seed(1))
    values = torch.rand(SIDE, SIDE + 10, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(SIDE, SIDE + 10, dtype=torch.bool)
    mask[:, : SIDE // 2 + 5] = True
    regions = as_seen(at.make_regions(image, "grid", count=12), classifier)

    def score(values: torch.Tensor, mask: torch.Tensor) -> float:
        explanation = at.Explanation(image, 0, ("a", "b"), torch.tensor([0.5, 0.5]), pixel_map=values)
        made = Case(classifier, explanation, 0, regions, lambda picture: values, mask)
        return METRICS[name].function(made, PROTOCOL).value

    beyond, inside = values.clone(), values.clone()
    beyond[:, :5], beyond[:, -5:] = 9.0, -9.0
    inside[:, 5:-5] = values[:, 5:-5].flip(1)
    masked = mask.clone()
    masked[:, :5], masked[:, -5:] = False, True
    assert score(beyond, masked) == score(values, mask)
    assert score(inside, mask) != score(values, mask) or name == "pointing_game"


def test_mu_fidelity_with_a_crop_is_that_of_the_crop() -> None:
    module = linear_classifier(0).module
    cropping, whole = (at.Classifier(module, size=SIDE, resize=way) for way in ("short_side", "squash"))
    image = torch.rand(3, SIDE, SIDE + 10, generator=torch.Generator().manual_seed(1))
    values = torch.rand(SIDE, SIDE + 10, generator=torch.Generator().manual_seed(2))
    black = ev.mu_fidelity(image[:, :, 5:-5], whole, values[:, 5:-5], 0, grid=4)
    assert ev.mu_fidelity(image, cropping, values, 0, grid=4) == pytest.approx(black)


def test_titles() -> None:
    titles = {name: metric_title(name) for name in METRICS}
    assert titles == {
        "insertion": "insertion",
        "deletion": "deletion",
        "insertion_deletion": "insertion - deletion",
        "highest_confidence_25": "highest confidence 25%",
        "highest_confidence_50": "highest confidence 50%",
        "highest_confidence_75": "highest confidence 75%",
        "highest_confidence_100": "highest confidence 100%",
        "mu_fidelity": "muFidelity",
        "road": "ROAD",
        "infidelity": "infidelity",
        "sensitivity": "sensitivity",
        "pointing_game": "pointing game",
        "energy_pointing_game": "energy pointing game",
        "gridpg": "GridPG",
        "difull": "DiFull",
        "dipart": "DiPart",
    }


# --- the recipe of docs/extending.md: one function, one entry


def _peak_share(case: Case, protocol: Protocol) -> Measurement:
    """The share of the pixels that reach half of the map's maximum."""
    values = judged(case.explanation).heat
    return Measurement(float((values >= values.max() / 2).double().mean()))


def test_the_recipe_of_a_metric_keeps_the_contract(
    run_command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "peak_share", Metric(_peak_share, "lower", "share of the pixels that reach half of the maximum"))
    check_contract("peak_share")
    made = case("input_x_gradient", 0)
    values = made.explanation.pixel_map.flatten().tolist()
    by_hand = sum(value >= max(values) / 2 for value in values) / len(values)
    assert METRICS["peak_share"].function(made, PROTOCOL).value == pytest.approx(by_hand)
    assert metric_title("peak_share") == "peak share" and expand_metrics(["peak_share"]) == ("peak_share",)
    (measure,) = (measure for measure, _ in measures_of("peak_share", [PROTOCOL]))
    assert (measure.label, measure.direction) == ("peak_share", "lower")
    assert ev.make_settings({"data": "x", "metrics": ["peak_share"]}).measures == (measure,)
    code, out, _ = run_command("benchmark", "--list")
    assert code == 0 and "peak_share lower is better: share of the pixels" in " ".join(out.split())


def test_a_metric_has_a_direction() -> None:
    with pytest.raises(at.UserError, match="direction is 'sideways': expected one of higher, lower"):
        ev.Metric(None, "sideways", "of nothing")  # type: ignore[arg-type]
