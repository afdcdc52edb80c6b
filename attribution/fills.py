"""Fill: what hidden regions show."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attribution.errors import UserError
from attribution.image import describe_size, limit_size, load_image
from attribution.model.classifier import Classifier

Fill = str | Tensor | np.ndarray | Image.Image | tuple[float, ...]

DROP = "drop"


def make_fill(image: Tensor, fill: Fill, photo_size: tuple[int, int] | None = None) -> Tensor:
    """The image that stands where regions are hidden.

    Args:
        image: float32 [3, H, W] in [0, 1].
        fill: a key of ``FILLS`` (black, white, gray, mean: the image's own mean colour, blur: a heavy Gaussian blur of the
            image), a colour as '#rrggbb' or three numbers in [0, 1], or an image of the same size in any form that
            ``load_image`` takes.
        photo_size: (height, width) that the image had before ``limit_size``; a fill image of that size is shrunk likewise.

    Returns:
        float32 [3, H, W] in [0, 1].

    Raises:
        UserError: an unknown name, a colour out of range or an image of another size.
    """
    if isinstance(fill, str):
        if fill in FILLS:
            return FILLS[fill](image)
        if re.fullmatch(r"#[0-9a-fA-F]{6}", fill):
            return _constant(image, [int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        if not os.path.isfile(fill):  # unlike Path.is_file, also False for a name too long to exist
            raise UserError(f"unknown fill {fill!r}: expected one of {', '.join(FILLS)}, a colour such as '#808080', or an image file")
        filled = load_image(fill)
    elif isinstance(fill, tuple | list):
        return _constant(image, _checked_colour(fill))
    elif isinstance(fill, Tensor | np.ndarray) and fill.ndim == 1:
        return _constant(image, _checked_colour(fill.tolist()))
    else:
        filled = load_image(fill)
    if tuple(filled.shape[1:]) == photo_size:
        filled = limit_size(filled, max(image.shape[1:]))
    if filled.shape != image.shape:
        raise UserError(
            f"the fill image is {describe_size(filled)}, the image {describe_size(image)}: give a fill of the same size, or a colour"
        )
    return filled.to(image)


def _checked_colour(colour: Any) -> list[float]:
    numeric = len(colour) == 3 and all(isinstance(value, Real) for value in colour)
    if not numeric or not all(0 <= value <= 1 for value in colour):
        raise UserError(f"fill colour {colour!r}: expected three numbers in [0, 1], red, green and blue")
    return [float(value) for value in colour]


def _constant(image: Tensor, colour: list[float]) -> Tensor:
    return image.new_tensor(colour)[:, None, None].expand_as(image).contiguous()


def _blurred(image: Tensor) -> Tensor:
    """Gaussian blur with a standard deviation of 1/20 of the long side: shapes of objects are gone, colours stay."""
    from torchvision.transforms.v2.functional import gaussian_blur

    height, width = image.shape[-2:]
    sigma = max(height, width) / 20
    sizes = []
    for side in (width, height):
        reach = min(int(3 * sigma + 0.5), side - 1)  # reflection needs a border narrower than the image
        sizes.append(2 * reach + 1)
    return gaussian_blur(image, sizes, [sigma, sigma]).clamp(0, 1)  # its weights sum to 1 up to rounding


FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "black": torch.zeros_like,
    "white": torch.ones_like,
    "gray": lambda image: torch.full_like(image, 0.5),
    "mean": lambda image: image.mean(dim=(1, 2), keepdim=True).expand_as(image).contiguous(),
    "blur": _blurred,
}


def is_drop(fill: Any) -> bool:
    """Whether a fill takes tokens away instead of painting."""
    return isinstance(fill, str) and fill == DROP


def picture_of_fill(image: Tensor, fill: Fill, classifier: Classifier, photo_size: tuple[int, int] | None = None) -> Tensor:
    """``classifier_fill``, and the model's mean colour where tokens are dropped: what a person is shown in the place of hidden regions."""
    return classifier_fill(image, "model_mean" if is_drop(fill) else fill, classifier, photo_size)


def several_fills(fill: Fill) -> list[Fill]:
    """The fills that a text such as "black+blur+mean" names; any other fill alone."""
    if isinstance(fill, str) and "+" in fill:
        names = fill.split("+")
        if all(name in FILLS or name in ("model_mean", DROP) for name in names):
            if len(set(names)) < len(names):
                raise UserError(f"fill {fill!r} names one twice: give each once")
            return list(names)
    return [fill]


def drops(fill: Fill) -> bool:
    """Whether tokens are taken away under this fill, or under one of several."""
    return any(map(is_drop, several_fills(fill)))


def classifier_fill(image: Tensor, fill: Fill, classifier: Classifier, photo_size: tuple[int, int] | None = None) -> Tensor:
    """``make_fill``, and "model_mean": the classifier's mean colour, zero after its normalisation.

    Raises:
        UserError: see ``make_fill``; "drop", which is no image.
    """
    if is_drop(fill):
        raise UserError("fill 'drop' takes tokens away and is no image: it serves region searches, insertion, deletion and muFidelity")
    if isinstance(fill, str) and fill == "model_mean":
        return make_fill(image, classifier.preprocessing.mean)
    return make_fill(image, fill, photo_size)
