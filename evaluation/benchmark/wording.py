"""Benchmark results in plain language: the sentences, names and numbers that the page and the terminal share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from evaluation.benchmark.summary import SIGNIFICANCE, Agreement, Entry, Summary
from evaluation.metrics.registry import METRICS, Measure, metric_title
from evaluation.statistics.comparisons import EXACT_COUNT
from evaluation.study.tables import counted, grouped, listed

ARROWS = {"higher": "↑", "lower": "↓"}
LETTERS = f"letters: methods that share one are not told apart (paired sign-flip test, Holm over all pairs, {SIGNIFICANCE:.0%})"


def conclusions(summary: Summary, model: str) -> list[str]:
    """One plain sentence for each leader under the first protocol, one on all columns, and one where the images are too few."""
    head = _head_measures(summary, model)
    if not head:
        return [f"{judged(summary, model)}: no mean has an interval, so nothing is concluded."]
    leaders: dict[str, list[tuple[Measure, str]]] = {}
    for measure in head:
        decided = summary.separation(model, measure)
        if decided is not None:
            best, others = decided
            leaders.setdefault(best, []).append((measure, _separated(others, len(summary.column(model, measure)) - 1)))
    found = []
    families = {spec.label: spec.family for spec in summary.results.settings.methods}
    kind = "On grids at layer" if METRICS[head[0].metric].grid else "Under protocol"
    under = f"{kind} ({head[0].protocol}), " if head[0].protocol else ""
    for leader, led in leaders.items():
        name = f"{leader} (a control)" if families[leader] == "control" else leader
        clauses = {clause for _, clause in led}
        if len(clauses) == 1:
            sentence = f"{name} leads {listed(metric_title(m.metric) for m, _ in led)}, {clauses.pop()}."
        else:
            sentence = f"{name} leads {listed(f'{metric_title(m.metric)} ({clause})' for m, clause in led)}."
        found.append(under + sentence)
    firsts = _firsts(summary, model)
    columns = sum(firsts.values())
    if len(firsts) == 1 and columns > len(head):
        found.append(f"{next(iter(firsts))} leads all {columns} columns.")
    elif columns > len(head):
        found.append(f"Of all {columns} columns, {listed(f'{name} leads {count}' for name, count in firsts.items())}.")
    least = _least_p(summary, model, head[0])
    if least >= SIGNIFICANCE:
        noun, methods = summary.results.noun(head[0]), len(summary.column(model, head[0]))
        images = len(summary.results.units(model, head[0]))
        found.append(
            f"{counted(images, noun)} cannot separate any two of {methods} methods: the least p that the test can give "
            f"after Holm's correction is {least:.2g}. Use more {noun}s."
        )
    return found


def dependence(summary: Summary, model: str) -> list[str]:
    """How much the ranking depends on the fill and on the steps: least and median tau between protocols that differ only in one."""
    protocols = {p.label(): p.settings() for p in summary.results.settings.protocols}

    def change_of(agreement: Agreement) -> str:
        a, b = protocols[agreement.first], protocols[agreement.second]
        return " and ".join(sorted({"steps" if key == "count" else key for key in a if a[key] != b[key]}))

    by_change = grouped((a for a in summary.agreements if a.model == model and math.isfinite(a.tau)), change_of)
    found = []
    for change, agreements in by_change.items():
        taus = [a.tau for a in agreements]
        median, worst = float(np.median(taus)), min(agreements, key=lambda a: a.tau)
        depends = "hardly depends" if median >= 0.8 else "depends somewhat" if median >= 0.5 else "depends strongly"
        that = "these are" if " and " in change else "that is"
        found.append(
            f"The ranking {depends} on the {change}: where only {that} changed, Kendall's tau has median {median:.2f} and "
            f"least {worst.tau:.2f} ({metric_title(worst.metric)}; {worst.first} against {worst.second})."
        )
    return found


def refusals(summary: Summary, model: str) -> dict[str, list[str]]:
    """Methods and measures that were left out for a model, by the reason."""
    found = grouped((each for each in summary.refused if each.model == model), lambda each: each.reason)
    return {reason: list(dict.fromkeys(each.method for each in failures)) for reason, failures in found.items()}


def by_protocol(measures: Sequence[Measure]) -> list[tuple[str, list[Measure]]]:
    """Measures grouped by protocol, those without a curve last."""
    return sorted(grouped(measures, lambda measure: measure.protocol).items(), key=lambda group: group[0] == "")


def writer(column: Sequence[Entry]) -> Callable[[float], str]:
    """Three decimals where they suit the column, three digits elsewhere."""
    largest = max((abs(e.interval.estimate) for e in column if math.isfinite(e.interval.estimate)), default=0)
    return (lambda value: f"{value:z.3f}") if largest == 0 or 0.02 <= largest < 1000 else (lambda value: f"{value:.3g}")


def judged(summary: Summary, model: str) -> str:
    """How many images and grids were judged, such as "100 images, 200 grids"."""
    units = {summary.results.noun(m): len(summary.results.units(model, m)) for m in summary.measures}
    return ", ".join(counted(number, noun) for noun, number in units.items())


def explained_class(summary: Summary) -> str:
    """Which class of each image the maps explain."""
    return "the class that the model predicts" if summary.results.settings.target == "predicted" else "the label of the image"


def _head_measures(summary: Summary, model: str) -> list[Measure]:
    """Insertion and deletion under the first protocol of the model; the first measure that has a mean where these were not measured.

    Where only grids were judged, their settings at the first layer.
    """
    decided = [m for m in summary.measures if summary.separation(model, m) is not None]
    first = summary.first_protocol(model)
    head = [m for m in decided if m.metric in ("insertion", "deletion") and m.protocol == first]
    if not head and decided and METRICS[decided[0].metric].grid:
        head = [m for m in decided if m.protocol == decided[0].protocol]
    return head or decided[:1]


def _firsts(summary: Summary, model: str) -> dict[str, int]:
    """How many columns each method leads, most first."""
    return dict(Counter(best[0] for measure in summary.measures if (best := summary.separation(model, measure))).most_common())


def _separated(others: Sequence[str], all_others: int) -> str:
    if all_others == 0:
        return "the only method"
    if not others:
        return "separated from every other method"
    if len(others) == all_others:
        return "not separated from any other method"
    if len(others) <= 4:
        return f"separated from every other method except {listed(others)}"
    return f"separated from {all_others - len(others)} of {all_others} other methods"


def _least_p(summary: Summary, model: str, measure: Measure) -> float:
    """The least corrected p that the sign-flip test can give for this number of images and methods."""
    comparisons = summary.comparisons[model, measure].values()
    count = max((c.count for c in comparisons), default=0)
    single = 2 / 2**count if count <= EXACT_COUNT else 1e-4
    return min(1.0, single * len(comparisons)) if count else 0.0
