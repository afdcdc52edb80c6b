from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attribution as at
from evaluation.metrics.localization import box_mask, chance_level, energy_pointing_game, pointing_game, relevance_rank_accuracy

MAP = torch.tensor(
    [
        [0.0, 1.0, 0.0, 0.0],
        [0.0, 4.0, 2.0, 0.0],
        [-3.0, 0.0, 0.0, 4.0],
    ]
)


def mask_of(*pixels: tuple[int, int], size: tuple[int, int] = (3, 4)) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    for y, x in pixels:
        mask[y, x] = True
    return mask


def explanation_of(values: Tensor) -> at.Explanation:
    image = torch.zeros(3, *values.shape)
    return at.Explanation(image, target=0, class_names=("a", "b"), probabilities=torch.tensor([0.5, 0.5]), pixel_map=values)


def naive_pointing(values: Tensor, mask: Tensor, tolerance: float, strict: bool) -> float:
    height, width = values.shape
    pixels = [(y, x) for y in range(height) for x in range(width)]
    top = max(values[p].item() for p in pixels)
    maxima = [p for p in pixels if values[p].item() == top]
    objects = [p for p in pixels if mask[p]]
    if not objects or len(maxima) == len(pixels):
        return math.nan
    return float(any(math.dist(a, b) <= tolerance for a in (maxima[:1] if strict else maxima) for b in objects))


def naive_energy(values: Tensor, mask: Tensor) -> float:
    inside = outside = 0.0
    for value, hit in zip(values.flatten().tolist(), mask.flatten().tolist(), strict=True):
        inside += max(value, 0) if hit else 0
        outside += 0 if hit else max(value, 0)
    return inside / (inside + outside) if inside + outside > 1e-7 and mask.any() else math.nan


def naive_rank(values: Tensor, mask: Tensor) -> float:
    ranked = sorted(range(values.numel()), key=lambda i: (-values.flatten()[i].item(), i))
    size = int(mask.sum())
    return sum(bool(mask.flatten()[i]) for i in ranked[:size]) / size if size else math.nan


def test_pointing_game_by_hand() -> None:
    assert pointing_game(MAP, mask_of((1, 1), (0, 0))) == 1.0
    assert pointing_game(MAP, mask_of((2, 3))) == 1.0, "any pixel that attains the maximum"
    assert pointing_game(MAP, mask_of((2, 3)), strict=True) == 0.0, "only the first"
    assert pointing_game(MAP, mask_of((1, 1)), strict=True) == 1.0
    assert pointing_game(MAP, mask_of((1, 2), (2, 0), (0, 1))) == 0.0
    assert pointing_game(-MAP, mask_of((2, 0))) == 1.0, "signed values count as they are"
    assert pointing_game(-MAP, mask_of((1, 1))) == 0.0


def test_tolerance_is_a_radius_around_the_object() -> None:
    far = mask_of((0, 3))  # 2 from (2, 3), sqrt(5) from (1, 1)
    assert pointing_game(MAP, far, tolerance=1.9) == 0.0
    assert pointing_game(MAP, far, tolerance=2) == 1.0
    assert pointing_game(MAP, far, tolerance=2, strict=True) == 0.0
    assert pointing_game(MAP, far, tolerance=2.24, strict=True) == 1.0


def test_energy_and_rank_by_hand() -> None:
    mask = mask_of((1, 1), (1, 2), (2, 0))
    assert energy_pointing_game(MAP, mask) == pytest.approx(6 / 11), "the negative value counts nowhere"
    assert relevance_rank_accuracy(MAP, mask) == pytest.approx(2 / 3), "the three highest are 4, 4 and 2"
    assert relevance_rank_accuracy(MAP, mask_of((1, 1))) == 1.0, "of two equal values the first"
    assert relevance_rank_accuracy(MAP, mask_of((2, 3))) == 0.0
    assert chance_level(mask) == 0.25


def test_what_has_no_answer_is_nan() -> None:
    empty, some = mask_of(), mask_of((1, 1))
    for constant in (torch.zeros(3, 4), torch.full((3, 4), 0.7)):
        assert math.isnan(pointing_game(constant, some))
        assert math.isnan(pointing_game(constant, some, strict=True))
    for measure in (pointing_game, energy_pointing_game, relevance_rank_accuracy):
        assert math.isnan(measure(MAP, empty))
    assert math.isnan(pointing_game(MAP, empty, tolerance=100))
    assert math.isnan(energy_pointing_game(-MAP.abs(), some))
    assert math.isnan(energy_pointing_game(MAP / MAP.clamp(min=0).sum() * 0.9e-7, some))
    assert energy_pointing_game(MAP / MAP.clamp(min=0).sum() * 1.1e-7, some) == pytest.approx(4 / 11)
    assert chance_level(empty) == 0.0


def test_an_explanation_is_judged_by_its_signed_map() -> None:
    explanation = explanation_of(MAP - 10)  # its heatmap, without the negative part, is all zeros
    for mask in (mask_of((1, 1)), mask_of((1, 2), (0, 0))):
        assert pointing_game(explanation, mask) == pointing_game(MAP, mask)
        assert relevance_rank_accuracy(explanation, mask) == relevance_rank_accuracy(MAP, mask)
    assert energy_pointing_game(explanation_of(MAP), mask_of((1, 2))) == pytest.approx(2 / 11)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**16), st.floats(0, 6), st.booleans(), st.floats(0, 1))
def test_equals_naive_loops(height: int, width: int, seed: int, tolerance: float, strict: bool, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-2, 4, (height, width), generator=generator).float() / 3  # with ties
    mask = torch.rand(height, width, generator=generator) < share
    found = pointing_game(values, mask, tolerance=tolerance, strict=strict)
    assert found == pytest.approx(naive_pointing(values, mask, tolerance, strict), nan_ok=True)
    assert energy_pointing_game(values, mask) == pytest.approx(naive_energy(values, mask), nan_ok=True)
    assert relevance_rank_accuracy(values, mask) == pytest.approx(naive_rank(values, mask), nan_ok=True)


def test_random_maps_score_the_chance_level() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = box_mask((2, 1, 9, 7), 12, 10)
    maps = torch.rand(400, 12, 10, generator=generator)
    assert chance_level(mask) == pytest.approx(0.35)
    for measure, tolerance in ((pointing_game, 0.075), (energy_pointing_game, 0.01), (relevance_rank_accuracy, 0.02)):
        assert np.mean([measure(values, mask) for values in maps]) == pytest.approx(0.35, abs=tolerance)


def test_boxes() -> None:
    assert torch.equal(box_mask((1, 0, 3, 2), 3, 4), mask_of((0, 1), (0, 2), (1, 1), (1, 2)))
    assert box_mask((0, 0, 4, 3), 3, 4).all()
    assert torch.equal(box_mask([(3, 2, 9, 9), (-5, -1, 1, 1)], 3, 4), mask_of((2, 3), (0, 0))), "cut off at the border"
    assert torch.equal(box_mask((1.6, 1.2, 2.4, 1.4), 3, 4), mask_of((1, 1), (1, 2))), "every pixel that is touched"
    assert torch.equal(box_mask(torch.tensor([0.0, 1, 2, 3]), 3, 4), box_mask((0, 1, 2, 3), 3, 4))
    assert torch.equal(box_mask(np.array([[0, 0, 1, 1], [2, 2, 3, 3]]), 3, 4), mask_of((0, 0), (2, 2)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-3, 8)] * 2, *[st.integers(1, 5)] * 2), min_size=1, max_size=3))
def test_boxes_pixel_by_pixel(corners: list[tuple[int, int, int, int]]) -> None:
    boxes = [(x, y, x + w, y + h) for x, y, w, h in corners]
    if any(x1 <= 0 or y1 <= 0 or x0 >= 6 or y0 >= 5 for x0, y0, x1, y1 in boxes):
        with pytest.raises(at.UserError, match="lies outside the image of 6x5 pixels"):
            box_mask(boxes, 5, 6)
        return
    mask = box_mask(boxes, 5, 6)
    for y in range(5):
        for x in range(6):
            assert mask[y, x] == any(x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1 for x0, y0, x1, y1 in boxes)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ((2, 1, 2, 3), r"box \(2, 1, 2, 3\) is empty or reversed: expected x0 < x1 and y0 < y1"),
        ((0, 3, 2, 1), "empty or reversed"),
        ([(0, 0, 1, 1), (3, 0, 1, 1)], r"box \(3, 0, 1, 1\) is empty or reversed"),
        ([], "expected at least one box"),
        ((1, 2, 3), "expected at least one box of four numbers"),
        ((0, 0, math.nan, 1), "expected at least one box of four numbers"),
        ("1,2,3,4", "expected four numbers"),
        ((0, 0, "a", 1), "expected four numbers"),
    ],
)
def test_bad_boxes(boxes: object, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        box_mask(boxes, 3, 4)


def test_bad_masks_maps_and_tolerances() -> None:
    with pytest.raises(at.UserError, match=r"the mask is \[3, 5\], the map \[3, 4\]"):
        pointing_game(MAP, mask_of(size=(3, 5)))
    with pytest.raises(at.UserError, match=r"the mask is int64 \[3, 4\]: expected bool \[H, W\]"):
        energy_pointing_game(MAP, mask_of().long())
    with pytest.raises(at.UserError, match=r"expected bool \[H, W\]"):
        chance_level(mask_of()[None])
    for tolerance in (-1, math.nan, math.inf):
        with pytest.raises(at.UserError, match=r"tolerance is .*: expected a number of pixels"):
            pointing_game(MAP, mask_of((0, 0)), tolerance=tolerance)
    bad = MAP.clone()
    bad[0, 0] = math.nan
    with pytest.raises(at.UserError, match="1 of the 12 values of the map are not finite"):
        relevance_rank_accuracy(bad, mask_of((0, 0)))
