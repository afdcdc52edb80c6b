"""Compare methods on the same samples: paired tests, corrections for many tests, and a test against random orders.

Functions take arrays with one value for each sample. Values that are not finite are left out, and each result says how many samples
were used. Every random draw takes a seed; the global generator is not used.
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

from attribution.checks import check_choice, check_whole
from attribution.errors import UserError
from evaluation.statistics.intervals import bootstrap_interval, finite_pairs, resample_chunks, vector

EXACT_COUNT = 13  # with up to this many pairs all 2^N sign vectors are enumerated: at most 8192, fewer than the default resamples


@dataclass(frozen=True)
class Comparison:
    """The comparison of two methods on the same samples.

    Attributes:
        difference: mean of first - second, over the samples for which both are finite.
        low, high: its 95 % bootstrap interval.
        p: p-value of the two-sided paired test.
        adjusted_p: p after Holm's correction over all pairs of methods.
        count: number of samples used.
    """

    difference: float
    low: float
    high: float
    p: float
    adjusted_p: float
    count: int


def sign_flip(a: ArrayLike, b: ArrayLike, *, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided paired sign-flip test of the hypothesis that two methods are exchangeable on each sample.

    With differences d and random signs s, p = (1 + #{|mean(s d)| >= |mean d|}) / (B + 1). With at most 13 pairs the test is exact: all
    2^N sign vectors are enumerated, and p is the share of them whose |mean(s d)| is at least |mean d|.

    Args:
        a, b: float [N], two methods on the same samples. Pairs with a value that is not finite are left out.
        resamples: B, number of sign vectors drawn if there are more than 13 pairs.
        seed: of the draws.

    Returns:
        p in (0, 1]; 1 if no pair differs; NaN without pairs.

    Raises:
        UserError: arrays of other shapes, or resamples below 1.
    """
    check_whole("resamples", resamples, 1)
    differences = _differences(a, b)
    count = len(differences)
    if count == 0:
        return np.nan
    total = differences.sum()
    # Sums in another order differ by rounding errors. The tolerance is relative to the absolute values: the sum may be near 0.
    threshold = abs(total) - 1e-12 * np.abs(differences).sum()

    def extreme(flips: np.ndarray) -> int:
        return int(np.count_nonzero(np.abs(2 * (flips @ differences) - total) >= threshold))

    if count <= EXACT_COUNT:
        return extreme(np.arange(2**count)[:, None] >> np.arange(count) & 1) / 2**count
    generator = np.random.default_rng(seed)
    found = sum(extreme(_random_bits(generator, rows, count)) for rows in resample_chunks(resamples, count))
    return (1 + found) / (resamples + 1)


def wilcoxon(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided Wilcoxon signed-rank test of paired values (scipy's, exact if feasible).

    Pairs that do not differ are ranked and then dropped (Pratt, 1959). The alternative, splitting their ranks, gives the same
    statistic with a larger variance, as if the zeros had random signs. It is far too conservative for scores with many equal pairs,
    such as hit or miss.

    Args:
        a, b: float [N], two methods on the same samples. Pairs with a value that is not finite are left out.

    Returns:
        p in (0, 1]; 1 if no pair differs; NaN without pairs.

    Raises:
        UserError: arrays of other shapes.
    """
    differences = _differences(a, b)
    if len(differences) == 0:
        return np.nan
    if not differences.any():
        return 1.0
    with warnings.catch_warnings():  # older releases of scipy warn if they use no exact distribution
        warnings.simplefilter("ignore")
        return float(stats.wilcoxon(differences, zero_method="pratt").pvalue)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's step-down adjustment (1979), which controls the probability of any false rejection in the family.

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
    """Benjamini and Hochberg's step-up adjustment (1995), which controls the expected share of false rejections among rejections.

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
    """Compare every pair of methods on the same samples.

    Args:
        scores: float [N] for each method, the same samples in the same order. A pair of methods uses the samples finite in both.
        test: a name in ``PAIRED_TESTS``.
        seed: of the bootstrap and of the sign flips; the same for every pair.

    Returns:
        One comparison for each pair of methods, keyed by their names in the order of the mapping.

    Raises:
        UserError: an unknown test, or arrays of other shapes.
    """
    check_choice("test", test, PAIRED_TESTS)
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
    """One-sided test of whether an order scores higher than random orders of the same regions.

    Args:
        observed: score of the order, higher is better (negate scores of which lower is better, such as deletion).
        null: float [R], scores of random orders; NaN is left out.

    Returns:
        p = (1 + #{null >= observed}) / (R + 1); NaN if observed is NaN.

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
    """Random uint8 [rows, count] of 0 and 1. Each row draws whole words, so that chunks of rows do not change the numbers."""
    words = generator.integers(0, 2**64, (rows, -(-count // 64)), dtype=np.uint64)
    return np.unpackbits(words.view(np.uint8), axis=1, count=count)


def _adjusted(p_values: ArrayLike, adjust: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Adjust the p-values that are not NaN as one family."""
    adjusted = vector(p_values, "p-values").copy()
    known = ~np.isnan(adjusted)
    if ((adjusted[known] < 0) | (adjusted[known] > 1)).any():
        raise UserError("p-values out of [0, 1]: expected probabilities, or NaN for no test")
    if known.any():
        adjusted[known] = adjust(adjusted[known])
    return adjusted


PAIRED_TESTS: dict[str, Callable[[np.ndarray, np.ndarray, int], float]] = {
    "sign_flip": lambda a, b, seed: sign_flip(a, b, seed=seed),
    "wilcoxon": lambda a, b, seed: wilcoxon(a, b),
}
