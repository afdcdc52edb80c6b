"""Results -> tables: means with intervals, ranks, significance groups, cost, validity, and how far rankings depend on the fill."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from attribution.explanation import Explanation
from evaluation.metrics import Measure
from evaluation.results import Explained, Failure, Results
from evaluation.statistics import (
    STABLE,
    Comparison,
    Interval,
    SeedSpread,
    Validity,
    bootstrap_interval,
    count_validity,
    pairwise_tests,
    rank_agreement,
    ranks,
    seed_spread,
    significance_groups,
)

SIGNIFICANCE = 0.05
AXIS = np.linspace(0, 1, 101)  # share of the image on which curves of different steps are averaged
_CSV_COLUMNS = (
    *("model", "metric", "protocol", "direction", "rank", "method", "mean", "low", "high", "level", "interval", "group"),
    *("images", "missing", "failed", "constant_maps", "saturated", "area", "evaluations"),
    *("seeds", "seed_sd", "image_sd", "seed_rank_correlation"),
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
    """What a method costs: images forwarded for one explanation, mean over the images, and its family."""

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
    """Kendall's tau-b between the rankings of all methods by one metric under two protocols on one model."""

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
        refused: methods that are not defined for a model, with the reason.
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
        """The methods that ran on a model, best first by the first measure."""
        return tuple(e.method for e in self.column(model, self.measures[0]))

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The columns."""
        return tuple(measure for measure, _ in self.results.settings.measured())

    def separation(self, model: str, measure: Measure) -> tuple[str, tuple[str, ...]]:
        """The best method under a measure, and the methods that it cannot be told apart from."""
        column = self.column(model, measure)
        best = column[0]
        return best.method, tuple(e.method for e in column[1:] if set(e.group) & set(best.group))


def score_matrix(results: Results, model: str, measure: Measure, seed: int | None = None) -> dict[str, np.ndarray]:
    """Scores by method, float64 [N] over the images of a model, NaN where there is none."""
    seed = results.settings.seed if seed is None else seed
    positions = {sample: index for index, sample in enumerate(results.samples[model])}
    found: dict[str, np.ndarray] = {}
    for score in results.scores:
        if score.model == model and score.measure == measure and score.seed == seed:
            found.setdefault(score.method, np.full(len(positions), np.nan))[positions[score.sample]] = score.value
    order = [spec.label for spec in results.settings.methods]
    return {method: found[method] for method in order if method in found}


def summarise(results: Results) -> Summary:
    """Every table of a benchmark; deterministic, and the same for a run that was interrupted."""
    entries: list[Entry] = []
    comparisons: dict[tuple[str, Measure], Mapping[tuple[str, str], Comparison]] = {}
    for model in results.models:
        for measure, _ in results.settings.measured():
            scores = score_matrix(results, model, measure)
            if scores:
                tests = pairwise_tests(scores, seed=results.settings.seed)
                comparisons[model, measure] = tests
                entries += _column(results, model, measure, scores, tests)
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
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    costs = {(cost.model, cost.method): cost.evaluations for cost in summary.costs}
    for e in summary.entries:
        spread: list[object] = ["", "", "", ""]
        if e.spread is not None:
            spread = [e.spread.seeds, *map(_number, (e.spread.seed_sd, e.spread.image_sd, e.spread.rank_correlation))]
        v = e.validity
        writer.writerow(
            [
                e.model, e.measure.metric, e.measure.protocol, e.measure.direction, _number(e.rank), e.method,
                _number(e.interval.estimate), _number(e.interval.low), _number(e.interval.high), e.interval.level, e.interval.method,
                " ".join(e.group), v.finite, v.total - v.finite, v.failed, v.constant_maps, v.saturated,
                "" if e.area is None else _number(e.area), _number(costs[e.model, e.method]), *spread,
            ]
        )  # fmt: skip
    return buffer.getvalue()


def _number(value: float) -> str:
    return f"{value:.6g}"


def _column(
    results: Results, model: str, measure: Measure, scores: dict[str, np.ndarray], tests: Mapping[tuple[str, str], Comparison]
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
            _validity(results, model, method, scores[method]),
            _mean_area(results, model, measure, method),
            _spread(results, model, measure, method),
        )
        for method in ordered
    ]


def _explained(results: Results, model: str, method: str, seed: int) -> dict[str, Explained]:
    return {e.sample: e for e in results.explained if e.model == model and e.method == method and e.seed == seed}


def _validity(results: Results, model: str, method: str, values: np.ndarray) -> Validity:
    found = _explained(results, model, method, results.settings.seed)
    samples = results.samples[model]
    constant = np.array([sample in found and found[sample].constant for sample in samples])
    saturated = np.array([sample in found and found[sample].saturated for sample in samples])
    failed = np.array([sample not in found for sample in samples])
    return count_validity(values, constant, saturated, failed)


def _mean_area(results: Results, model: str, measure: Measure, method: str) -> float | None:
    wanted = (model, measure, method, results.settings.seed)
    areas = [s.area for s in results.scores if (s.model, s.measure, s.method, s.seed) == wanted and s.area is not None]
    return float(np.mean(areas)) if areas else None


def _spread(results: Results, model: str, measure: Measure, method: str) -> SeedSpread | None:
    spec = next(spec for spec in results.settings.methods if spec.label == method)
    seeds = results.settings.seeds_of(spec)
    if len(seeds) < 2:
        return None
    scores = np.stack([score_matrix(results, model, measure, seed)[method] for seed in seeds])
    if not np.isfinite(scores).all(axis=0).any():
        return None
    by_seed = [_explained(results, model, method, seed) for seed in seeds]
    samples = [sample for sample in results.samples[model] if all(sample in found for found in by_seed)][:_SEED_MAPS]
    correlations = []
    for sample in samples:
        maps = np.stack([_map_of(found[sample]).ravel()[None] for found in by_seed])
        column = scores[:, [results.samples[model].index(sample)]]
        correlations.append(seed_spread(column, maps).rank_correlation)
    finite = [value for value in correlations if np.isfinite(value)]
    correlation = float(np.mean(finite)) if finite else float("nan")
    return replace(seed_spread(scores), rank_correlation=correlation, stable=correlation >= STABLE)


def _map_of(explained: Explained) -> np.ndarray:
    explanation = Explanation.load(explained.path)
    values = explanation.pixel_map if explanation.pixel_map is not None else explanation.heatmap
    return values.numpy()


def _costs(results: Results) -> list[Cost]:
    found = []
    for model in results.models:
        for spec in results.settings.methods:
            explained = _explained(results, model, spec.label, results.settings.seed)
            if explained:
                found.append(Cost(model, spec.label, spec.family, float(np.mean([e.evaluations for e in explained.values()]))))
    return found


def _mean_curves(results: Results) -> list[MeanCurve]:
    found = []
    for model in results.models:
        for spec in results.settings.methods:
            explained = _explained(results, model, spec.label, results.settings.seed).values()
            for protocol in [p.label() for p in results.settings.protocols]:
                paths = [e.curves[protocol] for e in explained if protocol in e.curves]
                if not paths:
                    continue
                insertion, deletion = [], []
                for path in paths:
                    with np.load(path, allow_pickle=False) as arrays:
                        insertion.append(np.interp(AXIS, arrays["insertion_area"], arrays["insertion"]))
                        deletion.append(np.interp(AXIS, arrays["deletion_area"], arrays["deletion"]))
                first, second = np.stack(insertion), np.stack(deletion)
                seed = results.settings.seed
                found.append(MeanCurve(model, spec.label, protocol, first.mean(0), _band(first, seed), second.mean(0), _band(second, seed)))
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
    for model in results.models:
        metrics = dict.fromkeys(e.measure.metric for e in entries if e.model == model and e.measure.protocol)
        for metric in metrics:
            means: dict[str, dict[str, float]] = {label: {} for label in labels}
            for e in entries:
                if e.model == model and e.measure.metric == metric:
                    means[e.measure.protocol][e.method] = e.interval.estimate
            for first, second in combinations(labels, 2):
                shared = [method for method in means[first] if method in means[second]]
                a, b = (np.array([means[label][method] for method in shared]) for label in (first, second))
                found.append(Agreement(model, metric, first, second, rank_agreement(a, b)))
    return found
