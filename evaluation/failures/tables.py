"""The failures of a data set as CSV and JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attribution.failure import AREAS
from evaluation.failures.results import Failed, FailureResults
from evaluation.failures.summary import FailureSummary, highest_within
from evaluation.study.report import plain_heading
from evaluation.study.tables import csv_interval, csv_number, csv_text, interval_columns, plain_values

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


def failures_csv(summary: FailureSummary) -> str:
    """One row a failure: what the model says, both smallest sets, the highest probabilities, where the cause lies, its cluster."""
    results, names = summary.results, summary.results.classifier.class_names
    suspected = {suspect.sample for suspect in summary.suspected}
    rows: list[list[Any]] = []
    for failed in results.failures:
        found, cluster = failed.found, summary.cluster_of[failed.sample]
        row: list[Any] = [results.classifier.name, failed.sample, failed.group or "", names[failed.label], names[failed.predicted]]
        row += [csv_number(found["probability_true"]), csv_number(found["probability_predicted"])]
        for kind in ("cause", "sufficient"):
            each = found[kind]
            row += [""] * 4 if each is None else [len(each["regions"]), *(csv_number(each[name]) for name in ("area", "true", "predicted"))]
        row += [csv_number(highest_within(failed, limit)) for limit in AREAS]
        row += [csv_number(summary.border_share.get(failed.sample)), csv_number(failed.on_mask), csv_number(failed.chance_on_mask)]
        row += ["" if cluster < 0 else cluster, "yes" if failed.sample in suspected else "", _relative(results, failed.truth)]
        rows.append([*row, found["text"]])
    return csv_text(_FAILURE_COLUMNS, rows)


def pairs_csv(summary: FailureSummary) -> str:
    """One row a pair of classes."""
    results, names = summary.results, summary.results.classifier.class_names
    return csv_text(
        _PAIR_COLUMNS,
        (
            [
                *(results.classifier.name, names[pair.label], names[pair.predicted], pair.seen),
                *(csv_number(pair.share), pair.count, pair.repaired),
                *(*csv_interval(pair.cause_area), *csv_interval(pair.sufficient_area)),
            ]
            for pair in summary.pairs
        ),
    )


def plain_summary(summary: FailureSummary) -> dict[str, Any]:
    """failures.json: settings, versions, everything summed up, and each failure without its curves, which records.jsonl holds."""
    results, names = summary.results, summary.results.classifier.class_names
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
    names = summary.results.classifier.class_names
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
