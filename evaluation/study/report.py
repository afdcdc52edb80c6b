"""Writes the files of a study: tables, figures, and one page that needs no other file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attribution.figures.style import Figure
from attribution.files import whole_file
from attribution.model.classifier import Classifier
from attribution.provenance import versions
from evaluation.study.page import inline_svg, page, write_text
from evaluation.study.settings import StudySettings
from evaluation.study.style import figure_style


@dataclass(frozen=True)
class ReportFiles:
    """Where everything was written.

    Attributes:
        html: the page; it needs none of the others.
        csv: the main table.
        json: settings, versions, weights of the models, and what the tables do not hold.
        figures: PNG files.
    """

    html: Path
    csv: Path
    json: Path
    figures: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Planned:
    """A figure that a report will draw.

    Attributes:
        section: section of the page that shows it.
        name: name of its file, without suffix.
        alt: what it shows, for those who cannot see it.
        draw: function that draws it.
        caption: what the page writes above it.
        on_page: whether the page shows it; its file is written in any case.
    """

    section: str
    name: str
    alt: str
    draw: Callable[[], Figure]
    caption: str = ""
    on_page: bool = True


def draw_figures(planned: Iterable[Planned], folder: Path) -> tuple[tuple[Path, ...], dict[str, list[dict[str, Any]]]]:
    """Draw figures, write each as a PNG file, and remove the files of earlier settings.

    Returns:
        The files, and by section what the page shows: "svg", "alt", "name" (the caption) and "width" in pixels of each figure.

    Raises:
        CannotWrite: the folder cannot be written to, or the disk is full.
    """
    files: list[Path] = []
    shown: dict[str, list[dict[str, Any]]] = {}
    for each in planned:
        with figure_style():
            figure = each.draw()
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laid out once for both files
            files.append(folder / f"{each.name}.png")
            with whole_file(files[-1]) as temporary:
                figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
            if each.on_page:
                width = round(105 * figure.get_figwidth())
                drawn = {"svg": inline_svg(figure, f"f{len(files)}-"), "alt": each.alt, "name": each.caption, "width": width}
                shown.setdefault(each.section, []).append(drawn)
    for old in set(folder.glob("*.png")) - set(files):
        old.unlink(missing_ok=True)
    return tuple(files), shown


@dataclass(frozen=True)
class PageTable:
    """A table of a page, as text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def study_page(
    title: str,
    *,
    protocol: Sequence[tuple[str, Sequence[str]]],
    tables: Sequence[PageTable],
    conclusions: Sequence[tuple[str, Sequence[str]]] = (),
    figures: Sequence[Mapping[str, Any]] = (),
    failures: Sequence[tuple[str, str]] = (),
) -> str:
    """The page of a study that needs no template of its own.

    Args:
        title: of the page.
        protocol: how the numbers were measured, as terms with their texts.
        tables: what was found.
        conclusions: what the numbers say, in sentences, by model.
        figures: from ``draw_figures``.
        failures: (sample, reason).
    """
    numbers = ", ".join(f"{name} {number}" for name, number in versions().items())
    shown = {"protocol": protocol, "tables": tables, "conclusions": conclusions, "figures": figures, "failures": failures}
    return page("study.html.j2", title=title, versions=numbers, **shown)


def write_tables(out: Path, texts: Mapping[str, str]) -> None:
    """Write text files by name, each completely or not at all.

    Raises:
        CannotWrite: the folder cannot be written to, or the disk is full.
    """
    for name, text in texts.items():
        write_text(out / name, text)


def json_text(values: Mapping[str, Any]) -> str:
    """Values as JSON text, the same bytes for the same values. NaN must be None already."""
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def plain_heading(settings: StudySettings, *classifiers: Classifier) -> dict[str, Any]:
    """What every summary states first: settings, versions, and the models with weights and precision."""
    models = [{"name": each.name, "weights_digest": each.weights_digest, "precision": each.precision} for each in classifiers]
    return {"settings": settings.plain(), "versions": versions(), **({"model": models[0]} if len(models) == 1 else {"models": models})}
