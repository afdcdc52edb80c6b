from __future__ import annotations

import math

import pytest
import reference
import torch
from torch import Tensor

import attribution as at

ALL = at.ScoreWeights(consistency=2.0, collaboration=3.0, confidence=0.5, effectiveness=0.7)


def prepared(classifier: at.Classifier, image: Tensor, count: int = 9) -> at.MaskedInputs:
    regions = at.make_regions(image, "grid", count=count)
    return at.MaskedInputs(classifier, image, regions.labels, torch.zeros_like(image))


def some_subsets(size: int, seed: int = 0) -> Tensor:
    subsets = torch.rand(12, size, generator=torch.Generator().manual_seed(seed)) < 0.5
    subsets[0], subsets[1] = False, True
    subsets[2] = torch.arange(size) == 4
    return subsets


@pytest.mark.parametrize("confidence", ["entropy", "evidential"])
@pytest.mark.parametrize("consistency", ["probability", "cosine"])
def test_scores_equal_the_naive_derivation(cnn: at.Classifier, small_cat: Tensor, consistency: str, confidence: str) -> None:
    masked = prepared(cnn, small_cat)
    objective = at.SubmodularObjective(cnn, masked, 3, ALL, consistency=consistency, confidence=confidence, evidence_scale=0.5)
    subsets = some_subsets(9)
    scores, totals = objective.scores(subsets), objective(subsets)
    elements = cnn.features(masked(torch.eye(9, dtype=torch.bool)))
    whole = cnn.features(cnn.inputs(small_cat))[0]
    for index, subset in enumerate(subsets):
        logits = cnn.logits(masked(subset[None]))[0]
        if consistency == "probability":
            wanted = float(logits.softmax(0)[3])
        else:
            feature = cnn.features(masked(subset[None]))[0]
            wanted = 1 - math.acos(float(torch.cosine_similarity(feature, whole, dim=0).clamp(-1, 1))) / math.pi
        hidden = 1 - float(cnn.probabilities(masked(~subset[None]))[0, 3])
        sure = reference.entropy_confidence(logits) if confidence == "entropy" else reference.evidential_confidence(logits, 0.5)
        spread = reference.effectiveness(elements, set(subset.nonzero()[:, 0].tolist()))
        assert float(scores.consistency[index]) == pytest.approx(wanted, abs=2e-4 if consistency == "cosine" else 1e-5)
        assert float(scores.collaboration[index]) == pytest.approx(hidden, abs=1e-5)
        assert float(scores.confidence[index]) == pytest.approx(sure, abs=1e-5)
        assert float(scores.effectiveness[index]) == pytest.approx(spread, abs=1e-3)
        total = 2 * scores.consistency[index] + 3 * scores.collaboration[index] + 0.5 * scores.confidence[index]
        assert float(totals[index]) == pytest.approx(float(total + 0.7 * scores.effectiveness[index]), abs=1e-5)


def test_effectiveness_of_fewer_than_two_regions_is_zero(cnn: at.Classifier, small_cat: Tensor) -> None:
    objective = at.SubmodularObjective(cnn, prepared(cnn, small_cat), 3, at.ScoreWeights(0, 0, 0, 1.0))
    assert objective(torch.zeros(1, 9, dtype=torch.bool)).item() == 0
    assert objective(torch.eye(9, dtype=torch.bool)).tolist() == [0.0] * 9


@pytest.mark.parametrize(
    ("weights", "per_subset", "before"),
    [
        (at.ScoreWeights(20, 5, 0.01, 0), 2, 0),
        (at.ScoreWeights(20, 0, 0, 0), 1, 0),
        (at.ScoreWeights(0, 5, 0, 0), 1, 0),
        (at.ScoreWeights(0, 5, 0.01, 0), 2, 0),
        (at.ScoreWeights(0, 0, 0, 1), 0, 9),
        (at.ScoreWeights(20, 5, 0.01, 1), 2, 9),
    ],
)
def test_zero_weights_cost_nothing(cnn: at.Classifier, small_cat: Tensor, weights: at.ScoreWeights, per_subset: int, before: int) -> None:
    masked = prepared(cnn, small_cat)
    forwarded = 0

    def count(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal forwarded
        forwarded += len(args[0])

    handle = cnn.module.register_forward_pre_hook(count)
    try:
        cnn.features(masked(torch.zeros(1, 9, dtype=torch.bool)))  # the classifier finds its head once
        forwarded = 0
        objective = at.SubmodularObjective(cnn, masked, 3, weights)
        assert forwarded == objective.evaluations == before
        objective(some_subsets(9))
        assert forwarded == objective.evaluations == before + 12 * per_subset
    finally:
        handle.remove()


def test_second_classifier_for_the_confidence(cnn: at.Classifier, vit: at.Classifier, small_cat: Tensor) -> None:
    masked = prepared(cnn, small_cat)
    objective = at.SubmodularObjective(cnn, masked, 3, at.ScoreWeights(1, 1, 1, 0), confidence_classifier=vit)
    subsets = some_subsets(9)
    wanted = [reference.entropy_confidence(row) for row in vit.logits(masked(subsets))]
    assert objective.scores(subsets).confidence.tolist() == pytest.approx(wanted, abs=1e-5)
    assert objective.evaluations == 3 * 12
    alone = at.SubmodularObjective(cnn, masked, 3, at.ScoreWeights(0, 0, 1, 0), confidence_classifier=vit)
    assert alone(subsets).tolist() == pytest.approx(wanted, abs=1e-5)
    other = at.Classifier(lambda x: x.mean((2, 3)), size=16)
    with pytest.raises(at.UserError, match="prepares images in another way"):
        at.SubmodularObjective(cnn, masked, 3, confidence_classifier=other)


def test_semantic_feature_given(cnn: at.Classifier, small_cat: Tensor) -> None:
    masked = prepared(cnn, small_cat)
    feature = cnn.features(masked(torch.eye(9, dtype=torch.bool)))[4]
    objective = at.SubmodularObjective(cnn, masked, 3, at.ScoreWeights(1, 0, 0, 0), consistency="cosine", semantic_feature=feature)
    assert objective(torch.eye(9, dtype=torch.bool)).argmax().item() == 4
    with pytest.raises(at.UserError, match="semantic feature"):
        at.SubmodularObjective(cnn, masked, 3, consistency="cosine", semantic_feature=torch.zeros(2, 2))


def test_order_of_calls_does_not_matter(cnn: at.Classifier, small_cat: Tensor) -> None:
    objective = at.SubmodularObjective(cnn, prepared(cnn, small_cat), 3, ALL)
    subsets = some_subsets(9)
    first = objective(subsets)
    objective(~subsets)
    assert torch.equal(objective(subsets), first)


def test_set_score_is_the_weighted_effectiveness(cnn: at.Classifier, small_cat: Tensor) -> None:
    objective = at.SubmodularObjective(cnn, prepared(cnn, small_cat), 3, ALL)
    subsets = some_subsets(9)
    before = objective.evaluations
    assert torch.allclose(objective.set_score(subsets), 0.7 * objective.scores(subsets).effectiveness)
    assert objective.evaluations == before + 24


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"consistency": math.nan}, "consistency is nan"), ({"confidence": "1"}, "confidence is '1'"), ({"effectiveness": math.inf}, "inf")],
)
def test_bad_weights(weights: dict, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        at.ScoreWeights(**weights)


def test_all_weights_zero() -> None:
    with pytest.raises(at.UserError, match="all four weights are 0"):
        at.ScoreWeights(0, 0, 0, 0)


@pytest.mark.parametrize("option", [{"consistency": "nearness"}, {"confidence": "hope"}])
def test_unknown_variants(cnn: at.Classifier, small_cat: Tensor, option: dict) -> None:
    with pytest.raises(at.UserError, match="expected"):
        at.SubmodularObjective(cnn, prepared(cnn, small_cat), 3, **option)


def test_effectiveness_needs_features(small_cat: Tensor) -> None:
    black_box = at.Classifier(lambda x: x.mean((2, 3)), size=32)
    with pytest.raises(at.UserError, match="black box without features"):
        at.SubmodularObjective(black_box, prepared(black_box, small_cat), 0, ALL)
    plain = at.SubmodularObjective(black_box, prepared(black_box, small_cat), 0)
    assert plain(torch.ones(1, 9, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize(
    "weights",
    [
        at.ScoreWeights(),
        at.ScoreWeights(1.0, 1.0, 0.0, 0.0),
        at.ScoreWeights(1.0, 1.0, 0.5, 0.3),
        at.ScoreWeights(0.0, 2.0, 0.0, 0.0),
        at.ScoreWeights(1.0, -1.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("options", [{}, {"consistency": "cosine", "confidence": "evidential"}])
def test_the_two_parts_of_an_image_make_f(cnn: at.Classifier, small_cat: Tensor, weights: at.ScoreWeights, options: dict) -> None:
    masked = at.MaskedInputs(cnn, small_cat, at.make_regions(small_cat, "grid", rows=3, columns=3).labels, torch.zeros_like(small_cat))
    objective = at.SubmodularObjective(cnn, masked, 3, weights, **options)
    rows = torch.rand(20, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    before = objective.evaluations
    shown, _ = objective.parts(rows)
    assert objective.evaluations - before == objective.cost * len(rows)
    _, hidden = objective.parts(~rows)
    assert torch.allclose(shown + hidden, objective(rows), atol=1e-5)
    assert float(shown.max()) <= objective.highest[0] + 1e-6 and float(hidden.max()) <= objective.highest[1] + 1e-6
    assert objective.needed == (any((weights.consistency, weights.confidence, weights.effectiveness)), bool(weights.collaboration))


def test_the_mean_of_objectives(cnn: at.Classifier, small_cat: Tensor) -> None:
    labels = at.make_regions(small_cat, "grid", rows=3, columns=3).labels
    fills = [at.make_fill(small_cat, fill) for fill in ("black", "mean", "blur")]
    each = [at.SubmodularObjective(cnn, at.MaskedInputs(cnn, small_cat, labels, fill), 3) for fill in fills]
    mean = at.MeanObjective(each)
    rows = torch.rand(12, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.allclose(mean(rows), sum(one(rows) for one in each) / 3, atol=1e-5)
    assert torch.allclose(mean.parts(rows)[0] + mean.parts(~rows)[1], mean(rows), atol=1e-5)
    assert (mean.cost, mean.size, mean.highest) == (3, 9, pytest.approx((20.01, 5.0)))
    assert mean.evaluations == sum(one.evaluations for one in each)
    other = at.SubmodularObjective(cnn, at.MaskedInputs(cnn, small_cat, labels // 3, fills[0]), 3)
    for wrong in ([], [each[0], other]):
        with pytest.raises(at.UserError, match="expected one or more over the same"):
            at.MeanObjective(wrong)
