from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import correlate1d
from torch import Tensor

from attribution.baselines.smoothing import Smoothing, smoothed
from attribution.errors import UserError
from evaluation.grids.scores import localization_scores

PADDINGS = ["reflect", "zeros", "replicate"]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def window(kernel: int, sigma: float) -> list[float]:
    weights = [math.exp(-((i - kernel // 2) ** 2) / (2 * sigma**2)) for i in range(kernel)]
    return [weight / sum(weights) for weight in weights]


def step(position: int, side: int, padding: str) -> int | None:
    """Where a position beyond the border reads from, found by walking to and fro."""
    if padding == "replicate":
        return min(max(position, 0), side - 1)
    if padding == "zeros":
        return position if 0 <= position < side else None
    if side == 1:
        return 0
    at, direction = 0, 1 if position >= 0 else -1
    if direction < 0:
        direction = 1  # the mirror image of a walk to the left from 0 is the same walk to the right
    for _ in range(abs(position)):
        if not 0 <= at + direction < side:
            direction = -direction
        at += direction
    return at


def naive(values: list[list[float]], weights: list[float], padding: str) -> list[list[float]]:
    """The two-dimensional window, one pixel after the other."""
    height, width, reach = len(values), len(values[0]), len(weights) // 2
    found = [[0.0] * width for _ in range(height)]
    for y in range(height):
        for x in range(width):
            for i, a in enumerate(weights):
                for j, b in enumerate(weights):
                    row, column = step(y + i - reach, height, padding), step(x + j - reach, width, padding)
                    if row is not None and column is not None:
                        found[y][x] += a * b * values[row][column]
    return found


@settings(deadline=None, max_examples=60)
@given(
    padding=st.sampled_from(PADDINGS),
    kernel=st.integers(0, 6).map(lambda half: 2 * half + 1),
    sigma=st.floats(0.2, 9),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_equals_the_naive_loop(padding: Any, kernel: int, sigma: float, height: int, width: int, seed: int) -> None:
    """Also where the window is wider than the map, so that it is mirrored several times."""
    values = noise(height, width, seed=seed, dtype=torch.float64)
    expected = naive(values.tolist(), window(kernel, sigma), padding)
    found = smoothed(values, Smoothing(kernel, sigma, padding))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("padding", "mode"), [("reflect", "mirror"), ("zeros", "constant"), ("replicate", "nearest")])
def test_equals_scipy_at_the_papers_size(padding: Any, mode: str) -> None:
    values = noise(2, 40, 224)
    weights = window(129, 129 / 4)
    expected = correlate1d(correlate1d(values.double().numpy(), weights, axis=1, mode=mode), weights, axis=2, mode=mode)
    np.testing.assert_allclose(smoothed(values, Smoothing(padding=padding)).numpy(), expected, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(value=st.floats(-1e6, 1e6, width=32), height=st.integers(1, 40), width=st.integers(1, 40), half=st.integers(0, 128))
def test_a_constant_map_stays_exactly_as_it_is(value: float, height: int, width: int, half: int) -> None:
    values = torch.full((height, width), value)
    for padding in ("reflect", "replicate"):
        assert torch.equal(smoothed(values, Smoothing(2 * half + 1, padding=padding)), values)  # type: ignore[arg-type]


def test_a_single_pixel_becomes_the_window() -> None:
    values = torch.zeros(31, 41, dtype=torch.float64)
    values[15, 20] = 3
    weights = torch.tensor(window(9, 9 / 4), dtype=torch.float64)
    found = smoothed(values, Smoothing(9))
    torch.testing.assert_close(found[11:20, 16:25], 3 * weights[:, None] * weights)
    assert found.sum().item() == pytest.approx(3)
    assert found.count_nonzero() == 81


def test_zeros_fade_out_towards_the_border() -> None:
    found = smoothed(torch.ones(1, 21), Smoothing(41, 1e6, "zeros"))
    counts = torch.tensor([min(i, 20) + min(20 - i, 20) + 1 for i in range(21)]) / 41
    torch.testing.assert_close(found[0], counts / 41, msg="a flat window: one of its 41 rows and the columns that meet the map")


def test_a_kernel_of_one_changes_nothing() -> None:
    values = noise(3, 7, 9)
    for sigma in (None, 50.0):
        found = smoothed(values, Smoothing(1, sigma, "zeros"))
        assert torch.equal(found, values)
    found += 1
    assert not torch.equal(found, values), "a copy, whatever the kernel"


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), padding=st.sampled_from(PADDINGS), kernel=st.sampled_from([3, 7, 31]), factor=st.floats(-10, 10))
def test_linear_and_without_direction(seed: int, padding: Any, kernel: int, factor: float) -> None:
    a, b = noise(2, 6, 8, seed=seed, dtype=torch.float64)
    smooth = Smoothing(kernel, padding=padding)
    torch.testing.assert_close(smoothed(a + factor * b, smooth), smoothed(a, smooth) + factor * smoothed(b, smooth))
    torch.testing.assert_close(smoothed(a.flip(0, 1), smooth), smoothed(a, smooth).flip(0, 1))
    torch.testing.assert_close(smoothed(a.T, smooth), smoothed(a, smooth).T)


def test_leading_dimensions_are_maps_of_their_own() -> None:
    values = noise(2, 3, 6, 5)
    found = smoothed(values, Smoothing(5))
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(found[i, j], smoothed(values[i, j], Smoothing(5)))
    assert smoothed(values[:0], Smoothing(5)).shape == (0, 3, 6, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_type_stays_and_sums_are_in_float64(dtype: torch.dtype) -> None:
    values = (1000 + noise(8, 8)).to(dtype)
    found = smoothed(values, Smoothing(9))
    assert found.dtype == dtype
    assert torch.equal(found, smoothed(values.double(), Smoothing(9)).to(dtype))


def test_the_window_scales_with_the_map() -> None:
    assert Smoothing(129).deviation == 32.25
    assert Smoothing(129, 10).deviation == 10
    assert Smoothing(129).scaled(1) == Smoothing(129, 32.25)
    assert Smoothing(129).scaled(1 / 16) == Smoothing(9, 32.25 / 16), "8.06 pixels: 9 is nearer than 7"
    assert Smoothing(129, padding="zeros").scaled(1 / 8) == Smoothing(17, 32.25 / 8, "zeros")
    assert Smoothing(129, 8).scaled(2) == Smoothing(259, 16), "of 257 and 259, equally near, the larger"
    assert Smoothing(9).scaled(1 / 100).kernel == 1
    values = noise(14, 14)
    assert torch.equal(smoothed(values, Smoothing(129), scale=1 / 16), smoothed(values, Smoothing(9, 32.25 / 16)))


def test_signs_cancel_where_the_map_knows_nothing() -> None:
    """What smoothing is for: a weak but steady cell stands out from strong cells whose signs alternate."""
    signs = torch.where((torch.arange(32)[:, None] + torch.arange(32)) % 2 == 0, 1.0, -1.0)
    signs[:16, :16] = 0.2
    raw, smooth = localization_scores(torch.stack([signs, smoothed(signs, Smoothing(9))]), [0, 0], 2, (32, 32)).tolist()
    assert raw == pytest.approx(0.2 * 256 / (0.2 * 256 + 0.5 * 768))
    assert smooth > 0.8
    before_clipping = smoothed(signs.clamp(min=0), Smoothing(9))
    assert localization_scores(before_clipping[None], [0], 2, (32, 32)).item() < 0.2, "clipped first, nothing cancels"


def test_the_values_are_left_alone() -> None:
    values = noise(5, 5)
    before = values.clone()
    smoothed(values, Smoothing(3))
    assert torch.equal(values, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": 128}, "kernel of a smoothing is 128: expected an odd whole number"),
        ({"kernel": 0}, "kernel of a smoothing is 0"),
        ({"kernel": -3}, "kernel of a smoothing is -3"),
        ({"kernel": 3.0}, "kernel of a smoothing is 3.0"),
        ({"kernel": True}, "kernel of a smoothing is True"),
        ({"sigma": 0}, "sigma of a smoothing is 0"),
        ({"sigma": math.inf}, "sigma of a smoothing is inf"),
        ({"sigma": math.nan}, "sigma of a smoothing is nan"),
        ({"sigma": "wide"}, "sigma of a smoothing is 'wide'"),
        ({"padding": "circular"}, "expected one of reflect, zeros, replicate"),
    ],
)
def test_a_window_that_is_none(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Smoothing(**arguments)


@pytest.mark.parametrize(
    ("values", "scale", "message"),
    [
        (torch.ones(5), 1.0, r"float32 \[5\]: expected float \[..., h, w\]"),
        (torch.ones(5, 0), 1.0, "expected float"),
        (torch.ones(5, 5, dtype=torch.int64), 1.0, "int64"),
        (torch.full((5, 5), math.nan), 1.0, "not finite"),
        (torch.ones(5, 5), 0.0, "scale is 0.0"),
        (torch.ones(5, 5), math.inf, "scale is inf"),
    ],
)
def test_values_that_cannot_be_smoothed(values: Tensor, scale: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        smoothed(values, Smoothing(3), scale)
