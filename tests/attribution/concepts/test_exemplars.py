"""Exemplars against a planted unit, a naive sort, and the values of the reference code."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import attribution as at


def colours() -> at.Classifier:
    """A network whose layer "0" has three units: the brightness of red, of green and of blue in cells of 4 x 4 pixels."""
    layer = nn.Conv2d(3, 3, 4, 4, groups=3, bias=False)
    nn.init.constant_(layer.weight, 1 / 16)
    module = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    return at.Classifier(module.eval(), size=(16, 16), mean=(0, 0, 0), std=(1, 1, 1), batch_size=3)


def pictures(count: int = 20) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5


def test_a_planted_unit_finds_its_images() -> None:
    images = pictures()
    for rank, place in enumerate((3, 11, 7)):  # green, in one cell
        images[place, 1, 4:8, 8:12] = 1 - 0.1 * rank
    found = at.exemplars(images, colours(), "0", units=[1], count=3)
    assert found.indices.tolist() == [[3, 11, 7]]
    assert torch.allclose(found.activations, torch.tensor([[1.0, 0.9, 0.8]]), atol=1e-6)
    inside = found.masks[0, :, 4:8, 8:12].float().mean(dim=(1, 2))
    assert bool((inside > 0.9).all()) and bool((found.masks[0].sum(dim=(1, 2)) < 100).all())


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.99, 1.0])
def test_against_a_sort_of_everything(quantile: float) -> None:
    classifier, images = colours(), pictures()
    maps = F.avg_pool2d(images, 4)
    found = at.exemplars(images, classifier, "0", count=5, quantile=quantile)
    for unit in range(3):
        values = maps[:, unit].flatten().double().numpy()
        assert float(found.level[unit]) == pytest.approx(float(np.quantile(values, quantile)), abs=1e-6)
        maxima = maps[:, unit].amax(dim=(1, 2))
        assert found.indices[unit].tolist() == maxima.argsort(descending=True, stable=True)[:5].tolist()
        for rank, index in enumerate(found.indices[unit].tolist()):
            large = F.interpolate(maps[index : index + 1, unit : unit + 1], size=(16, 16), mode="bilinear", align_corners=False)[0, 0]
            unsure = (large - found.level[unit]).abs() < 1e-6
            assert torch.equal(found.masks[unit, rank] | unsure, (large > found.level[unit]) | unsure)


def test_sources_and_tensors_give_the_same() -> None:
    images = (pictures() * 255).round() / 255
    sources = [Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()) for image in images]
    one, two = (at.exemplars(each, colours(), "0", count=4) for each in (images, sources))
    assert torch.equal(one.indices, two.indices) and torch.equal(one.masks, two.masks)


def test_tokens_of_a_transformer_are_laid_on_their_grid(vit: at.Classifier) -> None:
    found = at.exemplars(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), vit, "blocks.2", units=[0, 5], count=2)
    assert found.masks.shape == (2, 2, 32, 32) and bool(found.masks.any())


@pytest.mark.slow
def test_the_reference_code_finds_the_same(shared: Path, cnn: at.Classifier) -> None:
    golden = json.loads((shared / "golden" / "concepts" / "exemplars.json").read_text())
    arrays = np.load(shared / "golden" / "concepts" / "exemplars_arrays.npz")
    with tarfile.open(shared / "data" / "cifar10" / "test.tar") as tar:
        members = {"/".join(member.name.split("/")[-2:]): member for member in tar.getmembers() if member.isfile()}
        even = {name: member for name, member in members.items() if int(Path(name).stem) % 2 == 0}
        names = [name for each in golden["meta"]["classes"] for name in sorted(n for n in even if n.startswith(f"{each}/"))[:100]]
        images = [np.array(Image.open(io.BytesIO(tar.extractfile(even[name]).read()))) for name in names]  # type: ignore[union-attr]
    for layer in ("layer2", "layer3"):
        units = [unit for unit in golden["units"] if unit["layer"] == layer]
        found, faded = (
            at.exemplars(images, cnn, layer, units=[unit["channel"] for unit in units], border=border)  # type: ignore[arg-type]
            for border in ("replicate", "zero")
        )
        for number, unit in enumerate(units):
            assert [names[index] for index in found.indices[number]] == unit["top_images"]
            np.testing.assert_allclose(found.activations[number], unit["top_activations"], atol=1e-4)
            assert float(found.level[number]) == pytest.approx(unit["quantile_linear"], abs=1e-5)
            masks = np.unpackbits(arrays[f"{layer}/{unit['channel']}/masks32"])[: 15 * 1024].reshape(15, 32, 32)
            assert np.abs(found.masks[number].numpy().astype(int) - masks).sum() <= 2
            areas = faded.masks[number].sum(dim=(1, 2)).numpy()
            assert np.abs(areas - np.array(unit["mask_areas"]["exact_zero_border_32"])).max() <= 2


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"images": []}, "no images were given: expected at least one"),
        ({"layer": "nothing"}, "nothing"),
        ({"units": [3]}, r"units are \[3\]: expected some of 0 to 2, the channels of 0"),
        ({"units": []}, r"units are \[\]: expected some of 0 to 2"),
        ({"count": 0}, "count is 0: expected a whole number"),
        ({"quantile": 2}, "quantile is 2: expected a number from 0 to 1"),
        ({"border": "wrap"}, "border is 'wrap': expected one of replicate, zero"),
    ],
)
def test_bad_input_is_one_line(changes: dict[str, object], line: str) -> None:
    given = {"images": pictures(2), "classifier": colours(), "layer": "0", **changes}
    with pytest.raises(at.UserError, match=line):
        at.exemplars(**given)  # type: ignore[arg-type]
