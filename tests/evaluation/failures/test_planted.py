"""Planted failures: the patch really flips the prediction, and every map is judged against it by the same functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attribution as at
from evaluation.data.dataset import ImageDataset
from evaluation.failures.planted import OURS, Planted, chance, judge_planted, plant_failures

SIDE = 12
NAMES = ("dark", "red", "blue")


class Patches(nn.Module):
    """Says which colour the brightest coloured part has: a patch of strong colour decides, wherever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, x: Tensor) -> Tensor:
        red = nn.functional.avg_pool2d(x[:, 0] - x[:, 2], 3, stride=1).amax(dim=(1, 2))
        blue = nn.functional.avg_pool2d(x[:, 2] - x[:, 0], 3, stride=1).amax(dim=(1, 2))
        return self.scale * torch.stack([torch.full_like(red, 0.35), red, blue], dim=1)


def model() -> at.Classifier:
    return at.Classifier(Patches().eval(), size=SIDE, class_names=NAMES, scores="logits", name="patches")


def dataset(count: int = 30) -> ImageDataset:
    generator = np.random.default_rng(0)
    images, labels = [], []
    for index in range(count):
        pixels = generator.uniform(0, 0.2, (3, SIDE, SIDE)).astype(np.float32)
        label = index % 3
        if label:
            pixels[0 if label == 1 else 2] += 0.7
        images.append(torch.from_numpy(pixels))
        labels.append(label)
    ids = tuple(f"{index}.png" for index in range(count))
    return ImageDataset("colours", NAMES, ids, tuple(labels), lambda index: images[index])


def test_planted_images_are_failures_that_the_patch_made() -> None:
    classifier, data = model(), dataset()
    planted = list(plant_failures(classifier, data, 6, seed=1))
    assert len(planted) == 6
    originals = {data.ids[index]: data[index] for index in range(len(data))}
    for each in planted:
        original, donor = originals[each.sample], originals[each.donor]
        assert int(classifier.probabilities(classifier.inputs(original.image)).argmax()) == original.label == each.label
        assert int(classifier.probabilities(classifier.inputs(each.image)).argmax()) == each.predicted == donor.label != each.label
        torch.testing.assert_close(each.image[:, ~each.mask], original.image[:, ~each.mask], rtol=0, atol=0)
        assert int(each.mask.sum()) == 16 and chance(each) == pytest.approx(16 / 144)
        rows, columns = each.mask.any(1).nonzero()[:, 0], each.mask.any(0).nonzero()[:, 0]
        assert len(rows) == len(columns) == 4 and bool(each.mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())
    again = list(plant_failures(classifier, data, 6, seed=1))
    assert all(torch.equal(a.image, b.image) for a, b in zip(planted, again, strict=True))
    assert any(not torch.equal(a.image, b.image) for a, b in zip(planted, plant_failures(classifier, data, 6, seed=2), strict=True))


def test_the_patch_is_found_and_maps_are_judged_alike() -> None:
    image = torch.full((3, SIDE, SIDE), 0.1)
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[4:8, 4:8] = True
    image[0, mask] = 0.9
    planted = Planted("a.png", image, 0, 1, mask, "b.png")
    found = judge_planted(
        model(), planted, ("saliency", "input_x_gradient", "lrp"), regions="grid", region_options={"count": 9}, fill="black"
    )
    assert list(found)[:3] == list(OURS)
    assert found["causing regions"] == (1.0, 1.0), "the 4 x 4 region of the patch, and nothing else"
    assert found["first region of the mistake"] == (1.0, 1.0)
    gradient = torch.autograd.functional.jacobian(lambda x: model().module(x)[0, 1], image[None])[0]
    saliency = gradient.abs().sum(dim=0)
    assert found["saliency"][0] == pytest.approx(float(saliency[mask].sum() / saliency.sum()), abs=1e-5)


def test_settings_that_do_not_fit() -> None:
    for values in ({"count": 0}, {"count": 1, "side": 1.5}, {"count": 1, "tries": 0}):
        with pytest.raises(at.UserError, match="expected at least 1, a share below 1"):
            next(plant_failures(model(), dataset(), **values))
