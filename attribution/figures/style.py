"""The style of figures of explanations."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

INSERTION, DELETION, INK = "#0072b2", "#d55e00", "#222222"  # told apart by colour-blind readers too


class Figure(MatplotlibFigure):
    """A matplotlib figure that notebooks show without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=90)
        return buffer.getvalue()


def border_segments(labels: np.ndarray) -> Any:
    """Line segments [n, 2, 2] (x, y) along the pixel edges where the label changes."""
    y, x = np.nonzero(labels[:, 1:] != labels[:, :-1])
    vertical = np.stack([np.stack([x + 0.5, y - 0.5], 1), np.stack([x + 0.5, y + 0.5], 1)], axis=1)
    y, x = np.nonzero(labels[1:] != labels[:-1])
    horizontal = np.stack([np.stack([x - 0.5, y + 0.5], 1), np.stack([x + 0.5, y + 0.5], 1)], axis=1)
    return np.concatenate([vertical, horizontal])


def draw_title(ax: Axes, text: str) -> None:
    ax.set_title(text, fontsize=10, color=INK, parse_math=False)


def draw_colorbar(ax: Axes, image: Any, ticks: list[float], names: list[str]) -> None:
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.035, pad=0.02, ticks=ticks)
    bar.ax.set_yticklabels(names, fontsize=7)
    bar.outline.set_visible(False)
