"""The failures of a data set as CSV, JSON and the atlas, and as tables in the terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evaluation.failures.atlas import conclusion, write_atlas
from evaluation.failures.summary import SIGNIFICANCE, FailureSummary, failures_csv, pairs_csv, plain_summary
from evaluation.statistics.intervals import Interval
from evaluation.study.page import write_text
from evaluation.study.report import ReportFiles
from evaluation.study.style import has_interval

_MOST_ROWS = 10  # of a table in the terminal
_NOTICED = 0.1  # share of failures whose class is in the fill already, from which that is said


def write_failures(summary: FailureSummary, out: str | Path, title: str | None = None) -> ReportFiles:
    """Write failures.csv, pairs.csv, failures.json and atlas.html; the same summary gives the same bytes.

    Raises:
        UserError: the folder cannot be written to, or the disk is full; each file is whole or not there.
    """
    out = Path(out)
    write_text(out / "failures.csv", failures_csv(summary))
    write_text(out / "pairs.csv", pairs_csv(summary))
    write_text(out / "failures.json", json.dumps(plain_summary(summary), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return ReportFiles(write_atlas(summary, out, title), out / "failures.csv", out / "failures.json", ())


def print_failures(summary: FailureSummary, console: Console) -> None:
    """Pairs, groups, clusters, what is suspected, and sentences on all of it."""
    if summary.results.failures:
        console.print(_pairs(summary))
        console.print(_highest(summary))
    if summary.groups:
        console.print(_groups(summary))
    if summary.clusters:
        console.print(_clusters(summary))
    for sentence in (*conclusion(summary), *_remarks(summary)):
        console.print(Text(sentence))
    for suspect in summary.suspected[:_MOST_ROWS]:
        console.print(Text(f"wrong label? {suspect.sample}: {suspect.reason}"))
    for shortcut in summary.shortcuts:
        console.print(Text(f"shortcut? {shortcut.text} p = {shortcut.p:.2g}"))
    if summary.results.failures:
        console.print(
            Text(
                "area to hide: of the smallest removal that makes the model right; area enough: of the smallest part that does alone; "
                f"95 % bootstrap intervals; * differs from the rest ({SIGNIFICANCE:.0%}, Holm)",
                "dim",
            )
        )


def _pairs(summary: FailureSummary) -> Table:
    names = summary.results.classifier.class_names
    table = _table(
        summary, "classes confused", ("label", "predicted"), ("images", "of the label", "repaired", "area to hide", "area enough")
    )
    for pair in summary.pairs[:_MOST_ROWS]:
        table.add_row(
            Text(names[pair.label]),
            Text(names[pair.predicted]),
            str(pair.seen),
            _share(pair.share),
            f"{pair.repaired} of {pair.count}",
            _percent(pair.cause_area),
            _percent(pair.sufficient_area),
        )
    return table


def _highest(summary: FailureSummary) -> Table:
    columns = [f"{limit:.0%}" for limit in summary.highest]
    table = _table(summary, "highest probability of the true class with at most this share of the image shown", (), columns)
    table.add_row(*(_mean(interval) for interval in summary.highest.values()))
    return table


def _groups(summary: FailureSummary) -> Table:
    table = _table(summary, "groups", ("group",), ("images", "wrong", "error rate", "area to hide"))
    for row in summary.groups[:_MOST_ROWS]:
        marks = ["*" if p < SIGNIFICANCE else "" for p in (row.p_error, row.p_area)]
        table.add_row(
            Text(row.group), str(row.images), str(row.wrong), _percent(row.error_rate) + marks[0], _percent(row.cause_area) + marks[1]
        )
    return table


def _clusters(summary: FailureSummary) -> Table:
    names = summary.results.classifier.class_names
    table = _table(summary, "clusters of causes that look alike to the model", ("cluster", "most often", "typical"), ("failures", "p"))
    for cluster in summary.clusters:
        label, predicted = (names[index] for index in cluster.top_pair)
        p = f"{cluster.tightness_p:.3f}" if math.isfinite(cluster.tightness_p) else ""
        table.add_row(str(cluster.number), Text(f"{label} as {predicted}"), Text(cluster.medoid), str(len(cluster.members)), p)
    return table


def _remarks(summary: FailureSummary) -> list[str]:
    """What a reader must know to judge the conclusions."""
    text = []
    for name, what in (("border", "at the border"), ("background", "off the object")):
        chance = summary.by_chance.get(name)
        if chance is not None and has_interval(chance):
            text.append(f"As many random regions would lie {what} in {_percent(chance)} of these failures.")
    fill = summary.fill_right
    if fill is not None and fill.estimate >= _NOTICED:
        text.append(
            f"Note: of {fill.estimate:.0%} of these failures the fill alone is the true class to the model, so that little is enough; "
            "try another fill."
        )
    return text


def _table(summary: FailureSummary, title: str, left: tuple[str, ...], right: tuple[str, ...] | list[str]) -> Table:
    heading = Text(f"{summary.results.classifier.name}: {title}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title=heading, title_justify="left")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _share(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else ""


def _percent(interval: Interval) -> str:
    if not math.isfinite(interval.estimate):
        return ""
    ends = f" [{100 * interval.low:.0f}, {100 * interval.high:.0f}]" if has_interval(interval) else ""
    return f"{100 * interval.estimate:.0f} %{ends}"


def _mean(interval: Interval) -> str:
    if not math.isfinite(interval.estimate):
        return ""
    ends = f" [{interval.low:.2f}, {interval.high:.2f}]" if has_interval(interval) else ""
    return f"{interval.estimate:.2f}{ends}"
