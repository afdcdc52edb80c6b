"""Causes that look alike to the model: the features of causing regions are clustered, and the clusters are tested."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from attribution.errors import UserError
from attribution.fills import picture_of_fill
from evaluation.failures.results import Failed, FailureResults
from evaluation.failures.settings import MOST_CLUSTERS
from evaluation.study.run import batches

_TOGETHER = 64  # images in memory at once
_AXES = 50  # principal axes kept: what lies beyond is noise, and each axis makes the simulation slower
_STARTS = 4  # initialisations of each run of k-means, on the data and in the simulation
_SIMULATIONS = 199
_JUDGED = 2000  # samples from which the silhouette is estimated where there are more


def cause_features(results: FailureResults, failures: Sequence[Failed]) -> np.ndarray:
    """Compute the classifier's features of each image with only its causing regions shown: float64 [N, D].

    Raises:
        UserError: a classifier without features, or features that are not finite.
    """
    classifier = results.classifier
    found = []
    for some in batches(failures, _TOGETHER):
        shown = [classifier.inputs(_only_cause(results, failed)) for failed in some]
        found.append(classifier.features(torch.cat(shown)).detach().double().cpu().numpy())
    features = np.concatenate(found)
    if not np.isfinite(features).all():
        raise UserError(f"{classifier.name} has features of causing regions that are not finite: they cannot be compared")
    return features


def coordinates(features: np.ndarray) -> np.ndarray:
    """Project standardised features on their leading principal axes, float64 [N, at most 50]; up to 50 axes preserve distances."""
    spread = features.std(axis=0)
    varied = spread > 1e-5 * np.abs(features).max(initial=0)
    standard = (features[:, varied] - features[:, varied].mean(axis=0)) / spread[varied]
    if standard.size == 0:
        return np.zeros((len(features), 1))
    left, values, _ = np.linalg.svd(standard, full_matrices=False)
    kept = values > 1e-8 * values[0]
    return (left * values)[:, kept][:, :_AXES]


def cluster_numbers(points: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """Number the cluster of each point by k-means, 0 for the largest cluster: int64 [N].

    Args:
        points: float64 [N, D].
        count: number of clusters, lowered to the number of different points where it is larger; None for the number between 2 and 8
            with the best mean silhouette (Rousseeuw, 1987) among those that leave no point alone. If all do, all points are one cluster.
        seed: of k-means.
    """
    different = len(np.unique(points.round(6), axis=0))
    if count is not None:
        tried: Sequence[int] = [min(count, different)]
    else:
        tried = range(2, min(MOST_CLUSTERS, different, len(points) - 1) + 1) or [1]
    partitions = [_k_means(points, number, seed) for number in tried]
    if count is None:
        together = [labels for labels in partitions if np.bincount(labels).min() > 1]
        partitions = together or [np.zeros(len(points), dtype=np.int64)]
    best = partitions[0] if len(partitions) == 1 else max(partitions, key=lambda labels: _silhouette(points, labels, seed))
    sizes = np.bincount(best)
    first = [int(np.flatnonzero(best == number)[0]) for number in range(len(sizes))]
    rank = sorted(range(len(sizes)), key=lambda number: (-sizes[number], first[number]))
    return np.argsort(rank)[best]


def tightness_test(points: np.ndarray, numbers: np.ndarray, seed: int) -> np.ndarray:
    """Test whether each cluster is tighter than those that k-means finds in points without clusters: p, float64 [K].

    K-means makes tight groups of any points, so that members are always closer to each other than random sets of points are. As in
    SigClust (Liu et al., "Statistical significance of clustering for high-dimension, low-sample size data", JASA 2008), clusters are
    therefore compared with those that the same k-means finds in draws of one Gaussian with the variances of the points. The
    statistic is the mean squared distance of the members to their centre, divided by that of all points to the centre of all.

    Returns:
        p = (1 + draws that hold a cluster of at least as many members that is at least as tight) / (1 + draws); NaN for single
        points, and where all points are one cluster.
    """
    count = int(numbers.max()) + 1
    sizes, spreads = _spreads(points, numbers)
    p = np.full(count, np.nan)
    if count < 2:
        return p
    generator = np.random.default_rng(seed)
    beaten = np.zeros(count)
    for _ in range(_SIMULATIONS):
        drawn = generator.standard_normal(points.shape) * points.std(axis=0)
        drawn_sizes, drawn_spreads = _spreads(drawn, _k_means(drawn, count, seed))
        large = drawn_sizes[:, None] >= sizes
        beaten += (large & (drawn_spreads[:, None] <= spreads + 1e-12)).any(axis=0)
    tested = sizes > 1
    p[tested] = ((1 + beaten) / (1 + _SIMULATIONS))[tested]
    return p


def medoid_of(points: np.ndarray) -> int:
    """The index of the point with the least sum of distances to the others."""
    from scipy.spatial.distance import cdist

    return int(cdist(points, points).sum(axis=1).argmin())


def _only_cause(results: FailureResults, failed: Failed) -> Tensor:
    explanation = failed.explanation()
    assert explanation.regions is not None
    hidden = picture_of_fill(explanation.image, results.settings.fill, results.classifier)
    cause = torch.isin(explanation.regions.labels, torch.tensor(failed.found["cause"]["regions"]))
    return torch.where(cause, explanation.image, hidden)


def _k_means(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    return KMeans(count, n_init=_STARTS, random_state=seed % 2**32).fit_predict(points)


def _silhouette(points: np.ndarray, labels: np.ndarray, seed: int) -> float:
    from sklearn.metrics import silhouette_score

    some = _JUDGED if len(points) > _JUDGED else None
    return float(silhouette_score(points, labels, sample_size=some, random_state=seed % 2**32))


def _spreads(points: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The size of each cluster, and the statistic of ``tightness_test``."""
    total = float(((points - points.mean(axis=0)) ** 2).sum(axis=1).mean())
    members = [points[numbers == number] for number in range(int(numbers.max()) + 1)]
    spreads = [float(((each - each.mean(axis=0)) ** 2).sum(axis=1).mean()) / total if total > 0 else np.nan for each in members]
    return np.array([len(each) for each in members]), np.array(spreads)
