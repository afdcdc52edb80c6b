"""Fills: names, colours, images, several at once; one default for everything that hides pixels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import attribution as at
import evaluation as ev
from attribution.fills import (
    DEFAULT_FILL,
    NAMED_FILLS,
    classifier_fill,
    fill_label,
    is_drop,
    is_named,
    parse_fill,
    picture_of_fill,
    plain_fill,
    recorded_fill,
    several_fills,
)
from evaluation.failures.settings import FailureSettings
from evaluation.pareto.settings import ParetoSettings

RGB = (np.stack(np.broadcast_arrays(*np.ogrid[0 : 1 : 24 * 1j, 0 : 1 : 37 * 1j], 0.3), axis=-1) * 255).round().astype(np.uint8)


def naive_blur(image: np.ndarray) -> np.ndarray:
    """Gaussian blur of [H, W] with a standard deviation of 1/20 of the long side, 3 deviations wide, borders reflected."""
    sigma = max(image.shape) / 20
    for axis in (0, 1):
        side = image.shape[axis]
        reach = min(int(3 * sigma + 0.5), side - 1)
        weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        padded = np.pad(image, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)], mode="reflect")
        shifted = [np.take(padded, np.arange(offset, offset + side), axis=axis) for offset in range(2 * reach + 1)]
        image = sum(w * s for w, s in zip(weights / weights.sum(), shifted, strict=True))
    return image


FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "black": lambda image: 0 * image,
    "white": lambda image: 0 * image + 1,
    "gray": lambda image: 0 * image + 0.5,
    "mean": lambda image: 0 * image + image.mean(axis=(1, 2), keepdims=True),
    "blur": lambda image: np.stack([naive_blur(channel) for channel in image]),
}


@pytest.mark.parametrize("name", at.FILLS)
@pytest.mark.parametrize("size", [(40, 60), (1, 50), (1, 1)])
def test_fills_follow_their_formulas(name: str, size: tuple[int, int], cat: Tensor) -> None:
    image = cat[:, 100 : 100 + size[0], 150 : 150 + size[1]]
    before = image.clone()
    fill = at.make_fill(image, name)
    assert fill.shape == image.shape
    assert fill.is_contiguous()
    assert np.abs(fill.numpy() - FORMULAS[name](image.double().numpy())).max() < 1e-5
    fill.add_(1)
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("fill", "colour"),
    [
        ("#FF8000", (1.0, 128 / 255, 0.0)),
        ("#0080ff", (0.0, 128 / 255, 1.0)),
        ((0.1, 0.2, 1), (0.1, 0.2, 1.0)),
        ([0, 0.5, 0], (0.0, 0.5, 0.0)),
        (np.array([0.1, 0.2, 0.3], np.float32), (0.1, 0.2, 0.3)),
        (tuple(np.array([0.1, 0.2, 0.3], np.float32)), (0.1, 0.2, 0.3)),
        (torch.tensor([0.1, 0.2, 0.3]), (0.1, 0.2, 0.3)),
    ],
    ids=str,
)
def test_fill_colours(fill: Any, colour: tuple[float, float, float]) -> None:
    expected = torch.tensor(colour)[:, None, None].expand(3, 4, 5)
    assert torch.allclose(at.make_fill(torch.rand(3, 4, 5), fill), expected, atol=1e-7)


def test_fill_images(tmp_path: Path) -> None:
    path = tmp_path / "fill.png"
    Image.fromarray(RGB).save(path)
    image = torch.rand(3, *RGB.shape[:2])
    for fill in (str(path), path, path.read_bytes(), Image.open(path), RGB, at.load_image(RGB)):
        assert torch.allclose(at.make_fill(image, fill), torch.from_numpy(RGB).permute(2, 0, 1) / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (
            "grey",
            f"unknown fill 'grey': expected one of {', '.join(NAMED_FILLS)}, a colour such as '#808080', or an image file",
        ),
        ("#12345", "unknown fill '#12345'"),
        ("x" * 5000, "unknown fill"),
        (torch.rand(3, 5, 4), "the fill image is 4x5, the image 5x4: give a fill of the same size"),
        ((0.1, 0.2, 1.5), "expected three numbers in"),
        ((0.1, 0.2, float("nan")), "expected three numbers in"),
        ((255, 255, 255), r"fill colour \(255, 255, 255\): expected three numbers in \[0, 1\]"),
        ((0.5, 0.5), "expected three numbers in"),
        (("a", "b", "c"), "expected three numbers in"),
        (7, "fill is int: expected one of black"),
        ((True, 0, 0), "expected three numbers in"),
        ("model_mean", r"fill 'model_mean' is the mean colour of a classifier: give that classifier's preprocessing\.mean"),
        ("linear", "fill 'linear' is imputed anew for each set of hidden pixels and is no image"),
        ("drop", "fill 'drop' takes tokens away and is no image"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.Tensor) else str(value)[:30],
)
def test_bad_fills(fill: Any, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        at.make_fill(torch.rand(3, 4, 5), fill)


def test_one_default_for_everything_that_hides_pixels() -> None:
    assert DEFAULT_FILL == "black"
    for function in (at.explain, at.explain_failure, ev.mu_fidelity, ev.infidelity):
        assert inspect.signature(function).parameters["fill"].default == DEFAULT_FILL, function.__name__
    assert ev.Protocol().fill == DEFAULT_FILL
    assert ev.make_settings({"data": "x"}).fills == (DEFAULT_FILL,)
    assert ParetoSettings(data="x").fill == DEFAULT_FILL
    assert inspect.signature(FailureSettings).parameters["fill"].default == DEFAULT_FILL


def test_the_default_of_attribute_is_black_and_that_of_a_preset_its_papers(cnn: at.Classifier, small_cat: Tensor) -> None:
    options = {"sliding_window_shapes": 8, "strides": 4}
    found = at.attribute(small_cat, cnn, "occlusion", **options)
    assert torch.equal(found.pixel_map, at.attribute(small_cat, cnn, "occlusion", fill="black", **options).pixel_map)
    assert found.provenance["settings"]["fill"] == "black"
    published = at.attribute(small_cat, cnn, "occlusion", preset="lima", **options)
    given = at.attribute(small_cat, cnn, "occlusion", preset="lima", fill="model_mean", **options)
    assert torch.equal(published.pixel_map, given.pixel_map)
    assert published.provenance["settings"]["fill"] == "model_mean"
    black = at.attribute(small_cat, cnn, "occlusion", preset="lima", fill="black", **options)
    assert not torch.equal(published.pixel_map, black.pixel_map), "a fill that is given beside a preset overrides it"


@pytest.mark.parametrize("fill", [*NAMED_FILLS, "#20c080", (0.1, 0.2, 0.3), torch.rand(3, 4, 5)])
def test_parsing_keeps_what_is_a_fill(fill: Any) -> None:
    assert parse_fill(fill) is fill if isinstance(fill, Tensor) else parse_fill(fill) == fill


def test_names_of_fills() -> None:
    image = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert parse_fill(np.array([0.5, 0.25, 1.0])) == parse_fill([0.5, 0.25, 1]) == (0.5, 0.25, 1.0)
    assert [plain_fill(fill) for fill in ("blur", "#102030", (0.5, 0, 1))] == ["blur", "#102030", [0.5, 0.0, 1.0]]
    assert plain_fill(image) == plain_fill(image.clone()) != plain_fill(1 - image)
    assert [fill_label(fill) for fill in ("model_mean", "#102030", (0.5, 0.0, 1.0), image)] == [
        "model_mean",
        "#102030",
        "[0.5, 0.0, 1.0]",
        "image",
    ]
    assert is_named("linear", ("linear", "drop")) and not is_named("black", ("linear",)) and not is_named(image, ("linear",))
    assert is_drop("drop") and not is_drop(image)


def test_several_fills_at_once() -> None:
    assert several_fills("black+blur+model_mean+drop") == ["black", "blur", "model_mean", "drop"]
    assert several_fills("black") == ["black"]
    assert several_fills("photo+cat.png") == ["photo+cat.png"] and several_fills("black+linear") == ["black+linear"]
    with pytest.raises(at.UserError, match=r"fill 'black\+black' names one twice"):
        several_fills("black+black")
    with pytest.raises(at.UserError, match=r"fill 'black\+blur' names several at once, which explain takes and this does not"):
        parse_fill("black+blur")


def test_the_mean_colour_of_a_classifier(cnn: at.Classifier, small_cat: Tensor) -> None:
    expected = torch.tensor(cnn.preprocessing.mean)[:, None, None].expand_as(small_cat)
    assert torch.allclose(classifier_fill(small_cat, "model_mean", cnn), expected)
    assert torch.allclose(picture_of_fill(small_cat, "drop", cnn), expected)
    assert cnn.inputs(classifier_fill(small_cat, "model_mean", cnn)).abs().max() < 1e-6
    assert torch.equal(classifier_fill(small_cat, "blur", cnn), at.make_fill(small_cat, "blur"))


def test_a_recorded_fill_is_found_again_unless_it_was_an_image() -> None:
    for fill in ("blur", "black+mean", "#20c080", "drop", "model_mean"):
        assert recorded_fill(fill) == fill
    assert recorded_fill([0.5, 0.25, 1]) == (0.5, 0.25, 1)
    for other in (None, 3, {}, "image [3, 4, 5] sha256:00", "/some/where.png", "black+pink"):
        assert recorded_fill(other) is None
    with pytest.raises(at.UserError, match="expected three numbers in"):
        recorded_fill([0.5, 2])


def test_polish_keeps_the_fill_of_the_explanation(cnn: at.Classifier, small_cat: Tensor) -> None:
    cells = {"regions": "grid", "region_options": {"count": 9}}
    found = at.explain(small_cat, cnn, fill="blur", search="greedy", **cells)
    assert at.polish(found, cnn, evaluations=60).provenance["settings"]["fill"] == "blur"
    assert at.polish(found, cnn, evaluations=60, fill="gray").provenance["settings"]["fill"] == "gray"
    drawn = at.explain(small_cat, cnn, fill=torch.rand_like(small_cat), search="greedy", **cells)
    assert at.polish(drawn, cnn, evaluations=60).provenance["settings"]["fill"] == "black"
