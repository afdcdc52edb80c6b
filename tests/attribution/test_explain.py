from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import attribution as at
from attribution.presets import PRESETS


def snapshot(classifier: at.Classifier) -> tuple:
    module = classifier.module
    return (
        [m.training for m in module.modules()],
        {name: value.clone() for name, value in module.state_dict().items()},
        [(p.requires_grad, p.grad) for p in module.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()],
        classifier.batch_size,
    )


def same(a: tuple, b: tuple) -> bool:
    weights = a[1].keys() == b[1].keys() and all(torch.equal(a[1][k], b[1][k]) for k in a[1])
    return weights and a[0] == b[0] and a[2:] == b[2:]


@pytest.mark.parametrize("weights", [None, at.ScoreWeights(20, 5, 1, 0.05)])
def test_contract(cnn: at.Classifier, small_cat: Tensor, weights: at.ScoreWeights | None) -> None:
    explanation = at.explain(small_cat, cnn, regions="grid", region_options={"count": 16}, weights=weights)
    assert explanation.order.dtype == torch.int64
    assert sorted(explanation.order.tolist()) == list(range(16))
    assert explanation.insertion_scores.dtype == explanation.deletion_scores.dtype == explanation.area.dtype == torch.float32
    black = torch.zeros_like(small_cat)
    shown = torch.zeros_like(explanation.regions.labels, dtype=torch.bool)
    for k in range(17):
        if k:
            shown |= explanation.regions.labels == explanation.order[k - 1]
        kept = cnn.probabilities(cnn.inputs(torch.where(shown, small_cat, black)))[0, 3]
        left = cnn.probabilities(cnn.inputs(torch.where(shown, black, small_cat)))[0, 3]
        assert float(explanation.insertion_scores[k]) == pytest.approx(float(kept), abs=1e-5)
        assert float(explanation.deletion_scores[k]) == pytest.approx(float(left), abs=1e-5)
        assert float(explanation.area[k]) == pytest.approx(float(shown.float().mean()))
    assert explanation.target_name == "cat"
    assert explanation.heatmap.shape == (32, 32)
    assert explanation.heatmap.max() == 1
    assert explanation.provenance["model"] == "zoo:cnn"
    assert explanation.provenance["weights_digest"] == cnn.weights_digest
    assert explanation.provenance["settings"]["fill"] == "black"
    assert explanation.provenance["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_result_does_not_depend_on_the_batch_size(vit: at.Classifier, small_cat: Tensor) -> None:
    runs = [at.explain(small_cat, vit, regions="grid", region_options={"count": 16}, batch_size=b) for b in (1, 7, 512)]
    for other in runs[1:]:
        assert torch.equal(runs[0].order, other.order)
        assert torch.allclose(runs[0].insertion_scores, other.insertion_scores, atol=1e-5)


def test_the_model_leaves_as_it_came(cnn: at.Classifier, small_cat: Tensor) -> None:
    module = at.load_classifier("zoo:cnn", device="cpu").module
    module.train()
    module.layer2.eval()
    module.fc.weight.requires_grad_(False)
    way = cnn.preprocessing
    classifier = at.Classifier(module, size=32, mean=way.mean, std=way.std, class_names=cnn.class_names)
    before = snapshot(classifier)
    at.explain(small_cat, classifier, regions="grid", region_options={"count": 9}, weights=at.ScoreWeights(1, 1, 1, 1), batch_size=3)
    assert same(before, snapshot(classifier))
    with pytest.raises(at.UserError):
        at.explain(small_cat, classifier, regions="nonsense", batch_size=3)
    assert same(before, snapshot(classifier))


@pytest.mark.parametrize("target", [3, "cat", "CAT", np.int64(3), "3"])
def test_targets(cnn: at.Classifier, small_cat: Tensor, target: object) -> None:
    assert at.explain(small_cat, cnn, target, regions="grid", region_options={"count": 4}).target == 3


def test_black_box_callable(small_cat: Tensor) -> None:
    def brightness(batch: Tensor) -> np.ndarray:
        assert not batch.requires_grad
        top = batch[:, :, :16].mean(dim=(1, 2, 3)).numpy()
        return np.stack([1 - top, top], axis=1)

    black_box = at.Classifier(brightness, size=32, class_names=["dark", "bright"])
    explanation = at.explain(small_cat, black_box, "bright", regions="grid", region_options={"count": 16})
    assert set(explanation.order[:8].tolist()) == set(range(8))
    assert explanation.provenance["weights_digest"] is None
    explanation.plot()


def test_bare_module(small_cat: Tensor) -> None:
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    explanation = at.explain(small_cat, at.Classifier(module, size=32), regions="grid", region_options={"count": 4})
    assert explanation.target_name.startswith("class ")
    with pytest.raises(at.UserError, match="no input size"):
        at.explain(small_cat, module)


@pytest.mark.parametrize("fill", ["black", "gray", "blur", "model_mean", "#102030", (0.1, 0.2, 0.3)])
def test_fills(cnn: at.Classifier, small_cat: Tensor, fill: object) -> None:
    explanation = at.explain(small_cat, cnn, regions="grid", region_options={"count": 4}, fill=fill)
    shown = at.make_fill(small_cat, cnn.preprocessing.mean if fill == "model_mean" else fill)
    wanted = cnn.probabilities(cnn.inputs(shown))[0, explanation.target]
    assert float(explanation.insertion_scores[0]) == pytest.approx(float(wanted), abs=1e-5)
    if fill == "model_mean":
        assert cnn.inputs(shown).abs().max() < 1e-5


def test_label_maps_masks_and_callables(cnn: at.Classifier, cat: Tensor) -> None:
    labels = (torch.arange(300)[:, None] // 150 * 2 + torch.arange(451) // 226) * 7
    by_map = at.explain(cat, cnn, regions=labels.numpy())
    assert by_map.regions.count == 4
    masks = torch.stack([labels == value for value in (0, 7, 14, 21)])
    for same_regions in (masks, masks.numpy(), lambda image: labels, at.Regions(labels)):
        other = at.explain(cat, cnn, regions=same_regions)
        assert torch.equal(other.order, by_map.order)
        assert other.insertion_auc == pytest.approx(by_map.insertion_auc)


def test_large_images_are_shrunk_first(cnn: at.Classifier) -> None:
    large = torch.rand(3, 300, 900, generator=torch.Generator().manual_seed(0))
    assert at.explain(large, cnn, regions="grid", region_options={"count": 4}).regions.labels.shape == (171, 512)
    assert at.explain(large, cnn, regions="grid", region_options={"count": 4}, max_side=None).image.shape == large.shape


def test_one_region_has_no_order(cnn: at.Classifier, small_cat: Tensor) -> None:
    with pytest.raises(at.UserError, match="labels gave 1 region, the whole image, and one region has no order"):
        at.explain(small_cat, cnn, regions=torch.zeros(32, 32, dtype=torch.int64))


def test_a_search_may_stop_early(cnn: at.Classifier, small_cat: Tensor) -> None:
    options = {"regions": "grid", "region_options": {"count": 9}, "search": "greedy"}
    whole = at.explain(small_cat, cnn, **options)
    part = at.explain(small_cat, cnn, **options, search_options={"count": 3})
    assert part.order[:3].tolist() == whole.order[:3].tolist()
    assert part.order[3:].tolist() == sorted(part.order[3:].tolist())
    assert part.evaluations == 2 * (9 + 8 + 7)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets(name: str, cnn: at.Classifier, small_cat: Tensor) -> None:
    preset = PRESETS[name]
    options: dict = {"preset": name}
    if preset.regions is None:
        with pytest.raises(at.UserError, match="works on masks"):
            at.explain(small_cat, cnn, preset=name)
        options["regions"] = at.make_regions(small_cat, "grid", count=9).masks
    elif preset.regions == "saliency_patches":
        options["region_options"] = {"heatmap": small_cat.mean(0)}
    if preset.search == "greedy":
        options["search_options"] = {"count": 3}
    elif preset.regions in ("slico", "seeds"):
        options["region_options"] = {"region_size": 10} if "region_size" in preset.region_options else {"count": 16}
    explanation = at.explain(small_cat, cnn, **options)
    settings = explanation.provenance["settings"]
    assert settings["weights"] == vars(preset.weights)
    assert settings["preset"] == name
    if preset.search == "bidirectional":
        share = -(-explanation.regions.count * 15 // 100)
        assert settings["search_options"]["pending"] == (share if preset.pending == "15%" else preset.pending)


def test_what_is_given_overrides_the_preset(cnn: at.Classifier, small_cat: Tensor) -> None:
    weights = at.ScoreWeights(1, 0, 0, 0)
    explanation = at.explain(small_cat, cnn, preset="lima-paper", weights=weights, regions="grid", search="bidirectional_v1")
    settings = explanation.provenance["settings"]
    assert settings["weights"] == vars(weights)
    assert settings["regions"]["method"] == "grid"
    assert settings["search"] == "bidirectional_v1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regions": "voronoi"}, "unknown regions 'voronoi'"),
        ({"search": "exhaustive"}, "search is 'exhaustive': expected one of bidirectional, budget"),
        ({"search": 3}, "search is int"),
        ({"search": lambda objective: [0, 0]}, "distinct region ids"),
        ({"search": lambda objective: [99]}, "distinct region ids"),
        ({"search": lambda objective: None}, "the search returned NoneType: expected distinct region ids"),
        ({"search_options": {"depth": 2}}, "search options depth are unknown"),
        ({"region_options": {"depth": 2}}, "does not take these options"),
        ({"preset": "best"}, "preset is 'best': expected one of default"),
        ({"fill": "pink"}, "unknown fill 'pink'"),
        ({"target": "unicorn"}, "no class 'unicorn'"),
        ({"target": 10}, "class index 10 is out of range"),
        ({"pending": 0}, "pending is 0"),
        ({"max_side": 0}, "max_side is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"regions": torch.zeros(5, 5, dtype=torch.int64)}, "label map is 5x5, the image 32x32"),
    ],
)
def test_bad_input(cnn: at.Classifier, small_cat: Tensor, options: dict, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        at.explain(small_cat, cnn, **options)


def test_an_entry_that_is_no_search_is_named(cnn: at.Classifier, small_cat: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(at.SEARCHES, "mine", lambda objective: range(objective.size))  # type: ignore[arg-type]
    with pytest.raises(at.UserError, match=r"SEARCHES\['mine'\] is function: expected a Search, such as Search\(function\)"):
        at.explain(small_cat, cnn, search="mine")


def test_a_model_that_breaks_says_what_came_back(small_cat: Tensor) -> None:
    calls = 0

    def breaks(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        rows = batch.mean((2, 3))
        return rows if calls < 4 else rows * torch.nan

    with pytest.raises(at.UserError, match="returned nan for class 0"):
        at.explain(small_cat, at.Classifier(breaks, size=32), regions="grid")


def test_from_a_path(cnn: at.Classifier, small_cat: Tensor, tmp_path: Path) -> None:
    pixels = (small_cat * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    options = {"regions": "grid", "region_options": {"count": 9}}
    from_path = at.explain(tmp_path / "cat.png", cnn, **options)
    from_array = at.explain(pixels, cnn, **options)
    assert torch.equal(from_path.order, from_array.order)
    assert torch.equal(from_path.image, from_array.image)


def test_a_fill_image_of_a_large_photo_is_shrunk_with_it(cnn: at.Classifier) -> None:
    photo, white = torch.zeros(3, 300, 900), torch.ones(3, 300, 900)
    explanation = at.explain(photo, cnn, fill=white, regions="grid", region_options={"count": 4})
    wanted = cnn.probabilities(cnn.inputs(torch.ones(3, 171, 512)))[0, explanation.target]
    assert explanation.fill_confidence == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda b: b.mean((2, 3)) - 0.1, "as probabilities of labels: expected 0 to 1"),
        (lambda b: b.mean((2, 3)) - torch.inf, "returned -inf"),
    ],
)
def test_scores_that_are_no_probabilities(small_cat: Tensor, rows: object, message: str) -> None:
    kind = "logits" if "inf" in message else "probabilities"
    with pytest.raises(at.UserError, match=message):
        at.explain(small_cat, at.Classifier(rows, size=32, scores=kind), regions="grid", region_options={"count": 4})


def test_parts_do_not_change_the_result(cnn: at.Classifier, small_cat: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = at.ScoreWeights(20, 5, 1, 0.5)
    options = {"regions": "grid", "region_options": {"count": 100}, "weights": weights, "search": "greedy", "search_options": {"count": 2}}
    whole = at.explain(small_cat, cnn, **options)
    monkeypatch.setattr("attribution.masking._INPUT_VALUES", 1)
    parts = at.explain(small_cat, cnn, **options)
    assert torch.equal(whole.order, parts.order)
    assert whole.evaluations == parts.evaluations
    assert torch.allclose(whole.insertion_scores, parts.insertion_scores, atol=1e-6)


@pytest.mark.parametrize("search", ["bidirectional", "budget"])
def test_several_fills_are_averaged(cnn: at.Classifier, small_cat: Tensor, search: str) -> None:
    options = {"regions": "grid", "region_options": {"count": 9}}
    found = at.explain(small_cat, cnn, fill="black+mean", search=search, **options)
    again = [at.explain(small_cat, cnn, fill=fill, search=lambda _: found.order, **options) for fill in ("black", "mean")]
    assert torch.allclose(found.insertion_scores, (again[0].insertion_scores + again[1].insertion_scores) / 2, atol=1e-5)
    assert torch.allclose(found.deletion_scores, (again[0].deletion_scores + again[1].deletion_scores) / 2, atol=1e-5)
    assert found.provenance["settings"]["fill"] == "black+mean"
    if search == "bidirectional":
        assert found.evaluations == 2 * at.explain(small_cat, cnn, search=search, **options).evaluations
    with pytest.raises(at.UserError, match="names one twice"):
        at.explain(small_cat, cnn, fill="black+black", **options)
    with pytest.raises(at.UserError, match="unknown fill 'black\\+pink'"):
        at.explain(small_cat, cnn, fill="black+pink", **options)


def test_regions_outside_the_crop_of_the_model_have_no_area(tmp_path: Path) -> None:
    """Of 3 x 6 cells of a photo of 60 x 120 pixels a square of 60 in the middle is seen: columns 1 (half), 2, 3 and 4 (half)."""
    photo = torch.rand(3, 60, 120, generator=torch.Generator().manual_seed(0))
    cells = {"regions": "grid", "region_options": {"rows": 3, "columns": 6}, "search": "greedy"}
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 3))
    cropping = at.Classifier(module, size=20, resize="short_side")
    explanation = at.explain(photo, cropping, **cells)
    explanation.save(tmp_path / "a.npz")
    assert at.Explanation.load(tmp_path / "a.npz") == explanation
    by_column = explanation.regions.area.view(3, 6).sum(dim=0)
    assert torch.allclose(by_column, torch.tensor([0, 1 / 6, 1 / 3, 1 / 3, 1 / 6, 0], dtype=torch.float64))
    assert float(explanation.area[-1]) == pytest.approx(1)
    found = explanation.provenance["settings"]["regions"]
    assert (found["crop"], found["unseen"]) == ([0, 30, 60, 90], 6)
    assert "crop" not in at.explain(photo, at.Classifier(module, size=20), **cells).provenance["settings"]["regions"]
    padded = at.explain(photo, at.Classifier(module, size=20, resize="long_side"), **cells)
    assert "crop" not in padded.provenance["settings"]["regions"]
    figure = at.explain(photo, cropping, **cells).plot()
    assert "the model's crop" in [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize(
    ("search", "options", "message"),
    [
        ("bidirectional", {"pending": "5"}, "search bidirectional: pending is '5': expected a whole number"),
        ("budget", {"start": 3}, "search budget: start is 3: expected a list or None"),
        ("greedy", {"count": 2.5}, "search greedy: count is 2.5: expected a whole number or None"),
    ],
)
def test_search_options_of_a_wrong_type(cnn: at.Classifier, small_cat: Tensor, search: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(at.UserError, match=f"^{message}$"):
        at.explain(small_cat, cnn, regions="grid", search=search, search_options=options)


def test_the_default_search(cnn: at.Classifier, small_cat: Tensor) -> None:
    cut = {"regions": "grid", "region_options": {"count": 9}}
    ways: dict[str, dict[str, Any]] = {"nothing": {}, "default": {"preset": "default"}, "p": {"pending": 2}}
    ways["published"] = {"preset": "published"}
    found = {name: at.explain(small_cat, cnn, **cut, **given).provenance["settings"] for name, given in ways.items()}
    balanced = vars(at.ScoreWeights(consistency=1, collaboration=1, confidence=0, effectiveness=0))
    lima = vars(at.ScoreWeights(consistency=20, collaboration=5, confidence=0.01, effectiveness=0))
    assert [each["search"] for each in found.values()] == ["budget", "budget", "bidirectional", "bidirectional"]
    assert [each["weights"] for each in found.values()] == [balanced, balanced, lima, lima]
    options = [each["search_options"] for each in found.values()]
    assert options == [
        {"evaluations": 288},
        {"evaluations": 288},
        {"pending": 2},
        {"pending": 8},
    ]
    greedy = at.explain(small_cat, cnn, **cut, search="greedy").provenance["settings"]
    assert greedy["weights"] == lima


def test_what_was_not_searched_is_told(cnn: at.Classifier, small_cat: Tensor) -> None:
    given = {"regions": "grid", "region_options": {"count": 36}}
    few = at.explain(small_cat, cnn, evaluations=1, **given)
    assert few.note == "the search forwarded 1 image, too few for a search: the order says little" and few.note in repr(few)
    assert at.explain(small_cat, cnn, evaluations=9, **given).note == ""
    assert at.explain(small_cat, cnn, evaluations=2, prior="saliency", **given).note == ""
    with pytest.raises(at.UserError, match="seconds is 0: expected a positive time"):
        at.explain(small_cat, cnn, seconds=0, **given)


def test_what_is_missing_or_of_another_kind(cnn: at.Classifier, small_cat: Tensor) -> None:
    with pytest.raises(at.UserError, match=r"explanation is 'photo\.png': expected an Explanation"):
        at.polish("photo.png", cnn)  # type: ignore[arg-type]
    with pytest.raises(at.UserError, match="size is missing"):
        at.Classifier(torch.nn.Identity())
    with pytest.raises(at.UserError, match=r"weight consistency is 1e\+308: expected a number from -1e\+09 to 1e\+09"):
        at.ScoreWeights(consistency=1e308)
    with pytest.raises(at.UserError, match="for several images use explain_many"):
        at.explain(small_cat[None].expand(2, -1, -1, -1), cnn)
    with pytest.raises(at.UserError, match=r"expected some of count.*did you mean count"):
        at.explain(small_cat, cnn, regions="grid", region_options={"counts": 4})
