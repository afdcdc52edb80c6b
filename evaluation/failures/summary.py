"""What the failures of a data set have in common: pairs of classes, clusters, suspected labels, shortcuts, groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage, stats

from attribution.errors import UserError
from attribution.failure import AREAS
from evaluation.failures.causes import CELLS, CausePlace, cause_place, cell_words
from evaluation.failures.clusters import cause_features, cluster_numbers, coordinates, medoid_of, tightness_test
from evaluation.failures.results import Failed, FailureResults
from evaluation.statistics.comparisons import holm
from evaluation.statistics.intervals import Interval, bootstrap_interval, share_interval
from evaluation.study.identity import sample_seed
from evaluation.study.tables import grouped

SIGNIFICANCE = 0.05
_FEW = 2  # regions
_LEAST_CLUSTERED = 3  # failures with a cause that clusters need
_LEAST_SHORTCUT = 5  # failures that a shortcut must cause
_MOST_ALIKE = 0.5  # share of the clustered failures above which a cluster says only that few look unlike the rest
_LEAST_PAIRS = 3  # pairs of classes that one appearance must confuse
_SHUFFLES = 1999


@dataclass(frozen=True)
class Pair:
    """One confusion: images of a label that the model takes for another class.

    Attributes:
        label, predicted: class indices.
        count: explained failures of the pair.
        share: share of the label's images looked at that are taken for the other class, explained or not; NaN if not known.
        repaired: number of these that become right by hiding or showing some regions.
        cause_area: mean share of the image that the smallest removal hides, over failures that have one.
        sufficient_area: mean share of the image that the smallest sufficient set shows, over failures that have one.
        seen: all images of the pair that were looked at, explained or not; pairs are ranked by it.
    """

    label: int
    predicted: int
    count: int
    share: float
    repaired: int
    cause_area: Interval
    sufficient_area: Interval
    seen: int = 0


@dataclass(frozen=True)
class Cluster:
    """Failures whose causing regions look alike to the model.

    Attributes:
        number: 0, 1, 2 and so on from the largest.
        members: sample ids, nearest to the centre first.
        medoid: the member with the least sum of distances to the others.
        top_pair: (label, predicted), the most frequent among the members.
        top_count: members of that pair.
        tightness_p: p of ``tightness_test``, adjusted by Holm over the clusters; NaN where it cannot be tested.
    """

    number: int
    members: tuple[str, ...]
    medoid: str
    top_pair: tuple[int, int]
    top_count: int
    tightness_p: float

    @property
    def has_main_pair(self) -> bool:
        """Whether most members are of one pair."""
        return 2 * self.top_count > len(self.members)


@dataclass(frozen=True)
class Suspect:
    """An image that may be wrongly labelled: the model is sure of its prediction, and no set of regions makes it say the label.

    Attributes:
        sample: id.
        label, predicted: class indices.
        confidence: probability of the predicted class.
        reason: one sentence.
    """

    sample: str
    label: int
    predicted: int
    confidence: float
    reason: str


@dataclass(frozen=True)
class Shortcut:
    """Something that the model may rely on although it says nothing about the class.

    Attributes:
        kind: "area", causes at the same place of many images; or "appearance", causes that look alike in different pairs of classes.
        text: one sentence with the numbers.
        samples: ids of the failures that it causes.
        p: of the test, adjusted by Holm.
    """

    kind: str
    text: str
    samples: tuple[str, ...]
    p: float


@dataclass(frozen=True)
class GroupRow:
    """One group of the data list, compared with all other images.

    Attributes:
        group: its name.
        images, wrong: number of images looked at, and of those misclassified.
        error_rate: wrong / images, with Wilson's interval.
        cause_area: mean share of the image that the smallest removal hides, over its explained failures that have one.
        p_error: p of Fisher's exact test of its error rate, adjusted by Holm over the groups.
        p_area: p of the permutation test of its cause area, adjusted likewise; NaN where there is nothing to compare.
    """

    group: str
    images: int
    wrong: int
    error_rate: Interval
    cause_area: Interval
    p_error: float
    p_area: float


@dataclass(frozen=True, eq=False)
class FailureSummary:
    """Everything that the tables and the atlas show.

    Attributes:
        results: what was explained.
        pairs: those with an explained failure, most frequent first.
        clusters: largest first; empty where fewer than three failures have a cause, or the model has no features.
        cluster_of: number of the cluster by sample; -1 for none.
        suspected: most confident first.
        shortcuts: least p first.
        groups: of the data list, highest error rate first; empty without groups.
        highest: by share of the image: mean over failures of the highest probability of the true class that the first regions reach
            while they cover at most this share.
        shares: shares of the explained failures. "repaired": hiding or showing some regions makes the model right. "few regions": the
            smallest removal takes at most two regions. "border": most of its area lies in regions at the border of the image.
            "background": most of its area lies off the object, among failures with a mask. A failure without a removal counts as
            none of the last three.
        by_chance: "border" and "background" for as many random regions of the same images.
        fill_right: share of the explained failures for which the model predicts the true class from the fill alone. Their sufficient
            sets say little.
        border_share: by sample, share of the cause's area that lies in regions at the border.
        unclustered: why there are no clusters, or "".
    """

    results: FailureResults
    pairs: tuple[Pair, ...]
    clusters: tuple[Cluster, ...]
    cluster_of: Mapping[str, int]
    suspected: tuple[Suspect, ...]
    shortcuts: tuple[Shortcut, ...]
    groups: tuple[GroupRow, ...]
    highest: Mapping[float, Interval]
    shares: Mapping[str, Interval]
    by_chance: Mapping[str, Interval] = field(default_factory=dict)
    fill_right: Interval | None = None
    border_share: Mapping[str, float] = field(default_factory=dict)
    unclustered: str = ""


def summarise_failures(results: FailureResults) -> FailureSummary:
    """Sum up what the failures of ``run_failures`` have in common; intervals, tests and clusters draw with the seed of the settings."""
    places = {failed.sample: _place(results, failed) for failed in results.failures if failed.found["cause"] is not None}
    clusters, unclustered = _clusters(results)
    found = [*_areas(results, places), *_appearances(results, clusters)]
    shares, by_chance = _shares(results, places)
    cluster_of = {failed.sample: -1 for failed in results.failures}
    cluster_of.update({sample: cluster.number for cluster in clusters for sample in cluster.members})
    fill_right = [failed.found["curves"]["shown"]["right"][0] for failed in results.failures]
    return FailureSummary(
        results=results,
        pairs=_pairs(results),
        clusters=clusters,
        cluster_of=cluster_of,
        suspected=_suspected(results),
        shortcuts=tuple(sorted(found, key=lambda shortcut: shortcut.p)),
        groups=_groups(results),
        highest={limit: _interval(results, [highest_within(failed, limit) for failed in results.failures]) for limit in AREAS},
        shares=shares,
        by_chance=by_chance,
        fill_right=share_interval(fill_right),
        border_share={sample: place.border_share for sample, place in places.items()},
        unclustered=unclustered,
    )


def repair_area(failed: Failed, kind: str) -> float:
    """The share of the image that the smallest "cause" or "sufficient" set covers; NaN where none was found."""
    found = failed.found[kind]
    return math.nan if found is None else float(found["area"])


def highest_within(failed: Failed, limit: float) -> float:
    """The highest probability of the true class among the first regions that cover at most this share of the image; NaN without any."""
    value = failed.found["highest_confidence"].get(f"{limit:g}")
    return math.nan if value is None else float(value)


def _interval(results: FailureResults, values: Sequence[float]) -> Interval:
    return bootstrap_interval(values, seed=results.settings.seed)


def _place(results: FailureResults, failed: Failed) -> CausePlace:
    regions = failed.explanation().regions
    assert regions is not None
    return cause_place(regions, failed.found["cause"]["regions"], failed.object_share, sample_seed(results.settings.seed, failed.sample))


def _pairs(results: FailureResults) -> tuple[Pair, ...]:
    made = []
    for (label, predicted), members in grouped(results.failures, lambda failed: (failed.label, failed.predicted)).items():
        seen = max(len(members), results.confusions.get((label, predicted), 0))
        images = results.by_class.get(label, 0)
        repaired = sum(failed.is_repaired for failed in members)
        areas = [_interval(results, [repair_area(failed, kind) for failed in members]) for kind in ("cause", "sufficient")]
        share = seen / images if images else math.nan
        made.append(Pair(label, predicted, len(members), share, repaired, areas[0], areas[1], seen))
    return tuple(sorted(made, key=lambda pair: (-pair.seen, -pair.count, pair.label, pair.predicted)))


def _shares(results: FailureResults, places: Mapping[str, CausePlace]) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """Observed shares and those by chance."""
    failures = results.failures
    found = [places.get(failed.sample) for failed in failures]
    shares = {
        "repaired": share_interval([failed.is_repaired for failed in failures]),
        "few regions": share_interval([place is not None and place.regions <= _FEW for place in found]),
        "border": share_interval([place is not None and place.at_border for place in found]),
    }
    by_chance = {"border": _interval(results, [0.0 if place is None else place.border_by_chance for place in found])}
    masked = [place for failed, place in zip(failures, found, strict=True) if failed.object_share is not None]
    if masked:
        shares["background"] = share_interval([bool(place is not None and place.background) for place in masked])
        by_chance["background"] = _interval(results, [0.0 if place is None else float(place.background_by_chance or 0) for place in masked])
    return shares, by_chance


def _clusters(results: FailureResults) -> tuple[tuple[Cluster, ...], str]:
    """Clusters of the failures that have a cause, or why there are none."""
    failures = [failed for failed in results.failures if failed.found["cause"] is not None]
    if len(failures) < _LEAST_CLUSTERED:
        return (), f"{len(failures)} failures have a cause: clusters need at least {_LEAST_CLUSTERED}"
    try:
        points = coordinates(cause_features(results, failures))
    except UserError as error:
        return (), str(error)
    seed = results.settings.seed
    numbers = cluster_numbers(points, results.settings.clusters, seed)
    if results.settings.clusters is None and not numbers.any():
        return (), "the causes of these failures form no groups"
    tightness = holm(tightness_test(points, numbers, seed))
    made = []
    for number, p in enumerate(tightness):
        inside = np.flatnonzero(numbers == number)
        distances = np.linalg.norm(points[inside] - points[inside].mean(axis=0), axis=1)
        members = [failures[index] for index in inside[distances.argsort(kind="stable")]]
        medoid = failures[inside[medoid_of(points[inside])]].sample
        pairs = Counter((failed.label, failed.predicted) for failed in members)
        top = min(pairs, key=lambda pair: (-pairs[pair], pair))
        made.append(Cluster(number, tuple(failed.sample for failed in members), medoid, top, pairs[top], float(p)))
    return tuple(made), ""


def _suspected(results: FailureResults) -> tuple[Suspect, ...]:
    names, made = results.names, []
    for failed in results.failures:
        confidence = float(failed.found["probability_predicted"])
        if not failed.is_repaired and confidence >= results.settings.min_confidence:
            best = failed.found["highest_confidence"].get("1")
            shown = "" if best is None else f" (at most {best:.2f})"
            reason = (
                f"The model is sure of {names[failed.predicted]} ({confidence:.2f}), and no set of regions, shown or hidden, makes it "
                f"say {names[failed.label]}{shown}."
            )
            made.append(Suspect(failed.sample, failed.label, failed.predicted, confidence, reason))
    return tuple(sorted(made, key=lambda suspect: (-suspect.confidence, suspect.sample)))


def _areas(results: FailureResults, places: Mapping[str, CausePlace]) -> list[Shortcut]:
    """Find places of the image that cause more failures than random regions would.

    Neighbouring cells of the grid with a significant count are one place; the numbers are those of its most significant cell.
    """
    if not places:
        return []
    hit = np.array([place.cells for place in places.values()])
    expected = np.array([place.cells_by_chance for place in places.values()]).mean(axis=0)
    counts = hit.sum(axis=0)
    p = holm([math.nan if math.isnan(q) else _binomial(n, len(hit), q) for n, q in zip(counts, expected, strict=True)])
    significant = (p < SIGNIFICANCE) & (counts >= _LEAST_SHORTCUT)
    joined, number = ndimage.label(significant.reshape(CELLS, CELLS))
    made = []
    for each in range(1, number + 1):
        cells = np.flatnonzero(joined.ravel() == each)
        strongest = min(cells, key=lambda cell: (p[cell], -counts[cell], cell))
        samples = tuple(sample for sample, place in places.items() if place.cells[strongest])
        text = (
            f"Causes lie at {cell_words(cells.tolist())}: there in {len(samples)} of {len(hit)} failures ({len(samples) / len(hit):.0%}), "
            f"where random regions would be in {expected[strongest]:.0%}."
        )
        made.append(Shortcut("area", text, samples, float(p[strongest])))
    return made


def _binomial(count: int, total: int, probability: float) -> float:
    """One-sided p. Every image has a probability of its own; with their mean the p is never too small (Hoeffding, 1956)."""
    return float(stats.binomtest(int(count), total, float(probability), alternative="greater").pvalue)


def _appearances(results: FailureResults, clusters: Sequence[Cluster]) -> list[Shortcut]:
    """Find tight clusters of causes, of at most half of the failures, that confuse at least three different pairs of classes."""
    names = results.names
    pair_of = {failed.sample: (failed.label, failed.predicted) for failed in results.failures}
    most = _MOST_ALIKE * sum(len(cluster.members) for cluster in clusters)
    made = []
    for cluster in clusters:
        pairs = {pair_of[sample] for sample in cluster.members}
        if len(pairs) < _LEAST_PAIRS or not _LEAST_SHORTCUT <= len(cluster.members) <= most or not cluster.tightness_p < SIGNIFICANCE:
            continue
        label, predicted = (names[index] for index in cluster.top_pair)
        often = "most often" if cluster.has_main_pair else "such as"
        text = (
            f"Causes look alike in {len(cluster.members)} failures of {len(pairs)} different pairs, {often} {label} taken for "
            f"{predicted} (cluster {cluster.number}, typical: {cluster.medoid})."
        )
        made.append(Shortcut("appearance", text, cluster.members, cluster.tightness_p))
    return made


def _groups(results: FailureResults) -> tuple[GroupRow, ...]:
    """Compare every group with all other images."""
    groups = results.by_group
    areas = {group: [repair_area(failed, "cause") for failed in results.failures if failed.group == group] for group in groups}
    images, wrong = (sum(row[part] for row in groups.values()) for part in (0, 1))
    p_error, p_area = [], []
    for group, (own, own_wrong) in groups.items():
        rest = [area for other, each in areas.items() if other != group for area in each]
        table = [[own_wrong, own - own_wrong], [wrong - own_wrong, images - own - (wrong - own_wrong)]]
        p_error.append(float(stats.fisher_exact(table).pvalue) if own < images else math.nan)
        p_area.append(_shuffle_test(areas[group], rest, results.settings.seed))
    if len(groups) != 2:  # two groups make one test, which both rows show
        p_error, p_area = list(holm(p_error)), list(holm(p_area))
    rows = []
    for (group, (own, own_wrong)), error, area in zip(groups.items(), p_error, p_area, strict=True):
        rate = share_interval([1] * own_wrong + [0] * (own - own_wrong))
        rows.append(GroupRow(group, own, own_wrong, rate, _interval(results, areas[group]), float(error), float(area)))
    return tuple(sorted(rows, key=lambda row: (-row.error_rate.estimate, row.group)))


def _shuffle_test(first: Sequence[float], second: Sequence[float], seed: int) -> float:
    """Two-sided permutation test of the difference of means; NaN with fewer than two values on a side."""
    a, b = (np.array([value for value in values if not math.isnan(value)]) for values in (first, second))
    if min(len(a), len(b)) < 2:
        return math.nan
    pooled, generator = np.concatenate([a, b]), np.random.default_rng(seed)
    observed = abs(a.mean() - b.mean())
    extreme = 0
    for _ in range(_SHUFFLES):
        shuffled = generator.permutation(pooled)
        extreme += abs(shuffled[: len(a)].mean() - shuffled[len(a) :].mean()) >= observed - 1e-12
    return (1 + int(extreme)) / (1 + _SHUFFLES)
