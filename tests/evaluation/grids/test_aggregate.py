from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import attribution as at
from attribution.errors import UserError
from evaluation.grids import scores as scores_module
from evaluation.grids.aggregate import FRACTIONS, aggregate, examples, saturation
from evaluation.grids.scores import cell_slices, localization_scores, positive_maps

# the first row of 4x4 maps whose other rows are 0; a 2x2 grid, top left cell
ROWS = [
    [1, 0, 1, 0],
    [2, 0, 2, 0],
    [1, 0, 1, 0],
    [3, 0, 0, 0],
    [1, 0, 0, 0],
    [0, 0, 1, 0],
    [0, 0, 0, 0],
    [-1, 0, 0, -2],
    [1, 0, 3, -100],
    [5e-8, 0, 0, 0],
    [2e-7, 0, 0, 0],
    [1, 0, 3, 0],
]


def hand_made() -> Tensor:
    return torch.stack([torch.cat([torch.tensor([row], dtype=torch.float32), torch.zeros(3, 4)]) for row in ROWS])


def random_maps(count: int, seed: int = 0, side: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, side, side, generator=generator) * torch.rand(count, 1, 1, generator=generator)


def naive_aggregate(maps: Tensor, cell: int, n: int, size: tuple[int, int], cuts: list[int]) -> tuple[list[int], list[Tensor]]:
    """All maps at once, sorted by Python."""
    positive = positive_maps(maps, size)
    rows, columns = cell_slices(cell, n, *size)
    scores = localization_scores(maps, [cell] * len(maps), n, size).tolist()
    inside = [math.fsum(m[rows, columns].flatten().tolist()) for m in positive]
    order = sorted(range(len(maps)), key=lambda i: (-scores[i], -inside[i], i))
    bins = [order[start:end] for start, end in pairwise(cuts) if end > start]
    return order, [torch.stack([positive[i] for i in members]).double().mean(dim=0).float() for members in bins]


def test_hand_made_maps() -> None:
    """Order, bins and scale as the authors' program finds them: ties by what is inside, then as they came."""
    found = aggregate(hand_made(), 0, 2, (4, 4), (0, 0.25, 0.5, 0.75, 1))
    assert found.order.tolist() == [3, 4, 10, 1, 0, 2, 8, 11, 9, 5, 6, 7]
    assert [b.tolist() for b in found.bins] == [[3, 4, 10], [1, 0, 2], [8, 11, 9], [5, 6, 7]]
    assert found.scores.tolist() == [0.5, 0.5, 0.5, 1.0, 1.0, 0.0, 0.0, 0.0, 0.25, 0.0, 1.0, 0.25]
    assert found.scale == 2.0
    first_rows = torch.tensor([[(4 + 2e-7) / 3, 0, 0, 0], [4 / 3, 0, 4 / 3, 0], [(2 + 5e-8) / 3, 0, 2, 0], [0, 0, 1 / 3, 0]])
    torch.testing.assert_close(found.maps[:, 0], first_rows)
    assert found.maps[:, 1:].abs().max() == 0
    assert found.fractions == (0, 0.25, 0.5, 0.75, 1)


def test_perfect_maps_tie_and_the_strongest_comes_first() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.zeros(40, 64, 64)
    maps[:, 32:, 32:] = torch.randn(40, 32, 32, generator=generator)
    found = aggregate(maps, 3, 2, (64, 64), (0, 0.5, 1))
    assert set(found.scores.tolist()) == {1.0}
    inside = maps.double().clamp(min=0).sum(dim=(1, 2))
    assert found.order.tolist() == inside.argsort(descending=True).tolist()


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 40), seed=st.integers(0, 99), n=st.sampled_from([2, 3]), data=st.data())
def test_equals_the_naive_program(count: int, seed: int, n: int, data: st.DataObject) -> None:
    cell = data.draw(st.integers(0, n * n - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1)))) if count > 1 else []
    maps = random_maps(count, seed)
    maps[data.draw(st.integers(0, count - 1))] = maps[0]  # a full tie
    cuts = [0, *cuts, count]
    found = aggregate(maps, cell, n, (6 * n, 6 * n), [cut / count for cut in cuts])
    order, means = naive_aggregate(maps, cell, n, (6 * n, 6 * n), cuts)
    assert found.order.tolist() == order
    assert torch.cat(found.bins).tolist() == order
    assert [len(b) for b in found.bins] == np.diff(cuts).tolist(), "fractions k / N cut at k, whatever their rounding"
    torch.testing.assert_close(found.maps, torch.stack(means))
    assert found.fractions == pytest.approx([cut / count for cut in cuts])


def test_the_papers_bins() -> None:
    for count in (100, 200, 500):
        found = aggregate(random_maps(count, side=2), 0, 2, (4, 4))
        assert [len(b) for b in found.bins] == [round(share * count) for share in (0.02, 0.03, 0.45, 0.45, 0.03, 0.02)]
        assert found.fractions == pytest.approx(FRACTIONS)


@pytest.mark.parametrize(
    ("count", "lengths"), [(1, [1]), (3, [1, 1, 1]), (24, [1, 11, 10, 1, 1]), (99, [1, 3, 45, 45, 3, 2]), (30, [1, 14, 13, 1, 1])]
)
def test_any_number_of_maps_is_cut_rounding_down_and_empty_bins_are_left_out(count: int, lengths: list[int]) -> None:
    found = aggregate(random_maps(count), 0, 2, (8, 8))
    assert [len(b) for b in found.bins] == lengths
    assert len(found.maps) == len(lengths)
    assert [(b - a) * count for a, b in pairwise(found.fractions)] == pytest.approx(lengths)


def test_edges_within_rounding_of_a_whole_number_of_maps() -> None:
    assert 0.29 * 100 < 29
    found = aggregate(random_maps(100), 0, 2, (8, 8), (0, 0.29, 1))
    assert [len(b) for b in found.bins] == [29, 71]
    assert [len(b) for b in aggregate(random_maps(100), 0, 2, (8, 8), (0, 0.29, 1), compat=True).bins] == [28, 72]


def test_compat_divides_the_fourth_bin_by_one_too_few() -> None:
    maps = random_maps(100)
    ours, authors = (aggregate(maps, 0, 2, (10, 10), compat=compat) for compat in (False, True))
    assert ours.order.tolist() == authors.order.tolist()
    factors = torch.tensor([1, 1, 1, 45 / 44, 1, 1])[:, None, None]
    torch.testing.assert_close(authors.maps, ours.maps * factors)
    with pytest.raises(UserError, match="compat with 24 maps divides by 0"):
        aggregate(maps[:24], 0, 2, (10, 10), compat=True)


def test_the_scale_is_the_value_that_half_a_percent_exceeds() -> None:
    values = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float()
    assert saturation(values.view(10, 100)) == 995, "index 995 of 0...999"
    assert saturation(torch.tensor([4.0])) == 4.0
    maps = random_maps(20)
    found = aggregate(maps, 1, 2, (10, 10), (0, 0.5, 1))
    assert found.scale == pytest.approx(found.maps.flatten().sort().values[int(200 * 0.01 * 99.5)].item())
    assert aggregate(-maps.abs(), 1, 2, (10, 10), (0, 0.5, 1)).scale == 0


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = random_maps(23)
    whole = aggregate(maps, 0, 2, (10, 10))
    monkeypatch.setattr(scores_module, "_CHUNK_VALUES", 350)
    parts = aggregate(maps, 0, 2, (10, 10))
    assert parts.order.tolist() == whole.order.tolist()
    torch.testing.assert_close(parts.maps, whole.maps, rtol=1e-6, atol=0)


def test_examples_alternate_around_the_median() -> None:
    found = aggregate(random_maps(18), 0, 2, (8, 8), (0, 1 / 18, 3 / 18, 8 / 18, 1))
    positions = {int(index): position for position, index in enumerate(found.order)}
    chosen = [[positions[i] for i in indices.tolist()] for indices in examples(found, 4)]
    assert chosen == [[0], [2, 1], [5, 4, 6, 3], [13, 12, 14, 11]]
    everything = [sorted(i.tolist()) for i in examples(found, 99)]
    assert everything == [sorted(b.tolist()) for b in found.bins]
    with pytest.raises(UserError, match="count is 0"):
        examples(found, 0)


@settings(deadline=None, max_examples=20)
@given(start=st.integers(0, 9), length=st.integers(1, 12), count=st.integers(1, 12))
def test_examples_follow_the_authors_offsets(start: int, length: int, count: int) -> None:
    total = start + length + 1
    found = aggregate(random_maps(total, side=2), 0, 2, (4, 4), sorted({0, start / total, (start + length) / total, 1}))
    end = start + length
    expected = [(start + end) // 2 + (i + 1) // 2 * (-1) ** i for i in range(2 * length + 1)]
    expected = [position for position in expected if start <= position < end][:count]
    positions = {int(index): position for position, index in enumerate(found.order)}
    chosen = examples(found, count)[1 if start else 0]
    assert [positions[int(i)] for i in chosen] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": torch.zeros(0, 4, 4)}, "at least one"),
        ({"maps": torch.full((2, 4, 4), math.nan)}, "2 of 2 maps"),
        ({"cell": 4}, "cell 4 is not on the grid"),
        ({"size": (7, 8)}, "does not fall into 2x2"),
        ({"fractions": (0, 0.5)}, "rising from 0 to 1"),
        ({"fractions": (0, 0.5, 0.5, 1)}, "rising from 0 to 1"),
        ({"fractions": (0.1, 1)}, "rising from 0 to 1"),
        ({"fractions": (0, math.nan, 1)}, "rising from 0 to 1"),
        ({"fractions": ("a",)}, "rising from 0 to 1"),
        ({"fractions": 3}, "rising from 0 to 1"),
    ],
)
def test_errors_say_what_was_received(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"maps": torch.ones(2, 4, 4), "cell": 0, "n": 2, "size": (8, 8)} | change
    with pytest.raises(UserError, match=message):
        aggregate(**arguments)


# ---- the authors' program on the small network: maps computed again, in closed form where there is one


def features(cnn: at.Classifier, inputs: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = cnn.module.layer3.register_forward_hook(lambda module, arguments, output: found.append(output))
    try:
        cnn.module(inputs)
    finally:
        handle.remove()
    return found[0]


def by_cell(function: Callable[[Tensor], Tensor], values: Tensor, n: int) -> Tensor:
    """A function of each cell alone, its results side by side."""
    rows = values.chunk(n, dim=2)
    return torch.cat([torch.cat([function(part.contiguous()) for part in row.chunk(n, dim=3)], dim=3) for row in rows], dim=2)


def grad_cam(maps: Tensor, weight: Tensor) -> Tensor:
    """At the last feature map: the gradient of a head is weight / positions where it pools, so its mean is the same for every head."""
    return torch.einsum("bc,bchw->bhw", weight, maps).relu() / (maps.shape[2] * maps.shape[3])


def input_x_gradient(cnn: at.Classifier, inputs: Tensor, setting: str, weight: Tensor, n: int, cell: int) -> Tensor:
    inputs = inputs.clone().requires_grad_()
    rows, columns = cell_slices(cell, n, *inputs.shape[2:])
    if setting == "DiFull":
        pooled = features(cnn, inputs[:, :, rows, columns]).mean(dim=(2, 3))
    else:
        found = features(cnn, inputs)
        if setting == "DiPart":
            found = found[(slice(None), slice(None), *cell_slices(cell, n, *found.shape[2:]))]
        pooled = found.mean(dim=(2, 3))
    (gradient,) = torch.autograd.grad((pooled * weight).sum(), inputs)
    return (gradient * inputs).sum(dim=1).detach()


def normalized(cnn: at.Classifier, pixels: np.ndarray) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (cnn.preprocessing.mean, cnn.preprocessing.std))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden" / "grid_golden.json").read_text())


def compare(golden: dict[str, Any], shared: Path, cnn: at.Classifier, name: str, inputs: Tensor) -> int:
    n, compared = int(name[0]), 0
    labels = torch.tensor(golden["grids"][name]["labels"])
    slow = {f"3x3/{setting}/Input/IxG/cell8" for setting in ("GridPG", "DiFull", "DiPart")}  # the first cell is compared
    with torch.no_grad():
        together, alone = features(cnn, inputs), by_cell(lambda x: features(cnn, x), inputs, n)
    with np.load(shared / "golden" / "grid_aggatt.npz") as arrays:
        for key, expected in golden["aggatt"].items():
            if key.split("/")[0] != name or key in slow:
                continue
            cell, setting = expected["head_pos_idx"], key.split("/")[1]
            weight = cnn.module.fc.weight.detach()[labels[:, cell]]
            if "/Final/GradCam/" in key:
                maps = grad_cam(alone if setting == "DiFull" else together, weight)
            else:
                maps = input_x_gradient(cnn, inputs, setting, weight, n, cell)
            size = (32 * n, 32 * n)
            found = aggregate(maps, cell, n, size, expected["bin_positions"], compat=True)
            assert found.scores[found.order].tolist() == pytest.approx(expected["sorted_scores"], abs=1e-5), key
            if not expected["order_reproducible"]:  # perfect maps: the authors' order is rounding noise, ours is by strength
                assert set(found.scores.tolist()) == {1.0}
                inside = {index: value for index, value in zip(expected["order"], expected["sorted_inside"], strict=True)}
                ours = [inside[int(index)] for index in found.order]
                assert ours == pytest.approx(sorted(ours, reverse=True), rel=1e-4), key
                continue
            reference = torch.from_numpy(arrays[key])
            assert found.order.tolist() == expected["order"], key
            assert [b.tolist() for b in found.bins] == expected["bin_members"], key
            tolerance = 5e-5 * reference.max().item()
            torch.testing.assert_close(found.maps, reference, rtol=0, atol=tolerance)
            assert found.scale == pytest.approx(expected["scale_factor"], rel=1e-4), key
            corrected = aggregate(maps, cell, n, size, expected["bin_positions"])
            lengths = [len(members) for members in expected["bin_members"]]
            factors = torch.tensor(expected["bin_divisors"]) / torch.tensor(lengths)
            torch.testing.assert_close(corrected.maps, reference * factors[:, None, None], rtol=0, atol=tolerance)
            compared += 1
    return compared


@pytest.mark.parametrize(("name", "reproducible"), [("2x2", 10), ("3x3", 8)])
def test_golden_orders_bins_and_scales(golden: dict, shared: Path, cnn: at.Classifier, name: str, reproducible: int) -> None:
    with np.load(shared / "golden" / "grid_pixels.npz") as pixels:
        inputs = normalized(cnn, pixels[f"grids_{name}"])
    assert compare(golden, shared, cnn, name, inputs) == reproducible


def test_golden_bins_of_a_hundred_grids(golden: dict, shared: Path, cnn: at.Classifier) -> None:
    """The paper's bins, where the authors' fourth divisor is 44 instead of 45."""
    archive = shared / "data" / "cifar10" / "test.tar"
    if not archive.is_file():
        pytest.skip("the CIFAR-10 images are not here")
    files = golden["grids"]["2x2_n100"]["files"]
    wanted = {f"test/{file}" for row in files for file in row}
    with tarfile.open(archive) as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar if m.name in wanted}
    images = {name: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for name, data in found.items()}
    grids = []
    for row in files:
        a, b, c, d = (images[f"test/{file}"] for file in row)
        grids.append(np.concatenate([np.concatenate([a, b], axis=1), np.concatenate([c, d], axis=1)]))
    assert compare(golden, shared, cnn, "2x2_n100", normalized(cnn, np.stack(grids))) == 3
