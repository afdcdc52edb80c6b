"""Computes means with intervals over images, and differences from the published search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.pareto.settings import BEST, REFERENCE, ParetoResults, Point
from evaluation.statistics.comparisons import sign_flip
from evaluation.statistics.intervals import Interval, bootstrap_interval
from evaluation.study.tables import csv_interval, csv_text, grouped, interval_columns


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
        gap: mean of what the best order of the same images has more; None for the exact search itself, and where it was not measured.
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
    gap: Interval | None = None


@dataclass(frozen=True)
class ParetoSummary:
    """The results and their rows."""

    results: ParetoResults
    rows: tuple[Row, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """A sentence for each model and partition in which some method has no row within some budget."""
        settings = self.results.settings
        wanted = [(method, budget) for method in settings.methods for budget in settings.budgets_of(method)]
        found = []
        for model, partition in self.results.points:
            known = {(row.method, row.budget) for row in self.rows if (row.model, row.partition) == (model, partition)}
            if names := [row_name(*each) for each in wanted if each not in known]:
                reasons = "the budget is too small, or it failed or is not measured yet"
                found.append(f"{model}, {partition}: no image has an order of {', '.join(names)}: {reasons}.")
        return tuple(found)


def row_name(method: str, budget: int) -> str:
    """What tables call a method within a budget."""
    return f"{method} {budget}" if budget else method


def summarise_pareto(results: ParetoResults) -> ParetoSummary:
    """A row for each model, partition, method and budget, in the order of the settings."""
    points = results.points.items()
    return ParetoSummary(results, tuple(row for (model, name), found in points for row in _rows(results, model, name, found)))


def _rows(results: ParetoResults, model: str, partition: str, by_sample: Mapping[str, Sequence[Point]]) -> Iterator[Row]:
    seed = results.settings.seed
    found = grouped(
        ((sample, point) for sample, points in by_sample.items() for point in points), lambda each: (each[1].method, each[1].budget)
    )
    reference, best = ({sample: point.difference for sample, point in found.get((name, 0), [])} for name in (REFERENCE, BEST))
    place = {method: at for at, method in enumerate(results.settings.methods)}
    for (method, budget), members in sorted(found.items(), key=lambda item: (place[item[0][0]], item[0][1])):
        points = [point for _, point in members]
        paired = [(point.difference, reference[sample]) for sample, point in members if sample in reference]
        own, theirs = np.array(paired).reshape(-1, 2).T
        compared = method != REFERENCE and len(paired) > 1
        below = [best[sample] - point.difference for sample, point in members if sample in best and method != BEST]
        yield Row(
            model=model,
            partition=partition,
            method=method,
            budget=budget,
            evaluations=float(np.mean([point.evaluations for point in points])),
            quality=bootstrap_interval([point.difference for point in points], seed=seed),
            insertion=bootstrap_interval([point.insertion for point in points], seed=seed),
            deletion=bootstrap_interval([point.deletion for point in points], seed=seed),
            gain=bootstrap_interval(own - theirs, seed=seed) if compared else None,
            p=sign_flip(own, theirs, seed=seed) if compared else float("nan"),
            gap=bootstrap_interval(below, seed=seed) if len(below) > 1 else None,
        )


def pareto_csv(rows: Iterable[Row]) -> str:
    """The rows as a table with one line each."""
    names = interval_columns("quality", "insertion", "deletion", "gain")
    columns = ["model", "regions", "method", "budget", "evaluations", "images", *names, "p", *interval_columns("gap")]
    return csv_text(
        columns,
        (
            [
                *(row.model, row.partition, row.method, row.budget or None, row.evaluations, row.quality.count),
                *(row.quality, row.insertion, row.deletion, *csv_interval(row.gain), row.p, *csv_interval(row.gap)),
            ]
            for row in rows
        ),
    )
