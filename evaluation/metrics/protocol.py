"""The protocol of a perturbation curve: steps, fill, output, axis; and the published protocols by name."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attribution.errors import UserError, describe
from attribution.fills import DROP, FILLS, Fill, is_drop, make_fill
from attribution.image import load_image

_NAMED_FILLS = (*FILLS, "model_mean", "linear", DROP)

Output = Literal["probability", "logit"]


@dataclass(frozen=True)
class Protocol:
    """How a curve is measured.

    Attributes:
        steps: "regions", one region a step; or "pixels", an equal share of the pixels a step.
        count: number of pixel steps, at most one for each pixel; region steps have no use for it.
        fill: what hidden pixels show: whatever ``make_fill`` takes, "model_mean" (zero after the classifier's normalisation), or
            "linear" (imputed from what is shown, noise 0.01; see ``evaluation.imputation``), or "drop" (the tokens of hidden patches
            leave a vision transformer's sequence; region steps whose regions follow its patches).
        output: "probability" or "logit" of the target.
        axis: "area", the exact share of pixels; or "black_unrevealed", LiMA's, on which black pixels of the image never count:
            insertion runs over 0...b and deletion over 1-b...1, b being the share of pixels that are not black.

    Raises:
        UserError: a value other than these, or "black_unrevealed" with a fill that is not black.
    """

    steps: Literal["regions", "pixels"] = "regions"
    count: int = 50
    fill: Fill = "black"
    output: Output = "probability"
    axis: Literal["area", "black_unrevealed"] = "area"

    def __post_init__(self) -> None:
        _check_choice("steps", self.steps, ("regions", "pixels"))
        _check_choice("output", self.output, ("probability", "logit"))
        _check_choice("axis", self.axis, ("area", "black_unrevealed"))
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise UserError(f"count is {self.count}: expected a whole number of steps, at least 1")
        object.__setattr__(self, "fill", _checked_fill(self.fill))
        if is_drop(self.fill) and self.steps == "pixels":
            raise UserError("fill 'drop' with pixel steps: it hides whole patches; expected steps='regions'")
        if self.axis == "black_unrevealed" and not (isinstance(self.fill, str) and self.fill == "black"):
            raise UserError(f"axis 'black_unrevealed' with fill {describe(self.fill)}: expected fill 'black', or axis 'area'")

    def label(self) -> str:
        """A short text for tables, such as "regions, black, p" or "50 pixel steps, model_mean, logit"."""
        steps = "regions" if self.steps == "regions" else f"{self.count} pixel steps"
        plain = _plain_fill(self.fill)
        fill = "image" if str(plain).startswith("image ") else plain
        output = "p" if self.output == "probability" else "logit"
        return f"{steps}, {fill}, {output}" + (", black unrevealed" if self.axis == "black_unrevealed" else "")

    def settings(self) -> dict[str, Any]:
        """All that changes a number, as plain JSON types; an image that fills by the digest of its pixels."""
        count = self.count if self.steps == "pixels" else None
        return {"steps": self.steps, "count": count, "fill": _plain_fill(self.fill), "output": self.output, "axis": self.axis}


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name} is {value!r}: expected {' or '.join(map(repr, choices))}")


def _checked_fill(fill: Any) -> Fill:
    """The fill with colours as tuples; images are read and compared with the image's size when they are used."""
    if isinstance(fill, list) or (isinstance(fill, Tensor | np.ndarray) and fill.ndim == 1):
        fill = tuple(fill if isinstance(fill, list) else fill.tolist())
    if isinstance(fill, tuple) or (isinstance(fill, str) and fill.startswith("#")):
        make_fill(torch.zeros(3, 1, 1), fill)
    elif isinstance(fill, str):
        if fill not in _NAMED_FILLS and not os.path.isfile(fill):
            raise UserError(f"unknown fill {fill!r}: expected one of {', '.join(_NAMED_FILLS)}, a colour such as '#808080', or an image")
    elif not isinstance(fill, Tensor | np.ndarray | Image.Image | Path | bytes):
        raise UserError(f"fill is {describe(fill)}: expected one of {', '.join(_NAMED_FILLS)}, a colour such as '#808080', or an image")
    return fill


def _plain_fill(fill: Fill) -> str | list[float]:
    if isinstance(fill, tuple):
        return [float(value) for value in fill]
    if isinstance(fill, str) and (fill in _NAMED_FILLS or fill.startswith("#")):
        return fill
    pixels = load_image(fill).cpu().contiguous().numpy()
    return f"image {list(pixels.shape)} sha256:{hashlib.sha256(pixels.tobytes()).hexdigest()}"


PROTOCOLS: dict[str, Protocol] = {
    "lima": Protocol(),
    "smdl": Protocol(steps="pixels", count=10, fill="model_mean"),
    "smdl-baselines": Protocol(steps="pixels", count=50, fill="model_mean"),
    "lima-compat": Protocol(axis="black_unrevealed"),
}
