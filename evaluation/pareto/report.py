"""The table and the figure of quality against evaluations, and the page that shows both."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rich.console import Console

from evaluation.pareto.figures import plot_pareto
from evaluation.pareto.settings import ParetoResults
from evaluation.pareto.summary import ParetoSummary, Row, pareto_csv, row_name
from evaluation.study.page import write_text
from evaluation.study.report import PageTable, Planned, ReportFiles, draw_figures, json_text, plain_heading, study_page, write_tables
from evaluation.study.tables import estimated, plain_values, terminal_table

_HEADINGS = ("model", "regions", "method", "images forwarded", "images", "insertion - deletion", "against bidirectional", "p")
_GAP = "below the best order"


def write_pareto(summary: ParetoSummary, out: str | Path) -> ReportFiles:
    """Write pareto.csv, pareto.json, figures/pareto.png and report.html; the same summary gives the same bytes.

    Raises:
        CannotWrite: the folder cannot be written to, or the disk is full; each file is whole or not there.
    """
    out = Path(out)
    plain = {**plain_heading(summary.results.settings), "rows": [plain_values(vars(row)) for row in summary.rows]}
    plain["failures"] = [{"sample": sample, "reason": reason} for sample, reason in summary.results.failures]
    write_tables(out, {"pareto.csv": pareto_csv(summary.rows), "pareto.json": json_text(plain)})
    alt = "Insertion - deletion over the images forwarded, a line or a point for each method"
    files, shown = draw_figures([Planned("quality", "pareto", alt, partial(plot_pareto, summary.rows))], out / "figures")
    text = study_page(
        f"Quality against evaluations on {plain['settings']['data']}",
        protocol=[("Measured", [protocol_of(summary.results)]), *([("Without a row", summary.missing)] if summary.missing else [])],
        tables=[PageTable("Insertion - deletion, with the 95 % bootstrap interval over images", *_table(summary))],
        figures=shown["quality"],
        failures=summary.results.failures,
    )
    write_text(out / "report.html", text)
    return ReportFiles(out / "report.html", out / "pareto.csv", out / "pareto.json", files)


def print_pareto(summary: ParetoSummary, console: Console) -> None:
    """A row for each method within each budget, and what has none."""
    headings, rows = _table(summary)
    console.print(terminal_table(protocol_of(summary.results), headings, rows, headings[:3]))
    for sentence in summary.missing:
        console.print(sentence, markup=False)


def protocol_of(results: ParetoResults) -> str:
    """The protocol under which the numbers were measured, in words."""
    settings = results.settings
    return f"fill {settings.fill}, region steps, probability of the label, exact share of pixels, seed {settings.seed}"


def _table(summary: ParetoSummary) -> tuple[tuple[str, ...], list[list[str]]]:
    """Headings and rows; with the gap to the best order where it is known."""
    known = any(row.gap is not None for row in summary.rows)
    gaps = [[] if not known else ["" if row.gap is None else estimated(row.gap, "{:.3f}".format)] for row in summary.rows]
    rows = [[*cells(row), *gap] for row, gap in zip(summary.rows, gaps, strict=True)]
    return (*_HEADINGS, *([_GAP] if known else [])), rows


def cells(row: Row) -> list[str]:
    """A row of the table as text, without the gap."""
    name, quality = row_name(row.method, row.budget), estimated(row.quality, "{:.3f}".format)
    gain = "" if row.gain is None else estimated(row.gain, "{:+.3f}".format)
    p = "" if row.gain is None else f"{row.p:.4f}"
    return [row.model, row.partition, name, f"{row.evaluations:.0f}", str(row.quality.count), quality, gain, p]
