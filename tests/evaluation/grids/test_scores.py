from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attribution.errors import UserError
from evaluation.grids import scores as module
from evaluation.grids.scores import cell_slices, cell_totals, chance, localization_scores, positive_maps

SMALL = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
SMALL_ENLARGED = [
    [1.0, 1.0, 0.625, -0.125, -0.875, -1.625, -2.0, -2.0],
    [1.0, 1.0, 0.625, -0.125, -0.875, -1.625, -2.0, -2.0],
    [1.25, 1.25, 0.9375, 0.3125, -0.3125, -0.9375, -1.25, -1.25],
    [1.75, 1.75, 1.5625, 1.1875, 0.8125, 0.4375, 0.25, 0.25],
    [2.25, 2.25, 2.1875, 2.0625, 1.9375, 1.8125, 1.75, 1.75],
    [2.75, 2.75, 2.8125, 2.9375, 3.0625, 3.1875, 3.25, 3.25],
    [3.0, 3.0, 3.125, 3.375, 3.625, 3.875, 4.0, 4.0],
    [3.0, 3.0, 3.125, 3.375, 3.625, 3.875, 4.0, 4.0],
]
# the first row of a 4x4 map whose other rows are 0, and its score in the top left of 2x2 cells, as the authors' program computes it
EDGE_CASES = {
    "half": ([1, 0, 1, 0], 0.5),
    "half_larger": ([2, 0, 2, 0], 0.5),
    "all_inside": ([3, 0, 0, 0], 1.0),
    "none_inside": ([0, 0, 1, 0], 0.0),
    "all_zero": ([0, 0, 0, 0], 0.0),
    "only_negative": ([-1, 0, 0, -2], 0.0),
    "negative_ignored": ([1, 0, 3, -100], 0.25),
    "total_below_1e-7": ([5e-8, 0, 0, 0], 0.0),
    "total_above_1e-7": ([2e-7, 0, 0, 0], 1.0),
    "quarter": ([1, 0, 3, 0], 0.25),
}


def top_row(values: list[float]) -> Tensor:
    return torch.cat([torch.tensor([values], dtype=torch.float32), torch.zeros(3, 4)])


def naive_enlarged(values: list[list[float]], height: int, width: int) -> list[list[float]]:
    """Bilinear with pixel centres at half coordinates, one pixel after the other."""

    def weights(position: int, large: int, small: int) -> list[tuple[int, float]]:
        source = max((position + 0.5) * small / large - 0.5, 0)
        low = min(int(source), small - 1)
        return [(low, 1 - (source - low)), (min(low + 1, small - 1), source - low)]

    rows, columns = len(values), len(values[0])
    return [
        [sum(a * b * values[i][j] for i, a in weights(y, height, rows) for j, b in weights(x, width, columns)) for x in range(width)]
        for y in range(height)
    ]


def naive_score(values: Tensor, cell: int, n: int, height: int, width: int) -> float:
    large = naive_enlarged(values.tolist(), height, width)
    inside = total = 0.0
    for y in range(height):
        for x in range(width):
            value = max(large[y][x], 0.0)
            total += value
            if (y * n // height) * n + x * n // width == cell:
                inside += value
    return inside / total if total > 1e-7 else 0.0


def test_cells_run_row_by_row_from_the_top_left() -> None:
    found = torch.full((6, 12), -1)
    for cell in range(9):
        found[cell_slices(cell, 3, 6, 12)] = cell
    expected = torch.arange(9).view(3, 3).repeat_interleave(2, dim=0).repeat_interleave(4, dim=1)
    assert torch.equal(found, expected)


def test_enlarging_comes_before_clipping() -> None:
    found = positive_maps(SMALL[None], (8, 8))
    assert torch.equal(found[0], torch.tensor(SMALL_ENLARGED).clamp(min=0))
    assert found.dtype == torch.float32
    clipped_first = positive_maps(SMALL.clamp(min=0)[None], (8, 8))
    assert clipped_first.sum() > found.sum(), "negative neighbours cancel positive values at the border"


def test_scores_of_the_four_cells_of_a_map_of_four_values() -> None:
    scores = localization_scores(SMALL.expand(4, 2, 2), range(4), 2, (8, 8))
    assert scores.tolist() == pytest.approx([0.134955749, 0.0154867256, 0.398230076, 0.451327443], abs=1e-7)


@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_cases(name: str) -> None:
    row, score = EDGE_CASES[name]
    assert localization_scores(top_row(row)[None], [0], 2, (4, 4)).item() == score


def test_every_golden_map(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "grid_golden.json").read_text())
    compared = 0
    with np.load(shared / "golden" / "grid_maps.npz") as arrays:
        for key in arrays.files:
            name, setting, layer, method, grid = key.split("/")
            expected = golden["scores"][name][f"{setting}/{layer}/{method}"]
            n, maps, row = int(name[0]), torch.from_numpy(arrays[key]), int(grid.removeprefix("grid"))
            cells = list(range(n * n)) if setting == "GridPG" else [0, n * n - 1]
            scores = localization_scores(maps, cells, n, (32 * n, 32 * n))
            assert scores.tolist() == pytest.approx(expected["localization"][row], abs=1e-6), key
            totals = cell_totals(maps, n, (32 * n, 32 * n)).sum(dim=1)
            assert totals.tolist() == pytest.approx(expected["positive_total"][row], rel=1e-5), key
            compared += len(cells)
    assert compared > 500


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_equals_the_naive_loop(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 3))
    height, width = (n * data.draw(st.integers(1, 4)) for _ in range(2))
    h, w = (data.draw(st.integers(1, 6)) for _ in range(2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    maps = torch.randn(3, h, w, generator=generator, dtype=torch.float64)
    cells = [data.draw(st.integers(0, n * n - 1)) for _ in range(3)]
    scores = localization_scores(maps, cells, n, (height, width))
    assert scores.dtype == torch.float32
    expected = [naive_score(m, c, n, height, width) for m, c in zip(maps, cells, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), n=st.sampled_from([2, 3]), side=st.integers(1, 9), factor=st.floats(1e-3, 1e6))
def test_shares_of_all_cells_sum_to_one_and_strength_does_not_count(seed: int, n: int, side: int, factor: float) -> None:
    values = torch.randn(side, side + 1, generator=torch.Generator().manual_seed(seed)).abs() + 0.1
    size, cells = (6 * n, 12 * n), range(n * n)
    scores = localization_scores(values.expand(n * n, -1, -1), cells, n, size)
    assert scores.sum().item() == pytest.approx(1, abs=1e-6)
    stronger = localization_scores((values.double() * factor).expand(n * n, -1, -1), cells, n, size)
    assert stronger.tolist() == pytest.approx(scores.tolist(), abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), n=st.sampled_from([2, 3]), cell=st.integers(0, 3), strength=st.floats(-5, 5))
def test_a_map_inside_its_cell_scores_exactly_one(seed: int, n: int, cell: int, strength: float) -> None:
    """Also where float32 sums would give 0.9999997 or 1.0000003, so that perfect maps tie."""
    generator = torch.Generator().manual_seed(seed)
    values = -torch.rand(32 * n, 32 * n, generator=generator)
    where = cell_slices(cell, n, 32 * n, 32 * n)
    values[where] = torch.randn(32, 32, generator=generator) * 10**strength
    assert localization_scores(values[None], [cell], n, tuple(values.shape)).item() == 1.0
    other = (cell + 1) % (n * n)
    assert localization_scores(values[None], [other], n, tuple(values.shape)).item() == 0.0


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_constant_map_scores_chance(n: int) -> None:
    for value in (0.1, 1.7, 3e-5):
        maps = torch.full((n * n, 7 * n, 7 * n), value)
        scores = localization_scores(maps, range(n * n), n, (32 * n, 32 * n))
        assert set(scores.tolist()) == {float(np.float32(1 / n**2))}
    assert chance(n) == 1 / n**2


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.randn(11, 5, 5, generator=torch.Generator().manual_seed(0))
    cells = [i % 4 for i in range(11)]
    whole = localization_scores(maps, cells, 2, (10, 10))
    for values in (1, 300, 1100):
        monkeypatch.setattr(module, "_CHUNK_VALUES", values)
        assert torch.equal(localization_scores(maps, cells, 2, (10, 10)), whole)


def test_maps_are_left_alone_and_gradients_left_out() -> None:
    maps = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = maps.detach().clone()
    assert not localization_scores(maps, [0, 3], 2, (4, 4)).requires_grad
    assert not positive_maps(maps, (4, 4)).requires_grad
    assert torch.equal(maps.detach(), before)


def test_no_maps_give_no_scores() -> None:
    assert localization_scores(torch.zeros(0, 4, 4), [], 2, (8, 8)).tolist() == []
    assert positive_maps(torch.zeros(0, 4, 4), (8, 8)).shape == (0, 8, 8)


@pytest.mark.parametrize("cells", [(1, 2), np.array([1, 2]), torch.tensor([1, 2])], ids=["tuple", "numpy", "torch"])
def test_cells_in_any_form(cells: Any) -> None:
    maps = torch.stack([top_row([1, 0, 3, 0]), top_row([1, 0, 3, 0]).flip(0)])
    assert localization_scores(maps, cells, 2, (4, 4)).tolist() == [0.75, 0.25]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype: torch.dtype) -> None:
    scores = localization_scores(top_row([1, 0, 3, -4])[None].to(dtype), [0], 2, (4, 4))
    assert scores.dtype == torch.float32 and scores.item() == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": torch.zeros(4, 4)}, r"float32 \[4, 4\]: expected float \[M, h, w\]"),
        ({"maps": torch.zeros(2, 4, 4, dtype=torch.int64)}, "int64"),
        ({"maps": torch.zeros(2, 0, 4)}, "expected float"),
        ({"maps": np.zeros((2, 4, 4))}, "expected float"),
        ({"maps": torch.tensor([[[math.nan]], [[1.0]]])}, "1 of 2 maps have values that are not finite"),
        ({"cells": [0]}, "1 cells for 2 maps"),
        ({"cells": [0, 4]}, "cell 4 is not on the grid: expected whole numbers from 0 to 3"),
        ({"cells": [-1, 0]}, "cell -1"),
        ({"cells": [0, 0.5]}, "cell 0.5"),
        ({"n": 3}, "a grid of 8x8 does not fall into 3x3 equal cells"),
        ({"n": 0}, "n is 0"),
        ({"n": 2.0}, "n is 2.0"),
        ({"size": (8, 7)}, "a grid of 8x7"),
        ({"size": (0, 8)}, "size is"),
        ({"size": 8}, "size is 8"),
    ],
)
def test_errors_say_what_was_received(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"maps": torch.ones(2, 4, 4), "cells": [0, 1], "n": 2, "size": (8, 8)} | change
    with pytest.raises(UserError, match=message):
        localization_scores(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((4, 2, 8, 8), "cells 0 to 3"), ((-1, 2, 8, 8), "cells 0 to 3"), ((0, 3, 8, 9), "8x9"), ((0, 0, 8, 8), "n is 0")],
)
def test_slices_refuse_what_is_not_on_the_grid(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cell_slices(*arguments)


def test_chance_refuses_no_grid() -> None:
    with pytest.raises(UserError, match="n is 0"):
        chance(0)


def test_positive_maps_checks_maps_and_size() -> None:
    with pytest.raises(UserError, match="not finite"):
        positive_maps(torch.full((1, 2, 2), math.inf), (4, 4))
    with pytest.raises(UserError, match="size is"):
        positive_maps(torch.ones(1, 2, 2), (4.0, 4))  # type: ignore[arg-type]
