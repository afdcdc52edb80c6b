"""One style for figures and pages of all studies."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from attribution.figures.style import one_line
from evaluation.statistics.intervals import Interval

INK, MUTED, GRID, PAPER = "#1f2328", "#5f6770", "#d9dde2", "#fffffe"
# Okabe and Ito's colours, darkened until they can be read on white; colour-blind readers can tell all of them apart
FAMILY_COLOURS = {
    "region search": "#d04a02",
    "gradient": "#0067a8",
    "cam": "#00825f",
    "perturbation": "#a8458a",
    "transformer": "#8a6a00",
    "control": "#868e96",
}
DARK_COLOURS = {
    INK: "#e6e9ec",
    MUTED: "#a3abb4",
    GRID: "#3a4149",
    PAPER: "#15181c",
    "#d04a02": "#ff9a57",
    "#0067a8": "#63b8f0",
    "#00825f": "#35c79d",
    "#a8458a": "#e497c9",
    "#8a6a00": "#e3bd4a",
    "#868e96": "#8b939b",
}
FAMILY_MARKERS = {"region search": "D", "gradient": "o", "cam": "s", "perturbation": "^", "transformer": "v", "control": "X"}
THUMBNAIL = 96  # longest side in pixels, as wide as the page shows it
DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1))]
_STYLE: dict[Any, Any] = {
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.facecolor": PAPER,
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "vision-attribution",
}


def has_interval(interval: Interval) -> bool:
    """Whether a mean may be shown: a score without an interval never is."""
    return bool(np.isfinite([interval.estimate, interval.low, interval.high]).all())


def draw_matrix(ax: Axes, values: np.ndarray, name: str, low: float, high: float, text: str) -> None:
    """Cells with their numbers (none where ``text`` is empty), row 0 on top, in ink that can be read on each."""
    rows, columns = values.shape
    edges = np.arange(max(rows, columns) + 1) - 0.5
    colours = matplotlib.colormaps[name]((values - low) / (high - low))
    colours[~np.isfinite(values)] = (0.6, 0.6, 0.6, 1)
    ax.pcolormesh(edges[: columns + 1], edges[: rows + 1], colours[:, :, :3], edgecolors=PAPER, linewidth=1.5)
    for row in range(rows if text else 0):
        for column in range(columns):
            light = colours[row, column, :3] @ [0.299, 0.587, 0.114] > 0.55
            shown = text.format(values[row, column]) if np.isfinite(values[row, column]) else "–"  # noqa: RUF001
            ax.text(column, row, shown, ha="center", va="center", fontsize=8, color="#000000" if light else "#ffffff")
    ax.set_ylim(rows - 0.5, -0.5)
    ax.set_xlim(-0.5, columns - 0.5)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def name_rows(ax: Axes, colours: Mapping[str, str], bold: Container[str] = ()) -> None:
    """Names down the left side in their colours, the first on top."""
    ax.set_yticks(range(len(colours)), [one_line(name) for name in colours], parse_math=False)
    ax.set_ylim(len(colours) - 0.5, -0.5)
    for label, (name, colour) in zip(ax.get_yticklabels(), colours.items(), strict=True):
        label.set(color=colour, fontweight="bold" if name in bold else "normal")


@contextmanager
def figure_style() -> Iterator[None]:
    """The settings under which figures are drawn, and saved as well: matplotlib makes some of their parts only then."""
    with matplotlib.rc_context(_STYLE):
        yield
