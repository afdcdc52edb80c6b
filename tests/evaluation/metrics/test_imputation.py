from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attribution as at
from evaluation.metrics import imputation
from evaluation.metrics.imputation import impute

WEIGHTS = {(dy, dx): 1 / 6 if 0 in (dy, dx) else 1 / 12 for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)}


def solved_directly(image: Tensor, shown: Tensor) -> Tensor:
    """The paper's system as it is written, one row for each hidden pixel, by a sparse direct solver in float64."""
    height, width = shown.shape
    hidden = [(y, x) for y in range(height) for x in range(width) if not shown[y, x]]
    number = {pixel: i for i, pixel in enumerate(hidden)}
    pixels = image.double().numpy()
    matrix = scipy.sparse.lil_matrix((len(hidden), len(hidden)))
    right = np.zeros((len(hidden), 3))
    for (y, x), i in number.items():
        inside = {(y + dy, x + dx): w for (dy, dx), w in WEIGHTS.items() if 0 <= y + dy < height and 0 <= x + dx < width}
        total = sum(inside.values())
        matrix[i, i] = 1
        for neighbour, weight in inside.items():
            if neighbour in number:
                matrix[i, number[neighbour]] = -weight / total
            else:
                right[i] += weight / total * pixels[:, neighbour[0], neighbour[1]]
    result = pixels.copy()
    if hidden:
        rows, columns = zip(*hidden, strict=True)
        result[:, rows, columns] = scipy.sparse.linalg.spsolve(matrix.tocsc(), right).reshape(-1, 3).T
    return torch.from_numpy(result)


def smooth_noise(height: int, width: int, seed: int) -> Tensor:
    coarse = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0, 0]


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 21),
    width=st.integers(1, 21),
    share=st.floats(0, 1),
    smooth=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_the_direct_solution(height: int, width: int, share: float, smooth: bool, seed: int) -> None:
    """Scattered pixels and large holes, any size: odd sides, single rows and single columns."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, height, width, generator=generator)
    values = smooth_noise(height, width, seed) if smooth else torch.rand(height, width, generator=generator)
    shown = values >= values.flatten().quantile(share)
    shown[int(torch.randint(height, (), generator=generator)), int(torch.randint(width, (), generator=generator))] = True
    imputed = impute(image, shown[None], noise=0)[0]
    assert (imputed - solved_directly(image, shown)).abs().max() < 5e-4
    assert torch.equal(imputed[:, shown], image[:, shown])


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_equals_the_direct_solution_in_large_holes(cat: Tensor, share: float) -> None:
    """Where steps that only look at the residual stop too early."""
    image = torch.nn.functional.interpolate(cat[None], size=(111, 150), mode="bilinear", antialias=True)[0]
    values = smooth_noise(111, 150, 3)
    shown = values >= values.flatten().quantile(1 - share)
    exact = solved_directly(image, shown)
    assert (impute(image, shown[None], noise=0)[0] - exact).abs().max() < 5e-4
    assert (impute(image, shown[None], noise=0, tolerance=1e-6)[0] - exact).abs().max() < 1e-5


def test_between_two_columns_lies_a_ramp() -> None:
    image = torch.rand(3, 9, 40, generator=torch.Generator().manual_seed(0))
    image[:, :, 0], image[:, :, -1] = 0.1, 0.9
    shown = torch.zeros(1, 9, 40, dtype=torch.bool)
    shown[:, :, [0, -1]] = True
    ramp = torch.linspace(0.1, 0.9, 40).expand(3, 9, 40)
    assert torch.allclose(impute(image, shown, noise=0)[0], ramp, atol=2e-4)
    assert torch.allclose(impute(image.mT.contiguous(), shown.mT, noise=0)[0], ramp.mT, atol=2e-4)


def test_one_shown_pixel_colours_all_and_none_gives_the_mean() -> None:
    image = torch.rand(3, 30, 41, generator=torch.Generator().manual_seed(1))
    shown = torch.zeros(3, 30, 41, dtype=torch.bool)
    shown[0, 4, 7] = True
    shown[2] = True
    one, none, whole = impute(image, shown, noise=0)
    assert torch.allclose(one, image[:, 4, 7, None, None].expand(3, 30, 41), atol=1e-5)
    assert torch.allclose(none, image.mean(dim=(1, 2))[:, None, None].expand(3, 30, 41), atol=1e-6)
    assert torch.equal(whole, image)


def test_noise_is_one_field_on_imputed_pixels_only() -> None:
    image = torch.rand(3, 60, 60, generator=torch.Generator().manual_seed(2))
    shown = torch.rand(4, 60, 60, generator=torch.Generator().manual_seed(3)) < 0.3
    shown[3] = False
    state = torch.random.get_rng_state()
    noisy = impute(image, shown, noise=0.02, std=(0.2, 1.0, 3.0), seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    added = noisy - impute(image, shown, noise=0)
    assert torch.all(added.movedim(1, -1)[shown] == 0)
    field = added[3]
    for mask, one in zip(shown, added, strict=True):
        assert torch.allclose(one[:, ~mask], field[:, ~mask], atol=1e-6)
    assert field.std(dim=(1, 2)).tolist() == pytest.approx([0.004, 0.02, 0.06], rel=0.06)
    assert field.mean(dim=(1, 2)).abs().max() < 4 * 0.06 / 60
    assert impute(torch.ones_like(image), shown).max() > 1.02, "noise is not clamped"
    assert torch.equal(impute(image, shown, noise=0.02, std=(0.2, 1.0, 3.0), seed=5), noisy)
    assert not torch.allclose(impute(image, shown, noise=0.02, std=(0.2, 1.0, 3.0), seed=6), noisy, atol=1e-3)


def test_a_mask_is_solved_alike_alone_and_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(3, 24, 31, generator=torch.Generator().manual_seed(4))
    ranks = smooth_noise(24, 31, 5).flatten().argsort().argsort().view(24, 31)
    shown = ranks < torch.tensor([0, 1, 5, 100, 400, 700, 743, 744])[:, None, None]
    together = impute(image, shown)
    alone = torch.cat([impute(image, mask[None]) for mask in shown])
    assert torch.allclose(together, alone, atol=1e-6)
    parts: list[int] = []
    solve = imputation._solve
    monkeypatch.setattr(imputation, "_solve", lambda image, shown, tolerance: (parts.append(len(shown)), solve(image, shown, tolerance))[1])
    many = impute(image, shown.repeat(50, 1, 1))
    assert len(parts) > 1 and sum(parts) == 400
    assert torch.allclose(many, together.repeat(50, 1, 1, 1), atol=1e-6)
    assert impute(image, shown[:0]).shape == (0, 3, 24, 31)


def test_imputed_pixels_lie_between_the_shown_ones() -> None:
    image = torch.rand(3, 33, 47, generator=torch.Generator().manual_seed(6))
    shown = torch.rand(5, 33, 47, generator=torch.Generator().manual_seed(7)) < torch.tensor([0.01, 0.05, 0.2, 0.5, 0.9])[:, None, None]
    for mask, imputed in zip(shown, impute(image, shown, noise=0), strict=True):
        low, high = image[:, mask].amin(dim=1), image[:, mask].amax(dim=1)
        assert (imputed >= low[:, None, None] - 1e-4).all() and (imputed <= high[:, None, None] + 1e-4).all()


IMAGE, MASKS = torch.full((3, 4, 5), 0.5), torch.ones(2, 4, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("image", "shown", "options", "message"),
    [
        (IMAGE[0], MASKS, {}, r"image is float32 \[4, 5\]"),
        (IMAGE.byte(), MASKS, {}, "image is uint8"),
        (IMAGE * torch.nan, MASKS, {}, "not finite"),
        (IMAGE, MASKS[0], {}, r"masks are bool \[4, 5\]: expected bool \[n, 4, 5\]"),
        (IMAGE, MASKS.float(), {}, "masks are float32"),
        (IMAGE, MASKS.mT, {}, r"masks are bool \[2, 5, 4\]"),
        (IMAGE, MASKS, {"noise": -0.1}, "noise -0.1"),
        (IMAGE, MASKS, {"noise": float("nan")}, "noise nan"),
        (IMAGE, MASKS, {"std": (1.0, 1.0)}, "three of them"),
        (IMAGE, MASKS, {"tolerance": 1e-9}, "tolerance is 1e-09"),
    ],
)
def test_bad_input(image: Tensor, shown: Tensor, options: dict, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        impute(image, shown, **options)
