"""From results to tables: means with intervals, ranks, significance groups, cost, validity, and how far rankings depend on the fill."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import numpy as np

from attribution.explanation import Explanation
from evaluation.benchmark.methods import MethodSpec
from evaluation.benchmark.results import Failure, Results
from evaluation.metrics.registry import METRICS, Measure
from evaluation.statistics.comparisons import Comparison, holm, pairwise_tests, wilcoxon
from evaluation.statistics.intervals import Interval, bootstrap_interval
from evaluation.statistics.ranking import rank_agreement, ranks, significance_groups
from evaluation.statistics.validity import STABLE, SeedSpread, Validity, count_validity, seed_spread
from evaluation.study.records import stored_arrays
from evaluation.study.tables import csv_interval, csv_text, grouped

SIGNIFICANCE = 0.05
AXIS = np.linspace(0, 1, 101)  # share of the image on which curves of different steps are averaged
_CSV_COLUMNS = (
    *("model", "metric", "protocol", "direction", "rank", "method", "mean", "low", "high", "level", "interval", "group"),
    *("images", "missing", "failed", "constant_maps", "saturated", "area", "evaluations"),
    *("seeds", "seed_sd", "image_sd", "seed_rank_correlation"),
)
_COMPARISON_COLUMNS = (
    *("model", "metric", "protocol", "first", "second", "images", "difference", "low", "high"),
    *("sign_flip_p", "sign_flip_holm", "wilcoxon_p", "wilcoxon_holm"),
)
_SEED_MAPS = 20  # samples whose maps are compared between seeds


@dataclass(frozen=True)
class Entry:
    """One method under one measure on one model.

    Attributes:
        model, measure, method: which.
        interval: mean over the images with its bootstrap interval.
        rank: 1 is best; ties share the mean of their ranks.
        group: letters; two methods share one iff they are not significantly different (paired sign-flip test, Holm-corrected over
            all pairs of the column).
        validity: how many images count, and what makes them doubtful.
        area: mean share of the image at which the value is reached, for measures that have one.
        spread: between seeds, for stochastic methods that ran with several.
    """

    model: str
    measure: Measure
    method: str
    interval: Interval
    rank: float
    group: tuple[str, ...]
    validity: Validity
    area: float | None
    spread: SeedSpread | None


@dataclass(frozen=True)
class Cost:
    """What a method costs: images (masked maps, where only grids were explained) forwarded for one map, on average, and its family."""

    model: str
    method: str
    family: str
    evaluations: float


@dataclass(frozen=True, eq=False)
class MeanCurve:
    """Mean insertion and deletion curves of a method over all images, on ``AXIS``, with pointwise bootstrap bands: float64 [101]."""

    model: str
    method: str
    protocol: str
    insertion: np.ndarray
    insertion_band: tuple[np.ndarray, np.ndarray]
    deletion: np.ndarray
    deletion_band: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """Kendall's tau-b between the rankings of the methods by one metric under two protocols on one model, controls left out."""

    model: str
    metric: str
    first: str
    second: str
    tau: float


@dataclass(frozen=True)
class Summary:
    """A benchmark as tables show it.

    Attributes:
        results: what was found.
        entries: every cell of the leaderboards, in the order models, measures, then best first.
        comparisons: (model, measure) -> paired tests of all methods.
        costs: per model and method.
        curves: mean curves per model, method and protocol.
        agreements: the sensitivity panel.
        refused: methods and measures that are not defined for a model, with the reason.
    """

    results: Results
    entries: tuple[Entry, ...]
    comparisons: Mapping[tuple[str, Measure], Mapping[tuple[str, str], Comparison]]
    costs: tuple[Cost, ...]
    curves: tuple[MeanCurve, ...]
    agreements: tuple[Agreement, ...]
    refused: tuple[Failure, ...]

    def column(self, model: str, measure: Measure) -> tuple[Entry, ...]:
        """The methods under one measure on one model, best first."""
        return tuple(e for e in self.entries if e.model == model and e.measure == measure)

    def methods(self, model: str) -> tuple[str, ...]:
        """The methods that ran on a model: best first by the first measure, then those without a value under it."""
        ranked = [e.method for e in self.column(model, self.measures_of(model)[0])]
        return tuple(dict.fromkeys([*ranked, *(cost.method for cost in self.costs if cost.model == model)]))

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The columns."""
        return self.results.settings.measures

    def measures_of(self, model: str) -> tuple[Measure, ...]:
        """The columns that a model has scores in; all of them where it has none."""
        return tuple(measure for measure in self.measures if self.column(model, measure)) or self.measures

    def first_protocol(self, model: str) -> str:
        """Label of the first protocol that a model has scores under; of the first of all where it has none."""
        found = (m.protocol for m in self.measures_of(model) if METRICS[m.metric].curve)
        return next(found, self.results.settings.protocols[0].label())

    def first_of_images(self, model: str) -> Measure | None:
        """The first measure of single images, not grids, that a model has scores in."""
        return next((m for m in self.measures_of(model) if self.column(model, m) and not METRICS[m.metric].grid), None)

    def separation(self, model: str, measure: Measure) -> tuple[str, tuple[str, ...]] | None:
        """The best method under a measure, and those it cannot be told apart from; None where its mean has no interval."""
        column = self.column(model, measure)
        if not column or not np.isfinite(column[0].interval.low):
            return None
        best = column[0]
        return best.method, tuple(e.method for e in column[1:] if set(e.group) & set(best.group))


def score_matrix(results: Results, model: str, measure: Measure, seed: int | None = None) -> dict[str, np.ndarray]:
    """Scores by method, float64 [N] over the images (or grids) of a model, NaN where there is none."""
    positions = {sample: index for index, sample in enumerate(results.units(model, measure))}
    found: dict[str, np.ndarray] = {}
    for spec in results.settings.methods:
        scores = results.scores_of(model, measure, spec.label, seed)
        if scores:
            found[spec.label] = np.full(len(positions), np.nan)
            found[spec.label][[positions[score.sample] for score in scores]] = [score.value for score in scores]
    return found


def summarise(results: Results) -> Summary:
    """Compute every table of a benchmark. The same records give the same tables, also after an interruption."""
    entries: list[Entry] = []
    comparisons: dict[tuple[str, Measure], Mapping[tuple[str, str], Comparison]] = {}
    for model in results.models:
        stability = {spec.label: _map_correlation(results, model, spec) for spec in results.settings.methods}
        for measure in results.settings.measures:
            scores = score_matrix(results, model, measure)
            if scores:
                tests = pairwise_tests(scores, seed=results.settings.seed)
                comparisons[model, measure] = tests
                entries += _column(results, model, measure, scores, tests, stability)
    return Summary(
        results,
        tuple(entries),
        comparisons,
        tuple(_costs(results)),
        tuple(_mean_curves(results)),
        tuple(_agreements(results, entries)),
        tuple(failure for failure in results.failures if failure.refused),
    )


def summary_csv(summary: Summary) -> str:
    """The leaderboards as CSV text; the columns say which protocol a number belongs to."""
    costs = {(cost.model, cost.method): cost.evaluations for cost in summary.costs}
    return csv_text(_CSV_COLUMNS, (_csv_row(entry, costs[entry.model, entry.method]) for entry in summary.entries))


def _csv_row(e: Entry, evaluations: float) -> list[Any]:
    """A cell of a leaderboard as a row; no mean stands without its interval."""
    v, s, shown = e.validity, e.spread, math.isfinite(e.interval.low)
    return [
        *(e.model, e.measure.metric, e.measure.protocol, e.measure.direction, e.rank, e.method),
        *csv_interval(e.interval if shown else None),
        *((e.interval.level, e.interval.method) if shown else (None, None)),
        *(" ".join(e.group), v.finite, v.total - v.finite, v.failed, v.constant_maps, v.saturated, e.area, evaluations),
        *((None,) * 4 if s is None else (s.seeds, s.seed_sd, s.image_sd, s.rank_correlation)),
    ]


def comparisons_csv(summary: Summary) -> str:
    """Every paired test as CSV text: mean difference with its interval, sign-flip and Wilcoxon p, raw and Holm-corrected."""
    rows = []
    for (model, measure), tests in summary.comparisons.items():
        scores = score_matrix(summary.results, model, measure)
        signed_ranks = [wilcoxon(scores[a], scores[b]) for a, b in tests]
        for ((a, b), test), p, adjusted in zip(tests.items(), signed_ranks, holm(np.array(signed_ranks)), strict=True):
            numbers = (test.difference, test.low, test.high, test.p, test.adjusted_p, p, adjusted)
            rows.append([model, measure.metric, measure.protocol, a, b, test.count, *numbers])
    return csv_text(_COMPARISON_COLUMNS, rows)


def _column(
    results: Results,
    model: str,
    measure: Measure,
    scores: dict[str, np.ndarray],
    tests: Mapping[tuple[str, str], Comparison],
    stability: Mapping[str, float],
) -> list[Entry]:
    seed = results.settings.seed
    intervals = {method: bootstrap_interval(values, seed=seed) for method, values in scores.items()}
    means = {method: interval.estimate for method, interval in intervals.items()}
    placed = ranks(means, measure.direction)
    ordered = sorted(scores, key=lambda method: (placed[method], method))
    groups = significance_groups({method: means[method] for method in ordered}, tests, SIGNIFICANCE)
    return [
        Entry(
            model,
            measure,
            method,
            intervals[method],
            placed[method],
            groups[method],
            _validity(results, model, measure, method, scores[method]),
            _mean_area(results, model, measure, method),
            _spread(results, model, measure, method, stability[method]),
        )
        for method in ordered
    ]


def _validity(results: Results, model: str, measure: Measure, method: str, values: np.ndarray) -> Validity:
    on_grids = METRICS[measure.metric].grid
    found = results.grid_maps_of(model, measure, method) if on_grids else results.explained_of(model, method)
    units = [found.get(unit) for unit in results.units(model, measure)]
    flags = [(each is not None and each.constant, getattr(each, "saturated", False), each is None) for each in units]
    return count_validity(values, *np.array(flags, dtype=bool).reshape(-1, 3).T)


def _mean_area(results: Results, model: str, measure: Measure, method: str) -> float | None:
    areas = [score.area for score in results.scores_of(model, measure, method) if score.area is not None]
    return float(np.mean(areas)) if areas else None


def _spread(results: Results, model: str, measure: Measure, method: str, stability: float) -> SeedSpread | None:
    spec = next(spec for spec in results.settings.methods if spec.label == method)
    by_seed = [score_matrix(results, model, measure, seed).get(method) for seed in results.settings.seeds_of(spec)]
    scores = [values for values in by_seed if values is not None]
    if len(scores) < 2 or not np.isfinite(np.stack(scores)).all(axis=0).any():
        return None
    return replace(seed_spread(np.stack(scores)), rank_correlation=stability, stable=stability >= STABLE)


def _map_correlation(results: Results, model: str, spec: MethodSpec) -> float:
    """Mean rank correlation of a method's maps between its seeds; NaN with one seed."""
    by_seed = [results.explained_of(model, spec.label, seed) for seed in results.settings.seeds_of(spec)]
    samples = [sample for sample in results.samples[model] if all(sample in found for found in by_seed)][:_SEED_MAPS]
    if len(by_seed) < 2:
        return math.nan
    found = []
    for sample in samples:
        maps = np.stack([Explanation.load(explained[sample].path).values.numpy().ravel()[None] for explained in by_seed])
        found.append(seed_spread(np.zeros((len(by_seed), 1)), maps).rank_correlation)
    finite = [value for value in found if np.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def _costs(results: Results) -> list[Cost]:
    on_grids = grouped(results.grid_maps, lambda each: (each.model, each.method))
    found = []
    for model, spec in product(results.models, results.settings.methods):
        made = results.explained_of(model, spec.label).values() or on_grids.get((model, spec.label), [])
        if made:
            found.append(Cost(model, spec.label, spec.family, float(np.mean([each.evaluations for each in made]))))
    return found


def _mean_curves(results: Results) -> list[MeanCurve]:
    found, seed = [], results.settings.seed
    for model, spec, protocol in product(results.models, results.settings.methods, results.settings.protocols):
        label = protocol.label()
        curves = [stored_arrays(e.curves[label]) for e in results.explained_of(model, spec.label).values() if label in e.curves]
        if curves:
            insertion, deletion = (
                np.stack([np.interp(AXIS, c[f"{name}_area"], c[name]) for c in curves]) for name in ("insertion", "deletion")
            )
            bands = _band(insertion, seed), _band(deletion, seed)
            found.append(MeanCurve(model, spec.label, label, insertion.mean(0), bands[0], deletion.mean(0), bands[1]))
    return found


def _band(curves: np.ndarray, seed: int, resamples: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Pointwise 95 % percentile bootstrap over the images, [N, 101] -> two [101]."""
    counts = np.random.default_rng(seed).multinomial(len(curves), np.full(len(curves), 1 / len(curves)), size=resamples)
    means = counts @ curves / len(curves)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high


def _agreements(results: Results, entries: Sequence[Entry]) -> list[Agreement]:
    found = []
    labels = [protocol.label() for protocol in results.settings.protocols]
    # controls rank last under every protocol, which would raise tau
    controls = {spec.label for spec in results.settings.methods if spec.family == "control"}
    on_curves = grouped((e for e in entries if METRICS[e.measure.metric].curve), lambda e: (e.model, e.measure.metric))
    for (model, metric), column in on_curves.items():
        means: dict[str, dict[str, float]] = {label: {} for label in labels}
        for e in column:
            if e.method not in controls:
                means[e.measure.protocol][e.method] = e.interval.estimate
        for first, second in combinations(labels, 2):
            shared = [method for method in means[first] if method in means[second]]
            a, b = (np.array([means[label][method] for method in shared]) for label in (first, second))
            found.append(Agreement(model, metric, first, second, rank_agreement(a, b)))
    return found
