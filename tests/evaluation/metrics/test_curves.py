from __future__ import annotations

import itertools
import json
import math
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.utils import save_image

import attribution as at
from evaluation.metrics import curves as perturbation
from evaluation.metrics.curves import HIGHEST_CONFIDENCE_SHARES, Curves, perturbation_curves, perturbation_steps, random_order_curves
from evaluation.metrics.imputation import impute
from evaluation.metrics.protocol import PROTOCOLS, Protocol
from evaluation.metrics.road import Road, road

LOGIT = Protocol(output="logit")


def linear_classifier(height: int, width: int, seed: int, bias: float = 0.3) -> at.Classifier:
    """Logit 0 is a weighted sum of the pixels plus a bias, so that every region contributes its own part."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * height * width, 2))
    with torch.no_grad():
        module[1].weight.copy_(torch.randn(2, 3 * height * width, generator=torch.Generator().manual_seed(seed)))
        module[1].bias.copy_(torch.tensor([bias, 0.0]))
    return at.Classifier(module, size=(height, width), scores="logits")


def contributions(classifier: at.Classifier, image: Tensor, labels: Tensor) -> list[float]:
    """What each region adds to logit 0 on black."""
    products = classifier.module[1].weight[0].detach().double() * image.flatten().double()
    by_pixel = products.view(3, *labels.shape).sum(dim=0)
    return [float(by_pixel[labels == region].sum()) for region in range(int(labels.max()) + 1)]


def ordered(image: Tensor, labels: Tensor, order: list[int]) -> at.Explanation:
    return at.Explanation(image, 0, ("a", "b"), torch.tensor([0.5, 0.5]), regions=at.Regions(labels), order=torch.tensor(order))


def mapped(image: Tensor, values: Tensor) -> at.Explanation:
    return at.Explanation(image, 0, ("a", "b"), torch.tensor([0.5, 0.5]), pixel_map=values)


def random_image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fill", ["black", "linear"])
def test_what_the_model_crops_away_changes_no_score(fill: str) -> None:
    """Regions outside the crop may stand anywhere in the order. The curves are those of the crop alone, cut out by hand."""
    image = random_image(12, 24)
    labels = torch.arange(6).repeat_interleave(4).expand(12, 24)  # six columns; the square in the middle shows 1 (half), 2, 3, 4 (half)
    module = linear_classifier(12, 12, 0).module
    cropping, whole = (at.Classifier(module, size=12, resize=way) for way in ("short_side", "squash"))
    protocol = Protocol(fill=fill)
    seen, cut = [2, 4, 1, 3], labels[:, 6:18] - 1
    expected = perturbation_curves(image[:, :, 6:18], whole, [1, 3, 0, 2], 0, replace(protocol, fill="black"), regions=cut)
    found = []
    for places in ((0, 1), (2, 5), (4, 5)):
        order = seen.copy()
        for place, region in zip(places, (0, 5), strict=True):
            order.insert(place, region)
        curves = perturbation_curves(image, cropping, order, 0, protocol, regions=labels)
        found.append((curves.insertion_auc, curves.deletion_auc))
        assert float(curves.insertion_area[-1]) == float(curves.deletion_area[-1]) == 1
    if fill == "black":
        assert found == [pytest.approx((expected.insertion_auc, expected.deletion_auc), abs=1e-6)] * 3
        area = at.MaskedInputs(cropping, image, labels, torch.zeros_like(image)).area
        assert area.tolist() == pytest.approx([0, 1 / 6, 1 / 3, 1 / 3, 1 / 6, 0])


def naive_curves(classifier: at.Classifier, image: Tensor, labels: Tensor, fill: Tensor, order: list[int]) -> tuple[list, list]:
    """Probability of class 0 of every masked image, built pixel by pixel and preprocessed and forwarded on its own."""

    def probability(subset: set[int]) -> float:
        shown = reference.masked_image(image, labels, fill, subset)
        return float(classifier.probabilities(classifier.preprocessing(shown[None]))[0, 0])

    prefixes = [set(order[:k]) for k in range(len(order) + 1)]
    return [probability(p) for p in prefixes], [probability(set(order) - p) for p in prefixes]


def nonlinear_classifier(size: int | tuple[int, int], **options: object) -> at.Classifier:
    generator = torch.Generator().manual_seed(11)
    weights = torch.randn(5, 3, 3, 3, generator=generator)
    head = torch.randn(3, 5, generator=generator)

    def scores(inputs: Tensor) -> Tensor:
        return nn.functional.conv2d(inputs, weights).relu().mean(dim=(2, 3)).sin() @ head.T

    return at.Classifier(scores, size=size, scores="logits", **options)


# --- closed forms on a linear classifier


@settings(max_examples=25, deadline=None)
@given(height=st.integers(2, 9), width=st.integers(2, 9), count=st.integers(1, 7), seed=st.integers(0, 2**16))
def test_curves_of_a_linear_classifier(height: int, width: int, count: int, seed: int) -> None:
    """Regions of any size: the k-th value is the bias and the first k contributions, and the areas are shares of pixels."""
    generator = torch.Generator().manual_seed(seed)
    classifier, image = linear_classifier(height, width, seed), random_image(height, width, seed)
    labels = at.Regions(torch.randint(0, count, (height, width), generator=generator)).labels
    parts = contributions(classifier, image, labels)
    order = torch.randperm(len(parts), generator=generator).tolist()
    curves = perturbation_curves(image, classifier, ordered(image, labels, order), 0, LOGIT)

    value, area = 0.3, 0.0
    insertion, areas = [value], [area]
    for region in order:
        value, area = value + parts[region], area + float((labels == region).sum()) / (height * width)
        insertion.append(value)
        areas.append(area)
    deletion = [0.3 + value - v for v in insertion]
    assert np.allclose(curves.insertion, insertion, atol=1e-4)
    assert np.allclose(curves.deletion, deletion, atol=1e-4)
    assert np.allclose(curves.insertion_area, areas, atol=1e-6)
    assert np.allclose(curves.deletion_area, areas, atol=1e-6)
    assert curves.insertion_auc == pytest.approx(reference.trapezoid(areas, insertion), abs=1e-4)
    assert curves.deletion_auc == pytest.approx(reference.trapezoid(areas, deletion), abs=1e-4)
    assert curves.difference == pytest.approx(curves.insertion_auc - curves.deletion_auc)
    assert curves.confidence == pytest.approx(insertion[-1], abs=1e-4)


def test_the_true_order_is_the_best_of_all() -> None:
    """Equal areas: by contribution descending, no permutation has a higher insertion, a lower deletion or a larger difference."""
    classifier, image = linear_classifier(6, 10, 1), random_image(6, 10, 1)
    labels = at.make_regions(image, "grid", rows=1, columns=5).labels
    parts = contributions(classifier, image, labels)
    true = sorted(range(5), key=lambda region: -parts[region])
    found = {
        order: perturbation_curves(image, classifier, ordered(image, labels, list(order)), 0, LOGIT)
        for order in itertools.permutations(range(5))
    }
    assert max(found, key=lambda order: found[order].difference) == tuple(true)
    assert max(found, key=lambda order: found[order].insertion_auc) == tuple(true)
    assert min(found, key=lambda order: found[order].deletion_auc) == tuple(true)
    assert min(found, key=lambda order: found[order].difference) == tuple(reversed(true))
    assert np.mean([c.difference for c in found.values()]) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("fill", ["black", "blur", "linear"])
def test_the_reversed_order_is_mirrored(cnn: at.Classifier, small_cat: Tensor, fill: str) -> None:
    """Showing the last k of an order hides the first R-k: deleting the least important first would swap the two curves."""
    labels = at.make_regions(small_cat, "slico", region_size=8).labels
    order = torch.randperm(int(labels.max()) + 1, generator=torch.Generator().manual_seed(0)).tolist()
    protocol = Protocol(fill=fill)
    forward = perturbation_curves(small_cat, cnn, ordered(small_cat, labels, order), 3, protocol)
    backward = perturbation_curves(small_cat, cnn, ordered(small_cat, labels, order[::-1]), 3, protocol)
    assert torch.allclose(backward.insertion, forward.deletion.flip(0), atol=1e-5)
    assert torch.allclose(backward.deletion, forward.insertion.flip(0), atol=1e-5)
    assert torch.allclose(backward.insertion_area, 1 - forward.insertion_area.flip(0), atol=1e-6)
    assert backward.insertion_auc == pytest.approx(forward.deletion_auc, abs=1e-5)
    assert backward.difference == pytest.approx(-forward.difference, abs=1e-5)


def test_deletion_removes_the_most_important_first() -> None:
    """One bright pixel is all the evidence: gone after the first step of deletion, there after the first of insertion."""
    image = torch.zeros(3, 4, 4)
    image[:, 1, 2] = 1
    classifier = at.Classifier(lambda x: torch.stack([x.sum(dim=(1, 2, 3)), 0 * x[:, 0, 0, 0]], dim=1), size=4, scores="logits")
    for protocol in (Protocol(steps="pixels", count=16, output="logit"), Protocol(output="logit")):
        curves = perturbation_curves(image, classifier, mapped(image, image[0]), 0, protocol, regions=torch.arange(16).view(4, 4))
        assert curves.insertion.tolist() == pytest.approx([0.0] + [3.0] * 16)
        assert curves.deletion.tolist() == pytest.approx([3.0] + [0.0] * 16)
        assert curves.difference == pytest.approx(3 * (1 - 1 / 32) - 3 / 32)


# --- chance level


def test_random_orders_score_at_chance() -> None:
    """Linear and equal areas: the expected k-th value lies on the line from fill to image, so both AUCs expect its middle."""
    classifier, image = linear_classifier(4, 12, 2), random_image(4, 12, 2)
    regions = at.make_regions(image, "grid", rows=1, columns=6)
    middle = 0.3 + sum(contributions(classifier, image, regions.labels)) / 2
    insertion, deletion = random_order_curves(image, classifier, regions, 0, LOGIT, count=400, seed=1)
    assert insertion.shape == deletion.shape == (400,)
    assert abs(insertion.mean() - middle) < 4 * insertion.std() / 20
    assert abs(deletion.mean() - middle) < 4 * deletion.std() / 20
    assert insertion.std() > 0.1
    assert torch.allclose(insertion + deletion, torch.full((400,), 2 * middle, dtype=torch.float64), atol=1e-4)


@pytest.mark.parametrize("name", ["lima", "smdl", "lima-compat"])
def test_random_orders_are_measured_as_any_order(cnn: at.Classifier, small_cat: Tensor, name: str) -> None:
    regions = at.make_regions(small_cat, "grid", count=9)
    state = torch.random.get_rng_state()
    insertion, deletion = random_order_curves(small_cat, cnn, regions, "cat", PROTOCOLS[name], count=3, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    generator = torch.Generator().manual_seed(4)
    for k in range(3):
        order = torch.randperm(9, generator=generator).tolist()
        curves = perturbation_curves(small_cat, cnn, ordered(small_cat, regions.labels, order), "cat", PROTOCOLS[name])
        assert curves.insertion_auc == pytest.approx(float(insertion[k]), abs=1e-9)
        assert curves.deletion_auc == pytest.approx(float(deletion[k]), abs=1e-9)
    other, _ = random_order_curves(small_cat, cnn, regions, "cat", PROTOCOLS[name], count=3, seed=5)
    assert not torch.allclose(other, insertion, atol=1e-4)


# --- steps


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 12), width=st.integers(1, 12), count=st.integers(1, 60), levels=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_pixel_steps(height: int, width: int, count: int, levels: int, seed: int) -> None:
    """Exactly floor(k N / K) pixels after step k: the highest values, of equal ones those that come first."""
    values = torch.randint(-levels, levels, (height, width), generator=torch.Generator().manual_seed(seed)).float()
    image = random_image(height, width)
    labels, order = perturbation_steps(mapped(image, values), Protocol(steps="pixels", count=count))
    pixels = height * width
    count = min(count, pixels)
    assert sorted(order.tolist()) == list(range(count))
    ranking = sorted(range(pixels), key=lambda i: (-float(values.flatten()[i]), i))
    revealed: set[int] = set()
    for k, step in enumerate(order.tolist(), start=1):
        revealed |= set((labels.flatten() == step).nonzero()[:, 0].tolist())
        assert revealed == set(ranking[: k * pixels // count])


def test_steps_of_a_search_and_of_a_map(small_cat: Tensor) -> None:
    grid, other = at.make_regions(small_cat, "grid", count=16), at.make_regions(small_cat, "slico", region_size=8)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    search = ordered(small_cat, grid.labels, order.tolist())
    values = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
    heatmap = mapped(small_cat, values)
    lima, pixels = PROTOCOLS["lima"], Protocol(steps="pixels", count=16)

    for regions in (None, grid, grid.labels):
        labels, found = perturbation_steps(search, lima, regions)
        assert torch.equal(labels, grid.labels) and torch.equal(found, order)
    for explanation in (search, heatmap):
        labels, found = perturbation_steps(explanation, lima, other)
        assert torch.equal(labels, other.labels) and torch.equal(found, explanation.ranked_over(other).order)
    labels, found = perturbation_steps(heatmap.ranked_over(grid), lima)
    means = [-float(values[grid.labels == region].mean()) for region in found.tolist()]
    assert torch.equal(labels, grid.labels) and means == sorted(means)
    # equal areas: 16 pixel steps of a search's rank map are its regions
    labels, found = perturbation_steps(search, pixels)
    assert torch.equal(found.argsort()[labels], order.argsort()[grid.labels])
    # a map that was ranked over regions is still measured by its pixels under pixel steps
    assert torch.equal(perturbation_steps(heatmap.ranked_over(grid), pixels)[0], perturbation_steps(heatmap, pixels)[0])


# --- the naive loop


@pytest.mark.parametrize("fill", ["black", "model_mean", "blur", "#20c080", (0.1, 0.9, 0.4)])
@pytest.mark.parametrize(
    "way",
    [
        {"size": (9, 11)},
        {"size": 8, "resize": "short_side", "interpolation": "bicubic", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)},
    ],
    ids=["as is", "resized"],
)
def test_equals_the_naive_loop(fill: object, way: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    image, classifier = random_image(9, 11, 5), nonlinear_classifier(**way)
    labels = at.Regions(torch.randint(0, 6, (9, 11), generator=torch.Generator().manual_seed(5))).labels
    order = [3, 0, 5, 1, 4, 2]
    background = torch.tensor(way.get("mean", (0.0, 0.0, 0.0)))[:, None, None].expand(3, 9, 11)
    if fill != "model_mean":
        background = at.make_fill(image, fill)
    insertion, deletion = naive_curves(classifier, image, labels, background, order)
    assert np.ptp(insertion) > 0.01
    for limit in (2**27, 0):  # by contributions of the regions, and image by image
        monkeypatch.setattr(perturbation, "_CONTRIBUTION_VALUES", limit)
        curves = perturbation_curves(image, classifier, ordered(image, labels, order), 0, Protocol(fill=fill))
        assert np.allclose(curves.insertion, insertion, atol=2e-5)
        assert np.allclose(curves.deletion, deletion, atol=2e-5)


def test_pixel_by_pixel_equals_the_naive_loop() -> None:
    """K = N: one pixel a step, also where more steps were asked for than there are pixels."""
    image, values = random_image(6, 7, 6), torch.randint(0, 20, (6, 7), generator=torch.Generator().manual_seed(6)).float()
    classifier = nonlinear_classifier((6, 7), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    ranking = sorted(range(42), key=lambda i: (-float(values.flatten()[i]), i))
    background = torch.tensor((0.5, 0.4, 0.3))[:, None, None].expand(3, 6, 7)
    insertion, deletion = naive_curves(classifier, image, torch.arange(42).view(6, 7), background, ranking)
    for count in (42, 5000):
        curves = perturbation_curves(image, classifier, mapped(image, values), 0, replace(PROTOCOLS["smdl"], count=count))
        assert np.allclose(curves.insertion, insertion, atol=1e-4)
        assert np.allclose(curves.deletion, deletion, atol=1e-4)
        assert np.allclose(curves.insertion_area, np.arange(43) / 42, atol=1e-6)
        assert np.allclose(curves.deletion_area, np.arange(43) / 42, atol=1e-6)


@pytest.mark.parametrize("parts", [False, True])
def test_linear_fill_equals_imputing_each_prefix(parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if parts:
        monkeypatch.setattr(perturbation, "_IMAGE_VALUES", 3 * 9 * 11 * 2)
    image, std = random_image(9, 11, 7), (0.2, 0.3, 0.4)
    classifier = nonlinear_classifier(12, mean=(0.4, 0.5, 0.6), std=std)
    labels = at.Regions(torch.randint(0, 5, (9, 11), generator=torch.Generator().manual_seed(7))).labels
    order = [3, 0, 1, 4, 2]
    curves = perturbation_curves(image, classifier, ordered(image, labels, order), 0, Protocol(fill="linear"), seed=9)
    for k in range(6):
        shown = torch.isin(labels, torch.tensor(order[:k], dtype=torch.int64))
        for mask, found in ((shown, curves.insertion), (~shown, curves.deletion)):
            inputs = classifier.preprocessing(impute(image, mask[None], noise=0.01, std=std, seed=9))
            assert float(classifier.probabilities(inputs)[0, 0]) == pytest.approx(float(found[k]), abs=1e-4)
    again = perturbation_curves(image, classifier, ordered(image, labels, order), 0, Protocol(fill="linear"), seed=10)
    assert torch.equal(again.insertion[-1], curves.insertion[-1]) and not torch.equal(again.insertion[:-1], curves.insertion[:-1])


def test_black_pixels_are_never_revealed_under_lima_compat() -> None:
    image, classifier = random_image(10, 12, 8), nonlinear_classifier((10, 12))
    image[:, torch.rand(10, 12, generator=torch.Generator().manual_seed(8)) < 0.3] = 0
    image[:2, 0, 0], image[2, 0, 0] = 0, 0.5  # one channel is enough
    labels = at.make_regions(image, "grid", rows=2, columns=3).labels
    order = [4, 2, 0, 5, 1, 3]
    insertion, deletion = [], []
    for k in range(7):
        shown = reference.masked_image(image, labels, torch.zeros_like(image), set(order[:k]))
        left = reference.masked_image(image, labels, torch.zeros_like(image), set(order[k:]))
        insertion.append(sum(float(shown[:, y, x].sum()) != 0 for y in range(10) for x in range(12)) / 120)
        deletion.append(1 - sum(float(left[:, y, x].sum()) != 0 for y in range(10) for x in range(12)) / 120)
    assert 0 < insertion[-1] < 0.8 and deletion[0] == pytest.approx(1 - insertion[-1]) and deletion[-1] == 1

    compat = perturbation_curves(image, classifier, ordered(image, labels, order), 0, PROTOCOLS["lima-compat"])
    exact = perturbation_curves(image, classifier, ordered(image, labels, order), 0, PROTOCOLS["lima"])
    assert np.allclose(compat.insertion_area, insertion, atol=1e-6)
    assert np.allclose(compat.deletion_area, deletion, atol=1e-6)
    assert torch.equal(compat.insertion, exact.insertion) and torch.equal(compat.deletion, exact.deletion)
    assert compat.insertion_auc == pytest.approx(reference.trapezoid(insertion, compat.insertion.tolist()), abs=1e-6)
    assert compat.deletion_auc == pytest.approx(reference.trapezoid(deletion, compat.deletion.tolist()), abs=1e-6)
    assert exact.insertion_area[-1] == 1 and exact.deletion_area[0] == 0
    assert abs(exact.insertion_auc - compat.insertion_auc) > 0.01


# --- what is forwarded and what is trusted


@pytest.mark.parametrize("fill", ["black", "linear"])
@pytest.mark.parametrize("steps", ["regions", "pixels"])
def test_images_forwarded(fill: str, steps: str) -> None:
    forwarded: list[int] = []

    def scores(inputs: Tensor) -> Tensor:
        forwarded.append(len(inputs))
        return inputs.mean(dim=(2, 3))

    image = random_image(8, 8)
    classifier = at.Classifier(scores, size=8, scores="logits", class_names=("a", "b", "c"))
    explanation = ordered(image, at.make_regions(image, "grid", count=4).labels, [2, 1, 0, 3])
    classifier.logits(classifier.inputs(image))  # the probe of what the module returns, once for a classifier
    forwarded.clear()
    perturbation_curves(image, classifier, explanation, 0, Protocol(steps=steps, count=7, fill=fill))
    assert sum(forwarded) == 2 * ((4 if steps == "regions" else 7) + 1)


def test_scores_that_a_method_stored_are_not_used(cnn: at.Classifier, small_cat: Tensor) -> None:
    explanation = at.explain(small_cat, cnn, "cat", regions="grid", search="greedy", region_options={"count": 9})
    curves = perturbation_curves(small_cat, cnn, explanation, "cat", PROTOCOLS["lima"])
    assert torch.allclose(curves.insertion, explanation.insertion_scores, atol=1e-6)
    assert torch.allclose(curves.deletion, explanation.deletion_scores, atol=1e-6)
    assert curves.insertion_auc == pytest.approx(explanation.insertion_auc, abs=1e-5)
    boasting = replace(explanation, insertion_scores=torch.ones(10), deletion_scores=torch.zeros(10), probabilities=torch.ones(10))
    for name, protocol in PROTOCOLS.items():
        honest = perturbation_curves(small_cat, cnn, explanation, "cat", protocol)
        assert torch.equal(perturbation_curves(small_cat, cnn, boasting, "cat", protocol).insertion, honest.insertion), name


# --- highest confidence


def curves_of(area: list[float], insertion: list[float]) -> Curves:
    zeros = torch.zeros(len(area))
    return Curves(torch.tensor(area), torch.tensor(insertion), zeros, zeros, PROTOCOLS["lima"])


def test_highest_confidence() -> None:
    curves = curves_of([0, 0.2, 0.25, 0.5, 0.8, 1], [0.99, 0.1, 0.4, 0.7, 0.7, 0.6])
    assert curves.highest_confidence(0.25) == pytest.approx((0.4, 0.25))  # the blank image does not count
    assert curves.highest_confidence(0.24) == pytest.approx((0.1, 0.2))
    assert curves.highest_confidence(0.75) == pytest.approx((0.7, 0.5))
    assert curves.highest_confidence(1.0) == pytest.approx((0.7, 0.5))  # where it is first reached
    assert all(math.isnan(value) for value in curves.highest_confidence(0.1))
    assert HIGHEST_CONFIDENCE_SHARES == (0.25, 0.5, 0.75, 1.0)
    for share in (0, 1.2, math.nan):
        with pytest.raises(at.UserError, match="share is"):
            curves.highest_confidence(share)


def test_highest_confidence_of_pixel_steps_is_that_of_the_first_steps() -> None:
    """The published rule for maps: the first int(share * steps) of uniform steps, without the blank image."""
    image = random_image(32, 32, 9)
    curves = perturbation_curves(image, nonlinear_classifier(32), mapped(image, image[0]), 0, replace(PROTOCOLS["smdl-baselines"]))
    for share in HIGHEST_CONFIDENCE_SHARES:
        assert curves.highest_confidence(share)[0] == float(curves.insertion[1 : int(share * 50) + 1].max())


# --- ROAD


def test_road_equals_the_naive_loop() -> None:
    image, std = random_image(10, 10, 10), (0.2, 0.3, 0.4)
    values = torch.randint(0, 30, (10, 10), generator=torch.Generator().manual_seed(10)).float()
    classifier = nonlinear_classifier(10, std=std)
    found = road(image, classifier, mapped(image, values), 0, percentages=(5, 29, 57, 99), noise=0.05, seed=3)
    ranking = sorted(range(100), key=lambda i: (-float(values.flatten()[i]), i))
    for p, morf, lerf in zip((5, 29, 57, 99), found.morf, found.lerf, strict=True):
        for removed, score in ((ranking[:p], morf), (ranking[100 - p :], lerf)):
            shown = torch.ones(100, dtype=torch.bool)
            shown[removed] = False
            inputs = classifier.preprocessing(impute(image, shown.view(1, 10, 10), noise=0.05, std=std, seed=3))
            assert float(classifier.probabilities(inputs)[0, 0]) == pytest.approx(float(score), abs=1e-4)


def test_road_of_a_patch_that_is_all_the_evidence() -> None:
    """A red square on gray: imputing it first ends the redness, as long as it stays, so does the redness."""
    image = torch.full((3, 20, 20), 0.5)
    image[0, 5:10, 5:10] = 1
    classifier = at.Classifier(lambda x: torch.stack([x[:, 0], x[:, 1]], 1).mean(dim=(2, 3)), size=20, scores="logits")
    truth = mapped(image, image[0])
    good = road(image, classifier, truth, 0, percentages=(10, 20, 30), output="logit", noise=0)
    assert good.morf.tolist() == pytest.approx([0.5] * 3, abs=1e-4)
    assert good.lerf.tolist() == pytest.approx([0.5 + 0.5 * 25 / 400] * 3, abs=1e-4)
    assert good.score == pytest.approx(0.5 * 25 / 400 / 2, abs=1e-4)
    assert good.area == pytest.approx(0.2 * 0.5 * 25 / 400, abs=1e-4)


def test_road_of_the_reversed_map_is_mirrored(cnn: at.Classifier, small_cat: Tensor) -> None:
    values = torch.randperm(1024, generator=torch.Generator().manual_seed(4)).view(32, 32).float()
    one, other = road(small_cat, cnn, mapped(small_cat, values), "cat"), road(small_cat, cnn, mapped(small_cat, -values), "cat")
    assert torch.allclose(one.morf, other.lerf, atol=1e-5) and torch.allclose(one.lerf, other.morf, atol=1e-5)
    assert one.score == pytest.approx(-other.score, abs=1e-5) and one.area == pytest.approx(-other.area, abs=1e-5)
    assert abs(one.score) > 1e-4
    assert one.percentages == (10, 20, 30, 40, 50, 60, 70, 80, 90)


def test_road_summaries() -> None:
    found = Road((10, 20, 60), torch.tensor([0.5, 0.3, 0.1]), torch.tensor([0.7, 0.7, 0.3]))
    assert found.score == pytest.approx((0.2 + 0.4 + 0.2) / 3 / 2)
    assert found.area == pytest.approx(0.1 * 0.3 + 0.4 * 0.3)


# --- protocols


def test_published_protocols() -> None:
    assert {name: protocol.label() for name, protocol in PROTOCOLS.items()} == {
        "lima": "regions, black, p",
        "smdl": "10 pixel steps, model_mean, p",
        "smdl-baselines": "50 pixel steps, model_mean, p",
        "lima-compat": "regions, black, p, black unrevealed",
    }
    assert Protocol(steps="pixels", count=7, fill="linear", output="logit").label() == "7 pixel steps, linear, logit"


def test_settings_tell_protocols_apart(tmp_path: Path) -> None:
    """Plain JSON, equal where the numbers must be equal and different where they may differ."""
    image = random_image(4, 4)
    others = [Protocol(fill=f) for f in ((0.1, 0.2, 0.3), image, random_image(4, 4, 1), "#102030", "linear", "mean")]
    protocols = [*PROTOCOLS.values(), *others, LOGIT, Protocol(steps="pixels", count=11, fill="model_mean")]
    assert len({json.dumps(p.settings()) for p in protocols}) == len(protocols)
    assert Protocol(count=3).settings() == Protocol(count=50).settings()
    assert Protocol(fill=image).settings() == Protocol(fill=image.clone()).settings()
    assert Protocol(fill=torch.tensor([0.5, 0.25, 1.0])) == Protocol(fill=(0.5, 0.25, 1.0))
    assert Protocol(fill=image).label() == "regions, image, p"
    path = tmp_path / "fill.png"
    save_image(image, path)
    first = Protocol(fill=str(path)).settings()
    assert str(path) not in json.dumps(first) and Protocol(fill=str(path)).label() == "regions, image, p"
    save_image(1 - image, path)
    assert Protocol(fill=str(path)).settings() != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": "patches"}, "steps is 'patches': expected one of regions, pixels"),
        ({"output": "p"}, "output is 'p'"),
        ({"axis": None}, "axis is None"),
        ({"count": 0}, "count is 0"),
        ({"count": 2.5}, "count is 2.5"),
        ({"fill": "blakc"}, "unknown fill 'blakc': expected one of black, .*model_mean, linear"),
        ({"fill": "#12"}, "unknown fill '#12'"),
        ({"fill": (0, 0, 2)}, r"fill colour \(0, 0, 2\)"),
        ({"fill": None}, "fill is NoneType: expected one of black"),
        ({"axis": "black_unrevealed", "fill": "mean"}, "axis 'black_unrevealed' with fill 'mean'"),
        ({"axis": "black_unrevealed", "fill": torch.zeros(3, 4, 4)}, "with fill float32"),
    ],
)
def test_bad_protocols(options: dict, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        Protocol(**options)


def test_a_published_protocol_by_its_name() -> None:
    classifier, image = linear_classifier(4, 4, 0), random_image(4, 4)
    heatmap, regions = mapped(image, image[0]), torch.arange(16).view(4, 4)
    named = perturbation_curves(image, classifier, heatmap, 0, "smdl")
    assert named.insertion_auc == perturbation_curves(image, classifier, heatmap, 0, PROTOCOLS["smdl"]).insertion_auc
    by_name = random_order_curves(image, classifier, regions, 0, "lima", count=2)[0]
    assert torch.equal(by_name, random_order_curves(image, classifier, regions, 0, PROTOCOLS["lima"], count=2)[0])


def test_bad_input() -> None:
    classifier, image = linear_classifier(4, 4, 0), random_image(4, 4)
    heatmap = mapped(image, image[0])
    lima, pixels = PROTOCOLS["lima"], PROTOCOLS["smdl"]
    with pytest.raises(at.UserError, match="map of pixels without regions: give regions="):
        perturbation_steps(heatmap, lima)
    with pytest.raises(at.UserError, match="regions are"):
        perturbation_steps(heatmap, lima, torch.zeros(5, 5, dtype=torch.int64))
    broken = mapped(image, torch.where(torch.eye(4) > 0, torch.nan, image[0]))
    for protocol, regions in ((lima, torch.arange(16).view(4, 4)), (pixels, None)):
        with pytest.raises(at.UserError, match="4 of the 16 values of the map are not finite"):
            perturbation_curves(image, classifier, broken, 0, protocol, regions=regions)
    with pytest.raises(at.UserError, match="4 of the 16 values of the map are not finite"):
        road(image, classifier, broken, 0)
    with pytest.raises(at.UserError, match="image is 5x6, the map or its regions 4x4"):
        perturbation_curves(random_image(6, 5), classifier, heatmap, 0, pixels)
    with pytest.raises(at.UserError, match="image is 5x6"):
        random_order_curves(random_image(6, 5), classifier, torch.zeros(4, 4, dtype=torch.int64), 0, lima)
    with pytest.raises(at.UserError, match="class index 7"):
        perturbation_curves(image, classifier, heatmap, 7, pixels)
    with pytest.raises(at.UserError, match=r"protocol is 'lime': expected one of lima, smdl, .*or a Protocol"):
        perturbation_curves(image, classifier, heatmap, 0, "lime")
    for regions in ("grid", [["a"]]):
        with pytest.raises(at.UserError, match=r"regions are .*: expected Regions, as make_regions cuts them, or a label map"):
            perturbation_curves(image, classifier, heatmap, 0, lima, regions=regions)
    with pytest.raises(at.UserError, match="count is 0"):
        random_order_curves(image, classifier, torch.zeros(4, 4, dtype=torch.int64), 0, lima, count=0)
    for percentages in ((), (0, 10), (50, 20), (50, 100), (10, math.nan)):
        with pytest.raises(at.UserError, match="percentages are"):
            road(image, classifier, heatmap, 0, percentages=percentages)
    with pytest.raises(at.UserError, match="output is 'logits'"):
        road(image, classifier, heatmap, 0, output="logits")


# --- the published code


@pytest.fixture(scope="module")
def records(shared: Path) -> list[dict]:
    found = json.loads((shared / "golden" / "submodular_search.json").read_text())
    return [record for record in found if "insertion_auc" in record and "probability" not in record]


def check_records(records: list[dict], shared: Path, classifiers: dict[str, at.Classifier]) -> None:
    maps = dict(np.load(shared / "golden" / "submodular_search_regions.npz"))
    with tarfile.open(shared / "data" / "cifar10" / "test.tar") as archive:
        images = {r["file"]: at.load_image(archive.extractfile(r["file"]).read()) for r in records}
    for record in records:
        image, labels = images[record["file"]], torch.from_numpy(maps[record["regions"]].astype(np.int64))
        explanation = ordered(image, labels, record["order"])
        curves = perturbation_curves(image, classifiers[record["model"]], explanation, record["target"], PROTOCOLS["lima"])
        where = f"{record['model']} {record['file']} {record['regions']}"
        assert curves.insertion_auc == pytest.approx(record["insertion_auc"], abs=1e-3), where
        assert curves.deletion_auc == pytest.approx(record["deletion_auc"], abs=1e-3), where
        assert curves.confidence == pytest.approx(record["full_score"], abs=1e-4), where
        assert np.allclose(curves.insertion[1:], record["insertion_scores"], atol=1e-3), where
        assert np.allclose(1 - curves.deletion[1:], record["one_minus_deletion_scores"], atol=1e-3), where


def test_published_aucs_of_some_records(shared: Path, records: list[dict], cnn: at.Classifier, vit: at.Classifier) -> None:
    chosen = []
    for model in ("cnn", "vit"):
        for kind in ("grid8", "slico"):
            chosen += [r for r in records if r["model"] == model and r["regions"].endswith(kind)][::7][:2]
    assert len(chosen) == 8
    check_records(chosen, shared, {"cnn": cnn, "vit": vit})


@pytest.mark.slow
def test_published_aucs_of_all_records(shared: Path, records: list[dict], cnn: at.Classifier, vit: at.Classifier) -> None:
    check_records(records, shared, {"cnn": cnn, "vit": vit})


def test_road_of_a_large_photo_works_at_the_size_of_the_input(cat: Tensor, cnn: at.Classifier) -> None:
    """The same as shrinking photo and map by hand."""
    explanation = at.attribute(cat, cnn, "edge_filter")
    small, values = (
        torch.nn.functional.interpolate(each[None], size=(32, 32), mode="bilinear", antialias=True)[0]
        for each in (cat, explanation.pixel_map[None])
    )
    by_hand = replace(explanation, image=small, pixel_map=values[0])
    large, expected = road(cat, cnn, explanation, explanation.target), road(small, cnn, by_hand, explanation.target)
    assert torch.equal(large.morf, expected.morf)
    assert torch.equal(large.lerf, expected.lerf)
    assert large.lerf.std() > 0.05  # pixels were hidden at all
