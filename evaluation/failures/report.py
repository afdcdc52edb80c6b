"""The failures of a data set as CSV, JSON and the atlas, and as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evaluation.failures.atlas import conclusion, write_atlas
from evaluation.failures.summary import SIGNIFICANCE, FailureSummary
from evaluation.failures.tables import failures_csv, pairs_csv, plain_summary
from evaluation.study.report import ReportFiles, json_text, write_tables
from evaluation.study.style import has_interval
from evaluation.study.tables import mean, p_value, percent

_MOST_ROWS = 10  # of a table in the terminal
_NOTICED = 0.1  # a remark is made from this share of failures on whose true class the fill alone suffices


def write_failures(summary: FailureSummary, out: str | Path) -> ReportFiles:
    """Write failures.csv, pairs.csv, failures.json and atlas.html; the same summary gives the same bytes.

    Raises:
        CannotWrite: the folder cannot be written to, or the disk is full; each file is whole or not there.
    """
    out = Path(out)
    texts = {"failures.csv": failures_csv(summary), "pairs.csv": pairs_csv(summary), "failures.json": json_text(plain_summary(summary))}
    write_tables(out, texts)
    return ReportFiles(write_atlas(summary, out), out / "failures.csv", out / "failures.json")


def print_failures(summary: FailureSummary, console: Console) -> None:
    """Print pairs, groups, clusters, suspected labels and shortcuts, and sentences on all of it."""
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
                "area to hide: share of the image that the smallest removal hides to make the model right; area enough: share that the "
                f"smallest sufficient part shows; 95 % bootstrap intervals; * differs from the rest ({SIGNIFICANCE:.0%}, Holm)",
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
            f"{pair.share:.1%}" if pair.share >= 0 else "",
            f"{pair.repaired} of {pair.count}",
            percent(pair.cause_area),
            percent(pair.sufficient_area),
        )
    return table


def _highest(summary: FailureSummary) -> Table:
    columns = [f"{limit:.0%}" for limit in summary.highest]
    table = _table(summary, "highest probability of the true class with at most this share of the image shown", (), columns)
    table.add_row(*(mean(interval) for interval in summary.highest.values()))
    return table


def _groups(summary: FailureSummary) -> Table:
    table = _table(summary, "groups", ("group",), ("images", "wrong", "error rate", "area to hide"))
    for row in summary.groups[:_MOST_ROWS]:
        marks = ["*" if p < SIGNIFICANCE else "" for p in (row.p_error, row.p_area)]
        table.add_row(
            Text(row.group), str(row.images), str(row.wrong), percent(row.error_rate) + marks[0], percent(row.cause_area) + marks[1]
        )
    return table


def _clusters(summary: FailureSummary) -> Table:
    names = summary.results.classifier.class_names
    table = _table(summary, "clusters of causes that look alike to the model", ("cluster", "most often", "typical"), ("failures", "p"))
    for cluster in summary.clusters:
        label, predicted = (names[index] for index in cluster.top_pair)
        table.add_row(
            str(cluster.number),
            Text(f"{label} as {predicted}"),
            Text(cluster.medoid),
            str(len(cluster.members)),
            p_value(cluster.tightness_p),
        )
    return table


def _remarks(summary: FailureSummary) -> list[str]:
    """Sentences that a reader needs to judge the conclusions."""
    text = []
    for name, what in (("border", "at the border"), ("background", "off the object")):
        chance = summary.by_chance.get(name)
        if chance is not None and has_interval(chance):
            text.append(f"As many random regions would lie {what} in {percent(chance)} of these failures.")
    fill = summary.fill_right
    if fill is not None and fill.estimate >= _NOTICED:
        text.append(
            f"Note: in {fill.estimate:.0%} of these failures the model sees the true class in the fill alone, so that a small part is "
            "enough; try another fill."
        )
    return text


def _table(summary: FailureSummary, title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    heading = Text(f"{summary.results.classifier.name}: {title}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title=heading, title_justify="left")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table
