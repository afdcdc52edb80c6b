"""Preprocessing equals that of timm, for configurations of all kinds; no model is made."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
import skimage
import timm
import torch
from PIL import Image
from torch import Tensor

import attribution as at
from attribution.model.matching import matching_settings, timm_geometry
from attribution.model.preprocessing import Preprocessing


def pretrained_configurations(count: int) -> list[str]:
    """Names of models with weights: some of every way to resize and crop, and otherwise spread over the whole list."""
    names = timm.list_pretrained()
    kinds: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        square = config["input_size"][1] == config["input_size"][2]
        kinds.setdefault((config["crop_mode"], config["interpolation"], square), []).append(name)
    chosen = [name for found in kinds.values() for name in found[:4]]
    spread = names[:: len(names) // (count - len(chosen)) or 1]
    return list(dict.fromkeys([*chosen, *spread, *names]))[:count]


def photos() -> list[Image.Image]:
    """A photo in three shapes. Its contrast is raised until much of it is black or white, so that a bicubic resize overshoots."""
    cat = Image.fromarray((4 * skimage.data.chelsea().astype(float) - 300).clip(0, 255).astype(np.uint8))
    return [cat, cat.rotate(90, expand=True), cat.crop((60, 40, 121, 80))]


@pytest.mark.slow
@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow resizes the width first")
def test_100_configurations_of_timm() -> None:
    """Within 1.1 gray levels of timm's own evaluation transform: it rounds to 8 bits, ours does not."""
    names, apart = pretrained_configurations(100), {}
    assert len(names) == 100
    for name in names:
        config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        transform = timm.data.create_transform(**config, is_training=False)
        way = Preprocessing(mean=tuple(config["mean"]), std=tuple(config["std"]), channels="RGB", **timm_geometry(config))
        worst = 0.0
        for photo in photos():
            theirs, ours = transform(photo), way(torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255)[0]
            assert ours.shape == theirs.shape, name
            worst = max(worst, float(((ours - theirs).abs() * torch.tensor(way.std)[:, None, None]).max()) * 255)
        apart[name] = worst
    assert {name: worst for name, worst in apart.items() if worst > 1.1} == {}


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("side", [(96, 96), (64, 96)])
@pytest.mark.parametrize("crop_pct", [0.9, 1.15])
def test_ways_to_crop_of_timm(crop_pct: float, crop_mode: str, side: tuple[int, int]) -> None:
    """Measured normalisation and compared result, as for any library."""
    config = {"input_size": (3, *side), "crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": "bicubic"}
    transform = timm.data.create_transform(**config, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), is_training=False)

    def pipeline(image: Image.Image) -> Tensor:
        return transform(image)

    settings = matching_settings(pipeline, timm_geometry(config), "model")
    assert settings["mean"] == pytest.approx((0.4, 0.5, 0.6), abs=1e-5)
    assert settings["std"] == pytest.approx((0.2, 0.3, 0.4), abs=1e-5)
    assert settings["channels"] == "RGB"


def test_an_interpolation_that_is_not_ours_is_refused() -> None:
    options = {"pretrained_cfg_overlay": {"interpolation": "lanczos"}}
    with pytest.raises(at.UserError, match="interpolation is 'lanczos': expected one of"):
        at.load_classifier("timm:resnet10t", pretrained=False, options=options)


def test_what_is_not_affine_is_refused() -> None:
    def squared(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1).float().div(255).square()

    with pytest.raises(at.UserError, match="gray levels on a photo"):
        matching_settings(squared, {"size": (32, 32), "interpolation": "bicubic"}, "model")
    gray = Image.Image.convert

    def mixed(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(gray(image, "L").convert("RGB").resize((32, 32)))).permute(2, 0, 1) / 255

    with pytest.raises(at.UserError, match="it mixes the colours"):
        matching_settings(mixed, {"size": (32, 32)}, "model")
