"""What a result rests on: the samples that weaken it, and how much of its spread is the method's own randomness."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from attribution.errors import UserError, describe
from evaluation.statistics.intervals import vector

SATURATED = 0.999  # a probability above it leaves gradients and orders to rounding
STABLE = 0.8  # rank correlation between seeds from which an order is called stable


@dataclass(frozen=True)
class SeedSpread:
    """How much of the spread is the method's own randomness.

    Attributes:
        seed_sd: standard deviation over seeds (n - 1), averaged over samples.
        image_sd: standard deviation over samples (n - 1) of the means over seeds; NaN for one sample.
        rank_correlation: mean Spearman correlation between pairs of seeds; NaN where nothing varies.
        seeds: number of seeds.
        stable: whether rank_correlation is at least 0.8; False where it is NaN.
    """

    seed_sd: float
    image_sd: float
    rank_correlation: float
    seeds: int
    stable: bool


@dataclass(frozen=True)
class Validity:
    """How many samples a result can rest on.

    Attributes:
        total: samples tried.
        finite: of these, how many have a finite value.
        constant_maps: how many have the same attribution everywhere, so that any order of theirs is arbitrary.
        saturated: how many have a confidence above 0.999, where gradients vanish.
        failed: how many raised an error.
    """

    total: int
    finite: int
    constant_maps: int
    saturated: int
    failed: int


def seed_spread(scores: ArrayLike, maps: ArrayLike | None = None) -> SeedSpread:
    """What the seed of a stochastic method changes, next to what the image changes.

    Args:
        scores: float [S, N], S seeds of N samples; samples that are not finite under every seed are left out.
        maps: [S, N, ...], the attributions: seeds are then compared by the ranks of the positions of each map, averaged over the
            samples, instead of by the ranks of the samples.

    Raises:
        UserError: fewer than two seeds, or arrays of other shapes.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise UserError(f"scores are {describe(values)}: expected float [S, N] with at least 2 seeds, one row a seed")
    kept = np.isfinite(values).all(axis=0)
    finite = values[:, kept]
    compared = [finite]
    if maps is not None:
        attributions = np.asarray(maps)
        if attributions.ndim < 3 or attributions.shape[:2] != values.shape:
            raise UserError(f"maps are {describe(attributions)}: expected [{values.shape[0]}, {values.shape[1]}, P], a map of each score")
        compared = [attributions[:, sample].reshape(len(values), -1) for sample in np.flatnonzero(kept)]
    correlation = _mean([_seed_correlation(rows) for rows in compared])
    return SeedSpread(
        seed_sd=_mean(finite.std(axis=0, ddof=1)),
        image_sd=float(finite.mean(axis=0).std(ddof=1)) if finite.shape[1] > 1 else np.nan,
        rank_correlation=correlation,
        seeds=len(values),
        stable=correlation >= STABLE,
    )


def is_saturated(confidence: ArrayLike) -> np.ndarray:
    """Which probabilities are above 0.999: float [N] in [0, 1] -> bool [N]. NaN is not."""
    return vector(confidence, "confidence") > SATURATED


def count_validity(values: ArrayLike, constant: ArrayLike, saturated: ArrayLike, failed: ArrayLike) -> Validity:
    """Count what weakens a result.

    Args:
        values: float [N], the score of each sample, NaN where there is none.
        constant: bool [N], whether its map is constant.
        saturated: bool [N], as from ``is_saturated``.
        failed: bool [N], whether it raised an error.

    Raises:
        UserError: arrays of other shapes or types.
    """
    checked = vector(values, "values")
    counts = {}
    for name, given in {"constant": constant, "saturated": saturated, "failed": failed}.items():
        flags = np.asarray(given)
        if flags.shape != checked.shape or (flags.dtype != np.bool_ and flags.size):
            raise UserError(f"{name} is {describe(flags)}: expected bool [{len(checked)}], one for each value")
        counts[name] = int(np.count_nonzero(flags))
    finite = int(np.isfinite(checked).sum())
    return Validity(len(checked), finite, counts["constant"], counts["saturated"], counts["failed"])


def _seed_correlation(rows: np.ndarray) -> float:
    """Mean Spearman correlation of each two rows of [S, P]; pairs with a constant row are left out."""
    if rows.shape[1] < 2:
        return np.nan
    with np.errstate(divide="ignore", invalid="ignore"):  # a constant row has no correlation: NaN, left out below
        correlations = np.corrcoef(stats.rankdata(rows, axis=1))
    return _mean(correlations[np.triu_indices(len(rows), 1)])


def _mean(values: ArrayLike) -> float:
    """Mean of those that are not NaN; NaN without any."""
    array = np.asarray(values, dtype=np.float64)
    known = array[~np.isnan(array)]
    return float(known.mean()) if len(known) else np.nan
