"""Preprocessing: an image becomes a model input by a resize, a crop or pad, and a normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.checks import check_choice
from attribution.errors import UserError, describe

Resize = Literal["squash", "short_side", "long_side"]
_RESIZES = ("squash", "short_side", "long_side")
_INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
_ROUNDINGS = ("torchvision", "timm", "transformers")
_PADDINGS = ("mean", "black")
_LUMA = (19595 / 2**16, 38470 / 2**16, 7471 / 2**16)  # Pillow's conversion to gray, ITU-R 601
CHANNELS: dict[str, tuple[tuple[float, float, float, float], ...]] = {  # each from red, green, blue and 1
    "RGB": ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)),
    "BGR": ((0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)),
    "L": ((*_LUMA, 0),),
    "RGBA": ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
}


@dataclass(frozen=True)
class Preprocessing:
    """Images [n, 3, H, W] in [0, 1] become model inputs [n, C, h, w]: resized, cropped or padded around the centre, normalised.

    Attributes:
        size: (h, w) of the model input, pixels.
        mean, std: per channel of the model input, which is (image - mean) / std.
        resize: "squash" resizes each side on its own. "short_side" and "long_side" keep the aspect ratio: the image is cropped to the
            input where it is larger, and padded where it is smaller.
        resized: (h, w) that the resize aims at, before the crop; None means size.
        interpolation: "bilinear" or "bicubic", both antialiased and clipped as in Pillow, or "nearest".
        channels: of the model input, made from the red, green and blue of an image: "RGB", "BGR", "L" (gray, as Pillow converts) or
            "RGBA" (opaque). None changes nothing: the mean has as many numbers as what is given has channels, such as maps of a layer.
        rounding: the library whose rules round. With the aspect ratio kept, "torchvision" and "transformers" round the free side down,
            "timm" to the nearest number. A crop that cannot be centred starts where half of the rest rounds to: to even for "torchvision"
            and "timm", down for "transformers". It also says which side a bicubic resize takes first, see ``begun``.
        padding: colour of the padding, "mean" (an input of zero) or "black".
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    resize: Resize = "squash"
    resized: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    channels: str | None = None
    rounding: str = "torchvision"
    padding: str = "mean"

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise UserError(f"input size {self.size}: expected a positive height and width")
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            count = {1: "one number", 3: "three numbers"}.get(len(self.mean), f"{len(self.mean)} numbers")
            raise UserError(f"mean {self.mean} and std {self.std}: expected {count} each, std positive")
        check_choice("resize", self.resize, _RESIZES)
        check_choice("interpolation", self.interpolation, _INTERPOLATIONS)
        check_choice("rounding", self.rounding, _ROUNDINGS)
        check_choice("padding", self.padding, _PADDINGS)
        if self.channels is not None:
            check_choice("channels", self.channels, CHANNELS)
            if len(self.mean) != len(CHANNELS[self.channels]):
                raise UserError(f"mean {self.mean}: expected one number for each channel of {self.channels}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, h, w) of a model input."""
        return (len(self.mean), *self.size)

    @property
    def mean_colour(self) -> tuple[float, ...]:
        """The colour of an image whose input is zero; three numbers, red, green and blue."""
        return self._colour(self.mean)

    @property
    def std_colour(self) -> tuple[float, ...]:
        """The standard deviation of red, green and blue."""
        return self._colour(self.std)

    def _colour(self, values: tuple[float, ...]) -> tuple[float, ...]:
        return {"L": values * 3, "BGR": values[::-1], "RGBA": values[:3]}.get(self.channels or "", values)

    def __call__(self, images: Tensor) -> Tensor:
        return self.finished(self.begun(images), images.shape[-2], images.shape[-1])

    def begun(self, images: Tensor) -> Tensor:
        """The affine part, up to the first clip: images [n, 3, H, W] -> values of which ``finished`` makes the model inputs.

        A bicubic resize overshoots at edges. As in Pillow one side is resized and clipped to black and white, then the other. The values
        are the images after the first resize. Where nothing overshoots they are the model inputs.
        """
        mixed = self._mixed(images, 1)
        if self._overshoots(*images.shape[-2:]):
            return self._along(mixed, self._sides(*images.shape[-2:])[0], images.shape[-2:])
        mean = images.new_tensor(self.mean)[:, None, None]
        if self.padding == "black":
            return self._scaled(mixed) - mean / images.new_tensor(self.std)[:, None, None]
        return self._scaled(mixed - mean)

    def begun_difference(self, images: Tensor) -> Tensor:
        """What a difference of two images [n, 3, H, W] becomes as a difference of two values of ``begun``."""
        size = images.shape[-2:]
        return self._along(self._mixed(images, 0), self._sides(*size)[0], size) if self._overshoots(*size) else self.linear(images)

    def finished(self, values: Tensor, height: int, width: int) -> Tensor:
        """The model inputs [n, C, h, w], from what ``begun`` makes of images of this height and width."""
        if not self._overshoots(height, width):
            return values
        values = self._along(values.clamp(0, 1), self._sides(height, width)[1], (height, width)).clamp_(0, 1)
        mean, std = (values.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
        missing = [max(0, side) for side in self._padding(*self._resized_size(height, width))]
        if any(missing) and self.padding == "black":
            values = F.pad(values, missing)
        inputs = values.sub_(mean).div_(std)
        return F.pad(inputs, missing) if any(missing) and self.padding == "mean" else inputs

    def _overshoots(self, height: int, width: int) -> bool:
        return self.interpolation == "bicubic" and self.channels is not None and self._resized_size(height, width) != (height, width)

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        """The sides in the order in which they are resized: 1, the width, and 0, the height.

        The width is first, except in Pillow 13, which torchvision and timm use, where the height shrinks by more than twice as many pixels.
        """
        new_height, new_width = self._resized_size(height, width)
        lost = height - new_height
        return (0, 1) if self.rounding != "transformers" and lost > 0 and lost > 2 * (width - new_width) else (1, 0)

    def _along(self, images: Tensor, side: int, size: Sequence[int]) -> Tensor:
        """Images of this size with one side resized, without the pixels that the crop leaves out there."""
        resized = self._resized_size(size[0], size[1])
        if resized[side] != size[side]:
            shape = [images.shape[-2], images.shape[-1]]
            shape[side] = resized[side]
            images = self._interpolated(images, (shape[0], shape[1]))
        left, right, top, bottom = (min(0, each) for each in self._padding(*resized))
        cut = [left, right] if side else [0, 0, top, bottom]
        return F.pad(images, cut) if any(cut) else images

    def _mixed(self, images: Tensor, one: float) -> Tensor:
        """The channels of the model input [n, C, H, W] from those of images, or of differences of images, where one is 0."""
        if self.channels in (None, "RGB"):
            return images
        mix = images.new_tensor(CHANNELS[self.channels])
        return torch.einsum("ck,nkhw->nchw", mix[:, :3], images) + one * mix[:, 3, None, None]

    def gray_inputs(self, device: torch.device) -> Tensor:
        """Two model inputs [2, channels, h, w]: of a gray image, and of one that goes from black to white, left to right."""
        images = torch.full((2, 3 if self.channels else len(self.mean), *self.size), 0.5, device=device)
        images[1] = torch.linspace(0, 1, images.shape[-1], device=device)
        return replace(self, resize="squash", resized=None)(images)

    def linear(self, images: Tensor) -> Tensor:
        """The linear part: what a difference of two images [n, 3, H, W] becomes as a difference of two inputs [n, C, h, w]."""
        return self._scaled(self._mixed(images, 0))

    def _scaled(self, images: Tensor) -> Tensor:
        """Resized, cropped or padded, and divided by the standard deviation."""
        target = self._resized_size(images.shape[-2], images.shape[-1])
        if target != tuple(images.shape[-2:]):
            images = self._interpolated(images, target)
        return self._centred(images) / images.new_tensor(self.std)[:, None, None]

    def _interpolated(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        if self.interpolation == "nearest":
            return F.interpolate(images, size=size, mode="nearest-exact")
        return F.interpolate(images, size=size, mode=self.interpolation, antialias=True, align_corners=False)

    def placement(self, height: int, width: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Where an image lies in the input: (scale, start) of its rows and of its columns. Row y of the image is at scale * y + start."""
        resized = self._resized_size(height, width)
        left, _, top, _ = self._padding(*resized)
        return (resized[0] / height, top), (resized[1] / width, left)

    def seen(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The part of an image that the input shows after the crop, in pixels of the image: (top, left, bottom, right)."""
        spans = []
        for (scale, start), side, length in zip(self.placement(height, width), self.size, (height, width), strict=True):
            spans.append((max(0, math.floor(-start / scale)), min(length, math.ceil((side - start) / scale))))
        (top, bottom), (left, right) = spans
        return top, left, bottom, right

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        wanted_height, wanted_width = self.resized or self.size
        if self.resize == "squash":
            return wanted_height, wanted_width
        if self.resize == "short_side":
            by_height = wanted_height * width >= wanted_width * height
        if self.resize == "long_side":
            by_height = wanted_height * width <= wanted_width * height
        if self.rounding == "timm":
            ratio = height / wanted_height if by_height else width / wanted_width
            return max(1, round(height / ratio)), max(1, round(width / ratio))
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
        """Crop or zero-pad to the centre; zero is black, or the mean colour after the subtraction of the mean."""
        padding = self._padding(images.shape[-2], images.shape[-1])
        return F.pad(images, padding) if any(padding) else images

    def _padding(self, height: int, width: int) -> list[int]:
        """(left, right, top, bottom) pixels that a resized image lacks; negative where it is cropped."""
        padding = []
        for have, want in zip((width, height), self.size[::-1], strict=True):
            missing = want - have
            # torchvision's CenterCrop rounds half to even
            cut = -missing // 2 if self.rounding == "transformers" else round(-missing / 2)
            before = missing // 2 if missing > 0 else -cut
            padding += [before, missing - before]
        return padding


def checked_sides(size: Any) -> tuple[int, int]:
    sides = _array(size)
    if sides.shape not in ((), (2,)) or sides.dtype.kind not in "iu":
        raise UserError(f"input size {size!r}: expected a whole number of pixels, or (height, width)")
    height, width = np.broadcast_to(sides, 2).tolist()
    return height, width


def _array(values: Any) -> np.ndarray:
    """Values as an array; of objects where they fit none, such as lists of several lengths."""
    try:
        return np.asarray(values)
    except (ValueError, OverflowError):
        return np.asarray([None])


def checked_channels(mean: Any, std: Any, channels: str | None) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Mean and standard deviation of each channel, and what the channels are: RGB for three numbers or none, L for one in a list.

    Raises:
        UserError: numbers that do not fit each other, or four of them where the fourth channel is not named.
    """
    numbers = [_array(values) for values in (mean, std)]
    for name, given in zip(("mean", "std"), numbers, strict=True):
        if given.ndim > 1 or not given.size or given.dtype.kind not in "fiu" or not np.isfinite(given).all():
            raise UserError(f"{name} is {describe(given) if given.ndim else given.item()!r}: expected one number for each channel")
    lengths = {len(given) for given in numbers if given.ndim}
    if channels is None:
        if lengths - {1, 3}:
            raise UserError(f"mean and std have {max(lengths)} numbers: expected 1 or 3, or say what they are by channels, such as 'RGBA'")
        channels = "L" if lengths == {1} else "RGB"
    check_choice("channels", channels, CHANNELS)
    count = len(CHANNELS[channels])
    if lengths - {count}:
        raise UserError(f"mean {mean!r} and std {std!r}: expected {count} numbers each, one for each channel of {channels}")
    own_mean, own_std = (tuple(float(value) for value in np.broadcast_to(given, count)) for given in numbers)
    return own_mean, own_std, channels
