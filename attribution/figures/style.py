"""The style that figures of explanations share: colours, titles, borders of regions, axes of curves."""

from __future__ import annotations

import io
import os
import textwrap
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from torch import Tensor

F = TypeVar("F", bound=MatplotlibFigure)
_LONGEST = 48  # characters of a class name
_TITLE, _LABEL = 40, 36  # characters that fit above a panel, and beside its axis
_NOT_FOR_TEXT = ("Last Resort", "cm", "STIXSize", "STIXNon")  # matplotlib's own fonts of boxes and of parts of formulas
_DATES = {"svg": "Date", "pdf": "CreationDate"}  # the names under which files of a format hold when they were written
INSERTION, DELETION, INK = "#0072b2", "#d55e00", "#222222"  # colour-blind readers can tell them apart


class Figure(MatplotlibFigure):
    """A matplotlib figure that notebooks display without pyplot, and that is written as the same bytes every time."""

    def savefig(self, fname: Any, **kwargs: Any) -> None:
        """Write the figure, as matplotlib does. SVG and PDF files name no date, and the marks inside an SVG file are not random."""
        suffix = Path(fname).suffix[1:] if isinstance(fname, (str, os.PathLike)) else ""
        date = _DATES.get((kwargs.get("format") or suffix or matplotlib.rcParams["savefig.format"]).lower())
        if date is None:
            super().savefig(fname, **kwargs)
            return
        kwargs["metadata"] = {date: None, **(kwargs.get("metadata") or {})}
        with matplotlib.rc_context({"svg.hashsalt": "vision-attribution"}):
            super().savefig(fname, **kwargs)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=90)
        return buffer.getvalue()


def one_line(text: str, instead: str | None = None) -> str:
    """A text of data, such as a name, as a figure can show it.

    Line breaks, tabs and characters that are not printed become spaces. If no installed font has all its letters, it is replaced, and
    a warning says so.

    Args:
        text: as it was given.
        instead: what replaces it, such as "class 7"; by default the text with "?" for each letter that no font has.
    """
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    lacking = {each for each in line if not _font_of(each)}
    if not lacking:
        return line
    shown = "".join("?" if each in lacking else each for each in line) if instead is None else instead
    readable = line.encode("utf-8", "backslashreplace").decode("utf-8")
    warnings.warn(
        f"no installed font has all letters of {readable!r}: figures show {shown!r}; install a font that has them, such as Noto Sans CJK",
        stacklevel=2,
    )
    return shown


def class_text(name: str, index: int) -> str:
    """The name of a class as a figure can show it (see ``one_line``), or its index. A name that would cover other panels is shortened."""
    text = one_line(name, f"class {index}")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def as_written(figure: F) -> F:
    """The figure with every text drawn as it is written: dollar signs begin no formula, and letters come from a font that has them.

    Every figure goes through this function when it is complete; names in it come from ``one_line`` or ``class_text``.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        families = text.get_fontfamily()
        others = {_font_of(each) for each in text.get_text() if not each.isascii() and not _has(tuple(families), each)} - {""}
        if others:
            text.set_fontfamily([*families, *sorted(others)])
    if any(ax.get_title().count("\n") > 1 for ax in figure.axes):
        figure.draw_without_rendering()  # one pass of the layout leaves too little room for such titles above a photo
    return figure


def _font_of(letter: str) -> str:
    """The family of the usual font if it has the letter, else of another installed font; empty where none has it."""
    usual = tuple(matplotlib.rcParams["font.family"])
    if letter.isascii() or _has(usual, letter):
        return usual[0]
    return next((family for family, path in _installed() if ord(letter) in _letters(path)), "")


def _has(families: tuple[str, ...], letter: str) -> bool:
    return any(ord(letter) in _letters(font_manager.findfont(font_manager.FontProperties(family=[family]))) for family in families)


def _installed() -> list[tuple[str, str]]:
    """Families and files of the installed fonts of upright letters."""
    fonts = [font for font in font_manager.fontManager.ttflist if font.style == "normal" and not font.name.startswith(_NOT_FOR_TEXT)]
    return sorted((font.name, font.fname) for font in fonts)


@cache
def _letters(path: str) -> frozenset[int]:
    return frozenset(font_manager.get_font(path).get_charmap())


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


def dimmed_photo(image: Tensor) -> np.ndarray:
    """An image float [3, H, W] in light gray [H, W, 3], for parts that do not count."""
    return 0.75 + 0.25 * shown_pixels(image).mean(axis=2, keepdims=True).repeat(3, axis=2)


def seen_pixels(shape: Sequence[int], crop: Sequence[int] | None) -> np.ndarray:
    """Where the model sees an image of shape (H, W): bool [H, W], True inside the crop (top, left, bottom, right), or everywhere."""
    top, left, bottom, right = crop or (0, 0, *shape)
    seen = np.zeros(tuple(shape), dtype=bool)
    seen[top:bottom, left:right] = True
    return seen


def draw_crop(ax: Axes, crop: Sequence[int] | None) -> None:
    """Draw the part (top, left, bottom, right) of a photo that the model sees, if it does not see all of it."""
    if crop is None:
        return
    top, left, bottom, right = crop
    ax.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color="white", linestyle="--"))
    ax.text(left, top, "the model's crop", color="white", fontsize=8, va="top", bbox={"color": "black", "alpha": 0.6, "pad": 1})


def gray_photo(image: Tensor, darkest: float = 0.25) -> np.ndarray:
    """An image float [3, H, W] as gray values [H, W] from ``darkest`` to 1, the background of a map."""
    return darkest + (1 - darkest) * shown_pixels(image).mean(axis=2)


def style_curves(ax: Axes, xlabel: str, ylabel: str, fontsize: float = 8) -> None:
    """Axes of probabilities over the share of the image, both from 0 to 1, with a legend."""
    ax.set_xlim(0, 1)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9 * min(1, _LABEL / max(len(ylabel), 1)))
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=fontsize, frameon=True, framealpha=0.85, edgecolor="none", loc="best")


def draw_title(ax: Axes, text: str) -> None:
    """Write the title of a panel. Long lines are broken at spaces; a line that is still too long makes the letters smaller."""
    lines = [line if len(line) <= _TITLE else _broken(line) for line in text.split("\n")]
    longest = max(len(part) for line in lines for part in line.split("\n"))
    ax.set_title("\n".join(lines), fontsize=10 * min(1, max(0.6, _TITLE / max(longest, 1))), color=INK)


def _broken(line: str) -> str:
    """A line broken at spaces, but not within "p = 0.42"."""
    whole = line.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    return textwrap.fill(whole, _TITLE, break_long_words=False, break_on_hyphens=False).replace("\N{NO-BREAK SPACE}", " ")


def draw_colorbar(ax: Axes, image: Any, ticks: list[float], names: list[str], fraction: float = 0.035, fontsize: float = 7) -> None:
    bar = ax.figure.colorbar(image, ax=ax, fraction=fraction, pad=0.02, ticks=ticks)
    bar.ax.set_yticklabels(names, fontsize=fontsize)
    bar.outline.set_visible(False)
