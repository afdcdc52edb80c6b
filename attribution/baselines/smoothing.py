"""Smoothed attributions: a signed map after a Gaussian convolution (S-IntGrad, S-IxG).

Where the image has nothing to do with the class, a fine-grained map has values of both signs, and smoothing cancels them. Where one
sign prevails, the smoothed map keeps it.

Rao, Boehle and Schiele, "Better Understanding Differences in Attribution Methods via Systematic Evaluations", TPAMI 2024, smooth the
attributions of Integrated Gradients and Input x Gradient at the input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from attribution.checks import check_choice, is_number, is_whole
from attribution.errors import UserError, describe

Padding = Literal["reflect", "zeros", "replicate"]


@dataclass(frozen=True)
class Smoothing:
    """A Gaussian window of a given size.

    Attributes:
        kernel: side of the window in pixels of the input, odd; 1 changes nothing. The paper takes 129 for images of 224 pixels.
        sigma: standard deviation in pixels; None is a quarter of the kernel, so that the window ends at two standard deviations.
        padding: what lies beyond the border. "reflect" mirrors the map at its outermost pixels, as often as the width of the window
            needs; "replicate" repeats these pixels; "zeros" fades the map out towards the border.

    Raises:
        UserError: a kernel that is not odd and positive, a sigma that is not positive and finite, an unknown padding.
    """

    kernel: int = 129
    sigma: float | None = None
    padding: Padding = "reflect"

    def __post_init__(self) -> None:
        if not is_whole(self.kernel) or self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"the kernel of a smoothing is {self.kernel!r}: expected an odd whole number of pixels, such as 129")
        if self.sigma is not None and not (is_number(self.sigma) and self.sigma > 0):
            raise UserError(f"the sigma of a smoothing is {self.sigma!r}: expected a positive number of pixels, or None for kernel / 4")
        check_choice("the padding of a smoothing", self.padding, get_args(Padding))

    @classmethod
    def parse(cls, value: Smoothing | int | Mapping[str, Any] | None) -> Smoothing | None:
        """Read a smoothing from the size of its kernel or from a table of its attributes; None for no smoothing.

        Raises:
            UserError: anything else.
        """
        if value is None or isinstance(value, Smoothing):
            return value
        if isinstance(value, Mapping):
            unknown = sorted(set(value) - {"kernel", "sigma", "padding"})
            if unknown:
                raise UserError(f"a smoothing has no {', '.join(unknown)}: expected some of kernel, sigma, padding")
            return cls(**value)
        return cls(value)

    @property
    def deviation(self) -> float:
        """The standard deviation in pixels of the input."""
        return self.kernel / 4 if self.sigma is None else float(self.sigma)

    def scaled(self, scale: float) -> Smoothing:
        """Scale the window to a map of another resolution: the kernel to the nearest odd size, the deviation exactly.

        Args:
            scale: side of the map over side of the input, such as 1/16 for a feature map of 14 for an input of 224.
        """
        if not is_number(scale) or scale <= 0:
            raise UserError(f"scale is {scale!r}: expected the side of the map over the side of the input, a positive number")
        half = math.floor((self.kernel * scale - 1) / 2 + 0.5)
        return Smoothing(2 * max(0, half) + 1, self.deviation * scale, self.padding)


def smoothed(values: Tensor, smoothing: Smoothing, scale: float = 1.0) -> Tensor:
    """Convolve maps with a Gaussian window whose weights sum to 1.

    It is computed in float64, so that a constant float32 map stays exactly the same, except with the padding "zeros".

    Args:
        values: float [..., h, w], signed. Negative and positive values must cancel, so clip afterwards, not before.
        smoothing: the window, in pixels of the input.
        scale: side of the map over side of the input, see ``Smoothing.scaled``.

    Returns:
        Shape, dtype and device of ``values``.

    Raises:
        UserError: values of another dtype, of fewer than two dimensions, without pixels or not finite; a scale that is not positive.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim < 2 or not all(values.shape[-2:]):
        raise UserError(f"the maps are {describe(values)}: expected float [..., h, w]")
    if not values.isfinite().all():
        raise UserError("the maps have values that are not finite, which smoothing would spread: mend the method first")
    window = smoothing.scaled(scale)
    if window.kernel == 1:
        return values.clone()
    precise = (values.cpu() if values.device.type == "mps" else values).double()
    vertical, horizontal = (torch.from_numpy(_convolution(side, window)).to(precise) for side in values.shape[-2:])
    return (vertical @ precise @ horizontal.T).to(values)


def _convolution(side: int, window: Smoothing) -> np.ndarray:
    """The convolution along one axis, padding included, as a matrix: float64 [side, side].

    A wide window makes the matrix dense. The product is then faster than a convolution, and the map need not be padded.
    """
    offsets = np.arange(window.kernel) - window.kernel // 2
    weights = np.exp(-0.5 * (offsets / window.deviation) ** 2)
    weights /= weights.sum()
    rows = np.arange(side)[:, None].repeat(window.kernel, axis=1)
    columns = rows + offsets
    matrix = np.zeros((side, side))
    if window.padding == "zeros":
        within = (columns >= 0) & (columns < side)
        np.add.at(matrix, (rows[within], columns[within]), np.broadcast_to(weights, columns.shape)[within])
        return matrix
    columns = _mirrored(columns, side) if window.padding == "reflect" else columns.clip(0, side - 1)
    np.add.at(matrix, (rows, columns), np.broadcast_to(weights, columns.shape))
    return matrix


def _mirrored(positions: np.ndarray, side: int) -> np.ndarray:
    """Fold positions beyond the border back at the outermost pixels, as often as needed: -1 becomes 1, ``side`` becomes ``side - 2``."""
    period = max(1, 2 * (side - 1))
    folded = positions % period
    return np.minimum(folded, period - folded)
