from __future__ import annotations

import inspect
import math
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.segmentation
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch import Tensor

import attribution as at
from attribution.image import limit_size
from attribution.regions import partition
from evaluation.study.identity import identity_of

SIZES = {"square": (32, 32), "odd": (33, 47), "photo": (64, 96)}
OPTIONS: dict[str, dict[str, Any]] = {
    "saliency_patches": {"heatmap": torch.linspace(0, 1, 36).view(6, 6).sin(), "side": 6, "cells_per_region": 5}
}


BAD_COUNTS = [0, -1, 1025, 2.5, True, "9"]


def shrunk(cat: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(cat[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def assert_partition(regions: at.Regions, height: int, width: int) -> None:
    labels = regions.labels
    assert labels.dtype == torch.int64
    assert labels.shape == (height, width)
    assert sorted(set(labels.flatten().tolist())) == list(range(regions.count))
    sizes = [int((labels == index).sum()) for index in range(regions.count)]
    assert regions.area.dtype == torch.float64
    assert torch.allclose(regions.area, torch.tensor(sizes, dtype=torch.float64) / (height * width), rtol=1e-12)
    assert math.isclose(regions.area.sum().item(), 1, rel_tol=1e-12)
    assert torch.equal(regions.masks.sum(0), torch.ones_like(labels))
    assert all(torch.equal(mask, labels == index) for index, mask in enumerate(regions.masks))


def default_count(name: str) -> int | None:
    """The number of regions that a method asks for by itself: the default of its parameter, or what it says where that is None."""
    default = inspect.signature(at.REGIONS[name]).parameters["count"].default
    return {"slico": 49, "saliency_patches": 7}[name] if default is None else default


def check_partition(name: str, image: Tensor) -> None:
    """One partition of the image, the same twice, and about as many regions as are asked for."""
    before, options = image.clone(), OPTIONS.get(name, {})
    if name in ("seeds", "watershed"):
        options = {"count": 20}  # their default is out of reach on small images
    regions = at.make_regions(image, name, **options)
    assert_partition(regions, *image.shape[1:])
    assert (regions.method, regions.requested) == (name, options.get("count", default_count(name)))
    assert torch.equal(regions.labels, at.make_regions(image, name, **options).labels)
    assert torch.equal(image, before)
    if name == "saliency_patches":
        assert regions.count == 8
        return
    asked = at.make_regions(image, name, count=20)
    assert (asked.requested, asked.note) == (20, "")
    assert 16 <= asked.count <= 24
    assert repr(asked) == f"Regions({name}, {asked.count} (20 requested), {image.shape[2]}x{image.shape[1]})"


def check_refused_count(name: str, count: Any, image: Tensor) -> None:
    with pytest.raises(at.UserError, match=f"count is {count!r}: expected a whole number from 1 to 1024"):
        at.make_regions(image, name, **{**OPTIONS.get(name, {}), "count": count})


@pytest.mark.parametrize("name", at.REGIONS)
@pytest.mark.parametrize("size", SIZES)
def test_every_method_cuts_one_partition_the_same_twice(name: str, size: str, cat: Tensor) -> None:
    check_partition(name, limit_size(cat, 96) if size == "photo" else shrunk(cat, SIZES[size]))


@pytest.mark.parametrize("name", at.REGIONS)
@pytest.mark.parametrize("count", BAD_COUNTS)
def test_count_out_of_range(name: str, count: Any, small_cat: Tensor) -> None:
    check_refused_count(name, count, small_cat)


IMAGES = {"noise": (64, 64), "photo": (97, 131), "constant": (48, 80), "tall": (200, 12)}


@pytest.mark.parametrize("name", at.REGIONS)
@pytest.mark.parametrize("kind", IMAGES)
def test_the_number_asked_for_is_met_within_a_fifth_or_what_was_made_is_said(name: str, kind: str, cat: Tensor) -> None:
    size = IMAGES[kind]
    noise = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    image = {"noise": noise, "constant": torch.full((3, *size), 0.4)}.get(kind, shrunk(cat, size))
    options = {"heatmap": torch.rand(7, 7, generator=torch.Generator().manual_seed(1)), "side": 12} if name == "saliency_patches" else {}
    for count in (7, 30, 120) if name != "quickshift" else (30,):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if (name, kind, count) == ("seeds", "tall", 7):
                with pytest.raises(at.UserError, match="too small or narrow"):
                    at.make_regions(image, name, count=count)
                continue
            regions = at.make_regions(image, name, count=count, **options)
        assert_partition(regions, *size)
        assert regions.requested == count
        if abs(regions.count - count) <= 0.2 * count:
            assert (regions.note, caught) == ("", [])
        else:
            assert (name, kind) in OUT_OF_REACH
            assert f"{regions.count} regions where {count} were asked for" in regions.note
            assert [str(each.message) for each in caught] == [f"{regions.note}: ask for another number, or use grid"]


# felzenszwalb finds no edge in a constant image; the others lay their seeds on a grid, whose rows and columns are whole numbers
OUT_OF_REACH = {
    ("felzenszwalb", "constant"),
    *((name, kind) for name in ("seeds", "slico", "watershed", "slic") for kind in IMAGES),
}


@pytest.mark.parametrize(
    ("name", "size", "count"), [("seeds", (300, 451), 50), ("slic", (224, 224), 49), ("saliency_patches", (60, 60), 200)]
)
def test_the_numbers_that_users_asked_for(name: str, size: tuple[int, int], count: int, cat: Tensor) -> None:
    """Once 30, 1 (on noise) and 262 regions were made."""
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) if name == "slic" else shrunk(cat, size)
    options = {"heatmap": torch.rand(9, 9), "side": 28} if name == "saliency_patches" else {}
    made = at.make_regions(image, name, count=count, **options)
    assert abs(made.count - count) <= (0 if name == "saliency_patches" else 0.2 * count)


def test_saliency_patches_by_count_differ_by_one_cell_and_keep_the_ranking() -> None:
    heatmap = torch.rand(11, 11, generator=torch.Generator().manual_seed(0))
    regions = at.make_regions(torch.zeros(3, 11, 11), "saliency_patches", heatmap=heatmap, side=11, count=50)
    sizes = torch.bincount(regions.labels.flatten())
    assert sorted(set(sizes.tolist())) == [2, 3]
    assert len(sizes) == 50
    assert (regions.labels.flatten()[heatmap.flatten().argsort(descending=True)].diff() >= 0).all()


@pytest.mark.parametrize("count", [2, 3, 5, 7, 11, 500, 560, 600])
def test_grids_have_about_the_number_asked_for(count: int) -> None:
    height, width = (2, 400) if count > 100 else (40, 40)
    regions = at.make_regions(torch.zeros(3, height, width), "grid", count=count)
    assert abs(regions.count - count) <= 0.2 * count


def test_parameters_that_are_given_are_kept() -> None:
    """A number is only searched by what the user left open: compactness 10 leaves one superpixel of noise."""
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    for name, options in (("slic", {"compactness": 10.0}), ("felzenszwalb", {"scale": 1e4, "min_size": 64})):
        with pytest.warns(UserWarning, match=f"1 regions where 49 were asked for, the nearest that {name} can make"):
            assert at.make_regions(noise, name, count=49, **options).count == 1


def test_one_region_explains_nothing(cnn: at.Classifier) -> None:
    image = torch.full((3, 32, 32), 0.4)
    with pytest.raises(at.UserError, match="grid gave 1 region, the whole image, and one region has no order: expected at least 2"):
        at.explain(image, cnn, regions="grid", region_options={"count": 1})
    with pytest.warns(UserWarning, match="1 regions where 49"), pytest.raises(at.UserError, match="felzenszwalb gave 1 region"):
        at.explain(image, cnn, regions="felzenszwalb")


@pytest.mark.filterwarnings("ignore:63 regions where 50")
def test_the_provenance_says_another_number_of_regions(small_cat: Tensor, cnn: at.Classifier, tmp_path: Path) -> None:
    explanation = at.explain(small_cat, cnn, regions="seeds", search=lambda objective: range(objective.size))
    assert explanation.provenance["settings"]["regions"] == {
        "method": "seeds",
        "requested": 50,
        "actual": 63,
        "note": "63 regions where 50 were asked for, the nearest that seeds can make of this image",
    }
    explanation.save(tmp_path / "cat.npz")
    assert at.Explanation.load(tmp_path / "cat.npz") == explanation


@pytest.mark.parametrize("name", ["grid", "seeds", "slic", "watershed"])
def test_no_count_where_one_is_needed(name: str, small_cat: Tensor) -> None:
    check_refused_count(name, None, small_cat)


def stripes(image: Tensor, count: int = 7) -> at.Regions:
    """The recipe of a region method: vertical stripes of equal width."""
    columns = torch.arange(image.shape[2]) * count // image.shape[2]
    return at.Regions(columns.expand(image.shape[1:]), "stripes", count)


def test_a_method_of_the_user_keeps_the_contract(cat: Tensor, small_cat: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(at.REGIONS, "stripes", stripes)
    for size in SIZES.values():
        check_partition("stripes", shrunk(cat, size))
    for count in [*BAD_COUNTS, None]:
        check_refused_count("stripes", count, small_cat)
    assert at.make_regions(torch.zeros(3, 2, 14), "stripes").labels.tolist() == [[c // 2 for c in range(14)]] * 2


@pytest.mark.filterwarnings("ignore:.* regions where 30 were asked for")
@pytest.mark.parametrize("name", [name for name in at.REGIONS if name != "saliency_patches"])
def test_fewer_pixels_than_the_default_count(name: str) -> None:
    """The default asks for at most as many regions as there are pixels; seeds refuse images that are too small for them."""
    image = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(0))
    if name == "seeds":
        with pytest.raises(at.UserError, match="too small or narrow"):
            at.make_regions(image, name)
    else:
        assert_partition(at.make_regions(image, name), 5, 6)


@pytest.mark.parametrize("count", [1, 4, 49, 64])
def test_grid_of_a_square_number_is_exact_squares(count: int) -> None:
    side = math.isqrt(count)
    labels = at.make_regions(torch.zeros(3, 448, 448), "grid", count=count).labels
    cell = 448 // side
    expected = [[(y // cell) * side + x // cell for x in range(448)] for y in range(448)]
    assert labels.tolist() == expected


def test_grid_of_64_on_32_pixels_is_4x4_squares() -> None:
    regions = at.make_regions(torch.zeros(3, 32, 32), "grid", count=64)
    assert regions.labels.tolist() == [[(y // 4) * 8 + x // 4 for x in range(32)] for y in range(32)]


@given(height=st.integers(1, 40), width=st.integers(1, 40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_grid_spreads_the_remainder(height: int, width: int, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    regions = at.make_regions(torch.zeros(3, height, width), "grid", rows=rows, columns=columns)
    labels = regions.labels
    assert regions.count == rows * columns
    heights = torch.bincount(labels[:, 0] // columns)
    widths = torch.bincount(labels[0])
    assert heights.max() - heights.min() <= 1
    assert widths.max() - widths.min() <= 1
    assert torch.equal(labels, (labels[:, :1] // columns) * columns + labels[:1])
    assert (labels.diff(dim=0) >= 0).all()
    assert (labels.diff(dim=1) >= 0).all()


@pytest.mark.parametrize(("options", "shape"), [({"rows": 3}, "3x3"), ({"columns": 2}, "2x2"), ({"rows": 1, "columns": 4}, "1x4")])
def test_grid_by_rows_and_columns(options: dict, shape: str) -> None:
    regions = at.make_regions(torch.zeros(3, 12, 12), "grid", **options)
    rows, columns = map(int, shape.split("x"))
    assert regions.labels.tolist() == [[y * rows // 12 * columns + x * columns // 12 for x in range(12)] for y in range(12)]


@pytest.mark.parametrize("options", [{"rows": 0, "columns": 3}, {"rows": 13}, {"columns": 0}, {"rows": -1, "columns": 2}])
def test_grid_that_does_not_fit(options: dict) -> None:
    with pytest.raises(at.UserError, match=r"a grid of -?\d+x\d+ cells does not fit an image of 12x12 pixels"):
        at.make_regions(torch.zeros(3, 12, 12), "grid", **options)


def uint8(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def test_slico_has_the_published_parameters(cat: Tensor) -> None:
    image = shrunk(cat, (224, 224))
    published = cv2.ximgproc.createSuperpixelSLIC(uint8(image), cv2.ximgproc.SLICO, 30, 20.0)
    published.iterate(20)
    regions = at.make_regions(image, "slico")
    assert np.array_equal(regions.labels.numpy(), published.getLabels())
    assert regions.count == 49
    assert torch.equal(at.make_regions(image, "slico", region_size=30).labels, regions.labels)


def test_seeds_has_the_published_parameters(cat: Tensor) -> None:
    image = shrunk(cat, (224, 224))
    published = cv2.ximgproc.createSuperpixelSEEDS(224, 224, 3, 50, 3)
    published.iterate(uint8(image), 10)
    regions = at.make_regions(image, "seeds")
    assert torch.equal(regions.labels, partition(published.getLabels()))
    assert regions.count == 49


def test_slico_options(small_cat: Tensor) -> None:
    assert torch.equal(at.make_regions(small_cat, "slico", count=16).labels, at.make_regions(small_cat, "slico", region_size=8).labels)
    assert at.make_regions(small_cat, "slico", region_size=8).requested is None
    with pytest.raises(at.UserError, match="count or region_size, not both: received count=9 and region_size=5"):
        at.make_regions(small_cat, "slico", count=9, region_size=5)
    for size in (0, 33):
        with pytest.raises(at.UserError, match=f"region_size is {size}: expected a whole number from 1 to 32"):
            at.make_regions(small_cat, "slico", region_size=size)


def test_without_opencvs_contrib_modules_the_others_work(small_cat: Tensor, cnn: at.Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain OpenCV, which other packages bring, replaces the contrib build."""
    options = {name: OPTIONS.get(name, {"count": 20}) for name in at.REGIONS}
    with_contrib = {name: at.make_regions(small_cat, name, **options[name]).labels for name in at.REGIONS}
    monkeypatch.delattr(cv2, "ximgproc")
    for name, labels in with_contrib.items():
        if name not in ("slico", "seeds"):
            assert torch.equal(at.make_regions(small_cat, name, **options[name]).labels, labels)
    with pytest.raises(at.UserError, match=r"regions='seeds' need OpenCV's contrib modules: .*opencv-contrib-python-headless"):
        at.make_regions(small_cat, "seeds")
    note = "cut by scikit-image's SLICO, not by OpenCV's, the published one"
    for chosen, count in (({}, 56), ({"count": 20}, 20), ({"region_size": 8}, 16)):
        with pytest.warns(UserWarning, match=rf"regions='slico' are {note}: pip uninstall opencv-python"):
            regions = at.make_regions(small_cat, "slico", **chosen)
        labels = skimage.segmentation.slic(small_cat.permute(1, 2, 0).numpy(), n_segments=count, slic_zero=True, start_label=0)
        assert torch.equal(regions.labels, partition(labels))
        assert (regions.method, regions.note) == ("slico", note)
    with pytest.warns(UserWarning, match="the published one"):
        explanation = at.explain(small_cat, cnn, search=lambda objective: range(objective.size))
    assert explanation.provenance["settings"]["regions"]["note"] == note
    assert explanation.provenance["settings"]["regions"]["library"] == "scikit-image"
    with pytest.warns(UserWarning, match="the published one"):
        assert at.attribute(small_cat, cnn, "feature_ablation").provenance["regions_by"] == "scikit-image"


def test_records_depend_on_the_library_that_cuts_superpixels(
    small_cat: Tensor, cnn: at.Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert at.make_regions(small_cat, "slico").library == "OpenCV" and not at.make_regions(small_cat, "grid").library
    before = identity_of(cnn)
    monkeypatch.delattr(cv2, "ximgproc")
    assert identity_of(cnn) != before


NARROW = """
import warnings
import torch
import attribution as at
from evaluation.study.identity import identity_of
warnings.simplefilter("ignore")  # of numbers that narrow images cannot hold
torch.manual_seed(0)
for height, width in [(7, 300), (300, 7), (1, 40), (40, 1), (2, 2), (3, 200), (10, 90), (5, 5), (60, 13), (16, 400), (20, 20), (30, 30)]:
    for count in (1, 2, 10, 50, 300):
        for levels in (1, 2, 3, 5):
            try:
                regions = at.make_regions(torch.rand(3, height, width), "seeds", count=count, levels=levels)
            except at.UserError as error:
                assert "too small or narrow" in str(error) or "count is" in str(error), error
                print(height, width, count, levels, "refused", flush=True)
                continue
            labels = regions.labels
            assert labels.shape == (height, width)
            assert labels.unique().tolist() == list(range(regions.count))
            print(height, width, count, levels, "cut", flush=True)
for height, width in [(64, 512), (8, 512), (60, 512), (4, 64)]:
    found = at.make_regions(torch.rand(3, height, width), "slico", count=2).count
    assert found >= 2, found
    print(height, width, "slico", flush=True)
"""


def test_superpixels_never_crash_on_narrow_images() -> None:
    """OpenCV kills the process where its grid of seeds does not fit into the image."""
    done = subprocess.run([sys.executable, "-c", NARROW], capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{done.returncode} after {lines[-1:]}: {done.stderr[-500:]}"
    assert len(lines) == 12 * 5 * 4 + 4
    assert {line.split()[-1] for line in lines} == {"refused", "cut", "slico"}


def naive_saliency_labels(values: np.ndarray, group: int, height: int, width: int) -> np.ndarray:
    """Cells in descending order (the first of equal ones first), group by group, each pixel that of the cell it lies in."""
    rows, columns = values.shape
    order = sorted(range(values.size), key=lambda cell: (-values.flat[cell], cell))
    region = {cell: rank // group for rank, cell in enumerate(order)}
    labels = np.empty((height, width), np.int64)
    for y in range(height):
        for x in range(width):
            row, column = y * rows // height, x * columns // width
            labels[y, x] = region[row * columns + column]
    return labels


@pytest.mark.parametrize(("side", "group"), [(6, 4), (6, 5), (7, 7), (7, 50), (1, 1), (10, 3)])
@pytest.mark.parametrize("size", [(42, 42), (33, 47)])
def test_saliency_patches_equal_a_naive_loop(side: int, group: int, size: tuple[int, int]) -> None:
    group = min(group, side * side)
    generator = torch.Generator().manual_seed(side)
    heatmap = torch.randint(0, 9, (side, side), generator=generator).float()
    regions = at.make_regions(torch.zeros(3, *size), "saliency_patches", heatmap=heatmap, side=side, cells_per_region=group)
    assert regions.labels.tolist() == naive_saliency_labels(heatmap.numpy(), group, *size).tolist()
    assert regions.requested == side * side // group
    assert regions.count == math.ceil(side * side / group)


def test_saliency_patches_rank_pixels() -> None:
    heatmap = torch.rand(9, 13, generator=torch.Generator().manual_seed(0))
    regions = at.make_regions(torch.zeros(3, 9, 13), "saliency_patches", heatmap=heatmap, level="pixel", cells_per_region=10)
    assert regions.labels.tolist() == naive_saliency_labels(heatmap.numpy(), 10, 9, 13).tolist()


def test_saliency_patches_resize_the_heatmap_as_opencv_does() -> None:
    heatmap = np.random.default_rng(0).random((50, 37)).astype(np.float32)
    cells = cv2.resize(heatmap, (8, 8), interpolation=cv2.INTER_LINEAR)
    regions = at.make_regions(torch.zeros(3, 40, 40), "saliency_patches", heatmap=heatmap, side=8, cells_per_region=4)
    assert regions.labels.tolist() == naive_saliency_labels(cells, 4, 40, 40).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"saliency_patches needs a heatmap \[h, w\]: give heatmap="),
        ({"heatmap": torch.tensor([[0.0, torch.nan]])}, r"the heatmap is float32 \[1, 2\]: expected \[h, w\] with finite values"),
        ({"heatmap": torch.tensor([[0.0, torch.inf]])}, "with finite values"),
        ({"heatmap": torch.zeros(3, 4, 4)}, r"the heatmap is float32 \[3, 4, 4\]"),
        ({"heatmap": torch.zeros(4, 4)}, "28x28 cells do not fit an image of 20x10 pixels: give a smaller side"),
        ({"heatmap": torch.zeros(4, 4), "side": 0}, "0x0 cells do not fit"),
        ({"heatmap": torch.zeros(4, 4), "side": 5, "cells_per_region": 26}, "cells_per_region is 26: expected a whole number from 1 to 25"),
        ({"heatmap": torch.zeros(4, 4), "side": 5, "cells_per_region": 0}, "cells_per_region is 0: expected a whole number from 1 to 25"),
    ],
    ids=["none", "nan", "inf", "shape", "side", "side 0", "cells", "cells 0"],
)
def test_bad_heatmaps(options: dict, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        at.make_regions(torch.zeros(3, 10, 20), "saliency_patches", **options)


def naive_masks(masks: np.ndarray, image: np.ndarray, variant: str, smallest: float) -> np.ndarray:
    """The published double loop in exact fractions: the larger overlap share keeps the overlap, the later mask when equal."""
    masks = masks.copy()
    for i in range(len(masks)):
        for j in range(i + 1, len(masks)):
            overlap = masks[i] & masks[j]
            if overlap.any():
                share_i, share_j = (Fraction(int(overlap.sum()), int(masks[k].sum())) for k in (i, j))
                masks[j if share_i > share_j else i][overlap] = False
    kept = [mask for mask in masks if mask.sum() > smallest * mask.size]
    remainder = ~np.any(kept, axis=0) if kept else np.ones_like(masks[0])
    if variant == "lima" and kept and not image[:, remainder].sum() > 0:
        kept[-1] = kept[-1] | remainder
    elif remainder.any():
        kept.append(remainder)
    return np.sum([index * mask for index, mask in enumerate(kept)], axis=0)


@given(
    masks=hnp.arrays(bool, st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))),
    variant=st.sampled_from(["fixed", "smdl", "lima"]),
    dark=st.sampled_from([0.0, 0.5, 1.0]),
    smallest=st.sampled_from([0.0, 0.0005, 0.1, 0.25]),
    seed=st.integers(0, 9),
)
@settings(max_examples=150, deadline=None)
def test_from_masks_equals_the_naive_loop(masks: np.ndarray, variant: Any, dark: float, smallest: float, seed: int) -> None:
    size = masks.shape[1:]
    image = np.broadcast_to(np.random.default_rng(seed).random(size) >= dark, (3, *size)).astype(np.float32)
    before = masks.copy()
    regions = at.from_masks(masks, torch.from_numpy(image), variant=variant, smallest=smallest)
    assert regions.labels.tolist() == naive_masks(masks, image, variant, smallest).tolist()
    assert_partition(regions, *size)
    assert regions.requested == len(masks)
    assert np.array_equal(masks, before)


def rows(*shown: str) -> np.ndarray:
    return np.array([[character == "#" for character in row] for row in shown])[:, None]


@pytest.mark.parametrize(
    ("masks", "labels"),
    [
        (rows("####..", "..###."), [0, 0, 1, 1, 1, 2]),
        (rows("..###.", "####.."), [1, 1, 0, 0, 0, 2]),
        (rows("###...", "..###."), [0, 0, 1, 1, 1, 2]),
        (rows("######", "..##.."), [0, 0, 1, 1, 0, 0]),
        (rows("###...", "###..."), [0, 0, 0, 1, 1, 1]),
        (rows("###...", "...###"), [0, 0, 0, 1, 1, 1]),
        (rows("......"), [0, 0, 0, 0, 0, 0]),
    ],
    ids=["smaller wins", "smaller first", "equal: the later", "inside", "twice the same", "no remainder", "nothing"],
)
def test_from_masks_by_hand(masks: np.ndarray, labels: list[int]) -> None:
    assert at.from_masks(masks).labels.tolist() == [labels]
    assert at.from_masks([torch.from_numpy(mask) for mask in masks]).labels.tolist() == [labels]


def test_masks_at_the_published_size_limit_are_dropped() -> None:
    masks = np.zeros((3, 100, 100), bool)
    masks[0, 0, :5], masks[1, 1, :6], masks[2, 50:] = True, True, True
    labels = at.from_masks(masks).labels
    assert labels[0, 0] == labels[10, 10] == 2
    assert labels[1, 0] == 0
    assert labels[60, 0] == 1


def test_lima_gives_a_black_remainder_to_the_last_mask() -> None:
    masks, image = rows("##....", "..##.."), torch.zeros(3, 1, 6)
    assert at.from_masks(masks, image, variant="lima").labels.tolist() == [[0, 0, 1, 1, 1, 1]]
    image[1, 0, 5] = 0.01
    assert at.from_masks(masks, image, variant="lima").labels.tolist() == [[0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize(
    ("masks", "options", "message"),
    [
        ([], {}, r"masks cannot be read .*expected bool \[R, H, W\] with at least one mask"),
        (torch.zeros(0, 4, 4, dtype=torch.bool), {}, r"masks are bool \[0, 4, 4\]: expected bool \[R, H, W\]"),
        (torch.zeros(4, 4, dtype=torch.bool), {}, r"masks are bool \[4, 4\]"),
        ([torch.zeros(2, 2), torch.zeros(3, 3)], {}, "masks cannot be read"),
        (torch.ones(1, 4, 4) > 0, {"variant": "sam"}, "variant is 'sam': expected one of fixed, smdl, lima"),
        (torch.ones(1, 4, 4) > 0, {"variant": "lima"}, "variant 'lima' looks at the colour of what no mask covers: give the image"),
        (torch.ones(1, 4, 4) > 0, {"variant": "lima", "image": torch.zeros(3, 5, 5)}, r"masks are bool \[1, 4, 4\], the image is float32"),
    ],
    ids=["none", "no mask", "flat", "ragged", "variant", "no image", "size"],
)
def test_bad_masks(masks: Any, options: dict, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        at.from_masks(masks, **options)


INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32]


@given(
    labels=st.sampled_from(INTEGERS).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            st.tuples(st.integers(1, 6), st.integers(1, 6)),
            elements=st.one_of(st.integers(max(-3, np.iinfo(dtype).min), 4), st.integers(np.iinfo(dtype).min, np.iinfo(dtype).max)),
        )
    ),
    flipped=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_partition_closes_gaps_in_order_and_puts_the_unassigned_last(labels: np.ndarray, flipped: bool) -> None:
    labels = labels[::-1] if flipped else labels
    given_ids = sorted({int(v) for v in labels.flat if v >= 0}) + ([-1] if (labels < 0).any() else [])
    expected = [[given_ids.index(max(int(v), -1)) for v in row] for row in labels]
    assert partition(labels).tolist() == expected
    assert partition(torch.from_numpy(labels.copy())).tolist() == expected
    regions = at.Regions(labels)
    assert_partition(regions, *labels.shape)


def test_partition_takes_a_read_only_array() -> None:
    labels = np.array([[5, 9], [9, -4]])
    labels.flags.writeable = False
    assert partition(labels).tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4, 4), r"the label map is float32 \[4, 4\]: expected integers \[H, W\]"),
        (torch.zeros(4, 4, dtype=torch.bool), r"bool \[4, 4\]: expected integers"),
        (torch.zeros(4, 4, dtype=torch.complex64), r"complex64 \[4, 4\]: expected integers"),
        (torch.zeros(4, dtype=torch.int64), r"int64 \[4\]: expected integers \[H, W\]"),
        (torch.zeros(1, 4, 4, dtype=torch.int64), r"int64 \[1, 4, 4\]: expected integers"),
        (torch.zeros(0, 4, dtype=torch.int64), r"int64 \[0, 4\]: expected integers"),
        (np.array([["a"]]), r"the label map cannot be read .*expected integers \[H, W\]"),
        ([[1, 2], [3]], "the label map cannot be read"),
    ],
    ids=["float", "bool", "complex", "1d", "3d", "empty", "text", "ragged"],
)
def test_partition_refuses_what_is_no_label_map(labels: Any, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        partition(labels)


def test_make_regions_takes_labels_masks_regions_and_callables() -> None:
    image = torch.zeros(3, 2, 3)
    labels = [[3, 3, -1], [8, 8, -1]]
    expected = [[0, 0, 2], [1, 1, 2]]
    for given_labels in (torch.tensor(labels), np.array(labels), np.array(labels, np.int8), labels):
        regions = at.make_regions(image, given_labels)
        assert regions.labels.tolist() == expected
        assert (regions.method, regions.requested) == ("labels", None)
    masks = torch.tensor([[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [1, 1, 0]]]).bool()
    for given_masks in (masks, masks.numpy(), list(masks)):
        regions = at.make_regions(image, given_masks)
        assert regions.labels.tolist() == expected
        assert (regions.method, regions.requested) == ("masks", 2)
    assert at.make_regions(image, regions) is regions

    def halves(image: Tensor, at_column: int = 1) -> Tensor:
        return (torch.arange(image.shape[2]) >= at_column).long().expand(image.shape[1], -1)

    assert at.make_regions(image, halves).labels.tolist() == [[0, 1, 1]] * 2
    assert at.make_regions(image, halves, at_column=2).labels.tolist() == [[0, 0, 1]] * 2
    assert at.make_regions(image, lambda image: masks).labels.tolist() == expected


@pytest.mark.parametrize(
    ("regions", "options", "message"),
    [
        ("superpixels", {}, "unknown regions 'superpixels': expected one of slico, seeds, grid, .*, a label map, masks or a callable"),
        ("grid", {"cells": 4}, "region method grid does not take these options .*'cells'"),
        (lambda image: None, {"count": 4}, "does not take these options"),
        (torch.zeros(8, 8, dtype=torch.int64), {"count": 4}, r"options count go with a region method, not with int64 \[8, 8\]"),
        (torch.zeros(8, 7, dtype=torch.int64), {}, "the label map is 7x8, the image 8x8: give labels at the image's own resolution"),
        (torch.ones(2, 4, 8) > 0, {}, r"masks are bool \[2, 4, 8\], the image is float32 \[3, 8, 8\]"),
        (torch.zeros(8, 8), {}, r"the label map is float32 \[8, 8\]"),
        ([], {}, "the regions cannot be read .*expected an int label map"),
        (None, {}, "regions are NoneType: expected one of slico"),
        (7, {}, "regions are int"),
        (lambda image: "grid", {}, "regions are 'grid'"),
        (lambda image: torch.zeros(4, 4, dtype=torch.int64), {}, "the label map is 4x4, the image 8x8"),
    ],
)
def test_regions_that_cannot_be_used(regions: Any, options: dict, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        at.make_regions(torch.zeros(3, 8, 8), regions, **options)


@pytest.mark.parametrize("name", ["felzenszwalb", "quickshift"])
@pytest.mark.parametrize("count", [1, 7, 20])
def test_merged_regions_are_unions_of_adjacent_unmerged_ones(name: str, count: int, cat: Tensor) -> None:
    image = shrunk(cat, (48, 61))
    whole = at.make_regions(image, name, count=None)
    merged = at.make_regions(image, name, count=count)
    assert whole.requested is None
    assert whole.count > 20
    assert merged.count == count
    for index in range(whole.count):
        assert len(merged.labels[whole.labels == index].unique()) == 1
    for mask in merged.masks if name == "felzenszwalb" else []:  # a region of quickshift need not be connected
        assert cv2.connectedComponents(mask.numpy().astype(np.uint8), connectivity=8)[0] == 2
    assert torch.equal(at.make_regions(image, name, count=whole.count + 5).labels, whole.labels)


@pytest.mark.parametrize("name", ["felzenszwalb", "quickshift"])
def test_merging_takes_the_smallest_into_the_neighbour_nearest_in_colour(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four stripes of areas 4, 3, 2, 6: the 2 joins the 6 (nearer in colour than the 3), then the 3 joins the 4."""
    labels = np.repeat([0, 1, 2, 3], [4, 3, 2, 6])[None]
    image = torch.tensor([0.2, 0.3, 0.9, 1.0])[torch.from_numpy(labels)].expand(3, -1, -1)
    monkeypatch.setattr(f"skimage.segmentation.{name}", lambda *_, **__: labels)
    assert at.make_regions(image, name, count=3).labels.tolist() == [[0] * 4 + [1] * 3 + [2] * 8]
    assert at.make_regions(image, name, count=2).labels.tolist() == [[0] * 7 + [1] * 8]
    assert at.make_regions(image, name, count=1).labels.tolist() == [[0] * 15]


def test_masks_with_transposed_memory_lose_their_overlaps_too() -> None:
    masks = torch.zeros(2, 6, 6, dtype=torch.bool)
    masks[0, :, :3] = True
    masks[1, :, 2:] = True
    assert torch.equal(at.from_masks(masks.mT.contiguous().mT).labels, at.from_masks(masks).labels)


def test_saliency_patches_by_count_and_by_pixel() -> None:
    image, heatmap = torch.rand(3, 32, 32), torch.rand(16, 16)
    assert at.make_regions(image, "saliency_patches", heatmap=heatmap, side=10, count=25).count == 25
    pixels = at.make_regions(image, "saliency_patches", heatmap=heatmap, level="pixel")
    assert pixels.requested == 112
    assert (torch.bincount(pixels.labels.flatten())[:112] == 9).all()
    with pytest.raises(at.UserError, match="level is 'texel': expected 'cell' or 'pixel'"):
        at.make_regions(image, "saliency_patches", heatmap=heatmap, level="texel")


def test_regions_of_a_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 18, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    from_file = at.make_regions(tmp_path / "photo.png", "slico", count=6)
    assert torch.equal(from_file.labels, at.make_regions(at.load_image(pixels), "slico", count=6).labels)
    bytes_of_a_tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    assert torch.equal(from_file.labels, at.make_regions(bytes_of_a_tensor, "slico", count=6).labels)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("felzenszwalb", {"sigma": None}, "regions felzenszwalb: sigma is NoneType: expected a finite number"),
        ("seeds", {"levels": "5"}, "regions seeds: levels is '5': expected a whole number"),
        ("slic", {"zero": 1}, "regions slic: zero is 1: expected True or False"),
        ("slico", {"ruler": float("nan")}, "regions slico: ruler is nan: expected a finite number"),
    ],
)
def test_options_of_a_wrong_type(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(at.UserError, match=f"^{message}$"):
        at.make_regions(torch.rand(3, 32, 32), method, **options)


def test_areas_of_a_part_that_is_seen() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [0, 0, 2, 2]])
    assert at.Regions(labels).area.tolist() == [0.5, 0.25, 0.25]
    assert at.Regions(labels, seen=(0, 1, 2, 3)).area.tolist() == [0.5, 0.25, 0.25]
    assert at.Regions(labels, seen=(1, 2, 2, 4)).area.tolist() == [0, 0, 1]
    for wrong in ((0, 0, 0, 4), (0, 0, 3, 4), (-1, 0, 2, 4)):
        with pytest.raises(at.UserError, match=r"expected \(top, left, bottom, right\) inside an image of 4x2 pixels"):
            at.Regions(labels, seen=wrong)


@pytest.mark.parametrize(("height", "width"), [(2, 4000), (4000, 2), (1, 512), (512, 1), (3, 1000)])
@pytest.mark.parametrize("name", [name for name in at.REGIONS if name not in ("saliency_patches", "quickshift")])
def test_narrow_images_have_a_bounded_number_of_regions(name: str, height: int, width: int, cnn: at.Classifier) -> None:
    """SLICO once made 512 regions of 4000 x 2 pixels, whose search did not end."""
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            regions = at.make_regions(image, name)
        except at.UserError as error:
            refusal = str(error)
            assert name == "seeds" and "too small or narrow" in refusal
            return
    assert 20 <= regions.count <= 2 * 49
    if name == "slico" and regions.method == "grid":
        assert regions.note == f"cells of a grid, since this image of {width}x{height} pixels is narrower than a superpixel"


def test_an_opencv_whose_contrib_modules_were_emptied_is_like_one_without(small_cat: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain OpenCV installed over the contrib build leaves a module without functions."""
    monkeypatch.setattr(cv2, "ximgproc", ModuleType("cv2.ximgproc"))
    with pytest.warns(UserWarning, match="cut by scikit-image's SLICO.*--force-reinstall --no-deps opencv-contrib-python-headless"):
        assert at.make_regions(small_cat, "slico").library == "scikit-image"
    with pytest.raises(at.UserError, match="need OpenCV's contrib modules"):
        at.make_regions(small_cat, "seeds")
