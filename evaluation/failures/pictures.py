"""Pictures of failures, as data URIs for the atlas."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor

from attribution.errors import UserError
from attribution.explanation import Explanation
from attribution.fills import picture_of_fill
from attribution.regions import Regions
from evaluation.failures.results import Failed
from evaluation.failures.summary import FailureSummary
from evaluation.study.page import data_uri, image_of, shrunk
from evaluation.study.style import FAMILY_COLOURS, THUMBNAIL

TRUTH, MISTAKE = FAMILY_COLOURS["gradient"], FAMILY_COLOURS["region search"]  # blue and orange, told apart by colour-blind readers
_SIDE = 256  # longest side of an image on the page, pixels
_LOSSLESS = 64  # images up to this side are stored without loss


def failure_pictures(failed: Failed, summary: FailureSummary) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Draw the photo and the signed map of the tile, and gather what the script of the page draws from.

    Where the stored explanation is gone there are no pictures, and the script gets no regions.
    """
    try:
        explanation = failed.explanation()
    except UserError:  # moved or removed since
        return [], {"labels": None}
    assert explanation.regions is not None
    labels, photo = explanation.regions.labels.numpy(), _photo(explanation.image)
    settings, shown, lossless = summary.results.settings, shrunk(photo, _SIDE), max(photo.size) <= _LOSSLESS
    signed = _signed(photo, np.asarray(failed.found["causes"])[labels])
    drawn = {
        "width": shown.width,
        "height": shown.height,
        "image": None if max(photo.size) <= THUMBNAIL else data_uri(shown, lossless),  # None: the script takes the photo of the tile
        "labels": base64.b64encode(zlib.compress(_nearest(labels, shown.size).astype("<u2").tobytes(), 9)).decode("ascii"),
        "fill": _fill(picture_of_fill(explanation.image, settings.fill, summary.results.classifier), lossless),
        "heat": {name: rounded(_heat(explanation, failed.found, name)) for name in ("truth", "mistake")},
    }
    return [_picture(photo, lossless), _picture(signed, lossless)], drawn


def _heat(explanation: Explanation, found: Any, towards: str) -> list[float]:
    """The value of ``Explanation.to_pixels("gain")`` by region id, towards "truth" or "mistake": float [R]."""
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
    """Draw values float [H, W] in [-1, 1] over the gray photo: causes of the mistake in orange, support of the truth in blue."""
    gray = 0.25 + 0.75 * np.asarray(photo.convert("L"), dtype=float) / 255
    colours = np.where(values[..., None] > 0, ImageColor.getrgb(TRUTH), ImageColor.getrgb(MISTAKE))
    alpha = 0.8 * np.abs(values)[..., None]
    return Image.fromarray(((1 - alpha) * gray[..., None] * 255 + alpha * colours).round().astype(np.uint8))


def _photo(image: torch.Tensor) -> Image.Image:
    return image_of(image.permute(1, 2, 0).numpy())


def _nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map at another size (width, height): the label at the centre of each pixel."""
    rows = ((np.arange(size[1]) + 0.5) * labels.shape[0] / size[1]).astype(int)
    columns = ((np.arange(size[0]) + 0.5) * labels.shape[1] / size[0]).astype(int)
    return np.asarray(labels[rows[:, None], columns])


def _picture(image: Image.Image, lossless: bool) -> dict[str, Any]:
    small = shrunk(image, THUMBNAIL)
    return {"uri": data_uri(small, lossless), "width": small.width, "height": small.height, "tiny": lossless}


def _fill(fill: torch.Tensor, lossless: bool) -> str:
    """The fill as "#rrggbb" where it is one colour, else as a picture."""
    image = _photo(fill)
    colours = image.getcolors(1)
    if colours is None:
        return data_uri(shrunk(image, _SIDE), lossless)
    return "#{:02x}{:02x}{:02x}".format(*colours[0][1])  # type: ignore[misc]


def rounded(values: Iterable[float], digits: int = 3) -> list[float]:
    return [round(float(value), digits) for value in values]
