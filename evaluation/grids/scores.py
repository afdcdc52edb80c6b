"""Localisation on a grid: the share of the positive attribution that lies in the cell whose class is explained.

Rao, Boehle and Schiele, "Towards Better Understanding Attribution Methods", CVPR 2022; the same authors, "Better
Understanding Differences in Attribution Methods via Systematic Evaluations", TPAMI 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.checks import check_whole, is_whole
from attribution.errors import UserError, describe

LEAST_TOTAL = 1e-7  # a map with no more positive attribution than this scores 0
_CHUNK_VALUES = 2**22  # pixels of enlarged maps held at once, 32 MiB


def cell_slices(cell: int, n: int, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of one cell of an n x n grid.

    Args:
        cell: 0 to n² - 1, row by row from the top left.
        n: cells along each side.
        height, width: of the whole grid (an image, a map or a feature map), multiples of n.

    Raises:
        UserError: a cell that is not on the grid, or a side that n does not divide.
    """
    check_grid(n, (height, width))
    if not is_whole(cell) or not 0 <= cell < n * n:
        raise UserError(f"cell is {cell!r}: a {n}x{n} grid has the cells 0 to {n * n - 1}, row by row from the top left")
    rows, columns = height // n, width // n
    row, column = divmod(int(cell), n)
    return slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)


def positive_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The positive part of maps at the grid's size.

    A map is enlarged bilinearly over the whole grid, and then its negative values become 0. Next to a border between two cells
    values of opposite sign therefore cancel, and a coarse map reaches across the border.

    Args:
        maps: float [M, h, w], signed, at any resolution.
        size: height and width of the grid in pixels.

    Returns:
        float32 [M, H, W], 0 or more.

    Raises:
        UserError: maps of another shape or dtype, values that are not finite, or a size that is not two positive whole numbers.
    """
    _check_size(size)
    return _enlarged(checked_maps(maps).float(), size)


def localization_scores(maps: Tensor, cells: Sequence[int] | Tensor, n: int, size: tuple[int, int]) -> Tensor:
    """Share of each map's positive attribution that lies inside its cell, in [0, 1]; higher is better.

    A constant map scores ``chance(n)``. A map without positive attribution (a total of at most 1e-7) scores 0, so that it lowers a
    mean instead of being left out of it. Sums are in float64: a map that lies entirely inside its cell scores exactly 1, a constant
    map exactly 1/n² (rounded to float32).

    Args:
        maps: float [M, h, w], signed. They are enlarged and clipped as in ``positive_maps``.
        cells: M cells, row by row from the top left.
        n: cells along each side.
        size: height and width of the grid in pixels, multiples of n.

    Returns:
        float32 [M], on the CPU.

    Raises:
        UserError: maps that ``positive_maps`` refuses, a number of cells other than M, a cell that is not on the grid, or a size
            that n does not divide.
    """
    return cell_shares(cell_totals(maps, n, size), cells)[0].float()


def chance(n: int) -> float:
    """The localisation score of a constant map: 1/n²."""
    check_grid(n)
    return 1 / n**2


def cell_totals(maps: Tensor, n: int, size: tuple[int, int]) -> Tensor:
    """The positive attribution inside every cell of each enlarged map: float64 [M, n²], on the CPU. Args: ``localization_scores``."""
    check_grid(n, size)
    maps = checked_maps(maps)
    totals = torch.zeros(len(maps), n * n, dtype=torch.float64)
    for rows, positive in enlarged_chunks(maps, size, torch.float64):
        blocks = positive.view(len(positive), n, size[0] // n, n, size[1] // n)
        totals[rows] = blocks.sum(dim=(2, 4)).flatten(1).cpu()
    return totals


def cell_shares(totals: Tensor, cells: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """The share and the sum of each map's attribution inside its cell: totals [M, n²] and M cells -> float64 [M] twice.

    A map's total is the sum over its cells, so that cells without attribution add exact zeros and no rounding errors.
    """
    count, cell_count = totals.shape
    found = list(cells.tolist() if isinstance(cells, Tensor) else cells)
    if len(found) != count:
        raise UserError(f"{len(found)} cells for {count} maps: give each map the cell whose class it explains")
    for cell in found:
        if not is_whole(cell) or not 0 <= cell < cell_count:
            raise UserError(f"cell {cell!r} is not on the grid: expected whole numbers from 0 to {cell_count - 1}, row by row")
    inside = totals[torch.arange(count), torch.tensor([int(cell) for cell in found], dtype=torch.int64)]
    total = totals.sum(dim=1)
    return torch.where(total > LEAST_TOTAL, inside / total.clamp(min=LEAST_TOTAL), 0.0), inside


def enlarged_chunks(maps: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Positive enlarged maps in chunks of bounded size: (which maps, [m, H, W])."""
    step = max(1, _CHUNK_VALUES // (size[0] * size[1]))
    for start in range(0, len(maps), step):
        rows = slice(start, min(start + step, len(maps)))
        yield rows, _enlarged(maps[rows].to(dtype), size)


def checked_maps(maps: Any) -> Tensor:
    """The maps, checked: finite, float [M, h, w]; without gradients, on a device that has float64."""
    if not isinstance(maps, Tensor) or not maps.is_floating_point() or maps.ndim != 3 or not all(maps.shape[1:]):
        raise UserError(f"the maps are {describe(maps)}: expected float [M, h, w], each a map of a whole grid")
    if not maps.isfinite().all():
        broken = int((~maps.isfinite()).flatten(1).any(dim=1).sum())
        raise UserError(f"{broken} of {len(maps)} maps have values that are not finite: leave these maps out, or correct the method")
    maps = maps.detach()
    return maps.cpu() if maps.device.type == "mps" else maps


def check_grid(n: Any, size: Any = None) -> None:
    """Check that n is a number of cells and, with a size, divides the grid's height and width."""
    check_whole("n", n, 1)
    if size is None:
        return
    _check_size(size)
    if size[0] % n or size[1] % n:
        raise UserError(f"a grid of {size[0]}x{size[1]} cannot be cut into {n}x{n} equal cells: expected sides that {n} divides")


def _check_size(size: Any) -> None:
    if not isinstance(size, Sequence) or len(size) != 2 or not all(is_whole(side) and side > 0 for side in size):
        raise UserError(f"size is {size!r}: expected (height, width) of the grid, two positive whole numbers")


def _enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[1:]) == tuple(size):
        return maps.clamp(min=0)
    if not len(maps):
        return maps.new_zeros(0, *size)
    return F.interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0].clamp(min=0)
