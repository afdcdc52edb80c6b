"""The style that figures of explanations share: colours, titles, borders of regions, axes of curves."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure
from torch import Tensor

INSERTION, DELETION, INK = "#0072b2", "#d55e00", "#222222"  # colour-blind readers can tell them apart


class Figure(MatplotlibFigure):
    """A matplotlib figure that notebooks display without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=90)
        return buffer.getvalue()


def border_segments(labels: np.ndarray) -> Any:
    """Line segments [n, 2, 2], points (x, y), along the pixel edges between different labels [H, W]."""
    y, x = np.nonzero(labels[:, 1:] != labels[:, :-1])
    vertical = np.stack([np.stack([x + 0.5, y - 0.5], 1), np.stack([x + 0.5, y + 0.5], 1)], axis=1)
    y, x = np.nonzero(labels[1:] != labels[:-1])
    horizontal = np.stack([np.stack([x - 0.5, y + 0.5], 1), np.stack([x + 0.5, y + 0.5], 1)], axis=1)
    return np.concatenate([vertical, horizontal])


def shown_pixels(image: Tensor) -> np.ndarray:
    """An image float [3, H, W] as an array [H, W, 3] in [0, 1] that matplotlib draws."""
    return image.detach().cpu().permute(1, 2, 0).numpy().clip(0, 1)


def gray_photo(image: Tensor, darkest: float = 0.25) -> np.ndarray:
    """An image float [3, H, W] as gray values [H, W] from ``darkest`` to 1, the background of a map."""
    return darkest + (1 - darkest) * shown_pixels(image).mean(axis=2)


def style_curves(ax: Axes, xlabel: str, ylabel: str, fontsize: float = 8) -> None:
    """Axes of probabilities over the share of the image, both from 0 to 1, with a legend."""
    ax.set_xlim(0, 1)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    legend = ax.legend(fontsize=fontsize, frameon=True, framealpha=0.85, edgecolor="none", loc="best")
    for text in legend.get_texts():
        text.set_parse_math(False)


def draw_title(ax: Axes, text: str) -> None:
    ax.set_title(text, fontsize=10, color=INK, parse_math=False)


def draw_colorbar(ax: Axes, image: Any, ticks: list[float], names: list[str], fraction: float = 0.035, fontsize: float = 7) -> None:
    bar = ax.figure.colorbar(image, ax=ax, fraction=fraction, pad=0.02, ticks=ticks)
    bar.ax.set_yticklabels(names, fontsize=fontsize)
    bar.outline.set_visible(False)
