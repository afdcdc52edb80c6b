from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attribution as at

WAYS = [
    {"size": 32, "interpolation": "bicubic"},
    {"size": (20, 28), "interpolation": "bilinear", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)},
    {"size": 24, "resize": "short_side", "resized": (30, 30), "interpolation": "bicubic", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    {"size": 24, "resize": "long_side", "resized": (22, 22), "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3)},
    {"size": 17, "resize": "squash", "resized": (21, 21), "interpolation": "nearest"},
]


def colour_sum(inputs: Tensor) -> Tensor:
    return inputs.mean(dim=(2, 3))


@pytest.mark.parametrize("way", WAYS, ids=lambda w: f"{w.get('resize', 'squash')}-{w['interpolation']}")
@pytest.mark.parametrize("size", [(40, 57), (32, 32), (13, 90)])
@pytest.mark.parametrize("fill", ["black", "mean", "blur"])
def test_equals_preprocessing_each_masked_image(way: dict, size: tuple[int, int], fill: str) -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(3, *size, generator=generator)
    labels = at.make_regions(image, torch.randint(0, 9, size, generator=generator)).labels
    background = at.make_fill(image, fill)
    classifier = at.Classifier(colour_sum, **way)
    masked = at.MaskedInputs(classifier, image, labels, background)
    subsets = torch.rand(6, 9, generator=generator) < 0.5
    subsets[0], subsets[1] = False, True
    for subset, inputs in zip(subsets, masked(subsets), strict=True):
        shown = reference.masked_image(image, labels, background, set(subset.nonzero()[:, 0].tolist()))
        assert (inputs - classifier.preprocessing(shown[None])[0]).abs().max() < 1e-5


@pytest.mark.parametrize("spec", ["zoo:cnn", "zoo:vit", "timm:vit_tiny_patch16_224", "torchvision:resnet18"])
def test_equals_resizing_each_masked_photo(spec: str, cat: Tensor) -> None:
    classifier = at.load_classifier(spec, device="cpu", pretrained=False)
    regions = at.make_regions(cat, "grid", count=12)
    background = at.make_fill(cat, "gray")
    masked = at.MaskedInputs(classifier, cat, regions.labels, background)
    subsets = torch.rand(5, regions.count, generator=torch.Generator().manual_seed(2)) < 0.5
    for subset, inputs in zip(subsets, masked(subsets), strict=True):
        shown = torch.where(subset[regions.labels], cat, background)
        assert (inputs - classifier.inputs(shown)[0]).abs().max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(height=st.integers(2, 40), width=st.integers(2, 40), count=st.integers(1, 8), seed=st.integers(0, 2**16))
def test_any_size_and_partition(height: int, width: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, height, width, generator=generator)
    labels = at.make_regions(image, torch.randint(0, count, (height, width), generator=generator)).labels
    classifier = at.Classifier(colour_sum, size=16, interpolation="bicubic", mean=(0.4, 0.4, 0.4), std=(0.3, 0.3, 0.3))
    background = torch.rand(3, height, width, generator=generator)
    masked = at.MaskedInputs(classifier, image, labels, background)
    subset = torch.rand(1, masked.size, generator=generator) < 0.5
    shown = torch.where(subset[0][labels], image, background)
    assert (masked(subset)[0] - classifier.preprocessing(shown[None])[0]).abs().max() < 1e-5


def test_many_regions_are_made_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(3))
    regions = at.make_regions(image, "grid", count=64)
    classifier = at.Classifier(colour_sum, size=8)
    black = torch.zeros_like(image)
    subsets = torch.eye(64, dtype=torch.bool)
    whole = at.MaskedInputs(classifier, image, regions.labels, black)(subsets)
    monkeypatch.setattr("attribution.masking._CHUNK_VALUES", 5 * image.numel())
    assert torch.equal(at.MaskedInputs(classifier, image, regions.labels, black)(subsets), whole)


def test_no_subsets() -> None:
    image = torch.rand(3, 8, 8)
    masked = at.MaskedInputs(at.Classifier(nn.Flatten(), size=8), image, at.make_regions(image, "grid", count=4).labels, image * 0)
    assert masked(torch.zeros(0, 4, dtype=torch.bool)).shape == (0, 3, 8, 8)
