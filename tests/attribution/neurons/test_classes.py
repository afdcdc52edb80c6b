from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attribution as at
from attribution.neurons import class_paths, class_similarity, halves, path_frequency


@st.composite
def paths(draw: Any) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Neurons [N, L] or [N, L, K], labels [N], classes, width."""
    count, layers, classes, width = (draw(st.integers(1, most)) for most in (9, 4, 4, 6))
    shape = draw(st.sampled_from([(count, layers), (count, layers, draw(st.integers(1, 3)))]))
    size = int(np.prod(shape))
    neurons = np.array(draw(st.lists(st.integers(0, width - 1), min_size=size, max_size=size))).reshape(shape)
    labels = np.array(draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count)))
    return neurons, labels, classes, width


@given(paths())
def test_frequency_is_the_naive_loop(drawn: Any) -> None:
    neurons, labels, classes, width = drawn
    expected = np.zeros((classes, neurons.shape[1], width), dtype=int)
    for path, label in zip(neurons, labels, strict=True):
        for layer, units in enumerate(path):
            for unit in np.atleast_1d(units):
                expected[label, layer, unit] += 1
    found = path_frequency(neurons, labels, classes, width)
    assert found.dtype == np.int64 and np.array_equal(found, expected)


@given(paths())
def test_class_paths_are_the_naive_loop(drawn: Any) -> None:
    """The most frequent unit, the smallest on ties."""
    neurons, labels, classes, _ = drawn
    ranks = neurons.reshape(*neurons.shape[:2], -1)
    found = class_paths(neurons, labels, classes)
    assert found.shape == (classes, *ranks.shape[1:]) and found.dtype == np.int64
    for label in range(classes):
        for layer in range(ranks.shape[1]):
            for rank in range(ranks.shape[2]):
                counts = Counter(ranks[labels == label, layer, rank].tolist())
                expected = min(counts, key=lambda unit: (-counts[unit], unit)) if counts else -1
                assert found[label, layer, rank] == expected
    for depth in range(ranks.shape[1] + 1):
        shallow = class_paths(neurons, labels, classes, depth)
        assert np.array_equal(shallow[:, :depth], found[:, :depth]) and (shallow[:, depth:] == -1).all()


def test_class_paths_by_hand() -> None:
    neurons = [[4, 1], [2, 1], [4, 0], [2, 0], [5, 3]]
    found = class_paths(neurons, [0, 0, 0, 0, 2], 4)
    assert found[:, :, 0].tolist() == [[2, 0], [-1, -1], [5, 3], [-1, -1]]
    assert class_paths(neurons, [0, 0, 0, 0, 2], 4, depth=1)[:, :, 0].tolist() == [[2, -1], [-1, -1], [5, -1], [-1, -1]]
    ranked = np.array([[[1, 2]], [[1, 1]], [[3, 1]]])
    assert class_paths(ranked, [0, 0, 0], 1).tolist() == [[[1, 1]]]  # at two ranks, as in the reference


@given(paths())
def test_similarity_is_the_cosine(drawn: Any) -> None:
    frequency = path_frequency(*drawn)
    found = class_similarity(frequency)
    for a, first in enumerate(frequency):
        for b, second in enumerate(frequency):
            if first.any() and second.any():
                dot = sum(float(x) * float(y) for x, y in zip(first.flat, second.flat, strict=True))
                assert found.matrix[a, b] == pytest.approx(dot / np.sqrt((first**2).sum() * (second**2).sum()), abs=1e-12)
                assert -1 <= found.matrix[a, b] <= 1
            else:
                assert np.isnan(found.matrix[a, b])
    assert sorted(found.order.tolist()) == [c for c in range(len(frequency)) if frequency[c].any()]


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three groups of classes, mixed; images of a group use the same few units of 30, and class 5 has no image."""
    group = np.array([0, 1, 0, 2, 1, -1, 2, 0, 1])
    generator = np.random.default_rng(seed)
    neurons, labels = [], []
    for label, own in enumerate(group):
        for _ in range(20 if own >= 0 else 0):
            common = generator.random(4) < 0.8
            neurons.append(np.where(common, 3 * own + generator.integers(0, 3, 4), generator.integers(9, 30, 4)))
            labels.append(label)
    return path_frequency(np.array(neurons), labels, len(group), 30), group


@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_found(seed: int) -> None:
    frequency, group = planted(seed)
    found = class_similarity(frequency)
    assert found.clusters(3).tolist() == [0, 1, 0, 2, 1, -1, 2, 0, 1]  # numbered by their first class
    assert set(found.clusters(1).tolist()) == {0, -1}
    ends = found.clusters(8)
    assert ends[ends >= 0].tolist() == list(range(8)) and ends[5] == -1
    in_order = group[found.order].tolist()
    assert 5 not in found.order and sum(a != b for a, b in itertools.pairwise(in_order)) == 2
    for label in (0, 3, 8):
        alike = found.most(label)
        own = set(np.flatnonzero(group == group[label]).tolist()) - {label}
        assert len(alike) == 7 and label not in alike and 5 not in alike
        assert set(alike[: len(own)].tolist()) == own
        assert np.all(np.diff(found.matrix[label, alike]) <= 0)
        assert found.least(label).tolist() == sorted(alike.tolist(), key=lambda c, label=label: found.matrix[label, c])
        assert found.most(label, 2).tolist() == alike[:2].tolist()


def test_similarity_of_few_classes() -> None:
    frequency = np.zeros((3, 2, 4), dtype=np.int64)
    empty = class_similarity(frequency)
    assert np.isnan(empty.matrix).all() and empty.order.tolist() == [] and empty.clusters(2).tolist() == [-1, -1, -1]
    frequency[1, 0, 2] = 5
    one = class_similarity(frequency)
    assert one.matrix[1, 1] == 1 and one.clusters(4).tolist() == [-1, 0, -1] and one.most(1).tolist() == []
    frequency[2, 0, 2], frequency[2, 1, 1] = 3, 4
    two = class_similarity(frequency)
    assert two.matrix[1, 2] == pytest.approx(0.6) and two.most(2).tolist() == [1]
    assert two.clusters(2).tolist() == [-1, 0, 1] and two.clusters(1).tolist() == [-1, 0, 0]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.sampled_from([0.2, 0.5, 0.8, 1.0]), st.integers(0, 5))
def test_halves_split_each_class(labels: list[int], share: float, seed: int) -> None:
    first = halves(labels, share, seed=seed)
    assert first.dtype == bool and first.shape == (len(labels),)
    for label, members in Counter(labels).items():
        own = int(first[np.array(labels) == label].sum())
        assert own >= 1 and abs(own - max(1, share * members)) <= 0.5
    assert np.array_equal(first, halves(np.array(labels), share, seed=seed))


def test_halves_are_drawn() -> None:
    labels = np.repeat(np.arange(3), 30)
    draws = [halves(labels, seed=seed) for seed in range(40)]
    assert all(each.sum() == 45 for each in draws)
    assert len({each.tobytes() for each in draws}) == 40
    often = np.mean(draws, axis=0)
    assert often.min() > 0.1 and often.max() < 0.9
    assert not np.array_equal(draws[0][:30], draws[0][30:60])


@pytest.mark.parametrize(
    ("neurons", "labels", "message"),
    [
        ([[0.5, 1.0]], [0], r"neurons are float64 \[1, 2\]: expected whole numbers \[N, L\] or \[N, L, K\]"),
        ([1, 2], [0, 0], r"neurons are int64 \[2\]"),
        ([[[[1]]]], [0], r"neurons are int64 \[1, 1, 1, 1\]"),
        ([[1, 2]], [0, 1], "expected 1 whole numbers, one for each path"),
        ([[1, 2]], [0.0], "expected 1 whole numbers"),
        ([[1, -1]], [0], "units run from -1 to 1"),
        ([[1, 2]], [3], "labels run from 3 to 3: expected 0 to 2"),
        ([[1, 2]], [-1], "labels run from -1 to -1: expected 0 to 2"),
    ],
)
def test_errors(neurons: Any, labels: Any, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        path_frequency(neurons, labels, 3, 6)
    with pytest.raises(at.UserError, match=message):
        class_paths(neurons, labels, 3)


def test_units_beyond_the_width() -> None:
    with pytest.raises(at.UserError, match="units run from 1 to 6: expected 0 to 5"):
        path_frequency([[1, 6]], [0], 3, 6)
