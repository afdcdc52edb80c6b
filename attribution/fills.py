"""Fill: what hidden pixels show. A fill is checked, drawn and named here and nowhere else."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attribution.checks import did_you_mean, is_number
from attribution.errors import UserError, describe
from attribution.image import describe_size, limit_size, load_image
from attribution.model.classifier import Classifier

Fill = str | Tensor | np.ndarray | Image.Image | Path | bytes | tuple[float, ...]

DEFAULT_FILL = "black"
MODEL_MEAN = "model_mean"  # the classifier's mean colour: zero after its normalisation
LINEAR = "linear"  # imputed from the pixels that are shown (see evaluation.metrics.imputation)
DROP = "drop"  # the tokens of hidden patches leave a vision transformer's sequence (see attribution.dropping)


def parse_fill(fill: Any) -> Fill:
    """Check a fill as far as that is possible without the image.

    Args:
        fill: one of ``NAMED_FILLS``; a colour as '#rrggbb' or as three numbers in [0, 1]; or an image in any form that
            ``load_image`` takes.

    Returns:
        The fill; a colour that was given as a list or an array becomes a tuple of floats.

    Raises:
        UserError: anything else.
    """
    if isinstance(fill, tuple | list) or (isinstance(fill, Tensor | np.ndarray) and fill.ndim == 1):
        return _colour(fill)
    if isinstance(fill, Tensor | np.ndarray | Image.Image | Path | bytes):
        return fill
    if isinstance(fill, str) and (fill in NAMED_FILLS or _is_hexadecimal(fill) or os.path.isfile(fill)):
        return fill  # unlike Path.is_file, os.path.isfile is also False for a name too long to exist
    if len(several_fills(fill)) > 1:
        raise UserError(f"fill {fill!r} names several at once, which explain takes and this does not: give one of them")
    received = f"unknown fill {fill!r}" if isinstance(fill, str) else f"fill is {describe(fill)}"
    raise UserError(
        f"{received}: expected one of {', '.join(NAMED_FILLS)}, a colour such as '#808080', or an image file"
        f"{did_you_mean(fill, NAMED_FILLS)}"
    )


def make_fill(image: Tensor, fill: Fill, photo_size: tuple[int, int] | None = None) -> Tensor:
    """Draw a fill: the image whose pixels stand where an image is hidden.

    Args:
        image: float32 [3, H, W] in [0, 1].
        fill: a key of ``FILLS`` (black, white, gray, mean: the image's own mean colour, blur: a heavy Gaussian blur of the
            image), a colour as '#rrggbb' or three numbers in [0, 1], or an image of the same size in any form that
            ``load_image`` takes.
        photo_size: (height, width) that the image had before ``limit_size``; a fill image of that size is shrunk likewise.

    Returns:
        float32 [3, H, W] in [0, 1].

    Raises:
        UserError: an unknown name, a colour out of range, an image of another size, or a fill that is no image of its own
            ("model_mean", "linear", "drop").
    """
    fill = parse_fill(fill)
    if isinstance(fill, tuple):
        return _constant(image, fill)
    if isinstance(fill, str) and fill in FILLS:
        return FILLS[fill](image)
    if isinstance(fill, str) and fill in _REFUSED:
        raise UserError(f"fill {fill!r} {_REFUSED[fill]}")
    if isinstance(fill, str) and _is_hexadecimal(fill):
        return _constant(image, [int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    filled = load_image(fill)
    if tuple(filled.shape[1:]) == photo_size:
        filled = limit_size(filled, max(image.shape[1:]))
    if filled.shape != image.shape:
        raise UserError(
            f"the fill image is {describe_size(filled)}, the image {describe_size(image)}: give a fill of the same size, or a colour"
        )
    return filled.to(image)


def classifier_fill(image: Tensor, fill: Fill, classifier: Classifier, photo_size: tuple[int, int] | None = None) -> Tensor:
    """``make_fill``, and "model_mean": the classifier's mean colour, zero after its normalisation.

    Raises:
        UserError: see ``make_fill``.
    """
    if isinstance(fill, str) and fill == MODEL_MEAN:
        return make_fill(image, classifier.preprocessing.mean_colour)
    return make_fill(image, fill, photo_size)


def picture_of_fill(image: Tensor, fill: Fill, classifier: Classifier, photo_size: tuple[int, int] | None = None) -> Tensor:
    """Draw in place of hidden regions what a person is shown: ``classifier_fill``, or the model's mean colour for "drop"."""
    return classifier_fill(image, MODEL_MEAN if is_drop(fill) else fill, classifier, photo_size)


def several_fills(fill: Fill) -> list[Fill]:
    """List the fills that a text such as "black+blur+mean" names. Any other fill stands alone.

    Raises:
        UserError: a fill named twice.
    """
    if isinstance(fill, str) and "+" in fill:
        names = fill.split("+")
        if all(name in NAMED_FILLS and name != LINEAR for name in names):
            if len(set(names)) < len(names):
                raise UserError(f"fill {fill!r} names one twice: give each once")
            return list(names)
    return [fill]


def is_named(fill: Any, names: Iterable[str]) -> bool:
    """Whether a fill is given by one of these names; arrays and colours never are."""
    return isinstance(fill, str) and fill in names


def is_drop(fill: Any) -> bool:
    """Whether a fill takes tokens away instead of painting."""
    return is_named(fill, (DROP,))


def drops(fill: Fill) -> bool:
    """Whether tokens are taken away under this fill, or under one of several."""
    return any(map(is_drop, several_fills(fill)))


def plain_fill(fill: Fill) -> str | list[float]:
    """A fill as JSON: its name, its colour, or the digest of the pixels of an image."""
    if isinstance(fill, tuple):
        return [float(value) for value in fill]
    if isinstance(fill, str) and (fill in NAMED_FILLS or _is_hexadecimal(fill)):
        return fill
    pixels = load_image(fill).cpu().contiguous().numpy()
    return f"image {list(pixels.shape)} sha256:{hashlib.sha256(pixels.tobytes()).hexdigest()}"


def recorded_fill(recorded: Any) -> Fill | None:
    """The fill that provenance names: one or several by name, or a colour. Of an image it holds a digest, which names none: None."""
    if isinstance(recorded, list):
        return _colour(recorded)
    parts = several_fills(recorded) if isinstance(recorded, str) else []
    return recorded if parts and all(is_named(each, NAMED_FILLS) or _is_hexadecimal(str(each)) for each in parts) else None


def fill_label(fill: Fill) -> str:
    """A fill in a word, for tables: "black", "#20c080", "[0.1, 0.9, 0.4]", or "image"."""
    plain = plain_fill(fill)
    return "image" if isinstance(plain, str) and plain.startswith("image ") else str(plain)


def _is_hexadecimal(fill: str) -> bool:
    return re.fullmatch(r"#[0-9a-fA-F]{6}", fill) is not None


def _colour(colour: Any) -> tuple[float, ...]:
    values = tuple(colour.tolist() if isinstance(colour, Tensor | np.ndarray) else colour)
    if len(values) != 3 or not all(is_number(value) and 0 <= value <= 1 for value in values):
        raise UserError(f"fill colour {values!r}: expected three numbers in [0, 1], red, green and blue")
    return tuple(float(value) for value in values)


def _constant(image: Tensor, colour: Iterable[float]) -> Tensor:
    return image.new_tensor(tuple(colour))[:, None, None].expand_as(image).contiguous()


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

_REFUSED = {  # names that are no image of their own, and why
    MODEL_MEAN: "is the mean colour of a classifier: give that classifier's preprocessing.mean_colour as a colour",
    LINEAR: "is imputed anew for each set of hidden pixels and is no image: it serves insertion, deletion and ROAD",
    DROP: "takes tokens away and is no image: it serves region searches, insertion, deletion and muFidelity",
}

NAMED_FILLS = (*FILLS, *_REFUSED)
