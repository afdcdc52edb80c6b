"""Semi-NMF against planted factors, a naive loop, and the values of the reference code."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import attribution as at
from attribution.concepts.nonnegative import nonnegative_codes


def planted(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A [40, 300], features of three neurons each that no other has, and sparse coefficients."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.zeros(40, 4)
    for number in range(4):
        z[3 * number : 3 * number + 3, number] = torch.randn(3, generator=generator).sign() * (1 + torch.rand(3, generator=generator))
    y = torch.rand(300, 4, generator=generator) * (torch.rand(300, 4, generator=generator) < 0.4)
    return z @ y.T, z, y


def test_planted_features_are_found() -> None:
    a, z, y = planted()
    found = at.semi_nmf(a, 4, sparsity=3 / 40, start="knn", seed=1)
    assert found.relative_error < 0.01
    cosine = torch.nn.functional.normalize(found.features, dim=0).T @ torch.nn.functional.normalize(z, dim=0)
    places = cosine.argmax(dim=1)
    assert sorted(places.tolist()) == [0, 1, 2, 3] and bool((cosine.max(dim=1).values > 0.999).all())
    scale = (found.features * z[:, places]).sum(dim=0) / z[:, places].square().sum(dim=0)
    assert torch.allclose(found.coefficients * scale, y[:, places], atol=0.02)
    assert torch.allclose(found.encode(a), found.coefficients, atol=0.02)


def naive(a: np.ndarray, y: np.ndarray, kept: int, steps: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
    losses, pairs = [], []
    for _ in range(steps):
        z = a @ y @ np.linalg.inv(y.T @ y + 1e-6 * np.eye(y.shape[1]))
        for column in z.T:
            column[np.argsort(-np.abs(column))[kept:]] = 0
        for number in range(y.shape[1]):
            norm = np.linalg.norm(y[:, number])
            y[:, number] /= norm
            z[:, number] *= norm
        new = np.empty_like(y)
        p, q = a.T @ z, z.T @ z
        for n in range(len(y)):
            for k in range(y.shape[1]):
                above = max(p[n, k], 0) + sum(y[n, j] * max(-q[j, k], 0) for j in range(y.shape[1]))
                below = max(-p[n, k], 0) + sum(y[n, j] * max(q[j, k], 0) for j in range(y.shape[1]))
                new[n, k] = y[n, k] * math.sqrt(above / (below + 1e-6))
        y = new
        losses.append(float(((a - z @ y.T) ** 2).sum()))
        pairs.append((z, y.copy()))
    best = int(np.argmin(losses))
    return *pairs[best], losses


def test_against_a_naive_loop() -> None:
    generator = np.random.default_rng(0)
    a, y = generator.normal(size=(12, 30)), generator.uniform(0.1, 1, size=(30, 3))
    found = at.semi_nmf(a, 3, sparsity=0.5, start=y, iterations=8)
    z, expected, losses = naive(a, y.copy(), 6, 8)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-9)
    np.testing.assert_allclose(found.features.numpy(), z, atol=1e-5)
    np.testing.assert_allclose(found.coefficients.numpy(), expected, atol=1e-5)
    assert found.losses[found.best] == found.losses.min() and not found.converged


@pytest.mark.parametrize("start", ["svd", "random", "knn"])
def test_starts_are_seeded_and_never_end_worse(start: str) -> None:
    a = torch.randn(20, 60, generator=torch.Generator().manual_seed(0))
    one, two = (at.semi_nmf(a, 5, sparsity=1.0, start=start, iterations=60, seed=3) for _ in range(2))
    assert torch.equal(one.features, two.features) and torch.equal(one.coefficients, two.coefficients)
    assert bool((one.coefficients >= 0).all())
    assert one.losses[one.best] <= one.losses[0]


def test_codes_are_exact() -> None:
    generator = np.random.default_rng(0)
    basis, rows = generator.normal(size=(4, 30)), generator.normal(size=(50, 30))
    codes = nonnegative_codes(rows, basis)
    gradient = (codes @ basis - rows) @ basis.T  # Karush, Kuhn and Tucker
    assert (codes >= 0).all() and (gradient > -1e-9).all() and np.abs(gradient * codes).max() < 1e-9


@pytest.mark.parametrize("name", ["block2/K10/sparsity0.01/random", "block5/K10/sparsity0.01/svd"])
def test_the_reference_code_finds_the_same(shared: Path, name: str) -> None:
    folder = shared / "golden" / "concepts"
    (record,) = [each for each in json.loads((folder / "snmf.json").read_text())["records"] if each["name"] == name]
    arrays = np.load(folder / "snmf_arrays.npz")
    a = np.load(folder / f"snmf_activations_block{record['block']}.npz")["A"].T
    found = at.semi_nmf(a, record["K"], sparsity=record["sparsity"], start=arrays[f"init_Y/{record['init_key']}"])
    for step in (1, 10, 50, 100):
        assert found.losses[step - 1] == pytest.approx(record["loss"][str(step)], rel=5e-4)
    assert found.losses.min() == pytest.approx(record["loss"]["best"], rel=1e-3)
    for mine, stored in ((found.features, arrays[f"{name}/Z"]), (found.coefficients, arrays[f"{name}/Y"])):
        assert np.linalg.norm(mine.numpy() - stored) < 0.02 * np.linalg.norm(stored)
    assert np.array_equal(found.features.numpy() != 0, arrays[f"{name}/Z"] != 0)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"activations": torch.zeros(3)}, r"activations are float32 \[3\]: expected finite numbers \[neurons, tokens\]"),
        ({"activations": torch.full((3, 4), math.nan)}, "expected finite numbers"),
        ({"n_features": 0}, "n_features is 0: expected a whole number"),
        ({"n_features": 7}, "n_features is 7: expected a whole number"),
        ({"sparsity": 0}, "sparsity is 0: expected a share"),
        ({"sparsity": 2}, "sparsity is 2: expected a number from 0 to 1"),
        ({"start": "pca"}, "start is 'pca': expected one of svd, random, knn"),
        ({"start": torch.ones(3, 2)}, r"start is float32 \[3, 2\]: expected finite coefficients of at least 0, \[9, 2\]"),
        ({"start": -torch.ones(9, 2)}, "expected finite coefficients of at least 0"),
        ({"iterations": 0}, "iterations is 0: expected a whole number"),
        ({"seed": -1}, "seed is -1: expected a whole number"),
    ],
)
def test_bad_input_is_one_line(changes: dict[str, object], line: str) -> None:
    given = {"activations": torch.ones(6, 9), "n_features": 2, **changes}
    with pytest.raises(at.UserError, match=line):
        at.semi_nmf(**given)  # type: ignore[arg-type]
