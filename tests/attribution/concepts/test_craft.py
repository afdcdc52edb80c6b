"""CRAFT against planted factors, the closed form of a linear head, and the values of the reference code."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import attribution as at
from attribution.concepts.craft import _design, jansen

CONCEPTS = torch.tensor([[1.0, 0.5, 0, 0, 0, 0], [0, 0, 1.0, 0.5, 0, 0], [0, 0, 0, 0, 1.0, 0.5]])


class Planted(nn.Module):
    """Channels that are the three colours of a cell, each as a concept of two channels; then the mean and a linear head."""

    def __init__(self, head: torch.Tensor) -> None:
        super().__init__()
        self.colours = nn.Conv2d(3, 6, 4, 4, bias=False)
        self.colours.weight.data = CONCEPTS.T[:, :, None, None].expand(-1, -1, 4, 4) / 16
        self.relu = nn.ReLU()
        self.head = nn.Linear(6, 2, bias=False)
        self.head.weight.data = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.relu(self.colours(x)).mean(dim=(2, 3)))


def planted() -> at.Classifier:
    head = torch.tensor([[2.0, 0, -1.0, 0, 0.2, 0], [0, 0, 0, 0, 0, 1.0]])
    return at.Classifier(Planted(head).eval(), size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1), batch_size=16)


def pictures(count: int = 12) -> torch.Tensor:
    """Patches of pure colours, so that crops are nearly pure too."""
    generator = torch.Generator().manual_seed(0)
    colour = torch.randint(0, 3, (count, 4, 4), generator=generator)
    strength = 0.3 + 0.7 * torch.rand(count, 4, 4, generator=generator)
    cells = nn.functional.one_hot(colour, 3).float() * strength[..., None]
    return cells.permute(0, 3, 1, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)


def found(**changes: Any) -> at.Concepts:
    given = {"layer": "relu", "n_concepts": 3, "patch_size": 8, "stride": 8, "max_iter": 2000, **changes}
    return at.craft(pictures(), planted(), 0, **given)


def test_planted_concepts_are_found() -> None:
    concepts = found()
    assert concepts.relative_error < 1e-3
    normal = nn.functional.normalize(concepts.basis, dim=1) @ nn.functional.normalize(CONCEPTS, dim=1).T
    assert bool((normal.max(dim=1).values > 0.999).all()) and len(set(normal.argmax(dim=1).tolist())) == 3
    assert concepts.codes.shape == (12 * 16, 3) and concepts.crops.shape == (12 * 16, 3)
    assert concepts.crops[:5].tolist() == [[0, 0, 0], [0, 0, 8], [0, 0, 16], [0, 0, 24], [0, 8, 0]]
    assert concepts.same_prediction == 1.0 and concepts.constant_images == 0


def test_importance_of_a_linear_head_is_known() -> None:
    """Masks are uniform and independent, and the logit is sum m_i c_i: the total Sobol index is c_i^2 / sum c^2."""
    concepts = found(samples=512)
    means = concepts.encode(pictures()).mean(dim=(1, 2))
    head = torch.tensor([2.0, 0, -1.0, 0, 0.2, 0])
    parts = (means * (concepts.basis @ head)).double().numpy()
    expected = parts**2 / (parts**2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(concepts.image_importance, expected, atol=0.02)
    np.testing.assert_allclose(concepts.importance, expected.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(concepts.effect, parts.mean(axis=0), atol=1e-5)
    low, high = concepts.importance_interval.T
    assert (low <= concepts.importance).all() and (concepts.importance <= high).all()
    assert concepts.order.tolist() == np.argsort(-concepts.importance).tolist()


def test_encoding_and_maps() -> None:
    concepts, images = found(), pictures()
    codes = concepts.encode(images)
    assert codes.shape == (12, 8, 8, 3)
    cells = images[:, :, ::4, ::4].permute(0, 2, 3, 1) @ CONCEPTS
    assert torch.allclose(codes @ concepts.basis, cells, atol=1e-3)
    red = int((nn.functional.normalize(concepts.basis, dim=1) @ CONCEPTS[0]).argmax())
    maps = concepts.maps(images, red, quantile=0)
    assert maps.shape == (12, 32, 32)
    assert float(maps[images[:, 0] > 0.5].mean()) > 10 * float(maps[images[:, 0] == 0].mean())
    assert float((concepts.maps(images, red) > 0).float().mean()) < 0.3
    best = concepts.crops[concepts.best_crops(red, 3)]
    assert all(float(images[image, 0, top : top + 8, left : left + 8].min()) > 0.8 for image, top, left in best)


def test_removal_by_importance_is_the_fastest() -> None:
    concepts = found()
    curve = concepts.removed(pictures())
    assert curve.shape == (4,) and curve[-1] == pytest.approx(0, abs=1e-5)
    whole = planted().logits(pictures())[:, 0].double().mean()
    assert curve[0] == pytest.approx(float(whole), abs=1e-3)
    kept = concepts.removed(pictures(), keep=True)
    assert kept[0] == pytest.approx(0, abs=1e-5) and kept[-1] == pytest.approx(curve[0])
    own, others, p = concepts.removal_test(pictures(), orders=30)
    assert own == pytest.approx(concepts.removed(pictures()).mean()) and len(others) == 30 and 1 / 31 <= p <= 1


def test_jansen_against_a_loop() -> None:
    generator = np.random.default_rng(0)
    outputs = generator.normal(size=5 * 16)
    a, c = outputs[:16], outputs[16:].reshape(4, 16)
    expected = [sum((a[k] - c[i, k]) ** 2 for k in range(16)) / (2 * 16 * a.var(ddof=1)) for i in range(4)]
    np.testing.assert_allclose(jansen(outputs, 4)[0], expected, rtol=1e-12)
    assert jansen(np.ones(80), 4)[1] and not jansen(outputs, 4)[1]


def test_transformers_by_semi_nmf(vit: at.Classifier) -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(at.NotApplicable, match=r"returns negative values .* factorisation='semi_nmf'"):
        at.craft(images, vit, 0, layer="blocks.2", n_concepts=3, patch_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        concepts = at.craft(images, vit, "cat", layer="blocks.2", n_concepts=3, patch_size=16, samples=8, factorisation="semi_nmf")
    assert concepts.target == 3 and concepts.encode(images).shape == (4, 8, 8, 3) and bool((concepts.codes >= 0).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer3/frog/r10", "layer3/frog/r5", "layer2/automobile/r5"])
def test_the_reference_code_finds_the_same(shared: Path, cnn: at.Classifier, name: str) -> None:
    folder = shared / "golden" / "concepts"
    (record,) = [each for each in json.loads((folder / "craft.json").read_text())["records"] if each["name"] == name]
    arrays, pixels = np.load(folder / "craft_arrays.npz"), np.load(folder / "craft_pixels.npz")
    images, others = (
        torch.from_numpy(pixels[f"{record['class_name']}/{part}"]).permute(0, 3, 1, 2) / 255 for part in ("images", "heldout")
    )
    for masks in (f"halton32_r{record['n_concepts']}", f"sobol128_r{record['n_concepts']}"):
        design = "halton" if masks.startswith("h") else "sobol"
        samples, rank = int(masks[6:8]) if design == "halton" else 128, record["n_concepts"]
        stored = arrays[f"design/{masks}"].reshape(rank + 2, samples, rank)
        np.testing.assert_array_equal(_design(design, samples, rank, 0), np.delete(stored, 1, axis=0).reshape(-1, rank))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shape = {"layer": record["layer"], "n_concepts": record["n_concepts"], "patch_size": 16}
        published = at.craft(
            *(images, cnn, record["class_index"]), **shape, importance_images=record["importance_images"],
            design="halton", samples=32, max_iter=200, codes="coordinate_descent",
        )  # fmt: skip
        ours = at.craft(images, cnn, record["class_index"], **shape, importance_images=record["spec_pipeline"]["images"])
    assert np.abs(published.basis.numpy() - arrays[f"{name}/W"]).max() < 2e-3 * arrays[f"{name}/W"].max()
    assert published.relative_error == pytest.approx(record["relative_error"], abs=1e-4)
    np.testing.assert_allclose(published.importance, record["importances_halton32"], atol=2e-3)
    np.testing.assert_allclose(published.effect, record["mean_mask_gradient"], atol=5e-3)
    assert published.same_prediction == pytest.approx(record["same_argmax"], abs=0.02)
    stored = arrays[f"{name}/U_heldout"]
    assert np.abs(published.encode(others).numpy() - stored).max() < 1e-2 * stored.max()
    cosine = nn.functional.cosine_similarity(ours.basis, torch.from_numpy(arrays[f"{name}/spec_W"]), dim=1)
    assert float(cosine.min()) > 0.999
    assert ours.relative_error == pytest.approx(record["spec_pipeline"]["relative_error"], abs=1e-4)
    np.testing.assert_allclose(ours.importance, record["spec_pipeline"]["importances_sobol128"], atol=5e-3)
    if record["layer"] == "layer3":
        count = len(ours.image_importance)
        assert count != record["importance_images"] or np.allclose(ours.importance, record["importances_closed_form"], atol=0.05)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"images": []}, "no images were given: expected those of one class"),
        ({"target": "unicorn"}, "unicorn"),
        ({"layer": "nothing"}, "nothing"),
        ({"layer": "input"}, "layer is 'input': expected a layer inside the network"),
        ({"patch_size": 33}, "patch_size is 33: expected at most 32, the side of the model input"),
        ({"n_concepts": 7}, "n_concepts is 7: expected at most 6, since there are 32 crops of 6 channels"),
        ({"n_concepts": 0}, "n_concepts is 0: expected a whole number"),
        ({"samples": 100}, "samples is 100: expected a power of two for the design sobol, such as 128"),
        ({"design": "grid"}, "design is 'grid': expected one of sobol, halton"),
        ({"codes": "exact"}, "codes is 'exact': expected one of nnls, coordinate_descent"),
        ({"factorisation": "pca"}, "factorisation is 'pca': expected one of nmf, semi_nmf"),
        ({"stride": 0}, "stride is 0: expected a whole number"),
        ({"importance_images": 0}, "importance_images is 0: expected a whole number"),
    ],
)
def test_bad_input_is_one_line(changes: dict[str, object], line: str) -> None:
    given = {"images": pictures(2), "classifier": planted(), "target": 0, "layer": "relu", "n_concepts": 2, "patch_size": 8, "stride": 8}
    with pytest.raises(at.UserError, match=line):
        at.craft(**{**given, **changes})  # type: ignore[arg-type]
