"""From the points of images to means with intervals, and to differences from the published search."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from evaluation.pareto.settings import REFERENCE, ParetoResults
from evaluation.statistics.comparisons import sign_flip
from evaluation.statistics.intervals import Interval, bootstrap_interval


@dataclass(frozen=True)
class Row:
    """One method within one budget, over the images.

    Attributes:
        model, partition: of the settings.
        method, budget: see ``Point``.
        evaluations: mean number of images forwarded.
        quality: mean Insertion - Deletion.
        insertion, deletion: means.
        gain: mean difference of Insertion - Deletion from the bidirectional search on the same images; None for that search
            itself, and where it was not measured.
        p: of the paired test of that difference; NaN where there is none.
    """

    model: str
    partition: str
    method: str
    budget: int
    evaluations: float
    quality: Interval
    insertion: Interval
    deletion: Interval
    gain: Interval | None
    p: float


def summarise_pareto(results: ParetoResults) -> tuple[Row, ...]:
    """A row for each method and budget, in the order of the settings."""
    seed = results.settings.seed
    found: dict[tuple[str, int], dict[str, tuple[float, float, float]]] = {}
    for sample, points in results.points.items():
        for point in points:
            found.setdefault((point.method, point.budget), {})[sample] = (point.evaluations, point.insertion, point.deletion)
    reference = {sample: values[1] - values[2] for sample, values in found.get((REFERENCE, 0), {}).items()}
    rows = []
    place = {method: at for at, method in enumerate(results.settings.methods)}
    for (method, budget), by_sample in sorted(found.items(), key=lambda item: (place[item[0][0]], item[0][1])):
        values = np.array(list(by_sample.values()))
        paired = [sample for sample in by_sample if sample in reference]
        own = np.array([by_sample[sample][1] - by_sample[sample][2] for sample in paired])
        theirs = np.array([reference[sample] for sample in paired])
        compared = method != REFERENCE and len(paired) > 1
        rows.append(
            Row(
                model=results.model,
                partition=results.settings.partition,
                method=method,
                budget=budget,
                evaluations=float(values[:, 0].mean()),
                quality=bootstrap_interval(values[:, 1] - values[:, 2], seed=seed),
                insertion=bootstrap_interval(values[:, 1], seed=seed),
                deletion=bootstrap_interval(values[:, 2], seed=seed),
                gain=bootstrap_interval(own - theirs, seed=seed) if compared else None,
                p=sign_flip(own, theirs, seed=seed) if compared else float("nan"),
            )
        )
    return tuple(rows)


def pareto_csv(rows: Iterable[Row]) -> str:
    """The rows as a table with one line each."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = ("quality", "insertion", "deletion", "gain")
    heads = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    writer.writerow(["model", "regions", "method", "budget", "evaluations", "images", *heads, "p"])
    for row in rows:
        intervals = [getattr(row, name) for name in names]
        ends = ["" if each is None else f"{value:.6g}" for each in intervals for value in _ends(each)]
        head = [row.model, row.partition, row.method, row.budget or "", f"{row.evaluations:.6g}", row.quality.count]
        writer.writerow([*head, *ends, "" if np.isnan(row.p) else f"{row.p:.6g}"])
    return file.getvalue()


def _ends(interval: Interval | None) -> tuple[float, float, float]:
    return (np.nan,) * 3 if interval is None else (interval.estimate, interval.low, interval.high)
