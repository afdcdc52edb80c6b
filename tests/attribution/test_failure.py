"""One failure explained: what causes the wrong class, what restores the right one, and the curves of both."""

from __future__ import annotations

import json
import tarfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attribution as at
from attribution.failure import FailureExplanation

SIDE = 12
NAMES = ("cat", "dog", "ship")
GRID = torch.arange(SIDE * SIDE).view(SIDE, SIDE) // (SIDE * 4) * 3 + (torch.arange(SIDE) // 4)[None]  # 3 x 3 regions


class Regional(nn.Module):
    """Logits that are sums over nine regions of a weight times the mean brightness there: every subset's answer is known."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights)  # [3 classes, 9 regions]

    def forward(self, x: Tensor) -> Tensor:
        shown = torch.stack([x[:, :, region == GRID].mean(dim=(1, 2)) for region in range(9)], dim=1)
        return shown @ self.weight.T


def classifier(weights: Tensor) -> at.Classifier:
    return at.Classifier(Regional(weights).eval(), size=SIDE, class_names=NAMES, scores="logits", name="regional")


def failure(weights: Tensor, true: str = "cat", **options: object) -> FailureExplanation:
    return at.explain_failure(torch.ones(3, SIDE, SIDE), classifier(weights), true, regions=GRID, **options)


def right(weights: Tensor, shown: Tensor, true: int = 0) -> bool:
    return int((weights @ shown.float()).argmax()) == true


def planted() -> Tensor:
    """Region 4 makes a dog of the cat that regions 0, 1 and 2 show."""
    weights = torch.zeros(3, 9)
    weights[0, :3] = 1.0
    weights[1, 4] = 5.0
    weights[2, 8] = 0.1
    return weights


def test_a_planted_cause_is_found_and_the_least_set_that_is_enough() -> None:
    found = failure(planted())
    assert (found.true_name, found.predicted_name) == ("cat", "dog")
    assert found.cause is not None and found.cause.regions.tolist() == [4]
    assert found.cause.area == pytest.approx(1 / 9)
    assert found.cause.true == pytest.approx(float(torch.tensor([3.0, 0.0, 0.1]).softmax(0)[0]), abs=1e-5)
    assert found.sufficient is not None and found.sufficient.regions.tolist() in ([0], [1], [2])
    assert found.causes[4] == found.causes.min() == -1
    assert set(found.causes.argsort(descending=True)[:3].tolist()) == {0, 1, 2}
    assert "Hiding 11 % of the image, this one region, turns dog" in found.text


def test_curves_are_those_of_every_prefix() -> None:
    weights = torch.randn(3, 9, generator=torch.Generator().manual_seed(3))
    weights[1] += 0.5
    model = classifier(weights)
    found = failure(weights)
    for order, along, kept in (
        (found.truth.order, found.shown, True),
        (found.truth.order, found.hidden, False),
        (found.mistake.order, found.mistake_shown, True),
        (found.mistake.order, found.mistake_hidden, False),
    ):
        assert order is not None
        for k in range(10):
            shown = torch.isin(torch.arange(9), order[:k]) == kept
            probabilities = (weights @ shown.float()).softmax(0)
            assert float(along.true[k]) == pytest.approx(float(probabilities[0]), abs=1e-5)
            assert float(along.predicted[k]) == pytest.approx(float(probabilities[found.mistake.target]), abs=1e-5)
            assert bool(along.right[k]) == (int(probabilities.argmax()) == 0)
    torch.testing.assert_close(found.shown.true, found.truth.insertion_scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.mistake_hidden.predicted, found.mistake.deletion_scores, atol=1e-5, rtol=0)
    assert found.mistake.target == int(model.probabilities(model.inputs(found.truth.image)).argmax())


@pytest.mark.parametrize("seed", range(12))
def test_repairs_are_right_cannot_be_pruned_and_are_seldom_larger_than_the_least(seed: int) -> None:
    weights = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed))
    true = int((weights.sum(dim=1)).argsort()[1])  # not what the whole image is taken for
    found = failure(weights, NAMES[true])
    subsets = [torch.tensor(bits, dtype=torch.bool) for bits in product([False, True], repeat=9)]
    least_shown = min((int(s.sum()) for s in subsets if s.any() and not s.all() and right(weights, s, true)), default=None)
    for repair, hide in ((found.sufficient, False), (found.cause, True)):
        if repair is None:
            assert least_shown is None or hide, "a set exists"
            continue
        chosen = torch.isin(torch.arange(9), repair.regions)
        assert right(weights, ~chosen if hide else chosen, true)
        for region in repair.regions.tolist():
            less = chosen.clone()
            less[region] = False
            assert not right(weights, ~less if hide else less, true) or len(repair.regions) == 1, "a region too many"
        assert repair.area == pytest.approx(len(repair.regions) / 9, abs=1e-6)
    least_hidden = min((int(s.sum()) for s in subsets if s.any() and not s.all() and right(weights, ~s, true)), default=None)
    assert (found.cause is None) == (least_hidden is None)
    if found.cause is not None and least_hidden is not None:
        assert len(found.cause.regions) <= least_hidden + 1


def test_a_model_that_can_never_be_right() -> None:
    weights = torch.zeros(3, 9)
    weights[1] = 1.0
    found = failure(weights)
    assert found.cause is None and found.sufficient is None
    assert "No set of regions was found whose removal makes the model right." in found.text
    assert "No set of regions alone makes the model right" in found.text
    assert json.loads(json.dumps(found.plain()))["cause"] is None
    assert found.plot().axes


def test_highest_confidence_is_the_best_prefix_within_the_area() -> None:
    found = failure(planted())
    area, true = found.truth.area, found.shown.true
    for limit, value in found.highest_confidence().items():
        wanted = max(float(true[k]) for k in range(1, 10) if float(area[k]) <= limit + 1e-6)
        assert value == pytest.approx(wanted)
    assert np.isnan(found.highest_confidence((0.05,))[0.05])
    assert found.shown.true[found.peak] >= found.shown.true[1:].max() - 0.005
    assert not bool((found.shown.true[found.peak + 1 :] >= found.shown.true[1:].max() - 0.005).any())


def test_what_is_counted_and_written_down() -> None:
    calls = 0
    weights = planted()
    model = classifier(weights)
    module = model.module
    model.probabilities(model.inputs(torch.ones(3, SIDE, SIDE)))

    def count(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        nonlocal calls
        calls += len(args[0])

    with module.register_forward_hook(count):
        found = at.explain_failure(torch.ones(3, SIDE, SIDE), model, 0, regions=GRID)
    assert found.evaluations <= calls <= found.evaluations + 2 * (1 + 2 * 10)  # the images themselves and explain's own prefixes
    plain = json.loads(json.dumps(found.plain()))
    assert plain["truth_order"] == found.truth.order.tolist()  # type: ignore[union-attr]
    assert plain["curves"]["shown"]["true"] == found.shown.true.tolist()
    assert plain["cause"]["regions"] == [4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"true_class": "dog"}, "is right about this image"),
        ({"true_class": "bird"}, "no class 'bird'"),
        ({"true_class": "cat", "target": 1}, "takes no target"),
        ({"true_class": "cat", "fill": "purple"}, "unknown fill"),
    ],
)
def test_input_that_does_not_fit(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(at.UserError) as error:
        at.explain_failure(torch.ones(3, SIDE, SIDE), classifier(planted()), **arguments)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_options_reach_both_searches_and_progress_counts_them_together(cnn: at.Classifier, small_cat: Tensor) -> None:
    predicted = int(cnn.probabilities(cnn.inputs(small_cat)).argmax())
    other = (predicted + 1) % 10
    seen: list[tuple[int, int]] = []
    found = at.explain_failure(
        small_cat,
        cnn,
        other,
        regions="grid",
        region_options={"count": 16},
        pending=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert found.truth.regions.count == found.mistake.regions.count == 16  # type: ignore[union-attr]
    assert found.truth.provenance["settings"]["search_options"] == found.mistake.provenance["settings"]["search_options"] == {"pending": 2}
    assert seen[-1] == (32, 32)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_trajectories_of_the_reference(shared: Path, cnn: at.Classifier, vit: at.Classifier) -> None:
    """failure_scores of the public code: the predicted class along the prefixes towards the true one."""
    records = json.loads((shared / "golden" / "submodular_search.json").read_text(encoding="utf-8"))
    labels = np.load(shared / "golden" / "submodular_search_regions.npz")
    wrong = [r for r in records if r["target"] != r["predicted"] and "failure_scores" in r and r["algorithm"] == "bidirectional"]
    assert wrong
    for record in wrong[:1]:  # about 10 seconds each
        with tarfile.open(shared / "data" / "cifar10" / "test.tar") as archive:
            data = archive.extractfile(record["file"]).read()  # type: ignore[union-attr]
        found = at.explain_failure(
            data,
            {"cnn": cnn, "vit": vit}[record["model"]],
            record["target"],
            regions=labels[record["regions"]].astype(np.int64),
            weights=at.ScoreWeights(**record["weights"]),
            pending=record["pending_samples"],
        )
        assert found.mistake.target == record["predicted"]
        assert found.truth.order.tolist() == record["order"]  # type: ignore[union-attr]
        np.testing.assert_allclose(found.shown.predicted[1:].numpy(), record["failure_scores"], atol=1e-5)
        np.testing.assert_allclose(found.shown.true[1:].numpy(), record["insertion_scores"], atol=1e-5)


def test_a_fill_image_of_a_photo_that_is_shrunk() -> None:
    photo, fill = torch.ones(3, 2 * SIDE, 2 * SIDE), torch.full((3, 2 * SIDE, 2 * SIDE), 0.25)
    found = at.explain_failure(photo, classifier(planted()), "cat", fill=fill, max_side=SIDE, regions="grid", region_options={"count": 9})
    assert found.truth.image.shape == found.fill.shape == (3, SIDE, SIDE)
    torch.testing.assert_close(found.fill, torch.full((3, SIDE, SIDE), 0.25))
    assert float(found.mistake_shown.predicted[0]) == pytest.approx(float((0.25 * planted().sum(dim=1)).softmax(0)[1]), abs=1e-5)


def test_a_fill_that_is_the_truth_already_is_said() -> None:
    weights = planted()
    model = at.Classifier(
        lambda x: torch.cat(
            [2 - x.mean(dim=(1, 2, 3))[:, None], 3 * x[:, :, 4:8, 4:8].mean(dim=(1, 2, 3))[:, None], 0 * x[:, 0, 0, :1]], dim=1
        ),
        size=SIDE,
        class_names=NAMES,
        scores="logits",
    )
    found = at.explain_failure(torch.ones(3, SIDE, SIDE), model, "cat", regions=GRID)
    assert bool(found.shown.right[0]) and "The fill alone is predicted as cat" in found.text
    assert "the fill alone" not in failure(weights[[1, 0, 2]], "dog").text


def test_a_white_image_is_blurred_into_its_range() -> None:
    """The weights of a blur sum to 1 up to rounding; the second search takes the first one's fill as an image."""
    found = failure(planted(), fill="blur")
    assert float(found.fill.max()) <= 1
    torch.testing.assert_close(found.fill, torch.ones(3, SIDE, SIDE))


def test_no_more_images_are_forwarded_at_once_than_asked_for() -> None:
    wrapped = classifier(planted())
    sizes: list[int] = []
    assert isinstance(wrapped.module, nn.Module)
    wrapped.module.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    own = wrapped.batch_size
    found = at.explain_failure(torch.ones(3, SIDE, SIDE), wrapped, "cat", regions=GRID, batch_size=3)
    assert max(sizes) <= 3 and wrapped.batch_size == own
    assert found.plain() == failure(planted()).plain()


def test_several_fills_are_refused_before_anything_runs() -> None:
    wrapped = classifier(planted())
    calls: list[int] = []
    assert isinstance(wrapped.module, nn.Module)
    wrapped.module.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(at.UserError, match="names several fills: give one"):
        at.explain_failure(torch.ones(3, SIDE, SIDE), wrapped, "cat", regions=GRID, fill="black+blur")
    assert not calls


def test_an_image_that_the_model_is_right_about_has_an_error_of_its_own() -> None:
    with pytest.raises(at.NotMisclassified, match="there is no failure to explain"):
        failure(planted(), "dog")


def test_printing_a_failure_shows_words_and_no_tensors(vit: at.Classifier, small_cat: Tensor) -> None:
    found = at.explain_failure(small_cat, vit, "dog", fill="gray", regions="grid", region_options={"count": 9})
    assert repr(found) == f"FailureExplanation({found.text})" and "tensor" not in repr(found)


def test_shares_of_a_model_that_crops_are_shares_of_what_it_sees() -> None:
    """Of a wide photo the model sees the square in the middle, half red and half blue; hiding all the red makes it say blue."""
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        module[2].weight.copy_(torch.tensor([[30.0, 0, 0], [0, 0, 29.0]]))
    classifier = at.Classifier(module, size=8, resize="short_side", class_names=("red", "blue"))
    photo = torch.zeros(3, 16, 48)
    photo[0, :, :24], photo[2, :, 24:] = 1, 1
    columns = torch.arange(6).repeat_interleave(8).expand(16, 48)  # the middle two are seen
    failure = at.explain_failure(photo, classifier, "blue", regions=columns)
    assert failure.cause is not None
    assert (failure.cause.regions.tolist(), failure.cause.area) == ([2], pytest.approx(0.5))
    assert "Hiding 50% of what it sees" in failure.text or "Hiding 50 % of what it sees" in failure.text
    titles = [ax.get_title() for ax in failure.plot().axes]
    assert any("50% of what is seen" in title for title in titles)
