"""Rank methods, group those that do not differ significantly, and compare two rankings."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from attribution.checks import check_choice
from attribution.errors import UserError
from evaluation.statistics.comparisons import Comparison
from evaluation.statistics.intervals import same_length


def significance_groups(
    estimates: Mapping[str, float], comparisons: Mapping[tuple[str, str], Comparison], level: float = 0.05
) -> dict[str, tuple[str, ...]]:
    """Compact letter display by insert-and-absorb (Piepho, 2004): methods that share a letter do not differ significantly.

    Args:
        estimates: the methods, best first; only their order is used.
        comparisons: one for each pair of methods, in either order, as from ``pairwise_tests``.
        level: two methods differ if their adjusted p is below this level; NaN does not count as a difference.

    Returns:
        The letters of each method: "a" to "z", then "aa" and so on. Two methods share a letter if and only if they do not differ.
        The first method has "a".

    Raises:
        UserError: a pair of methods without a comparison.
    """
    names = list(estimates)
    columns = [frozenset(range(len(names)))] if names else []
    for first, second in combinations(range(len(names)), 2):
        if _comparison(comparisons, names[first], names[second]).adjusted_p < level:
            columns = _split(columns, first, second)
    ordered = sorted(columns, key=sorted)
    return {name: tuple(_letter(at) for at, column in enumerate(ordered) if place in column) for place, name in enumerate(names)}


def ranks(estimates: Mapping[str, float], direction: Literal["higher", "lower"]) -> dict[str, float]:
    """Rank of each method, 1 for the best. Equal estimates share the mean of their ranks; all NaN share the mean of the last ranks.

    Args:
        estimates: one number for each method.
        direction: which is better, "higher" or "lower".

    Raises:
        UserError: another direction.
    """
    check_choice("direction", direction, ("higher", "lower"))
    values = np.array(list(estimates.values()), dtype=np.float64)
    known = ~np.isnan(values)
    places = np.full(len(values), (known.sum() + 1 + len(values)) / 2)
    places[known] = stats.rankdata(values[known] if direction == "lower" else -values[known])
    return dict(zip(estimates, places.tolist(), strict=True))


def rank_agreement(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b between two scores of the same methods: how far two metrics rank the methods alike.

    Args:
        a, b: float [M], one for each method; pairs with a NaN are left out.

    Returns:
        In [-1, 1], 1 for the same order; NaN for fewer than two pairs, or if a or b is constant.

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
    raise UserError(f"no comparison of {first} and {second}: give one for each pair of methods, as pairwise_tests returns them")


def _split(columns: list[frozenset[int]], first: int, second: int) -> list[frozenset[int]]:
    """Separate two methods: replace each column with both by two columns without one of them; drop columns inside others."""
    apart = [column for column in columns if not {first, second} <= column]
    halves = [column - {gone} for column in columns if {first, second} <= column for gone in (first, second)]
    # Before the split no column contains another. So only a half can lie inside a column, and only inside one that was not split.
    return apart + [half for half in halves if not any(half <= column for column in apart)]


def _letter(index: int) -> str:
    """Letters like the columns of a spreadsheet: 0 is a, 25 is z, 26 is aa."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return letters
