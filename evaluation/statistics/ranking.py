"""In which order methods come, which of them cannot be told apart, and whether two orders agree."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from attribution.errors import UserError
from evaluation.statistics.comparisons import Comparison
from evaluation.statistics.intervals import same_length


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
    first, second = same_length(a, b, "a", "b")
    known = ~(np.isnan(first) | np.isnan(second))
    first, second = first[known], second[known]
    if len(first) < 2 or (first == first[0]).all() or (second == second[0]).all():
        return np.nan
    return float(stats.kendalltau(first, second).statistic)


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
