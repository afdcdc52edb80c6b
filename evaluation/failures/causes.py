"""Where the causing regions of a failure lie, compared with as many random regions of the same image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attribution.regions import Regions

CELLS = 8  # along each side of the grid on which places of different images are compared
_DRAWS = 400  # random sets of regions of each image
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class CausePlace:
    """Where a cause lies. Values "by chance" are probabilities for random sets of as many regions of the same image.

    Attributes:
        regions: number of causing regions.
        border_share: share of the cause's area in regions that touch the border of the image.
        border_by_chance: probability that most of the area lies in such regions.
        cells: bool [64], cells of the 8x8 grid, row by row, of which the cause covers at least half.
        cells_by_chance: float64 [64]; NaN for cells without a pixel.
        background: whether less than half of the cause's area lies on the object; None without a mask.
        background_by_chance: the probability of that; None without a mask.
    """

    regions: int
    border_share: float
    border_by_chance: float
    cells: np.ndarray
    cells_by_chance: np.ndarray
    background: bool | None
    background_by_chance: float | None

    @property
    def at_border(self) -> bool:
        """Whether regions that touch the border hold most of the cause's area."""
        return self.border_share > 0.5


def cause_place(regions: Regions, cause: Sequence[int], object_share: Sequence[float] | None, seed: int) -> CausePlace:
    """Find out where a cause lies.

    Args:
        regions: of the image.
        cause: ids of the causing regions, at least one.
        object_share: for each region, the share of its pixels that lies on the object; None without a mask.
        seed: of the random sets.
    """
    labels, area, count = regions.seen_labels.numpy(), regions.area.numpy(), regions.count
    chosen = np.zeros((1, count), dtype=bool)
    chosen[0, list(cause)] = True
    keys = np.random.default_rng(seed).random((_DRAWS, count)) + (area == 0)  # what a crop leaves out causes nothing
    draws = keys.argsort(axis=1).argsort(axis=1) < len(cause)

    def share_of_area(sets: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return (sets * area * weight).sum(axis=1) / np.maximum((sets * area).sum(axis=1), _ROUNDING)

    touches = np.zeros(count)
    touches[np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))] = 1
    cover = _covers(labels, count)
    by_chance = (1 + (draws @ cover >= 0.5 - _ROUNDING).sum(axis=0)) / (1 + _DRAWS)  # never 0, which no test can work with
    on_object = None if object_share is None else np.asarray(object_share)
    return CausePlace(
        regions=len(cause),
        border_share=float(share_of_area(chosen, touches)[0]),
        border_by_chance=float((share_of_area(draws, touches) > 0.5).mean()),
        cells=(chosen @ cover)[0] >= 0.5 - _ROUNDING,
        cells_by_chance=np.where(cover.sum(axis=0) > 0, by_chance, np.nan),
        background=None if on_object is None else bool(share_of_area(chosen, on_object)[0] < 0.5),
        background_by_chance=None if on_object is None else float((share_of_area(draws, on_object) < 0.5).mean()),
    )


def cell_words(cells: Sequence[int]) -> str:
    """Where cells of the grid lie, such as "the top left (rows 1 to 2, column 1 of 8x8)"."""
    rows, columns = np.divmod(np.asarray(cells), CELLS)
    vertical, horizontal = (
        names[int(((values.min() + values.max() + 1) / 2) * 3 // CELLS)]
        for values, names in ((rows, ("top", "middle", "bottom")), (columns, ("left", "centre", "right")))
    )
    place = "centre" if (vertical, horizontal) == ("middle", "centre") else f"{vertical} {horizontal}"
    return f"the {place} ({_span(rows, 'row')}, {_span(columns, 'column')} of {CELLS}x{CELLS})"


def _span(values: np.ndarray, noun: str) -> str:
    low, high = int(values.min()) + 1, int(values.max()) + 1
    return f"{noun} {low}" if low == high else f"{noun}s {low} to {high}"


def _covers(labels: np.ndarray, count: int) -> np.ndarray:
    """The share of each cell's pixels in each region: float64 [R, 64]; zeros for cells without a pixel, as small images have."""
    height, width = labels.shape
    rows, columns = np.arange(height) * CELLS // height, np.arange(width) * CELLS // width
    cells = rows[:, None] * CELLS + columns
    pixels = np.bincount((labels * CELLS**2 + cells).ravel(), minlength=count * CELLS**2).reshape(count, CELLS**2)
    return pixels / np.maximum(1, pixels.sum(axis=0))
