"""Pictures of failures, as data URIs for the atlas."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from attribution.errors import UserError
from attribution.explanation import Explanation
from attribution.fills import picture_of_fill
from attribution.regions import Regions
from evaluation.failures.results import Failed
from evaluation.failures.summary import FailureSummary
from evaluation.study.style import FAMILY_COLOURS, THUMBNAIL

TRUTH, MISTAKE = FAMILY_COLOURS["gradient"], FAMILY_COLOURS["region search"]  # blue and orange, told apart by colour-blind readers
_SIDE = 256  # longest side of an image on the page, pixels
_LOSSLESS = 64  # images up to this side are stored without loss


def failure_pictures(failed: Failed, summary: FailureSummary) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The photo and the signed map of the tile, and what the script draws from; nothing where the stored explanation is gone."""
    try:
        explanation = failed.explanation()
    except UserError:  # moved or removed since
        return [], {"labels": None}
    assert explanation.regions is not None
    labels, photo = explanation.regions.labels.numpy(), _image(explanation.image)
    settings, shown, lossless = summary.results.settings, _shrunk(photo, _SIDE), max(photo.size) <= _LOSSLESS
    signed = _signed(photo, np.asarray(failed.found["causes"])[labels])
    drawn = {
        "width": shown.width,
        "height": shown.height,
        "image": None if max(photo.size) <= THUMBNAIL else _uri(shown, lossless),  # None: that of the tile
        "labels": base64.b64encode(zlib.compress(_nearest(labels, shown.size).astype("<u2").tobytes(), 9)).decode("ascii"),
        "fill": _fill(picture_of_fill(explanation.image, settings.fill, summary.results.classifier), lossless),
        "heat": {name: rounded(_heat(explanation, failed.found, name)) for name in ("truth", "mistake")},
    }
    return [_picture(photo, lossless), _picture(signed, lossless)], drawn


def _heat(explanation: Explanation, found: Any, towards: str) -> list[float]:
    """float [R] by region id: ``Explanation.to_pixels("gain")`` towards the true class or towards the predicted one."""
    whose, prefix = ("true", "") if towards == "truth" else ("predicted", "mistake_")
    order = torch.tensor(found[f"{towards}_order"])
    one_pixel_each = replace(
        explanation,
        regions=Regions(torch.arange(len(order))[None]),
        order=order,
        insertion_scores=torch.tensor(found["curves"][f"{prefix}shown"][whose]),
        deletion_scores=torch.tensor(found["curves"][f"{prefix}hidden"][whose]),
    )
    values: list[float] = one_pixel_each.to_pixels("gain")[0].tolist()
    return values


def _signed(photo: Image.Image, values: np.ndarray) -> Image.Image:
    """float [H, W] in [-1, 1] over the gray photo: the mistake's causes in orange, the truth's support in blue."""
    gray = 0.25 + 0.75 * np.asarray(photo.convert("L"), dtype=float) / 255
    colours = np.where(values[..., None] > 0, _rgb(TRUTH), _rgb(MISTAKE))
    alpha = 0.8 * np.abs(values)[..., None]
    return Image.fromarray(((1 - alpha) * gray[..., None] * 255 + alpha * colours).round().astype(np.uint8))


def _image(tensor: torch.Tensor) -> Image.Image:
    """An image float [3, H, W] in [0, 1]."""
    return Image.fromarray((tensor.permute(1, 2, 0).numpy().clip(0, 1) * 255).round().astype(np.uint8))


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    copy = image.copy()
    copy.thumbnail((side, side), Image.Resampling.LANCZOS)
    return copy


def _nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map at another size (width, height): the label at the centre of each pixel."""
    rows = ((np.arange(size[1]) + 0.5) * labels.shape[0] / size[1]).astype(int)
    columns = ((np.arange(size[0]) + 0.5) * labels.shape[1] / size[0]).astype(int)
    picked: np.ndarray = labels[rows[:, None], columns]
    return picked


def _picture(image: Image.Image, lossless: bool) -> dict[str, Any]:
    small = _shrunk(image, THUMBNAIL)
    return {"uri": _uri(small, lossless), "width": small.width, "height": small.height, "tiny": lossless}


def _uri(image: Image.Image, lossless: bool) -> str:
    """A data URI: PNG where nothing may be lost, else JPEG."""
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, format="png", optimize=True)
    else:
        image.save(buffer, format="jpeg", quality=86, optimize=True)
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _fill(fill: torch.Tensor, lossless: bool) -> str:
    """A colour "#rrggbb" where the fill is one, else its picture."""
    image = _image(fill)
    colours = image.getcolors(1)
    if colours is None:
        return _uri(_shrunk(image, _SIDE), lossless)
    return "#{:02x}{:02x}{:02x}".format(*colours[0][1])  # type: ignore[misc]


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)], dtype=float)


def rounded(values: Iterable[float], digits: int = 3) -> list[float]:
    return [round(float(value), digits) for value in values]
