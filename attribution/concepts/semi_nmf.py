"""Semi-NMF of the activations of an MLP: features that are sparse combinations of neurons, and what each token has of them.

Ding, Li and Jordan, "Convex and semi-nonnegative matrix factorizations" (TPAMI 2010), with the hard sparsity of public code for language
models: A ~ Z Y', Z of free sign, Y >= 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution.checks import check_choice, check_number, check_seed, check_whole
from attribution.concepts.nonnegative import nonnegative_codes
from attribution.errors import UserError, describe

STARTS = ("svd", "random", "knn")
_FLOOR = 1e-6  # of coefficients at the start, and what keeps divisions defined
_PATIENCE = 100  # iterations without a better pair
_BETTER = 1e-4  # by which a loss must be lower to be better
_LLOYD = 15  # steps of k-means


@dataclass(frozen=True, eq=False)
class SemiNMF:
    """Activations A [F, n] as Z Y'.

    Attributes:
        features: Z, float32 [F, K]: each column is a combination of neurons.
        coefficients: Y, float32 [n, K], at least 0: what each token has of each feature.
        losses: float64 [iterations], ||A - Z Y'||^2 after each iteration; not monotone where neurons are dropped.
        best: the iteration that the pair is from, counted from 0: the one with the smallest loss.
        relative_error: ||A - Z Y'|| / ||A||.
        converged: whether it stopped because the loss improved no more.
    """

    features: Tensor
    coefficients: Tensor
    losses: np.ndarray
    best: int
    relative_error: float
    converged: bool

    def encode(self, activations: Tensor | np.ndarray) -> Tensor:
        """The coefficients of other tokens on these features, by exact non-negative least squares.

        Args:
            activations: float [F, m].

        Returns:
            float32 [m, K].
        """
        given = torch.as_tensor(activations)
        if given.ndim != 2 or len(given) != len(self.features):
            raise UserError(f"activations are {describe(given)}: expected [{len(self.features)}, tokens], as those that were factorised")
        return torch.from_numpy(nonnegative_codes(given.T.cpu().numpy(), self.features.T.cpu().numpy())).float()


def semi_nmf(
    activations: Tensor | np.ndarray,
    n_features: int,
    sparsity: float = 0.01,
    start: str | Tensor | np.ndarray | None = None,
    iterations: int = 500,
    seed: int = 0,
) -> SemiNMF:
    """Factorise activations into features and non-negative coefficients.

    Each iteration solves Z by least squares, keeps the largest entries of each column, gives the columns of Y unit length, and updates Y
    by the multiplicative step. It is computed in float64: in float32 coefficients underflow to 0 and never return.

    Args:
        activations: A, float [F, n]: F neurons of n tokens, of any sign.
        n_features: K, at most min(F, n).
        sparsity: share of the F entries that each feature keeps, above 0; 1 keeps all.
        start: the first Y: "svd" (right singular vectors; their signs are fixed so that the largest entry of each is positive), "random"
            (uniform in (0, 1)), "knn" (clusters of tokens by k-means), or Y itself, float [n, K], at least 0. None: "svd".
        iterations: at most; it stops earlier after 100 without a better pair.
        seed: of "random" and "knn".

    Returns:
        The best pair, and the loss after each iteration.

    Raises:
        UserError: not a matrix of finite numbers, or values out of range.
    """
    given = torch.as_tensor(activations)
    if given.ndim != 2 or not given.numel() or not bool(torch.isfinite(given).all()):
        raise UserError(f"activations are {describe(given)}: expected finite numbers [neurons, tokens]")
    check_whole("n_features", n_features, 1, min(given.shape))
    check_number("sparsity", sparsity, 0, 1)
    check_whole("iterations", iterations, 1)
    check_seed(seed)
    if sparsity == 0:
        raise UserError("sparsity is 0: expected a share of the neurons above 0, at most 1")
    a = given.detach().double()
    size = float(a.square().sum())
    y = _start(a, n_features, start, seed)
    kept = math.ceil(sparsity * len(a))
    losses: list[float] = []
    best: tuple[int, Tensor, Tensor] | None = None
    for step in range(iterations):
        z = torch.linalg.solve(y.T @ y + _FLOOR * torch.eye(n_features, dtype=y.dtype, device=y.device), (a @ y).T).T
        z = _sparse(z, kept)
        norms = y.norm(dim=0).clamp_min(1e-300)
        y, z = y / norms, z * norms
        p, q = a.T @ z, z.T @ z
        y = y * _step(p, y, q)
        losses.append(size - 2 * float((p * y).sum()) + float((y.T @ y * q).sum()))  # ||A||^2 - 2 <A, Z Y'> + ||Z Y'||^2
        if best is None or losses[-1] < losses[best[0]] - _BETTER:
            best = step, z, y
        elif step - best[0] >= _PATIENCE:
            break
    assert best is not None
    error = math.sqrt(max(losses[best[0]], 0.0) / size) if size else 0.0
    return SemiNMF(best[1].float(), best[2].float(), np.array(losses), best[0], error, len(losses) < iterations)


def _step(p: Tensor, y: Tensor, q: Tensor) -> Tensor:
    """The factor of the multiplicative step: sqrt((P+ + Y Q-) / (P- + Y Q+))."""
    return ((p.clamp_min(0) + y @ (-q).clamp_min(0)) / ((-p).clamp_min(0) + y @ q.clamp_min(0) + _FLOOR)).sqrt()


def _sparse(z: Tensor, kept: int) -> Tensor:
    """Zero all but the largest entries of each column."""
    if kept >= len(z):
        return z
    places = z.abs().topk(kept, dim=0).indices
    return torch.zeros_like(z).scatter(0, places, z.gather(0, places))


def _start(a: Tensor, count: int, start: str | Tensor | np.ndarray | None, seed: int) -> Tensor:
    """The first Y, float64 [n, K]."""
    if start is not None and not isinstance(start, str):
        y = torch.as_tensor(start).to(a)
        if y.shape != (a.shape[1], count) or not bool(torch.isfinite(y).all()) or bool((y < 0).any()):
            raise UserError(f"start is {describe(start)}: expected finite coefficients of at least 0, [{a.shape[1]}, {count}]")
        return y
    name = start or STARTS[0]
    check_choice("start", name, STARTS)
    generator = torch.Generator().manual_seed(seed)
    if name == "random":
        return torch.rand(a.shape[1], count, generator=generator, dtype=a.dtype).clamp_min(_FLOOR).to(a.device)
    if name == "svd":
        _, values, rows = torch.linalg.svd(a, full_matrices=False)
        columns = rows[:count].T
        largest = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True))
        return (columns * largest.sign() * values[:count].sqrt()).clamp_min(_FLOOR)
    return _clusters(a.T, count, generator)


def _clusters(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """One-hot clusters of tokens by Lloyd's steps, with a floor."""
    centres = tokens[torch.randperm(len(tokens), generator=generator)[:count].to(tokens.device)]
    for _ in range(_LLOYD):
        labels = torch.cdist(tokens, centres).argmin(dim=1)
        for number in range(count):
            if bool((labels == number).any()):  # an empty cluster keeps its centre
                centres[number] = tokens[labels == number].mean(dim=0)
    return torch.nn.functional.one_hot(labels, count).to(tokens.dtype).clamp_min(_FLOOR)
