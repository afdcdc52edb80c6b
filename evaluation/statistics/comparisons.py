"""How sure a number is: intervals, paired tests, and corrections for many tests.

Everything works on plain arrays of one value a sample. Values that are not finite are left out and never counted, so each result
says how many samples it rests on. Every draw takes a seed; the global generator is never touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from attribution.errors import UserError
from evaluation.statistics.intervals import bootstrap_interval, finite_pairs, resample_chunks, vector

EXACT_COUNT = 13  # pairs up to which all 2^N sign vectors are enumerated: 8192, fewer than the default resamples


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
    found = sum(extreme(_random_bits(generator, rows, count)) for rows in resample_chunks(resamples, count))
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
        a, b, _ = finite_pairs(arrays[first], arrays[second], f"scores of {first}", f"scores of {second}")
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


def _differences(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    first, second, _ = finite_pairs(a, b, "a", "b")
    return first - second


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
