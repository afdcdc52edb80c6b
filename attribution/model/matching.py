"""Preprocessing of another library as settings of ``Classifier``: its normalisation is measured, and its result compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attribution.errors import UserError
from attribution.model.forwarding import first_line
from attribution.model.preprocessing import Preprocessing
from attribution.model.source import LARGEST_INPUT

Pipeline = Callable[[Image.Image], Tensor]
_SIZES = ((240, 331), (333, 240), (75, 60))  # (height, width): landscape, portrait, small; their crops cannot be centred
_MOST_APART = 2.5  # gray levels: others round after each pass of a resize (1.1), and older ones of Pillow always take the width first
_DIGITS = 6  # of measured means and standard deviations


def matching_settings(pipeline: Pipeline, geometry: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Settings of ``Classifier`` under which its preprocessing equals another library's.

    The mean, the standard deviation and the order of the channels are measured from black, white and red images, so that every
    way to scale and normalise is covered. Then both sides are compared on patterns of three sizes.

    Args:
        pipeline: the library's preprocessing, from an RGB image to an input [3, h, w].
        geometry: how it resizes and crops, as settings of ``Classifier``: size, resize, resized, interpolation, rounding, padding.
        name: of the model, for messages.

    Raises:
        UserError: the preprocessing cannot be expressed; the message says why and what can be given instead.
    """
    sides = [*geometry["size"], *(geometry.get("resized") or ())]
    if not all(1 <= side <= LARGEST_INPUT for side in sides):
        raise _refused(name, f"it resizes to {max(sides, key=abs)} pixels, expected 1 to {LARGEST_INPUT}")

    def tried(image: Image.Image) -> Tensor:
        try:
            return pipeline(image)
        except Exception as error:  # configurations of all kinds raise many types
            raise _refused(name, f"its own code fails ({first_line(error)})") from None

    settings = {**geometry, **_normalisation(tried, name)}
    way = Preprocessing(**{key: value for key, value in settings.items() if key in Preprocessing.__dataclass_fields__})
    for height, width in _SIZES:
        pattern = _pattern(height, width)
        theirs = tried(Image.fromarray(pattern)).float()
        if tuple(theirs.shape) != way.shape:
            raise _refused(name, f"it makes an input {list(theirs.shape)} of a photo of {width}x{height}, not {list(way.shape)}")
        ours = way(torch.from_numpy(pattern).permute(2, 0, 1)[None] / 255)[0]
        apart = float(((ours - theirs).abs() * torch.tensor(way.std)[:, None, None]).max()) * 255
        if apart > _MOST_APART:
            how = ", ".join(f"{key} {value}" for key, value in geometry.items())
            raise _refused(name, f"read as {how}, it differs by {apart:.1f} gray levels on a photo of {width}x{height}")
    return settings


def timm_geometry(config: Mapping[str, Any]) -> dict[str, Any]:
    """How timm's evaluation transform resizes and crops, of a data configuration as ``timm.data.resolve_data_config`` returns it."""
    side = tuple(config["input_size"][1:])
    resized = tuple(math.floor(s / config["crop_pct"]) for s in side)
    resize = {"squash": "squash", "border": "long_side"}.get(config["crop_mode"], "short_side")
    return {
        "size": side,
        "resize": resize,
        "resized": resized,
        "interpolation": config["interpolation"],
        "padding": "black" if config["crop_pct"] > 1 and resize != "long_side" else "mean",
        # square inputs go through torchvision's own resize
        "rounding": "timm" if resize == "long_side" or resized[0] != resized[1] else "torchvision",
    }


def _normalisation(pipeline: Pipeline, name: str) -> dict[str, Any]:
    """Mean, standard deviation and channels of a pipeline, from what it makes of plain images."""
    inputs = [pipeline(Image.new("RGB", (64, 64), colour)).double() for colour in ("black", "white", (255, 0, 0))]
    if any(each.ndim != 3 or len(each) != 3 for each in inputs):
        raise _refused(name, f"it makes an input {list(inputs[0].shape)} of a photo, not [3, height, width]")
    black, white, red = (each[:, each.shape[1] // 2, each.shape[2] // 2] for each in inputs)
    if not bool((white > black).all()):
        raise _refused(name, f"it makes {white.tolist()} of white and {black.tolist()} of black: expected white above black")
    std, reddened = 1 / (white - black), ((red - black).abs() > 1e-4 * (white - black)).tolist()
    channels = {(True, False, False): "RGB", (False, False, True): "BGR"}.get(tuple(reddened))
    if channels is None:
        raise _refused(name, "it mixes the colours")
    mean = -black * std
    return {"mean": tuple(map(_rounded, mean.tolist())), "std": tuple(map(_rounded, std.tolist())), "channels": channels}


def _pattern(height: int, width: int) -> np.ndarray:
    """Waves of a colour each, uint8 [height, width, 3], cut off at black and white, so that a bicubic resize overshoots."""
    rows, columns = np.mgrid[:height, :width].astype(float)
    waves = [np.sin(rows / 5) + np.cos(columns / 7), np.cos(rows / 11 + columns / 5), np.sin((rows - columns) / 6) + np.cos(rows / 9)]
    return np.stack([128 + 120 * wave for wave in waves], axis=2).round().clip(0, 255).astype(np.uint8)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}") if abs(value) > 1e-7 else 0.0


def _refused(name: str, why: str) -> UserError:
    return UserError(
        f"the preprocessing of {name} cannot be repeated, as {why}: in Python, give at.Classifier(module, size=..., mean=..., std=...) "
        "what comes closest"
    )
