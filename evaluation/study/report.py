"""Files of a report, and the figures that it plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from attribution.figures.style import Figure


@dataclass(frozen=True)
class ReportFiles:
    """Where everything was written.

    Attributes:
        html: the page; it needs none of the others.
        csv: every cell of the leaderboards with its protocol.
        json: settings, versions, weights of the models, agreements, separations, refusals and failures.
        figures: PNG files.
    """

    html: Path
    csv: Path
    json: Path
    figures: tuple[Path, ...]


@dataclass(frozen=True)
class Planned:
    section: str
    model: str
    name: str
    alt: str
    caption: str
    draw: Callable[[], Figure]
    on_page: bool = True
