"""Missing instead of painted: hidden patches leave the sequence, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from toys import image_folder

import attribution as at
import evaluation as ev
from attribution.dropping import dropping, follow_patches, masked_inputs
from evaluation.benchmark.report import write_report
from evaluation.metrics.protocol import Protocol

GRID = {"regions": "grid", "region_options": {"rows": 4, "columns": 4}}


def small_timm(name: str = "vit_tiny_patch16_224", **options: object) -> at.Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = timm.create_model(name, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5, **options)
    for parameter in module.parameters():  # heads start at zero
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return at.Classifier(module.eval(), size=32, mean=0.5, std=0.5, scores="logits", name=name)


def small_torchvision() -> at.Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5)
        nn.init.normal_(module.heads.head.weight, std=0.5)
    return at.Classifier(module.eval(), size=32, mean=0.5, std=0.5, scores="logits", name="torchvision vit")


MODELS = {
    "timm": small_timm,
    "timm distilled": lambda: small_timm("deit_tiny_distilled_patch16_224"),
    "timm registers": lambda: small_timm(reg_tokens=3),
    "torchvision": small_torchvision,
}


def one_by_one(classifier: at.Classifier, image: Tensor, kept: list[int]) -> Tensor:
    """Logits with the kept patches alone, written out: embed, position, choose, blocks, norm, head."""
    module, x = classifier.module, classifier.inputs(image)
    if isinstance(module, torchvision.models.VisionTransformer):
        tokens = torch.cat([module.class_token, module._process_input(x)], dim=1) + module.encoder.pos_embedding
        tokens = tokens[:, [0, *(1 + patch for patch in kept)]]
        return module.heads(module.encoder.ln(module.encoder.layers(tokens))[:, 0])
    prefix = module.num_prefix_tokens
    tokens = module._pos_embed(module.patch_embed(x))
    tokens = module.blocks(tokens[:, [*range(prefix), *(prefix + patch for patch in kept)]])
    logits = module.forward_head(module.norm(tokens))
    return logits[0] if isinstance(logits, tuple) else logits


@pytest.mark.parametrize("name", MODELS)
def test_dropped_tokens_equal_a_model_without_them(name: str, small_cat: Tensor) -> None:
    classifier = MODELS[name]()
    labels = at.make_regions(small_cat, "grid", rows=4, columns=4).labels
    hiding, masked = masked_inputs(classifier, small_cat, labels, "drop")
    rows = torch.rand(20, 16, generator=torch.Generator().manual_seed(2)) < torch.linspace(0, 1, 20)[:, None]
    found = hiding.logits(masked(rows))
    with torch.no_grad():
        for row, logits in zip(rows, found, strict=True):
            assert torch.allclose(logits[None], one_by_one(classifier, small_cat, row.nonzero()[:, 0].tolist()), atol=1e-5)
    everything = masked(torch.ones(1, 16, dtype=torch.bool))
    assert torch.allclose(hiding.logits(everything), classifier.logits(classifier.inputs(small_cat)), atol=1e-5)
    logits, features = hiding.logits_and_features(masked(rows))
    assert torch.allclose(logits, found, atol=1e-5) and len(features) == 20
    assert not classifier.module._forward_pre_hooks and not hiding.forward.parts.first_block._forward_pre_hooks


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_rows_of_the_same_length_meet_in_batches(vit: at.Classifier, small_cat: Tensor, batch_size: int) -> None:
    labels = at.make_regions(small_cat, "grid", rows=4, columns=4).labels
    hiding, masked = masked_inputs(vit, small_cat, labels, "drop")
    rows = torch.rand(40, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    vit.find_out(False)
    lengths: list[tuple[int, int]] = []
    handle = vit.module.blocks[1].register_forward_pre_hook(lambda _, args: lengths.append(tuple(args[0].shape[:2])))
    with hiding.forwarding(batch_size):
        found = hiding.probabilities(masked(rows))
    handle.remove()
    assert torch.allclose(found, hiding.probabilities(masked(rows)), atol=1e-5)
    counts = rows.sum(dim=1)
    assert sum(rows for rows, _ in lengths) == 40 and max(rows for rows, _ in lengths) <= batch_size
    assert {length - 1 for _, length in lengths} == {4 * int(count) for count in counts}  # four patches a region
    if batch_size == 64:
        assert len(lengths) == len(counts.unique())


def test_a_batch_that_does_not_fit_is_halved(small_cat: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = small_timm()
    labels = at.make_regions(small_cat, "grid", rows=4, columns=4).labels
    hiding, masked = masked_inputs(classifier, small_cat, labels, "drop")
    rows = torch.rand(24, 16, generator=torch.Generator().manual_seed(4)).argsort(dim=1) < 8  # eight patches each
    expected = hiding.logits(masked(rows))

    block = classifier.module.blocks[1]
    inside = block.forward

    def full(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if len(x) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inside(x, *args, **kwargs)

    monkeypatch.setattr(block, "forward", full)
    hiding.batch_size = 24
    assert torch.allclose(hiding.logits(masked(rows)), expected, atol=1e-5) and hiding.batch_size <= 5


@pytest.mark.parametrize("search", ["bidirectional", "budget"])
def test_searches_and_evaluators_take_it(vit: at.Classifier, small_cat: Tensor, search: str) -> None:
    found = at.explain(small_cat, vit, fill="drop", search=search, **GRID)
    curves = ev.perturbation_curves(small_cat, vit, found, found.target, Protocol(fill="drop"))
    assert torch.allclose(curves.insertion, found.insertion_scores, atol=1e-5)
    assert torch.allclose(curves.deletion, found.deletion_scores, atol=1e-5)
    painted = at.explain(small_cat, vit, fill="model_mean", search=search, **GRID)
    assert not torch.allclose(painted.insertion_scores, found.insertion_scores, atol=1e-2)
    assert -1 <= ev.mu_fidelity(small_cat, vit, found, found.target, grid=4, fill="drop") <= 1
    both = at.explain(small_cat, vit, fill="black+drop", search=search, **GRID)
    assert both.provenance["settings"]["fill"] == "black+drop"


def test_a_failure_is_explained_with_dropped_tokens(vit: at.Classifier, small_cat: Tensor) -> None:
    wrong = int(vit.probabilities(vit.inputs(small_cat))[0].argsort()[-2])
    found = at.explain_failure(small_cat, vit, wrong, fill="drop", **GRID)
    assert torch.allclose(found.shown.true, found.truth.insertion_scores, atol=1e-5)
    assert torch.allclose(found.mistake_shown.predicted, found.mistake.insertion_scores, atol=1e-5)


def test_what_cannot_drop_says_why(cnn: at.Classifier, vit: at.Classifier, small_cat: Tensor) -> None:
    with pytest.raises(at.NotApplicable, match=r"fill 'drop' does not apply to .*: no attention was found in it"):
        at.explain(small_cat, cnn, fill="drop", **GRID)
    box = at.Classifier(lambda x: x.mean(dim=(2, 3)), size=32, scores="logits")
    with pytest.raises(at.NotApplicable, match="it is a black box"):
        at.explain(small_cat, box, fill="drop", **GRID)
    thirds = at.make_regions(small_cat, "grid", rows=3, columns=3)
    with pytest.raises(at.NotApplicable, match="its head reads the patches, and without patches nothing is left to read"):
        dropping(small_timm(global_pool="avg"), small_cat, thirds.labels)
    with pytest.raises(at.UserError, match=r"hides whole patches of 4x4 pixels, but no region has more than .*at.follow_patches"):
        at.explain(small_cat, vit, fill="drop", regions=thirds)
    for given in (thirds, thirds.labels, thirds.labels.numpy(), thirds.masks):
        assert (
            at.explain(small_cat, vit, fill="drop", regions=at.follow_patches(vit, given), search="budget", evaluations=9).regions.count
            == 9
        )
    for given in (5, "slico", [[0, 1]], torch.zeros(4)):
        with pytest.raises(at.UserError, match=r"regions are .*expected Regions"):
            at.follow_patches(vit, given)
    with pytest.raises(at.UserError, match="goes without a confidence_classifier"):
        at.explain(small_cat, vit, fill="black+drop", objective_options={"confidence_classifier": cnn}, **GRID)
    with pytest.raises(at.UserError, match="fill 'drop' takes tokens away and is no image"):
        at.attribute(small_cat, vit, "occlusion", fill="drop")
    with pytest.raises(at.UserError, match="fill 'drop' with pixel steps"):
        Protocol(fill="drop", steps="pixels")


def test_regions_of_a_photo_follow_the_patches_up_to_the_resize(vit: at.Classifier, cat: Tensor) -> None:
    labels = at.make_regions(cat, "grid", rows=8, columns=8).labels
    hiding, masked = masked_inputs(vit, cat, labels, "drop")
    single = torch.eye(64, dtype=torch.bool)
    assert torch.equal(masked(single)[:, 3, ::4, ::4].flatten(1) == 0, single)
    logits = hiding.logits(masked(torch.ones(1, 64, dtype=torch.bool)))
    assert torch.allclose(logits, vit.logits(vit.inputs(cat)), atol=1e-5)


def test_what_a_resize_pads_is_not_hidden(small_cat: Tensor) -> None:
    plain = small_timm()
    padded = at.Classifier(plain.module, size=32, mean=0.5, std=0.5, resize="long_side", scores="logits")
    image = small_cat[:, 8:24]  # 16 x 32: a row of patches above and below is padding
    labels = at.make_regions(image, "grid", rows=2, columns=4).labels
    hiding, masked = masked_inputs(padded, image, labels, "drop")
    logits = hiding.logits(masked(torch.tensor([[True] * 8, [False] * 8])))
    assert torch.allclose(logits[:1], padded.logits(padded.inputs(image)), atol=1e-5)
    padding = [0, 1, 2, 3, 12, 13, 14, 15]
    with torch.no_grad():
        assert torch.allclose(logits[1:], one_by_one(padded, image, padding), atol=1e-5)


def test_tokens_that_are_not_patches_of_pixels_are_refused() -> None:
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", pretrained=False, num_classes=3)
    with pytest.raises(at.NotApplicable, match="its tokens are not made from one patch of pixels each"):
        follow_patches(at.Classifier(hybrid.eval(), size=224, scores="logits"), torch.zeros(224, 224, dtype=torch.int64))


def test_the_batch_size_reaches_dropped_tokens(vit: at.Classifier, small_cat: Tensor) -> None:
    wrong = int(vit.probabilities(vit.inputs(small_cat))[0].argsort()[-2])
    vit.find_out(False)
    sizes: list[int] = []
    handle = vit.module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    try:
        at.explain_failure(small_cat, vit, wrong, fill="drop", batch_size=5, regions="grid", region_options={"rows": 2, "columns": 4})
    finally:
        handle.remove()
    assert max(sizes) <= 5


WAYS = {
    "crop": {"resize": "short_side", "resized": (36, 36), "interpolation": "bicubic"},  # as most models of timm and torchvision do
    "padding": {"resize": "long_side"},
    "squash": {},
}


def seen_through(way: str, name: str = "timm") -> at.Classifier:
    module = MODELS[name]().module
    return at.Classifier(module, size=32, mean=0.5, std=0.5, scores="logits", name=name, **WAYS[way])


def placed(way: str, height: int, width: int) -> list[tuple[float, float, int]]:
    """Scale and start of rows and of columns in the input, and how many there are."""
    if way == "squash":
        return [(32 / height, 0, height), (32 / width, 0, width)]
    scale = 36 / min(height, width) if way == "crop" else 32 / max(height, width)
    resized = [int(side * scale + 1e-9) for side in (height, width)]
    starts = [(32 - r) // 2 if r < 32 else -round((r - 32) / 2) for r in resized]  # as torchvision rounds
    return [(r / side, start, side) for r, start, side in zip(resized, starts, (height, width), strict=True)]


def patch_of(way: str, y: int, x: int, height: int, width: int) -> tuple[int, bool]:
    """The patch, of 4 x 4, that holds the centre of a pixel or is nearest to it, and whether the model sees the pixel."""
    place = [(at + 0.5) * scale + start for at, (scale, start, _) in zip((y, x), placed(way, height, width), strict=True)]
    row, column = (min(3, max(0, int(at // 8))) for at in place)
    return 4 * row + column, all(0 <= at < 32 for at in place)


def pixel_of(way: str, patch: int, height: int, width: int) -> tuple[int, int] | None:
    """The pixel that holds the middle of a patch; None for padding."""
    middle = [
        (8 * at + 4 - start) / scale for at, (scale, start, _) in zip((patch // 4, patch % 4), placed(way, height, width), strict=True)
    ]
    return (int(middle[0]), int(middle[1])) if 0 <= middle[0] < height and 0 <= middle[1] < width else None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [(48, 64), (64, 48), (160, 90), (36, 51), (51, 37), (5, 6)])
def test_patches_go_to_the_region_that_has_most_of_them(way: str, size: tuple[int, int]) -> None:
    height, width = size
    labels = torch.randint(0, 9, (6, 6), generator=torch.Generator().manual_seed(5))
    regions = at.Regions(torch.nn.functional.interpolate(labels[None, None].float(), size=size)[0, 0].long())
    found = follow_patches(seen_through(way), regions)
    votes = np.zeros((16, regions.count))
    patches = {(y, x): patch_of(way, y, x, height, width) for y in range(height) for x in range(width)}
    for (y, x), (patch, seen) in patches.items():
        votes[patch, regions.labels[y, x]] += 1 if seen else 1e-9  # decides where nothing else does
    owners: dict[int, int] = {}
    for (y, x), (patch, _) in patches.items():
        owner = int(found.labels[y, x])
        assert owners.setdefault(patch, owner) == owner
    for one, owner in owners.items():
        for other, its in owners.items():
            assert (owner == its) == (votes[one].argmax() == votes[other].argmax())
    assert found.labels.unique().tolist() == list(range(found.count))
    assert follow_patches(seen_through(way), found) is found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "size"), [("timm", None), ("torchvision", None), ("timm", (5, 6)), ("timm", (3, 3)), ("timm", (7, 37))])
def test_any_regions_of_a_photo_that_is_cropped_or_padded(cat: Tensor, way: str, name: str, size: tuple[int, int] | None) -> None:
    """The patches that a hidden region has are gone, also those between pixels; those of padding and of the others are not."""
    photo = cat[:, 75:225] if size is None else torch.nn.functional.interpolate(cat[None], size=size, mode="area")[0]
    classifier, height, width = seen_through(way, name), *photo.shape[1:]
    regions = follow_patches(classifier, at.make_regions(photo, "grid", count=20 if size is None else 9))
    assert 1 < regions.count <= 16
    hiding, masked = masked_inputs(classifier, photo, regions.labels, "drop")
    owners = dict.fromkeys(range(16), -1)
    for patch in owners:
        if pixel := pixel_of(way, patch, height, width):
            owners[patch] = int(regions.labels[pixel])
    for y in range(height):
        for x in range(width):
            patch, seen = patch_of(way, y, x, height, width)
            if seen:
                owners[patch] = int(regions.labels[y, x])
    rows = torch.rand(8, regions.count, generator=torch.Generator().manual_seed(6)) < 0.5
    found = hiding.logits(masked(rows))
    for row, logits in zip(rows, found, strict=True):
        kept = [patch for patch, owner in owners.items() if owner < 0 or row[owner]]
        with torch.no_grad():
            assert torch.allclose(logits[None], one_by_one(classifier, photo, kept), atol=1e-5)
    if size is None:
        assert (way == "padding") == (-1 in owners.values())


def test_what_is_left_of_the_input_beyond_whole_patches(cat: Tensor) -> None:
    """timm reads the first 3 x 3 patches of 8 x 8 pixels of 30 x 30."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = timm.create_model("vit_tiny_patch16_224", img_size=30, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5)
        nn.init.normal_(module.head.weight, std=0.5)
    classifier = at.Classifier(module.eval(), size=30, mean=0.5, std=0.5, scores="logits")
    photo = torch.nn.functional.interpolate(cat[None], size=(30, 30), mode="area")[0]
    labels = torch.arange(30).div(8, rounding_mode="floor").clamp(max=2)
    labels = 3 * labels[:, None] + labels
    assert torch.equal(follow_patches(classifier, at.make_regions(photo, "grid", rows=3, columns=3)).labels, labels)
    hiding, masked = masked_inputs(classifier, photo, labels, "drop")
    row = torch.tensor([True, False, True, False, False, True, True, True, False])
    with torch.no_grad():
        found = hiding.logits(masked(row[None]))
        assert torch.allclose(found, one_by_one(classifier, photo, row.nonzero()[:, 0].tolist()), atol=1e-5)


def test_regions_by_name_follow_the_patches(cat: Tensor, small_cat: Tensor) -> None:
    classifier = seen_through("crop")
    found = at.explain(cat, classifier, fill="drop", search="budget", evaluations=60)
    assert follow_patches(classifier, found.regions) is found.regions and found.regions.method == "slico"
    curves = ev.perturbation_curves(cat, classifier, found, found.target, Protocol(fill="drop"))
    assert torch.allclose(curves.insertion, found.insertion_scores, atol=1e-5)
    assert torch.allclose(curves.deletion, found.deletion_scores, atol=1e-5)
    assert -1 <= ev.mu_fidelity(cat, classifier, found, found.target, grid=5, fill="drop") <= 1
    better = at.polish(at.attribute(cat, classifier, "saliency"), classifier, regions="slico", fill="black+drop", evaluations=60)
    assert torch.equal(better.regions.labels, found.regions.labels)


def test_a_benchmark_of_dropped_tokens_cuts_along_the_patches(tmp_path: Path) -> None:
    """Under every fill, so that their numbers belong to the same regions; a model without patches is refused for that fill alone."""
    box = at.Classifier(lambda x: x.mean(dim=(2, 3)), size=32, scores="logits", class_names=["a", "b", "c"], name="box")
    chosen = ev.make_settings(
        {
            "data": str(image_folder(tmp_path / "data", 2, side=50)),
            "models": [seen_through("crop"), box],
            "methods": ["random", {"method": "budget", "options": {"evaluations": 40, "fill": "drop"}}],
            "metrics": ["insertion", "insertion_deletion"],
            "fills": ["drop", "black"],
            "regions": "slico",
            "region_options": {"count": 9},
        }
    )
    results = ev.run_benchmark(chosen, tmp_path / "out")
    assert not results.failed
    assert {(failure.model, failure.method) for failure in results.failures} == {
        ("box", "insertion (regions, drop, p)"),
        ("box", "insertion_deletion (regions, drop, p)"),
        ("box", "budget"),
    }
    assert ev.run_benchmark(chosen, tmp_path / "out").scores == results.scores
    page = write_report(ev.summarise(results), tmp_path / "out").html.read_text(encoding="utf-8")
    assert page.count("does not apply to box: it is a black box") == 1
    assert "insertion (regions, drop, p); insertion_deletion (regions, drop, p); budget" in page
    assert "regions, drop, p: a region a step; tokens of hidden patches are dropped; probability" in page
    assert "slico (count 9) along the patches of models that have some" in page
    assert "worst image of random by insertion (regions, black, p)" in page
    classifier = seen_through("crop")
    kept = {(s.model, s.method, s.sample, s.measure.protocol): s.value for s in results.scores if s.measure.metric == "insertion"}
    assert len(kept) == 2 * 2 * 2 + 2
    for sample in results.samples["timm"]:
        image = at.load_image(tmp_path / "data" / sample)
        regions = follow_patches(classifier, at.make_regions(image, "slico", count=9))
        found = at.explain(image, classifier, regions=regions, search="budget", evaluations=40, fill="drop")
        for fill in ("black", "drop"):
            curves = ev.perturbation_curves(image, classifier, found, found.target, Protocol(fill=fill))
            assert kept["timm", "budget", sample, f"regions, {fill}, p"] == pytest.approx(curves.insertion_auc, abs=1e-5)
