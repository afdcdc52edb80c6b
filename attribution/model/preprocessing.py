"""Preprocessing: an image becomes a model input by a resize, a crop or pad, and a normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from attribution.errors import UserError

Resize = Literal["squash", "short_side", "long_side"]
_INTERPOLATIONS = ("bilinear", "bicubic", "nearest")


@dataclass(frozen=True)
class Preprocessing:
    """Image [n, 3, H, W] in [0, 1] -> model input [n, 3, h, w]: resize, crop or pad to the centre, normalise.

    Attributes:
        size: (h, w) of the model input, pixels.
        mean, std: per channel, red green blue of an image; the input is (image - mean) / std.
        resize: "squash" resizes each side on its own, "short_side" and "long_side" keep the aspect ratio; what reaches beyond
            the input is cut off, what is missing is padded with the mean colour.
        resized: (h, w) that the resize aims at, before the crop; None means size.
        interpolation: "bilinear" or "bicubic", both antialiased as in Pillow, or "nearest".
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    resize: Resize = "squash"
    resized: tuple[int, int] | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise UserError(f"input size {self.size}: expected a positive height and width")
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise UserError(f"mean {self.mean} and std {self.std}: expected three numbers each, std positive")
        if self.resize not in ("squash", "short_side", "long_side"):
            raise UserError(f"unknown resize {self.resize!r}: expected squash, short_side or long_side")
        if self.interpolation not in _INTERPOLATIONS:
            raise UserError(f"unknown interpolation {self.interpolation!r}: expected one of {', '.join(_INTERPOLATIONS)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, h, w) of a model input."""
        return (len(self.mean), *self.size)

    def __call__(self, images: Tensor) -> Tensor:
        return self.linear(images - images.new_tensor(self.mean)[:, None, None])

    def linear(self, images: Tensor) -> Tensor:
        """The linear part: what a difference of two images [n, 3, H, W] becomes as a difference of two inputs [n, 3, h, w]."""
        target = self._resized_size(images.shape[-2], images.shape[-1])
        if target != tuple(images.shape[-2:]):
            if self.interpolation == "nearest":
                images = F.interpolate(images, size=target, mode="nearest-exact")
            else:
                images = F.interpolate(images, size=target, mode=self.interpolation, antialias=True, align_corners=False)
        return self._centred(images) / images.new_tensor(self.std)[:, None, None]

    def placement(self, height: int, width: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Where an image lies in the input: (scale, start) of its rows and of its columns; a place y of the image is at y scale + start."""
        resized = self._resized_size(height, width)
        left, _, top, _ = self._padding(*resized)
        return (resized[0] / height, top), (resized[1] / width, left)

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        wanted_height, wanted_width = self.resized or self.size
        if self.resize == "squash":
            return wanted_height, wanted_width
        if self.resize == "short_side":
            by_height = wanted_height * width >= wanted_width * height
        if self.resize == "long_side":
            by_height = wanted_height * width <= wanted_width * height
        # torchvision's rule: the side that the scale comes from is exact, the other is rounded down
        if by_height:
            return wanted_height, max(1, wanted_height * width // height)
        return max(1, wanted_width * height // width), wanted_width

    def to_image(self, maps: Tensor, height: int, width: int) -> Tensor:
        """Maps over the model input [n, h, w] -> over the image [n, H, W], bilinear; zero where the input does not reach."""
        resized = self._resized_size(height, width)
        maps = F.pad(maps, [-side for side in self._padding(*resized)])
        if resized != (height, width):
            maps = F.interpolate(maps[:, None], size=(height, width), mode="bilinear", antialias=True, align_corners=False)[:, 0]
        return maps

    def _centred(self, images: Tensor) -> Tensor:
        """Crop or zero-pad to the centre; after the subtraction of the mean, zero is the mean colour."""
        padding = self._padding(images.shape[-2], images.shape[-1])
        return F.pad(images, padding) if any(padding) else images

    def _padding(self, height: int, width: int) -> list[int]:
        """(left, right, top, bottom) pixels that a resized image lacks; negative where it is cropped."""
        padding = []
        for have, want in zip((width, height), self.size[::-1], strict=True):
            missing = want - have
            before = missing // 2 if missing > 0 else -round(-missing / 2)  # torchvision's CenterCrop rounds half to even
            padding += [before, missing - before]
        return padding


def checked_sides(size: Any) -> tuple[int, int]:
    sides = np.asarray(size)
    if sides.shape not in ((), (2,)) or sides.dtype.kind not in "iu":
        raise UserError(f"input size {size!r}: expected a whole number of pixels, or (height, width)")
    height, width = np.broadcast_to(sides, 2).tolist()
    return height, width


def checked_triple(values: Any) -> tuple[float, float, float]:
    numbers = np.asarray(values)
    if numbers.shape not in ((), (3,)) or numbers.dtype.kind not in "fiu":
        raise UserError(f"mean and std take three numbers, red, green and blue: received {values!r}")
    red, green, blue = np.broadcast_to(numbers, 3).tolist()
    return float(red), float(green), float(blue)
