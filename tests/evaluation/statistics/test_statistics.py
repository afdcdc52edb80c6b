from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import evaluation.statistics as es
from attribution.errors import UserError
from evaluation.statistics import comparisons, intervals, ranking, validity
from evaluation.statistics.comparisons import Comparison
from evaluation.statistics.intervals import Interval

NAN = math.nan


def skewed(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).exponential(size=count)


def exact_sign_flip(differences: list[int]) -> float:
    """Every sign vector in turn, in integers: no rounding anywhere."""
    observed, extreme = abs(sum(differences)), 0
    for signs in itertools.product((-1, 1), repeat=len(differences)):
        extreme += abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= observed
    return extreme / 2 ** len(differences)


def separations(names: list[str], separated: set[frozenset[str]]) -> dict[tuple[str, str], Comparison]:
    return {
        (a, b): Comparison(0.0, 0.0, 0.0, 0.5, 0.01 if frozenset((a, b)) in separated else 0.05, 9)
        for a, b in itertools.combinations(names, 2)
    }


# intervals


@pytest.mark.parametrize("count", [2, 29, 30, 100])
@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_interval_equals_scipy(count: int, method: str, level: float) -> None:
    values = skewed(count, count)
    wanted = stats.bootstrap(
        (values,), np.mean, n_resamples=500, confidence_level=level, method=method, random_state=np.random.default_rng(3)
    ).confidence_interval
    interval = es.bootstrap_interval(values, resamples=500, level=level, method=method, seed=3)
    assert (interval.low, interval.high) == pytest.approx((wanted.low, wanted.high), rel=1e-12)
    assert interval.estimate == pytest.approx(values.mean(), rel=1e-14)
    assert (interval.level, interval.method, interval.count) == (level, method, count)


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_ratio_equals_scipy_on_pairs(method: str) -> None:
    above, below = skewed(1, 40), skewed(2, 40) + 0.1
    wanted = stats.bootstrap(
        (above, below),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=500,
        method=method,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    interval = es.bootstrap_ratio(above, below, resamples=500, method=method)
    assert (interval.low, interval.high) == pytest.approx((wanted.low, wanted.high), rel=1e-12)
    assert interval.estimate == pytest.approx(above.sum() / below.sum(), rel=1e-14)


def test_two_values_reach_their_ends() -> None:
    """A resample of two values holds the same one twice with probability 1/4 each: more than either tail of 2.5 %."""
    assert es.bootstrap_interval([0, 1]) == Interval(0.5, 0.0, 1.0, 0.95, "percentile", 2)


@pytest.mark.parametrize(("count", "method"), [(29, "percentile"), (30, "bca")])
def test_auto_takes_bca_from_thirty_finite_values(count: int, method: str) -> None:
    values = np.append(skewed(0, count), [NAN, math.inf])
    interval = es.bootstrap_interval(values)
    assert (interval.method, interval.count) == (method, count)
    assert interval == es.bootstrap_interval(values[:count], method=method)


def test_the_seed_decides_and_the_global_generator_stays() -> None:
    values, before = skewed(0, 50), np.random.get_state()[1].copy()  # noqa: NPY002
    first = es.bootstrap_interval(values, seed=1)
    assert first == es.bootstrap_interval(values, seed=1)
    assert first != es.bootstrap_interval(values, seed=2)
    es.sign_flip(values, values[::-1])
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("method", ["auto", "bca", "percentile"])
@pytest.mark.parametrize("count", [2, 31])
def test_equal_values_give_themselves(method: str, count: int) -> None:
    interval = es.bootstrap_interval([0.1] * count, method=method)
    assert (interval.estimate, interval.low, interval.high) == (0.1, 0.1, 0.1)
    grouped = es.bootstrap_interval([0.1] * count, groups=[0] + [1] * (count - 1))
    assert (grouped.estimate, grouped.low, grouped.high) == (0.1, 0.1, 0.1)


def test_nothing_and_one_value_have_no_interval() -> None:
    nothing = es.bootstrap_interval([NAN, math.inf])
    assert np.isnan([nothing.estimate, nothing.low, nothing.high]).all() and nothing.count == 0
    one = es.bootstrap_interval([NAN, 0.25])
    assert (one.estimate, one.count) == (0.25, 1) and np.isnan([one.low, one.high]).all()
    one_group = es.bootstrap_interval([0.0, 1.0, 2.0], groups="aaa")
    assert (one_group.estimate, one_group.count) == (1.0, 3) and np.isnan([one_group.low, one_group.high]).all()


def test_bca_that_does_not_exist_falls_back_and_says_so() -> None:
    values = [0.0] * 30 + [1.0]
    single = es.bootstrap_interval(values, resamples=1, method="bca", seed=1)  # one draw off the mean: an infinite bias
    assert single.method == "percentile (bca undefined)"
    assert single.low == single.high == es.bootstrap_interval(values, resamples=1, method="percentile", seed=1).low


def test_ratio_without_a_denominator() -> None:
    none = es.bootstrap_ratio([1.0, 2.0], [0.0, 0.0])
    assert np.isnan([none.estimate, none.low, none.high]).all() and none.count == 2
    unbounded = es.bootstrap_ratio([1.0, 2.0], [0.0, 4.0])
    assert unbounded.estimate == 0.75 and np.isnan([unbounded.low, unbounded.high]).all()
    cancelled = es.bootstrap_ratio([1.0, 2.0], [-1.0, 1.0])
    assert np.isnan(cancelled.estimate)


def test_proportional_pairs_have_one_ratio() -> None:
    below = skewed(4, 20) + 1
    interval = es.bootstrap_ratio(3 * below, below)
    assert (interval.low, interval.high) == pytest.approx((3, 3), rel=1e-14)


def test_clusters_of_copies_count_once() -> None:
    """Five copies of each value in one cluster carry no more than the value."""
    values = skewed(5, 40)
    copies = es.bootstrap_interval(np.repeat(values, 5), groups=np.repeat(np.arange(40), 5))
    once = es.bootstrap_interval(values, method="percentile")
    assert (copies.low, copies.high) == pytest.approx((once.low, once.high), rel=1e-12)
    assert (copies.method, copies.count) == ("percentile", 200)
    alone = es.bootstrap_interval(np.repeat(values, 5))
    assert alone.high - alone.low < 0.6 * (copies.high - copies.low)


def test_clusters_equal_a_naive_loop() -> None:
    values, labels = skewed(6, 12), list("abcabcdddaab")
    values[3] = NAN
    members = {g: [v for v, label in zip(values, labels, strict=True) if label == g and not np.isnan(v)] for g in "abcd"}
    generator, means = np.random.default_rng(0), []
    for _ in range(300):
        drawn = [value for index in generator.integers(0, 4, 4) for value in members["abcd"[index]]]
        means.append(sum(drawn) / len(drawn))
    interval = es.bootstrap_interval(values, groups=labels, resamples=300)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), rel=1e-12)
    assert (interval.estimate, interval.count) == (pytest.approx(np.nanmean(values)), 11)


def test_groups_may_be_anything_hashable() -> None:
    import torch

    values, numbers = skewed(7, 9), [0, 0, 1, 1, 2, 2, 3, 3, 3]
    wanted = es.bootstrap_interval(values, groups=numbers)
    for groups in (np.array(numbers), torch.tensor(numbers), ["abcd"[n] for n in numbers], ((n, n) for n in numbers)):
        assert es.bootstrap_interval(values, groups=groups) == wanted


def test_coverage() -> None:
    """The mean of 40 exponential values, nominal 95 %: a skewed mean is missed more often, and more often from below.

    8000 draws gave 92.4 % for BCa (3.1 % too high, 4.5 % too low) and 91.9 % for percentile (2.0 % and 6.1 %).
    """
    draws = np.random.default_rng(11).exponential(size=(1000, 40))
    lopsided = {}
    for method in ("bca", "percentile"):
        intervals = [es.bootstrap_interval(row, resamples=500, method=method, seed=s) for s, row in enumerate(draws)]
        too_high, too_low = np.mean([i.low > 1 for i in intervals]), np.mean([i.high < 1 for i in intervals])
        assert 0.90 <= 1 - too_high - too_low <= 0.98
        lopsided[method] = too_low - too_high
    assert 0 < lopsided["bca"] < lopsided["percentile"]


def test_chunks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = skewed(8, 70), skewed(9, 70)
    whole = es.bootstrap_interval(a), es.sign_flip(a, b, resamples=999)
    monkeypatch.setattr(intervals, "_CHUNK_VALUES", 7 * 70)
    assert (es.bootstrap_interval(a), es.sign_flip(a, b, resamples=999)) == whole
    monkeypatch.setattr(intervals, "_CHUNK_VALUES", 1)
    assert es.sign_flip(a, b, resamples=999) == whole[1]


# paired tests


@settings(max_examples=60, deadline=None)
@given(differences=st.lists(st.integers(-6, 6), min_size=1, max_size=9), scale=st.sampled_from([1, 0.1, 1 / 3, 1e-9, 1e9]))
def test_exact_sign_flip_equals_the_naive_enumeration(differences: list[int], scale: float) -> None:
    """Scaled integers tie only up to rounding: the tolerance must see the ties, and nothing else."""
    a = scale * np.array(differences)
    assert es.sign_flip(a, np.zeros(len(a))) == exact_sign_flip(differences)
    assert es.sign_flip(np.zeros(len(a)), a) == exact_sign_flip(differences)


def test_sign_flip_closed_forms() -> None:
    for count in range(1, 14):  # all of one sign and size: only the identity and its opposite are as extreme
        assert es.sign_flip(np.ones(count), np.zeros(count)) == 2 / 2**count
    assert es.sign_flip([1.0, 2.0], [1.0, 2.0]) == 1
    assert es.sign_flip([0.1, 0.2, 0.0], [0.0, 0.0, 0.3]) == 1  # their sum is 0 up to rounding
    assert es.sign_flip(np.ones(40), np.ones(40)) == 1
    assert es.sign_flip(np.ones(60), np.zeros(60), resamples=99) == 1 / 100
    assert np.isnan(es.sign_flip([NAN, 1.0], [0.0, NAN])) and np.isnan(es.sign_flip([], []))
    assert es.sign_flip([NAN, 1, 2, math.inf], [5, 0, 0, 0]) == exact_sign_flip([1, 2])


def test_drawn_signs_agree_with_all_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(12)
    cases = [generator.normal(shift, 1, 12) for shift in (0, 0.2, 0.4, 0.6)]
    exact = [es.sign_flip(d, np.zeros(12)) for d in cases]
    monkeypatch.setattr(comparisons, "EXACT_COUNT", 0)
    for d, p in zip(cases, exact, strict=True):
        drawn = es.sign_flip(d, np.zeros(12), resamples=20_000)
        assert drawn != p
        assert drawn == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 20_000) + 1e-4)


def test_sign_flip_of_many_pairs_is_near_the_t_test() -> None:
    for shift in (0.0, 0.05, 0.1):
        d = np.random.default_rng(13).normal(shift, 1, 1000)
        p = float(stats.ttest_1samp(d, 0).pvalue)
        assert es.sign_flip(d, np.zeros(1000)) == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 9999) + 2e-3)


@pytest.mark.parametrize("count", [10, 25])
def test_sign_flip_is_uniform_under_the_null(count: int) -> None:
    """Skewed samples swapped at random: exchangeable, so P(p <= x) is at most x, and near it."""
    generator = np.random.default_rng(14)
    a, b = generator.exponential(size=(2, 300, count))
    p = np.array([es.sign_flip(x, y, resamples=199, seed=s) for s, (x, y) in enumerate(zip(a, b, strict=True))])
    for x in (0.05, 0.25, 0.5, 0.75):
        assert np.mean(p <= x) == pytest.approx(x, abs=4 * math.sqrt(x * (1 - x) / 300))


@settings(max_examples=40, deadline=None)
@given(differences=st.lists(st.integers(-4, 4), min_size=1, max_size=8))
def test_wilcoxon_equals_the_naive_enumeration_of_rank_sums(differences: list[int]) -> None:
    sizes = sorted(abs(d) for d in differences)
    doubled = [math.copysign(sizes.index(abs(d)) * 2 + sizes.count(abs(d)) + 1, d) if d else 0 for d in differences]
    assert es.wilcoxon(differences, np.zeros(len(differences))) == pytest.approx(exact_sign_flip([int(r) for r in doubled]))


@pytest.mark.parametrize("seed", range(4))
def test_wilcoxon_of_many_zeros_is_the_sign_flip_test_of_ranks(seed: int) -> None:
    generator = np.random.default_rng(seed)
    d = np.where(generator.random(200) < 0.65, 0, generator.normal(0.25, 1, 200))
    p = es.wilcoxon(d, np.zeros(200))
    drawn = es.sign_flip(np.sign(d) * stats.rankdata(np.abs(d)), np.zeros(200), resamples=19_999)
    assert drawn == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 19_999) + 0.002)


def test_wilcoxon_edges() -> None:
    assert es.wilcoxon([1.0, 2.0, NAN], [1.0, 2.0, 3.0]) == 1
    assert es.wilcoxon(np.ones(60), np.ones(60)) == 1
    assert np.isnan(es.wilcoxon([NAN], [0.0])) and np.isnan(es.wilcoxon([], []))
    assert es.wilcoxon([2.0], [1.0]) == 1
    assert es.wilcoxon(np.arange(1, 11), np.zeros(10)) == pytest.approx(2 / 2**10)


# families of tests


def test_holm_on_a_known_family() -> None:
    assert es.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert es.holm([0.01, NAN, 0.04, 0.03, 0.005, NAN]) == pytest.approx([0.03, NAN, 0.06, 0.06, 0.02, NAN], nan_ok=True)
    assert es.holm([0.5, 0.9]).tolist() == [1, 1]
    assert es.holm([]).tolist() == [] and np.isnan(es.holm([NAN])).all()


def test_benjamini_hochberg_on_a_known_family() -> None:
    assert es.benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert es.benjamini_hochberg([NAN, 0.5, 0.9]) == pytest.approx([NAN, 0.9, 0.9], nan_ok=True)
    assert es.benjamini_hochberg([]).tolist() == [] and np.isnan(es.benjamini_hochberg([NAN])).all()


@settings(max_examples=80, deadline=None)
@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=12), level=st.sampled_from([0.01, 0.05, 0.3]))
def test_adjusted_values_reject_what_the_procedures_reject(p_values: list[float], level: float) -> None:
    """Holm steps down the sorted values until one exceeds level / (m - k); Benjamini-Hochberg steps up to the last below k q / m."""
    m, order = len(p_values), sorted(range(len(p_values)), key=lambda i: p_values[i])
    exact = [Fraction(p) for p in p_values]
    alpha = Fraction(level)
    bounds_down = [alpha / (m - k) for k in range(m)]
    bounds_up = [alpha * (k + 1) / m for k in range(m)]
    if any(abs(exact[i] - bound) < Fraction(1, 10**12) for i in order for bound in bounds_down + bounds_up):
        return  # decided by rounding
    down: set[int] = set()
    for k, i in enumerate(order):
        if exact[i] > bounds_down[k]:
            break
        down.add(i)
    last = max((k for k, i in enumerate(order) if exact[i] <= bounds_up[k]), default=-1)
    assert {i for i, p in enumerate(es.holm(p_values)) if p <= level} == down
    assert {i for i, p in enumerate(es.benjamini_hochberg(p_values)) if p <= level} == set(order[: last + 1])


@pytest.mark.parametrize("test", ["sign_flip", "wilcoxon"])
def test_pairwise_tests_compare_every_two_methods(test: str) -> None:
    generator = np.random.default_rng(16)
    base = generator.normal(size=60)
    scores = {"good": base + 1, "same": base + 1 + generator.normal(0, 0.5, 60), "bad": base + generator.normal(0, 0.3, 60)}
    scores["bad"][:4] = NAN
    compared = es.pairwise_tests(scores, test=test, seed=3)
    assert list(compared) == [("good", "same"), ("good", "bad"), ("same", "bad")]
    single = {"sign_flip": lambda a, b: es.sign_flip(a, b, seed=3), "wilcoxon": es.wilcoxon}[test]
    for (first, second), comparison in compared.items():
        interval = es.bootstrap_interval(scores[first] - scores[second], seed=3)
        assert (comparison.difference, comparison.low, comparison.high) == (interval.estimate, interval.low, interval.high)
        assert comparison.p == single(scores[first], scores[second])
        assert comparison.count == (60 if second == "same" else 56)
    adjusted = es.holm([c.p for c in compared.values()])
    assert [c.adjusted_p for c in compared.values()] == adjusted.tolist()
    assert compared["good", "same"].adjusted_p > 0.05 > compared["good", "bad"].adjusted_p
    assert ranking.significance_groups(dict.fromkeys(scores, 0.0), compared) == {"good": ("a",), "same": ("a",), "bad": ("b",)}


def test_pairwise_tests_without_common_samples() -> None:
    compared = es.pairwise_tests({"a": [1.0, NAN], "b": [NAN, 1.0], "c": [0.5, 0.25]})
    assert np.isnan([compared["a", "b"].p, compared["a", "b"].adjusted_p, compared["a", "b"].difference]).all()
    assert compared["a", "b"].count == 0 and compared["a", "c"].p == 1
    assert ranking.significance_groups({"a": 1, "b": 1, "c": 0}, compared) == {"a": ("a",), "b": ("a",), "c": ("a",)}
    assert es.pairwise_tests({"a": [1.0, 2.0]}) == {}


# letters and ranks


LETTERS: list[tuple[str, str, str]] = [
    ("a", "", "a"),
    ("abc", "", "a a a"),
    ("abc", "ab ac bc", "a b c"),
    ("abc", "ac", "a ab b"),
    ("abcd", "ad", "a ab ab b"),
    ("abcd", "ac ad bd", "a ab bc c"),
    ("abc", "bc", "ab a b"),
    ("abcd", "ab cd", "ab cd ac bd"),
]


@pytest.mark.parametrize(("names", "separated", "letters"), LETTERS)
def test_letters_by_hand(names: str, separated: str, letters: str) -> None:
    compared = separations(list(names), {frozenset(pair) for pair in separated.split()})
    assert ranking.significance_groups(dict.fromkeys(names, 0.0), compared) == {
        name: tuple(word) for name, word in zip(names, letters.split(), strict=True)
    }


def test_letters_read_pairs_in_either_order_and_a_level() -> None:
    compared = {("b", "a"): Comparison(0, 0, 0, 0.01, 0.02, 5)}
    assert ranking.significance_groups({"a": 2, "b": 1}, compared) == {"a": ("a",), "b": ("b",)}
    assert ranking.significance_groups({"a": 2, "b": 1}, compared, level=0.02) == {"a": ("a",), "b": ("a",)}
    assert ranking.significance_groups({"b": 2, "a": 1}, compared) == {"b": ("a",), "a": ("b",)}
    assert ranking.significance_groups({}, {}) == {}


def test_letters_after_z() -> None:
    names = [f"method {k}" for k in range(30)]
    everything = {frozenset(pair) for pair in itertools.combinations(names, 2)}
    groups = ranking.significance_groups(dict.fromkeys(names, 0.0), separations(names, everything))
    assert [groups[name] for name in (names[0], names[25], names[26], names[29])] == [("a",), ("z",), ("aa",), ("ad",)]
    assert len(set(groups.values())) == 30
    assert [ranking._letter(k) for k in (51, 52, 701, 702)] == ["az", "ba", "zz", "aaa"]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), size=st.integers(1, 8))
def test_letters_are_shared_if_and_only_if_not_separated(data: st.DataObject, size: int) -> None:
    names = [f"m{k}" for k in range(size)]
    pairs = [frozenset(pair) for pair in itertools.combinations(names, 2)]
    separated = {pair for pair in pairs if data.draw(st.booleans())}
    groups = ranking.significance_groups(dict.fromkeys(names, 0.0), separations(names, separated))
    assert list(groups) == names
    assert groups[names[0]][0] == "a"
    for first, second in itertools.combinations(names, 2):
        assert bool(set(groups[first]) & set(groups[second])) == (frozenset((first, second)) not in separated)
    sharing = [{name for name in names if letter in groups[name]} for letter in set(itertools.chain(*groups.values()))]
    assert not any(one <= other for one, other in itertools.permutations(sharing, 2))  # absorbed: no letter says less than another


def test_ranks() -> None:
    estimates = {"w": 0.5, "x": NAN, "y": 0.9, "z": 0.5}
    assert ranking.ranks(estimates, "higher") == {"w": 2.5, "x": 4, "y": 1, "z": 2.5}
    assert ranking.ranks(estimates, "lower") == {"w": 1.5, "x": 4, "y": 3, "z": 1.5}
    assert ranking.ranks({"x": NAN, "y": -math.inf, "z": NAN}, "higher") == {"x": 2.5, "y": 1, "z": 2.5}
    assert ranking.ranks({}, "lower") == {}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8))
def test_rank_agreement_equals_counting_pairs(pairs: list[tuple[int, int]]) -> None:
    concordant = ties_a = ties_b = 0
    for (a, b), (c, d) in itertools.combinations(pairs, 2):
        concordant += int(np.sign(a - c) * np.sign(b - d))
        ties_a += a == c
        ties_b += b == d
    total = math.comb(len(pairs), 2)
    first, second = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    wanted = concordant / math.sqrt((total - ties_a) * (total - ties_b)) if ties_a < total and ties_b < total else NAN
    assert ranking.rank_agreement(first, second) == pytest.approx(wanted, nan_ok=True)
    assert ranking.rank_agreement([*first, NAN, 9], [*second, 9, NAN]) == pytest.approx(wanted, nan_ok=True)


# seeds, validity, random orders


def test_seed_spread_by_hand() -> None:
    spread = validity.seed_spread([[1.0, 2.0, 3.0, NAN], [3.0, 2.0, 7.0, 1.0]])
    assert spread.seed_sd == pytest.approx((math.sqrt(2) + 0 + math.sqrt(8)) / 3)
    assert spread.image_sd == pytest.approx(np.std([2, 2, 5], ddof=1))
    assert spread.rank_correlation == pytest.approx(0.5)  # ranks 1 2 3 against 2 1 3
    assert (spread.seeds, spread.stable) == (2, False)


def test_seed_spread_of_maps_equals_scipy_on_each_pair() -> None:
    generator = np.random.default_rng(17)
    scores = generator.random((4, 5))
    maps = generator.random((5, 6, 7)) + 0.2 * generator.random((4, 5, 6, 7))
    pairs = list(itertools.combinations(range(4), 2))
    wanted = [stats.spearmanr(maps[r, n].ravel(), maps[s, n].ravel()).statistic for n in range(5) for r, s in pairs]
    spread = validity.seed_spread(scores, maps)
    assert spread.rank_correlation == pytest.approx(np.mean(wanted))
    assert spread.stable
    assert validity.seed_spread(scores, maps.reshape(4, 5, 42)) == spread
    maps[:, 0] = 1.0  # a constant map has no correlation and is left out
    assert validity.seed_spread(scores, maps).rank_correlation == pytest.approx(np.mean(wanted[6:]))
    scores[0, 1] = NAN  # so is a sample without a score under every seed
    assert validity.seed_spread(scores, maps).rank_correlation == pytest.approx(np.mean(wanted[12:]))


def test_seed_spread_of_scores_equals_scipy() -> None:
    scores = np.random.default_rng(18).random((3, 30))
    wanted = np.mean([stats.spearmanr(scores[r], scores[s]).statistic for r, s in itertools.combinations(range(3), 2)])
    assert validity.seed_spread(scores).rank_correlation == pytest.approx(wanted)


def test_seed_spread_where_nothing_varies() -> None:
    flat = validity.seed_spread(np.full((3, 4), 0.5))
    assert (flat.seed_sd, flat.image_sd, flat.stable) == (0, 0, False) and np.isnan(flat.rank_correlation)
    single = validity.seed_spread([[1.0], [2.0]])
    assert single.seed_sd == pytest.approx(math.sqrt(0.5)) and np.isnan([single.image_sd, single.rank_correlation]).all()
    none = validity.seed_spread([[NAN], [2.0]])
    assert np.isnan([none.seed_sd, none.image_sd, none.rank_correlation]).all()


def test_validity_counts() -> None:
    saturated = validity.is_saturated([0.999, 0.9991, 1.0, NAN])
    assert saturated.tolist() == [False, True, True, False]
    counted = validity.count_validity([1.0, NAN, math.inf, 0.0], [True, False, True, True], saturated, [False, True, False, False])
    assert counted == validity.Validity(total=4, finite=2, constant_maps=3, saturated=2, failed=1)
    assert validity.count_validity([], [], [], []) == validity.Validity(0, 0, 0, 0, 0)


def test_random_order_test_by_hand() -> None:
    assert es.random_order_test(0.5, [0.1, 0.5, 0.7, 0.2]) == 3 / 5
    assert es.random_order_test(0.9, np.linspace(0, 0.8, 99)) == 0.01
    assert es.random_order_test(0.5, [0.1, NAN, 0.7]) == 2 / 3
    assert es.random_order_test(0.5, []) == 1
    assert np.isnan(es.random_order_test(NAN, [0.1]))


# errors

MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: es.bootstrap_interval(np.zeros((2, 2))), r"values: received float64 \[2, 2\], expected numbers \[N\]"),
    (lambda: es.bootstrap_interval("cat"), "values: received 'cat'"),
    (lambda: es.bootstrap_interval([1, 2], resamples=0), "resamples is 0"),
    (lambda: es.bootstrap_interval([1, 2], level=95), "level is 95: expected a coverage between 0 and 1"),
    (lambda: es.bootstrap_interval([1, 2], method="basic"), "unknown method 'basic'"),  # type: ignore[arg-type]
    (lambda: es.bootstrap_interval([1, 2], groups=[0]), "groups have 1 labels for 2 values"),
    (lambda: es.bootstrap_interval([1, 2], groups=np.zeros((2, 1))), r"groups are float64 \[2, 1\]: expected one hashable label"),
    (lambda: es.bootstrap_ratio([1, 2], [1]), "numerators have 2 values and denominators 1"),
    (lambda: es.sign_flip([1, 2], [1]), "a have 2 values and b 1: give both on the same samples"),
    (lambda: es.sign_flip([1], [1], resamples=0), "resamples is 0"),
    (lambda: es.wilcoxon([1, 2], [1]), "a have 2 values"),
    (lambda: es.holm([0.5, 1.5]), r"p-values out of \[0, 1\]"),
    (lambda: es.benjamini_hochberg([-0.5]), r"p-values out of \[0, 1\]"),
    (lambda: es.pairwise_tests({"a": [1], "b": [1]}, test="t"), "unknown test 't': expected one of sign_flip, wilcoxon"),  # type: ignore[arg-type]
    (lambda: es.pairwise_tests({"a": [1], "b": [1, 2]}), "scores of a have 1 values and scores of b 2"),
    (lambda: ranking.significance_groups({"a": 1, "b": 0}, {}), "no comparison of a and b"),
    (lambda: ranking.ranks({"a": 1}, "up"), "direction is 'up'"),  # type: ignore[arg-type]
    (lambda: validity.seed_spread([[1.0, 2.0]]), r"scores are float64 \[1, 2\]: expected float \[S, N\] with at least 2 seeds"),
    (lambda: validity.seed_spread([1.0, 2.0]), r"scores are float64 \[2\]"),
    (lambda: validity.seed_spread(np.zeros((2, 3)), np.zeros((2, 4, 5))), r"maps are float64 \[2, 4, 5\]: expected \[2, 3, P\]"),
    (lambda: validity.count_validity([1.0], [True, False], [True], [True]), r"constant is bool \[2\]: expected bool \[1\]"),
    (lambda: validity.count_validity([1.0], [True], [0.9], [True]), "saturated is float64"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_mistakes_are_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        mistake()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (3, 10), (1, 1)])
def test_the_interval_of_a_share_solves_wilsons_equation(hits: int, count: int) -> None:
    found = es.share_interval([1] * hits + [0] * (count - hits) + [NAN])
    z, share = stats.norm.ppf(0.975), hits / count
    for end in (found.low, found.high):
        assert (share - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / count, abs=1e-12)
    assert found.low <= share <= found.high and found.low < found.high
    assert (found.estimate, found.method, found.count) == (share, "wilson", count)


def test_a_share_takes_hits_and_misses_only() -> None:
    assert math.isnan(es.share_interval([]).low)
    with pytest.raises(UserError, match="values other than 0 and 1"):
        es.share_interval([0.5, 1])
    with pytest.raises(UserError, match="level is 1"):
        es.share_interval([0, 1], level=1)
