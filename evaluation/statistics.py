"""How sure a number is: intervals, paired tests, corrections for many tests, and methods that cannot be told apart.

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
SATURATED = 0.999  # a probability above it leaves gradients and orders to rounding
STABLE = 0.8  # rank correlation between seeds from which an order is called stable
_CHUNK_VALUES = 2**22  # floats of resamples held at once, 32 MiB


@dataclass(frozen=True)
class Interval:
    """An estimate and how far it might be off.

    Attributes:
        estimate: the mean or ratio; NaN without values.
        low, high: ends of the interval; NaN where there is none, as for one value.
        level: nominal coverage in (0, 1).
        method: "bca", "percentile", or "percentile (bca undefined)" where BCa was wanted and does not exist.
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
    checked = _vector(values, "values")
    return bootstrap_ratio(checked, np.ones_like(checked), groups=groups, resamples=resamples, level=level, method=method, seed=seed)


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
    arrays = {name: _vector(values, f"scores of {name}") for name, values in scores.items()}
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


def significance_groups(
    estimates: Mapping[str, float], comparisons: Mapping[tuple[str, str], Comparison], level: float = 0.05
) -> dict[str, tuple[str, ...]]:
    """Compact letter display by insert and absorb (Piepho, 2004): methods that share a letter are not separated.

    Args:
        estimates: the methods, best first; only their order is used.
        comparisons: of each two of them, in either order, as from ``pairwise_tests``.
        level: two methods are separated where their adjusted p is below it; NaN does not separate.

    Returns:
        The letters of each method, "a" ... "z", "aa" ...; two methods have one in common if and only if they are not separated.
        The first method has "a".

    Raises:
        UserError: two methods without a comparison.
    """
    names = list(estimates)
    columns = [frozenset(range(len(names)))] if names else []
    for first, second in combinations(range(len(names)), 2):
        if _comparison(comparisons, names[first], names[second]).adjusted_p < level:
            columns = _split(columns, first, second)
    ordered = sorted(columns, key=sorted)
    return {name: tuple(_letter(at) for at, column in enumerate(ordered) if place in column) for place, name in enumerate(names)}


def ranks(estimates: Mapping[str, float], direction: Literal["higher", "lower"]) -> dict[str, float]:
    """Rank of each method, 1 = best; equal estimates share the mean of their ranks, and NaN shares the last ones.

    Args:
        estimates: one number a method.
        direction: which is better, "higher" or "lower".

    Raises:
        UserError: another direction.
    """
    if direction not in ("higher", "lower"):
        raise UserError(f"direction is {direction!r}: expected 'higher' or 'lower'")
    values = np.array(list(estimates.values()), dtype=np.float64)
    known = ~np.isnan(values)
    places = np.full(len(values), (known.sum() + 1 + len(values)) / 2)
    places[known] = stats.rankdata(values[known] if direction == "lower" else -values[known])
    return dict(zip(estimates, places.tolist(), strict=True))


def rank_agreement(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b between two scores of the same methods: do two metrics rank them alike?

    Args:
        a, b: float [M], one a method; pairs with a NaN are left out.

    Returns:
        In [-1, 1], 1 for the same order; NaN for fewer than two pairs or where a or b is constant.

    Raises:
        UserError: arrays of other shapes.
    """
    first, second = _same_length(a, b, "a", "b")
    known = ~(np.isnan(first) | np.isnan(second))
    first, second = first[known], second[known]
    if len(first) < 2 or (first == first[0]).all() or (second == second[0]).all():
        return np.nan
    return float(stats.kendalltau(first, second).statistic)


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
    return _vector(confidence, "confidence") > SATURATED


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
    checked = _vector(values, "values")
    counts = {}
    for name, given in {"constant": constant, "saturated": saturated, "failed": failed}.items():
        flags = np.asarray(given)
        if flags.shape != checked.shape or (flags.dtype != np.bool_ and flags.size):
            raise UserError(f"{name} is {describe(flags)}: expected bool [{len(checked)}], one for each value")
        counts[name] = int(np.count_nonzero(flags))
    finite = int(np.isfinite(checked).sum())
    return Validity(len(checked), finite, counts["constant"], counts["saturated"], counts["failed"])


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
    scores = _vector(null, "null")
    scores = scores[~np.isnan(scores)]
    if np.isnan(observed):
        return np.nan
    return (1 + int(np.count_nonzero(scores >= observed))) / (len(scores) + 1)


def _vector(values: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = None
    if array is None or array.ndim != 1:
        raise UserError(f"{name}: received {describe(values if array is None else array)}, expected numbers [N], one a sample")
    return array


def _same_length(a: ArrayLike, b: ArrayLike, name_a: str, name_b: str) -> tuple[np.ndarray, np.ndarray]:
    first, second = _vector(a, name_a), _vector(b, name_b)
    if len(first) != len(second):
        raise UserError(f"{name_a} have {len(first)} values and {name_b} {len(second)}: give both on the same samples")
    return first, second


def _finite_pairs(a: ArrayLike, b: ArrayLike, name_a: str, name_b: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of which both members are finite, and bool [N], which these are."""
    first, second = _same_length(a, b, name_a, name_b)
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
    adjusted = _vector(p_values, "p-values").copy()
    known = ~np.isnan(adjusted)
    if ((adjusted[known] < 0) | (adjusted[known] > 1)).any():
        raise UserError("p-values out of [0, 1]: expected probabilities, NaN where there is no test")
    if known.any():
        adjusted[known] = adjust(adjusted[known])
    return adjusted


def _comparison(comparisons: Mapping[tuple[str, str], Comparison], first: str, second: str) -> Comparison:
    for pair in ((first, second), (second, first)):
        if pair in comparisons:
            return comparisons[pair]
    raise UserError(f"no comparison of {first} and {second}: give one for each two methods, as pairwise_tests does")


def _split(columns: list[frozenset[int]], first: int, second: int) -> list[frozenset[int]]:
    """Part two methods: duplicate each column that holds both, without one of them each; absorb columns that another contains."""
    apart = [column for column in columns if not {first, second} <= column]
    halves = [column - {gone} for column in columns if {first, second} <= column for gone in (first, second)]
    # no column contains another before, so only a half can be absorbed, and only by a column that was not split
    return apart + [half for half in halves if not any(half <= column for column in apart)]


def _letter(index: int) -> str:
    """0 -> a, 25 -> z, 26 -> aa, as columns of a spreadsheet are named."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return letters


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


PAIRED_TESTS: dict[str, Callable[[np.ndarray, np.ndarray, int], float]] = {
    "sign_flip": lambda a, b, seed: sign_flip(a, b, seed=seed),
    "wilcoxon": lambda a, b, seed: wilcoxon(a, b),
}
