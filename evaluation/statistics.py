"""How sure a number is: intervals, paired tests, and corrections for many tests.

Everything works on plain arrays of one value a sample. Values that are not finite are left out and never counted, so each result
says how many samples it rests on. Every draw takes a seed; the global generator is never touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import ndtr, ndtri

from attribution.errors import UserError, describe

BCA_COUNT = 30  # values from which "auto" takes BCa: with fewer its acceleration is mostly noise
EXACT_COUNT = 13  # pairs up to which all 2^N sign vectors are enumerated: 8192, fewer than the default resamples
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


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same samples.

    Attributes:
        difference: mean of first - second over the samples where both are finite.
        low, high: its 95 % bootstrap interval.
        p: of the paired test, two-sided.
        adjusted_p: p after Holm's correction over all pairs compared.
        count: number of samples used.
    """

    difference: float
    low: float
    high: float
    p: float
    adjusted_p: float
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
    above, below, kept = _finite_pairs(numerators, denominators, "numerators", "denominators")
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


def sign_flip(a: ArrayLike, b: ArrayLike, *, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided paired sign-flip test: are two methods exchangeable on each sample?

    With differences d and random signs s, p = (1 + #{|mean(s d)| >= |mean d|}) / (B + 1). Up to 13 pairs all 2^N sign vectors are
    enumerated and p is the share of them, the identity included, that is at least as extreme: exact.

    Args:
        a, b: float [N], two methods on the same samples; pairs with a member that is not finite are left out.
        resamples: B, number of sign vectors drawn beyond 13 pairs.
        seed: of the draws.

    Returns:
        p in (0, 1]; NaN without a pair. 1 where no pair differs.

    Raises:
        UserError: arrays of other shapes, or resamples below 1.
    """
    if resamples < 1:
        raise UserError(f"resamples is {resamples}: expected at least 1")
    differences = _differences(a, b)
    count = len(differences)
    if count == 0:
        return np.nan
    total = differences.sum()
    # sums of the same numbers in another order differ by rounding: relative to what is summed, since the sum itself may be near 0
    threshold = abs(total) - 1e-12 * np.abs(differences).sum()

    def extreme(flips: np.ndarray) -> int:
        return int(np.count_nonzero(np.abs(2 * (flips @ differences) - total) >= threshold))

    if count <= EXACT_COUNT:
        return extreme(np.arange(2**count)[:, None] >> np.arange(count) & 1) / 2**count
    generator = np.random.default_rng(seed)
    found = sum(extreme(_random_bits(generator, rows, count)) for rows in _chunks(resamples, count))
    return (1 + found) / (resamples + 1)


def wilcoxon(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided Wilcoxon signed-rank test of paired values (scipy's, exact where that is feasible).

    Pairs that do not differ are ranked and then dropped (Pratt, 1959). Splitting their ranks instead gives the same statistic with
    a variance that counts the zeros as if they had random signs, far too cautious for scores with many equal pairs (hit or miss).

    Args:
        a, b: float [N], two methods on the same samples; pairs with a member that is not finite are left out.

    Returns:
        p in (0, 1]; NaN without a pair, 1 where no pair differs.

    Raises:
        UserError: arrays of other shapes.
    """
    differences = _differences(a, b)
    if len(differences) == 0:
        return np.nan
    if not differences.any():
        return 1.0
    with warnings.catch_warnings():  # older releases of scipy warn where they leave the exact distribution
        warnings.simplefilter("ignore")
        return float(stats.wilcoxon(differences, zero_method="pratt").pvalue)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's step-down adjustment (1979): controls the chance of any false rejection in the family.

    Args:
        p_values: float [M] in [0, 1]; NaN stays NaN and does not count in the family.

    Returns:
        float64 [M]: the k-th smallest of m becomes the maximum over j <= k of (m - j + 1) p_(j), at most 1.

    Raises:
        UserError: another shape, or a value out of [0, 1].
    """

    def adjust(p: np.ndarray) -> np.ndarray:
        order = p.argsort(kind="stable")
        adjusted = np.empty_like(p)
        adjusted[order] = np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]).clip(max=1)
        return adjusted

    return _adjusted(p_values, adjust)


def benjamini_hochberg(p_values: ArrayLike) -> np.ndarray:
    """Benjamini and Hochberg's step-up adjustment (1995): controls the share of false rejections among all rejections.

    Args:
        p_values: float [M] in [0, 1]; NaN stays NaN and does not count in the family.

    Returns:
        float64 [M]: the k-th smallest of m becomes the minimum over j >= k of m p_(j) / j, at most 1.

    Raises:
        UserError: another shape, or a value out of [0, 1].
    """
    return _adjusted(p_values, stats.false_discovery_control)


def pairwise_tests(
    scores: Mapping[str, ArrayLike], *, test: Literal["sign_flip", "wilcoxon"] = "sign_flip", seed: int = 0
) -> dict[tuple[str, str], Comparison]:
    """Compare every two methods on the same samples.

    Args:
        scores: float [N] of each method; index n is the same sample in all. A pair of methods uses the samples finite in both.
        test: a name in ``PAIRED_TESTS``.
        seed: of the bootstrap and of the sign flips; the same for every pair.

    Returns:
        One comparison for each two methods, keyed by their names in the order of the mapping.

    Raises:
        UserError: an unknown test, or arrays of other shapes.
    """
    if test not in PAIRED_TESTS:
        raise UserError(f"unknown test {test!r}: expected one of {', '.join(PAIRED_TESTS)}")
    arrays = {name: vector(values, f"scores of {name}") for name, values in scores.items()}
    pairs = list(combinations(arrays, 2))
    intervals, p_values = [], []
    for first, second in pairs:
        a, b, _ = _finite_pairs(arrays[first], arrays[second], f"scores of {first}", f"scores of {second}")
        intervals.append(bootstrap_interval(a - b, seed=seed))
        p_values.append(PAIRED_TESTS[test](a, b, seed))
    return {
        pair: Comparison(interval.estimate, interval.low, interval.high, p, float(adjusted), interval.count)
        for pair, interval, p, adjusted in zip(pairs, intervals, p_values, holm(p_values), strict=True)
    }


def random_order_test(observed: float, null: ArrayLike) -> float:
    """One-sided: does an order score higher than random orders of the same regions?

    Args:
        observed: score of the order, higher is better (negate it where lower is, as for deletion).
        null: float [R], scores of random orders; NaN is left out.

    Returns:
        p = (1 + #{null >= observed}) / (R + 1); NaN where observed is.

    Raises:
        UserError: null of another shape.
    """
    scores = vector(null, "null")
    scores = scores[~np.isnan(scores)]
    if np.isnan(observed):
        return np.nan
    return (1 + int(np.count_nonzero(scores >= observed))) / (len(scores) + 1)


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


def _finite_pairs(a: ArrayLike, b: ArrayLike, name_a: str, name_b: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of which both members are finite, and bool [N], which these are."""
    first, second = same_length(a, b, name_a, name_b)
    kept = np.isfinite(first) & np.isfinite(second)
    return first[kept], second[kept], kept


def _differences(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    first, second, _ = _finite_pairs(a, b, "a", "b")
    return first - second


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


def _chunks(resamples: int, count: int) -> list[int]:
    """Numbers of rows, summing to resamples, of which each chunk of [rows, count] fits the memory set aside."""
    rows = max(1, _CHUNK_VALUES // count)
    return [min(rows, resamples - start) for start in range(0, resamples, rows)]


def _resampled_ratios(above: np.ndarray, below: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    generator, count = np.random.default_rng(seed), len(above)
    draws = []
    for rows in _chunks(resamples, count):
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


def _random_bits(generator: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """uint8 [rows, count] of 0 and 1; whole words are drawn a row, so the chunks do not change the numbers."""
    words = generator.integers(0, 2**64, (rows, -(-count // 64)), dtype=np.uint64)
    return np.unpackbits(words.view(np.uint8), axis=1, count=count)


def _adjusted(p_values: ArrayLike, adjust: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Adjust those that are not NaN as one family."""
    adjusted = vector(p_values, "p-values").copy()
    known = ~np.isnan(adjusted)
    if ((adjusted[known] < 0) | (adjusted[known] > 1)).any():
        raise UserError("p-values out of [0, 1]: expected probabilities, NaN where there is no test")
    if known.any():
        adjusted[known] = adjust(adjusted[known])
    return adjusted


PAIRED_TESTS: dict[str, Callable[[np.ndarray, np.ndarray, int], float]] = {
    "sign_flip": lambda a, b, seed: sign_flip(a, b, seed=seed),
    "wilcoxon": lambda a, b, seed: wilcoxon(a, b),
}
