"""Confidence intervals by the bootstrap, and of shares by Wilson."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import ndtr, ndtri

from attribution.errors import UserError, describe

BCA_COUNT = 30  # values from which "auto" takes BCa: with fewer its acceleration is mostly noise
_CHUNK_VALUES = 2**22  # floats of resamples held at once, 32 MiB


@dataclass(frozen=True)
class Interval:
    """An estimate and how far it might be off.

    Attributes:
        estimate: the mean or ratio; NaN without values.
        low, high: ends of the interval; NaN where there is none, as for one value.
        level: nominal coverage in (0, 1).
        method: "wilson", "bca", "percentile", or "percentile (bca undefined)" where BCa was wanted and does not exist.
        count: number of finite values (or pairs) used.
    """

    estimate: float
    low: float
    high: float
    level: float
    method: str
    count: int


def bootstrap_interval(
    values: ArrayLike,
    *,
    groups: Iterable[Hashable] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    method: Literal["auto", "bca", "percentile"] = "auto",
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a mean.

    Args:
        values: float [N], one a sample; those that are not finite are left out.
        groups: N labels of clusters, such as the class of each image: whole clusters are then drawn.
        resamples: B, number of draws.
        level: nominal coverage in (0, 1).
        method: "percentile"; "bca", bias-corrected and accelerated (Efron, 1987); "auto", BCa from 30 values on without groups.
        seed: of the draws.

    Returns:
        The interval; low and high are NaN for fewer than two values (clusters), and equal the value where all are the same.

    Raises:
        UserError: arrays of other shapes, or a setting out of range.
    """
    checked = vector(values, "values")
    return bootstrap_ratio(checked, np.ones_like(checked), groups=groups, resamples=resamples, level=level, method=method, seed=seed)


def share_interval(hits: ArrayLike, *, level: float = 0.95) -> Interval:
    """Wilson's interval of a share (1927): unlike a bootstrap's it is not empty where all or none are hits.

    Args:
        hits: [N], 0 or 1 (or bool) a sample; those that are not finite are left out.
        level: nominal coverage in (0, 1).

    Returns:
        The interval; NaN without samples.

    Raises:
        UserError: values other than 0 and 1, or a level out of range.
    """
    values = vector(hits, "hits")
    values = values[np.isfinite(values)]
    if not np.isin(values, (0, 1)).all():
        raise UserError("hits hold values other than 0 and 1: expected one of both for each sample")
    if not 0 < level < 1:
        raise UserError(f"level is {level}: expected a number between 0 and 1, such as 0.95")
    if not len(values):
        return Interval(np.nan, np.nan, np.nan, level, "wilson", 0)
    found = stats.binomtest(int(values.sum()), len(values)).proportion_ci(level, method="wilson")
    return Interval(float(values.mean()), float(found.low), float(found.high), level, "wilson", len(values))


def bootstrap_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    groups: Iterable[Hashable] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    method: Literal["auto", "bca", "percentile"] = "auto",
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a ratio of means; numerator and denominator of a sample are drawn together.

    Args:
        numerators: float [N].
        denominators: float [N]. Pairs with a member that is not finite are left out.
        groups, resamples, level, method, seed: as in ``bootstrap_interval``.

    Returns:
        The interval. The estimate is NaN where the denominators sum to 0; low and high are NaN where those of a draw do, since
        the ratio is then unbounded.

    Raises:
        UserError: arrays of other shapes, or a setting out of range.
    """
    _check_bootstrap(resamples, level, method)
    above, below, kept = finite_pairs(numerators, denominators, "numerators", "denominators")
    count, wanted = len(above), str(method)
    if method == "auto":
        wanted = "bca" if count >= BCA_COUNT and groups is None else "percentile"
    constant = count > 0 and np.ptp(above) == 0 and np.ptp(below) == 0
    # a mean of equal values differs from them by rounding, so the value itself is taken
    estimate = float(_ratio(above[0], below[0]) if constant else _ratio(above.sum(), below.sum()))
    if groups is not None:
        codes = _codes(groups, len(kept))[kept]
        above, below = _sums_by_group(above, codes), _sums_by_group(below, codes)
    if len(above) < 2 or np.isnan(estimate):
        return Interval(estimate, np.nan, np.nan, level, wanted, count)
    if constant:
        return Interval(estimate, estimate, estimate, level, wanted, count)
    draws = _resampled_ratios(above, below, resamples, seed)
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    shares = _bca_shares(draws, estimate, above, below, tails) if wanted == "bca" else tails
    if np.isnan(shares).any():
        shares, wanted = tails, "percentile (bca undefined)"
    low, high = np.quantile(draws, shares)
    return Interval(estimate, float(low), float(high), level, wanted, count)


def vector(values: Any, name: str) -> np.ndarray:
    """The values as float64 [N], one a sample; a UserError that names them for anything else."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = None
    if array is None or array.ndim != 1:
        raise UserError(f"{name}: received {describe(values if array is None else array)}, expected numbers [N], one a sample")
    return array


def same_length(a: ArrayLike, b: ArrayLike, name_a: str, name_b: str) -> tuple[np.ndarray, np.ndarray]:
    """Two float64 [N] of the same samples; a UserError that names them where their lengths differ."""
    first, second = vector(a, name_a), vector(b, name_b)
    if len(first) != len(second):
        raise UserError(f"{name_a} have {len(first)} values and {name_b} {len(second)}: give both on the same samples")
    return first, second


def finite_pairs(a: ArrayLike, b: ArrayLike, name_a: str, name_b: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of which both members are finite, and bool [N], which these are."""
    first, second = same_length(a, b, name_a, name_b)
    kept = np.isfinite(first) & np.isfinite(second)
    return first[kept], second[kept], kept


def _check_bootstrap(resamples: int, level: float, method: str) -> None:
    if resamples < 1:
        raise UserError(f"resamples is {resamples}: expected at least 1")
    if not 0 < level < 1:
        raise UserError(f"level is {level}: expected a coverage between 0 and 1, such as 0.95")
    if method not in ("auto", "bca", "percentile"):
        raise UserError(f"unknown method {method!r}: expected 'auto', 'bca' or 'percentile'")


def _codes(groups: Iterable[Hashable], count: int) -> np.ndarray:
    """int [N], the groups numbered as they appear."""
    seen: dict[Hashable, int] = {}
    labels = groups.tolist() if hasattr(groups, "tolist") else groups  # elements of a tensor are hashed by identity, not by value
    try:
        codes = np.array([seen.setdefault(label, len(seen)) for label in labels], dtype=np.int64)
    except TypeError:
        raise UserError(f"groups are {describe(groups)}: expected one hashable label for each value, such as its class") from None
    if len(codes) != count:
        raise UserError(f"groups have {len(codes)} labels for {count} values: expected one for each value")
    return codes


def _sums_by_group(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Sum of each group that has a value: the mean over whole clusters is a ratio of sums, however many values each holds."""
    _, present = np.unique(codes, return_inverse=True)
    return np.bincount(present, weights=values)


def _ratio(above: Any, below: Any) -> np.ndarray:
    """above / below, NaN where below is 0."""
    above, below = np.asarray(above), np.asarray(below)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)


def resample_chunks(resamples: int, count: int) -> list[int]:
    """Numbers of rows, summing to resamples, of which each chunk of [rows, count] fits the memory set aside."""
    rows = max(1, _CHUNK_VALUES // count)
    return [min(rows, resamples - start) for start in range(0, resamples, rows)]


def _resampled_ratios(above: np.ndarray, below: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    generator, count = np.random.default_rng(seed), len(above)
    draws = []
    for rows in resample_chunks(resamples, count):
        index = generator.integers(0, count, (rows, count))
        draws.append(_ratio(above[index].sum(axis=1), below[index].sum(axis=1)))
    return np.concatenate(draws)


def _bca_shares(draws: np.ndarray, estimate: float, above: np.ndarray, below: np.ndarray, tails: np.ndarray) -> np.ndarray:
    """float [2], the quantiles of the draws that bound the interval (Efron and Tibshirani, 1993, eq. 14.10, 14.14 and 14.15).

    Not scipy's bootstrap: it holds a jackknife of N x N values, where leaving one out of a ratio of sums takes N.
    """
    bias = ndtri(((draws < estimate).mean() + (draws <= estimate).mean()) / 2)
    left_out = _ratio(above.sum() - above, below.sum() - below)
    deviations = left_out.mean() - left_out
    with np.errstate(divide="ignore", invalid="ignore"):  # a degenerate distribution ends as NaN, which the caller handles
        acceleration = (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5)
        shifted = bias + ndtri(tails)
        return ndtr(bias + shifted / (1 - acceleration * shifted))
