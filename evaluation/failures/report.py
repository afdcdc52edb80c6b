"""The failures of a data set as CSV, JSON and the atlas, and as tables in the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from attribution.failure import AREAS
from evaluation.failures.atlas import conclusion, write_atlas
from evaluation.failures.results import Failed, FailureResults
from evaluation.failures.summary import SIGNIFICANCE, FailureSummary, highest_within
from evaluation.study.report import ReportFiles, json_text, plain_heading, write_tables
from evaluation.study.style import has_interval
from evaluation.study.tables import csv_text, interval_columns, mean, p_value, percent, plain_values, terminal_table

_MOST_ROWS = 10  # of a table in the terminal
_NOTICED = 0.1  # a remark is made from this share of failures on whose true class the fill alone suffices

_FAILURE_COLUMNS = (
    *("model", "sample", "group", "label", "predicted", "probability_true", "probability_predicted"),
    *(f"{kind}_{what}" for kind in ("cause", "sufficient") for what in ("regions", "area", "true", "predicted")),
    *(f"highest_{limit:g}" for limit in AREAS),
    *("border_share", "on_object", "on_object_by_chance", "cluster", "suspected_label", "explanation", "text"),
)
_PAIR_COLUMNS = (
    *("model", "label", "predicted", "images", "share_of_label", "explained", "repaired"),
    *interval_columns("cause_area", "sufficient_area"),
)
_ONLY_IN_RECORDS = ("curves", "truth_order", "mistake_order", "truth_area", "mistake_area", "causes", "true", "predicted")


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
    for table in _tables(summary):
        console.print(table)
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


def _tables(summary: FailureSummary) -> Iterator[Table]:
    """What the failures have in common, at most ten rows a table."""
    names = summary.results.names

    def table(title: str, left: Sequence[str], right: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
        return terminal_table(f"{summary.results.classifier.name}: {title}", [*left, *right], rows, left, right)

    if summary.results.failures:
        rows = [
            [
                *(names[pair.label], names[pair.predicted], str(pair.seen), f"{pair.share:.1%}" if pair.share >= 0 else ""),
                *(f"{pair.repaired} of {pair.count}", percent(pair.cause_area), percent(pair.sufficient_area)),
            ]
            for pair in summary.pairs[:_MOST_ROWS]
        ]
        columns = ("images", "of the label", "repaired", "area to hide", "area enough")
        yield table("classes confused", ("label", "predicted"), columns, rows)
        title = "highest probability of the true class with at most this share of the image shown"
        yield table(title, (), [f"{limit:.0%}" for limit in summary.highest], [list(map(mean, summary.highest.values()))])
    if summary.groups:
        rows = [
            [
                *(row.group, str(row.images), str(row.wrong)),
                *(
                    f"{percent(each)}{'*' * (p < SIGNIFICANCE)}"
                    for each, p in ((row.error_rate, row.p_error), (row.cause_area, row.p_area))
                ),
            ]
            for row in summary.groups[:_MOST_ROWS]
        ]
        yield table("groups", ("group",), ("images", "wrong", "error rate", "area to hide"), rows)
    if summary.clusters:
        rows = [
            [str(each.number), " as ".join(names[c] for c in each.top_pair), each.medoid, str(len(each.members)), p_value(each.tightness_p)]
            for each in summary.clusters
        ]
        title = "clusters of causes that look alike to the model"
        yield table(title, ("cluster", "most often", "typical"), ("failures", "p"), rows)


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


def failures_csv(summary: FailureSummary) -> str:
    """One row a failure: what the model says, both smallest sets, the highest probabilities, where the cause lies, its cluster."""
    results, names = summary.results, summary.results.names
    suspected = {suspect.sample for suspect in summary.suspected}
    rows: list[list[Any]] = []
    for failed in results.failures:
        found, cluster = failed.found, summary.cluster_of[failed.sample]
        row: list[Any] = [results.classifier.name, failed.sample, failed.group, names[failed.label], names[failed.predicted]]
        row += [found["probability_true"], found["probability_predicted"]]
        for kind in ("cause", "sufficient"):
            each = found[kind]
            row += [None] * 4 if each is None else [len(each["regions"]), each["area"], each["true"], each["predicted"]]
        row += [highest_within(failed, limit) for limit in AREAS]
        row += [summary.border_share.get(failed.sample), failed.on_mask, failed.chance_on_mask, None if cluster < 0 else cluster]
        rows.append([*row, "yes" if failed.sample in suspected else None, _relative(results, failed.truth), found["text"]])
    return csv_text(_FAILURE_COLUMNS, rows)


def pairs_csv(summary: FailureSummary) -> str:
    """One row a pair of classes."""
    name, names = summary.results.classifier.name, summary.results.names
    rows = (
        [name, names[p.label], names[p.predicted], p.seen, p.share, p.count, p.repaired, p.cause_area, p.sufficient_area]
        for p in summary.pairs
    )
    return csv_text(_PAIR_COLUMNS, rows)


def plain_summary(summary: FailureSummary) -> dict[str, Any]:
    """failures.json: settings, versions, everything summed up, and each failure without its curves, which records.jsonl holds."""
    results, names = summary.results, summary.results.names
    return {
        **plain_heading(results.settings, results.classifier),
        "looked_at": results.looked_at,
        "right": results.right,
        "explained": len(results.failures),
        "confusions": [{"label": names[a], "predicted": names[b], "images": n} for (a, b), n in results.confusions.items()],
        "pairs": [_with_names(pair, names) for pair in summary.pairs],
        "shares": plain_values(summary.shares),
        "shares_by_chance": plain_values(summary.by_chance),
        "true_class_in_fill": plain_values(summary.fill_right),
        "highest_confidence": {f"{limit:g}": plain_values(interval) for limit, interval in summary.highest.items()},
        "clusters": [plain_values({**vars(c), "top_pair": [names[index] for index in c.top_pair]}) for c in summary.clusters],
        "unclustered": summary.unclustered,
        "suspected": [_with_names(suspect, names) for suspect in summary.suspected],
        "shortcuts": [plain_values(vars(shortcut)) for shortcut in summary.shortcuts],
        "groups": [plain_values(vars(row)) for row in summary.groups],
        "failures": [_plain_failure(failed, summary) for failed in results.failures],
        "broken": [{"sample": sample, "reason": reason} for sample, reason in results.broken],
    }


def _plain_failure(failed: Failed, summary: FailureSummary) -> dict[str, Any]:
    names = summary.results.names
    return {
        "sample": failed.sample,
        "group": failed.group,
        "label": names[failed.label],
        "predicted": names[failed.predicted],
        **{name: value for name, value in failed.found.items() if name not in _ONLY_IN_RECORDS},
        "border_share": plain_values(summary.border_share.get(failed.sample)),
        "on_object": failed.on_mask,
        "on_object_by_chance": failed.chance_on_mask,
        "cluster": summary.cluster_of[failed.sample],
        "explanation": _relative(summary.results, failed.truth),
    }


def _with_names(row: Any, names: Sequence[str]) -> Any:
    return plain_values({**vars(row), "label": names[row.label], "predicted": names[row.predicted]})


def _relative(results: FailureResults, path: Path) -> str:
    return Path(os.path.relpath(path, results.out)).as_posix()
