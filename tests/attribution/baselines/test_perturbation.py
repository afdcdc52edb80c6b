from __future__ import annotations

from typing import Any

import captum.attr
import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from captum._utils.models.linear_model import SkLearnLasso, SkLearnRidge
from captum.attr._core.lime import get_exp_kernel_similarity_function
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import apart, linear, photo
from torch import Tensor, nn

import attribution as at
from attribution.baselines.attribute import attribute
from attribution.baselines.perturbation import _covering_windows, hsic_indices, jansen_indices, sobol_design
from attribution.errors import ChanceWarning
from attribution.task import seeded

SIDE = 4  # cells a side of the linear problems
CELLS = {"regions": "grid", "region_options": {"rows": SIDE, "columns": SIDE}}


@pytest.fixture(scope="module")
def problem() -> tuple[at.Classifier, Tensor, Tensor]:
    """A linear classifier on 8 x 8 images, an image, and what each of 4 x 4 cells adds to logit 1 over black."""
    used, weight = linear(8)
    image = photo(8)
    return used, image, F.avg_pool2d((weight[1] * image).sum(0)[None, None], 2)[0, 0] * 4


def of_cells(pixel_map: Tensor) -> Tensor:
    return F.avg_pool2d(pixel_map[None, None], 2)[0, 0]


def correlation(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1])


@pytest.mark.parametrize("overlap", ["mean", "sum"])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (9, 5), (10, 7)])
def test_occlusion(window: int, stride: int, overlap: Any, cnn: at.Classifier, small_cat: Tensor) -> None:
    inputs = cnn.inputs(small_cat)
    direct = captum.attr.Occlusion(cnn.module).attribute(inputs, (3, window, window), (3, stride, stride), 0, target=3)[0, 0]
    ones = captum.attr.Occlusion(lambda x: x.flatten(1).sum(1)).attribute(
        torch.ones(1, 1, 32, 32), (1, window, window), (1, stride, stride), 0
    )
    counts = torch.zeros(32, 32)
    starts = [min(k * stride, 32) for k in range(1 + -(-(32 - window) // stride))]
    for y in starts:
        for x in starts:
            counts[y : y + window, x : x + window] += 1
    assert ones.shape[-2:] == counts.shape
    expected = direct * counts if overlap == "sum" else direct
    given = {"sliding_window_shapes": window, "strides": stride, "overlap": overlap, "fill": "model_mean"}
    found = attribute(small_cat, cnn, "occlusion", 3, batch_size=7, **given).pixel_map
    assert apart(found, expected.detach()) < 1e-4


@given(side=st.integers(3, 20), data=st.data())
@settings(max_examples=30, deadline=None)
def test_occlusion_of_a_linear_model(side: int, data: st.DataObject) -> None:
    """The drop of a window is the sum of its contributions; the sum over windows counts each pixel once for each of them."""
    window = data.draw(st.integers(1, side))
    stride = data.draw(st.integers(1, window))
    used, weight = linear(side)
    image = photo(side, side)
    contribution = (weight[1] * image).sum(0)
    expected, counts = torch.zeros(side, side), torch.zeros(side, side)
    for y in range(0, side + stride, stride):
        for x in range(0, side + stride, stride):
            last_y, last_x = y - stride + window >= side and y > 0, x - stride + window >= side and x > 0
            if last_y or last_x:
                continue  # the window before already reached the border
            expected[y : y + window, x : x + window] += contribution[y : y + window, x : x + window].sum()
            counts[y : y + window, x : x + window] += 1
    assert torch.equal(_covering_windows((side, side), (window, window), (stride, stride)), counts)
    found = attribute(image, used, "occlusion", 1, sliding_window_shapes=window, strides=stride, overlap="sum", fill="black").pixel_map
    assert torch.allclose(found, expected, atol=1e-4 * max(1, float(expected.abs().max())))


def test_occlusion_with_captums_shapes(cnn: at.Classifier, small_cat: Tensor) -> None:
    """A window that is no square, given as Captum takes it."""
    shapes, strides = (3, 6, 10), (3, 4, 9)
    inputs = cnn.inputs(small_cat)
    direct = captum.attr.Occlusion(cnn.module).attribute(inputs, shapes, strides, torch.zeros_like(inputs), 3)[0, 0]
    for window in (shapes, list(shapes)):
        found = attribute(small_cat, cnn, "occlusion", 3, sliding_window_shapes=window, strides=strides, fill="model_mean").pixel_map
        assert apart(found, direct.detach()) < 1e-4


def windows_across(side: int, window: int, stride: int) -> list[tuple[int, int]]:
    """First and last position of each window along an axis as Rao et al. place them, those that lie outside left out."""
    found = []
    for index in range(side // stride + window // stride - 1):
        if window % 2 == 0:
            first = (index - (window // stride - 1)) * stride
            last = first + window - 1
        else:
            first, last = index * stride - (window - 1) // 2, index * stride + (window - 1) // 2
        if last >= 0 and first < side:
            found.append((max(first, 0), min(last, side - 1)))
    return found


def occlusion_across(score: Any, inputs: Tensor, window: int, stride: int) -> tuple[Tensor, Tensor]:
    """The sum over windows of drop / area on the positions of the window, and how many windows cover each."""
    height, width = inputs.shape[-2:]
    total, covered = torch.zeros(height, width), torch.zeros(height, width)
    full = float(score(inputs))
    for top, bottom in windows_across(height, window, stride):
        for left, right in windows_across(width, window, stride):
            hidden = inputs.clone()
            hidden[:, :, top : bottom + 1, left : right + 1] = 0
            area = (bottom - top + 1) * (right - left + 1)
            total[top : bottom + 1, left : right + 1] += (full - float(score(hidden))) / area
            covered[top : bottom + 1, left : right + 1] += 1
    return total, covered


@given(height=st.integers(5, 13), width=st.integers(5, 13), data=st.data())
@settings(max_examples=40, deadline=None)
def test_occlusion_across_the_border(height: int, width: int, data: st.DataObject) -> None:
    """Even and odd windows, every stride up to the window, sides that the stride does not divide."""
    window = data.draw(st.integers(1, min(height, width)))
    stride = data.draw(st.integers(1, window))
    weight = torch.randn(3, height, width, generator=torch.Generator().manual_seed(height * width))
    size = (height, width)
    used = at.Classifier(lambda x: torch.stack([(x * weight).sum((1, 2, 3)).square(), x.sum((1, 2, 3))], 1), size=size, scores="logits")
    image = photo(height, 1, width)
    total, covered = occlusion_across(lambda x: used.logits(x)[0, 0].double(), used.inputs(image), window, stride)
    options = {"sliding_window_shapes": window, "strides": stride, "border": "across", "fill": "black", "batch_size": 5}
    found = {overlap: attribute(image, used, "occlusion", 0, overlap=overlap, **options).pixel_map for overlap in ("sum", "mean")}
    scale = 1e-4 * float(total.abs().max().clamp(min=1e-3))
    assert torch.allclose(found["sum"], total, atol=scale)
    assert torch.allclose(found["mean"], total / covered.clamp(min=1), atol=scale)


def test_occlusion_across_the_border_of_a_linear_model() -> None:
    """Pixels that add 1 each: every window drops by its area, so that the sum counts the windows and the mean is 1 everywhere."""
    used, _ = linear(8)
    used.module[1].weight.data[1] = 1 / 3
    counts = {(4, 2): [2] * 8, (6, 2): [3] * 8, (5, 2): [2, 2, 3, 2, 3, 2, 3, 2], (3, 1): [2] + [3] * 7, (8, 8): [1] * 8, (1, 1): [1] * 8}
    for (window, stride), expected in counts.items():
        options = {"sliding_window_shapes": window, "strides": stride, "border": "across", "fill": "black"}
        each = torch.tensor(expected, dtype=torch.float32)
        total = attribute(torch.ones(3, 8, 8), used, "occlusion", 1, overlap="sum", **options).pixel_map
        assert torch.allclose(total, each[:, None] * each, atol=1e-4), (window, stride)
        mean = attribute(torch.ones(3, 8, 8), used, "occlusion", 1, overlap="mean", **options).pixel_map
        assert torch.allclose(mean, torch.ones(8, 8), atol=1e-4), (window, stride)


def test_unknown_border() -> None:
    used, _ = linear(8)
    with pytest.raises(at.UserError, match="border"):
        attribute(photo(8), used, "occlusion", 1, border="outside")


@pytest.mark.parametrize("method", ["feature_ablation", "shapley_value_sampling", "kernel_shap"])
def test_contributions_of_a_linear_classifier(method: str, problem: tuple[at.Classifier, Tensor, Tensor]) -> None:
    used, image, contributions = problem
    samples = {} if method == "feature_ablation" else {"n_samples": 3 if method == "shapley_value_sampling" else 400}
    found = attribute(image, used, method, 1, fill="black", **CELLS, **samples).pixel_map
    assert apart(of_cells(found), contributions) < 1e-3
    assert torch.equal(found, F.interpolate(of_cells(found)[None, None], scale_factor=2)[0, 0])  # one value a region


def test_lime_of_a_linear_classifier(problem: tuple[at.Classifier, Tensor, Tensor]) -> None:
    """Without a penalty, the coefficients of a linear model are its own."""
    used, image, contributions = problem
    found = attribute(image, used, "lime", 1, fill="black", n_samples=300, alpha=1e-6, output="logit", **CELLS).pixel_map
    assert apart(of_cells(found), contributions) < 1e-3


METHODS_ON_REGIONS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "feature_ablation": (captum.attr.FeatureAblation, {}, {}),
    "shapley_value_sampling": (captum.attr.ShapleyValueSampling, {"n_samples": 3}, {"n_samples": 3}),
    "kernel_shap": (captum.attr.KernelShap, {"n_samples": 40}, {"n_samples": 40}),
    "lime": (
        lambda f: captum.attr.Lime(f, SkLearnRidge(alpha=2.0), get_exp_kernel_similarity_function("euclidean", 45.0)),
        {"n_samples": 40},
        {
            "n_samples": 40,
            "interpretable_model": "ridge",
            "alpha": 2.0,
            "distance_mode": "euclidean",
            "kernel_width": 45.0,
            "output": "logit",
        },
    ),
    "lime lasso": (
        lambda f: captum.attr.Lime(f, SkLearnLasso(alpha=0.01), get_exp_kernel_similarity_function("euclidean", 45.0)),
        {"n_samples": 40},
        {
            "n_samples": 40,
            "interpretable_model": "lasso",
            "alpha": 0.01,
            "distance_mode": "euclidean",
            "kernel_width": 45.0,
            "output": "logit",
        },
    ),
}


@pytest.mark.parametrize("name", METHODS_ON_REGIONS)
def test_captum_over_the_pixels(name: str, cnn: at.Classifier, small_cat: Tensor) -> None:
    """Captum on the image itself with the regions as its feature mask."""
    build, direct_options, options = METHODS_ON_REGIONS[name]
    labels = at.make_regions(small_cat, "grid", rows=3, columns=3).labels
    mean = torch.tensor(cnn.preprocessing.mean).view(1, 3, 1, 1).repeat(1, 1, 32, 32)

    def forward(images: Tensor) -> Tensor:
        with torch.no_grad():
            return cnn.module(cnn.preprocessing(images))

    with seeded(8):
        direct = build(forward).attribute(small_cat[None], mean, target=3, feature_mask=labels.repeat(1, 3, 1, 1), **direct_options)
    expected = direct[0, 0]
    if name.startswith("lime"):  # the distance lies between images there, between subsets of regions here: nearly 1 for so wide a kernel
        assert (
            correlation(
                attribute(small_cat, cnn, "lime", 3, seed=8, regions=labels, fill="model_mean", **options).pixel_map, expected.float()
            )
            > 0.99
        )
        return
    found = attribute(small_cat, cnn, name, 3, seed=8, regions=labels, batch_size=7, fill="model_mean", **options).pixel_map
    assert apart(found, expected.float()) < 1e-3


def test_lime_over_the_region_vector(cnn: at.Classifier, small_cat: Tensor) -> None:
    """Captum on 0/1 vectors whose images are put together pixel by pixel."""
    labels = at.make_regions(small_cat, "grid", rows=3, columns=3).labels
    mean = torch.tensor(cnn.preprocessing.mean)[:, None, None].expand(3, 32, 32)

    def forward(subsets: Tensor) -> Tensor:
        images = [reference.masked_image(small_cat, labels, mean, set(row.nonzero()[:, 0].tolist())) for row in subsets]
        return cnn.probabilities(torch.cat([cnn.inputs(image) for image in images]))

    similarity = get_exp_kernel_similarity_function("cosine", kernel_width=0.25)
    with seeded(2):
        direct = captum.attr.Lime(forward, SkLearnRidge(alpha=1.0), similarity).attribute(torch.ones(1, 9), target=3, n_samples=25)
    found = attribute(small_cat, cnn, "lime", 3, seed=2, n_samples=25, regions=labels, fill="model_mean").pixel_map
    assert apart(found, direct[0].float()[labels]) < 1e-3


def test_one_region_is_the_whole_difference(problem: tuple[at.Classifier, Tensor, Tensor]) -> None:
    used, image, contributions = problem
    for method in ("feature_ablation", "shapley_value_sampling", "kernel_shap"):
        found = attribute(image, used, method, 1, fill="black", regions="grid", region_options={"count": 1}).pixel_map
        assert torch.allclose(found, contributions.sum().expand(8, 8), rtol=1e-3), method


@pytest.mark.parametrize("normalisation", ["expected", "observed"])
def test_rise_of_a_linear_classifier(normalisation: Any) -> None:
    """E[score | cell shown] - E[score] is proportional to the contribution of the cell (smoothed by the masks)."""
    used, _ = linear(8)
    weight = torch.zeros(3, 8, 8)
    weight[:, :4, :4], weight[:, 4:, 4:] = 1, -1  # smoother than a mask's cells
    used.module[1].weight.data[1] = weight.flatten()
    image = torch.ones(3, 8, 8)
    options = {"samples": 4000, "grid": 4, "normalisation": normalisation, "output": "logit", "fill": "black"}
    found = attribute(image, used, "rise", 1, **options).pixel_map
    smoothed = F.avg_pool2d(F.pad(weight.sum(0)[None, None], (2, 2, 2, 2), mode="replicate"), 5, stride=1)[0, 0]
    assert correlation(found, weight.sum(0)) > 0.9 and correlation(found, smoothed) > 0.96
    assert float(found[0, 0]) > float(found[0, 7]) > float(found[7, 7])


def test_rise_of_a_constant_score() -> None:
    """The expected mask times the score: keep on average; exactly the score where the observed masks divide."""
    used, _ = linear(8)
    used.module[1].weight.data.zero_()
    used.module[1].bias.data.fill_(2.0)
    expected = attribute(photo(8), used, "rise", 0, samples=4000, grid=4, keep=0.3, output="logit").pixel_map
    assert torch.allclose(expected, torch.full((8, 8), 2.0), atol=0.1)
    observed = attribute(photo(8), used, "rise", 0, samples=50, grid=4, keep=0.3, output="logit", normalisation="observed").pixel_map
    assert torch.allclose(observed, torch.full((8, 8), 2.0), atol=1e-4)


def test_rise_by_hand(cnn: at.Classifier, small_cat: Tensor) -> None:
    """The masks drawn again with numpy's loops: bilinear cells, a random shift, the mean weighted by the score."""
    generator = torch.Generator().manual_seed(3)
    cells = (torch.rand(5, 1, 4, 4, generator=generator) < 0.5).float()
    shifts = torch.stack([torch.randint(0, 8, (5,), generator=generator) for _ in range(2)], dim=1)
    total = torch.zeros(32, 32)
    for cell, (dy, dx) in zip(cells, shifts.tolist(), strict=True):
        mask = torch.empty(32, 32)
        for y in range(32):
            for x in range(32):
                # (grid + 1) * 8 = 40 pixels for 4 cells: 10 pixels a cell
                v, h = min(max((y + dy + 0.5) / 10 - 0.5, 0), 3), min(max((x + dx + 0.5) / 10 - 0.5, 0), 3)
                top, left = min(int(v), 2), min(int(h), 2)
                a, b = v - top, h - left
                block = cell[0, top : top + 2, left : left + 2]
                mask[y, x] = (1 - a) * ((1 - b) * block[0, 0] + b * block[0, 1]) + a * ((1 - b) * block[1, 0] + b * block[1, 1])
        inputs = cnn.inputs(small_cat) * mask
        total += cnn.probabilities(inputs)[0, 3] * mask
    found = attribute(small_cat, cnn, "rise", 3, samples=5, grid=4, seed=3, fill="model_mean").pixel_map
    assert apart(found, total / 2.5) < 1e-4


@given(n=st.integers(3, 9), d=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_hsic_indices(n: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks, scores = torch.randint(0, 2, (n, d), generator=generator).float(), torch.rand(n, generator=generator) + 0.1
    found = hsic_indices(masks, scores)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), torch.from_numpy(reference.hsic_indices(masks, scores)), atol=1e-6)
    assert (found > -1e-6).all()


def test_hsic_closed_forms() -> None:
    masks = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert hsic_indices(masks, torch.ones(4)).abs().max() == 0  # nothing depends on anything
    assert hsic_indices(masks, torch.zeros(4)).abs().max() == 0
    first = masks[:, 0] + 1  # the score is the first cell: k = l = 1 or exp(-1/(2 1.5^2))
    same = 1 - float(np.exp(-1 / (2 * 1.5**2)))
    found = hsic_indices(masks, first)
    # centred kernels are +-1/2 and +-same/2 over 16 pairs, divided by n = 4
    assert torch.allclose(found, torch.tensor([16 * 0.5 * same / 2 / 4, 0.0]), atol=1e-6)


@pytest.mark.parametrize("design", ["sobol", "latin_hypercube"])
def test_hsic_ranks_cells_by_their_contribution(design: Any) -> None:
    used, _ = linear(8)
    sizes = torch.linspace(0, 1, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(0))].view(4, 4)
    signs = torch.where(torch.arange(16).view(4, 4) % 3 == 0, -1.0, 1.0)
    used.module[1].weight.data[1] = F.interpolate((sizes * signs)[None, None], scale_factor=2).expand(1, 3, 8, 8).flatten()
    used.module[1].bias.data.fill_(20.0)  # a median far from zero
    options = {"samples": 1024, "grid": 4, "design": design, "output": "logit", "fill": "black"}
    found = of_cells(attribute(torch.ones(3, 8, 8), used, "hsic", 1, **options).pixel_map)
    ranks = [values.flatten().argsort().argsort().float() for values in (found, sizes)]
    assert correlation(*ranks) > 0.95
    assert correlation(found, sizes.square()) > 0.95


def test_jansen_indices() -> None:
    scores = torch.rand(5 * 4, generator=torch.Generator().manual_seed(0))
    rows = scores.view(5, 4).double().tolist()
    assert jansen_indices(scores, 4).tolist() == pytest.approx(reference.jansen_indices(rows[0], rows[1:]), rel=1e-5)
    assert jansen_indices(torch.full((20,), 0.1), 4).abs().max() == 0
    assert jansen_indices(scores * 1e-7, 4).tolist() == pytest.approx(jansen_indices(scores, 4).tolist(), rel=1e-4)  # no scale


def test_sobol_design() -> None:
    points = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    a, b = points[:, :4], points[:, 4:]
    design = sobol_design(points)
    assert design.shape == (15, 4)
    for row in range(3):
        assert torch.equal(design[row], a[row])
        for i in range(4):
            expected = a[row].clone()
            expected[i] = b[row, i]
            assert torch.equal(design[3 * (i + 1) + row], expected)


@pytest.mark.parametrize("perturbation", ["inpainting", "amplitude"])
def test_sobol_of_a_linear_classifier(perturbation: Any) -> None:
    """Total index of cell i is c_i^2 / sum c_j^2."""
    used, _ = linear(8)
    sizes = torch.linspace(-1, 1, 4).view(2, 2) + 0.1
    used.module[1].weight.data[1] = F.interpolate(sizes[None, None], scale_factor=4).expand(1, 3, 8, 8).flatten()
    options = {"designs": 1024, "grid": 2, "perturbation": perturbation, "output": "logit", "fill": "black"}
    explanation = attribute(torch.ones(3, 8, 8), used, "sobol", 1, **options)
    assert explanation.evaluations == 1024 * 5
    expected = sizes.square() / sizes.square().sum()
    enlarged = F.interpolate(expected[None, None], size=(8, 8), mode="bicubic", align_corners=False)[0, 0]
    assert torch.allclose(explanation.pixel_map, enlarged, atol=0.03)


def test_sobol_blurring_leaves_flat_images_alone() -> None:
    used, _ = linear(8)
    values = attribute(torch.full((3, 8, 8), 0.3), used, "sobol", 1, designs=8, grid=2, perturbation="blurring", output="logit").pixel_map
    assert values.abs().max() == 0
    assert attribute(photo(8), used, "sobol", 1, designs=8, grid=2, perturbation="blurring", output="logit").pixel_map.abs().max() > 0


def test_rare_classes_have_maps_too(cnn: at.Classifier, small_cat: Tensor) -> None:
    """A probability near 1e-8 still varies: its map is not flat."""

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return cnn.module(x) - 18 * torch.eye(10)[7]

    way = cnn.preprocessing
    rare = at.Classifier(Shifted(), size=32, mean=way.mean, std=way.std)
    values = attribute(small_cat, rare, "sobol", 7, designs=8, grid=2).pixel_map
    assert rare.probabilities(rare.inputs(small_cat))[0, 7] < 1e-6
    assert values.std() > 0


def test_the_fill_is_what_hidden_pixels_show(cnn: at.Classifier, small_cat: Tensor) -> None:
    """A fill equal to the image hides nothing."""
    for method in ("occlusion", "feature_ablation", "integrated_gradients"):
        quick = {"sliding_window_shapes": 16, "strides": 16} if method == "occlusion" else {}
        assert attribute(small_cat, cnn, method, 3, fill=small_cat, **quick).pixel_map.abs().max() < 1e-4
        assert attribute(small_cat, cnn, method, 3, fill="black", **quick).pixel_map.abs().max() > 0.01


def test_rise_says_how_stable_it_is(cnn: at.Classifier, small_cat: Tensor, recwarn: pytest.WarningsRecorder) -> None:
    """Against the correlation of maps of other seeds."""
    maps = [attribute(small_cat, cnn, "rise", "cat", samples=500, seed=seed) for seed in range(6)]
    pairs = torch.corrcoef(torch.stack([each.pixel_map.flatten() for each in maps]))
    measured = float((pairs.sum() - 6) / 30)
    said = [each.provenance["stable"] for each in maps]
    assert abs(sum(said) / 6 - measured) < 0.15 and measured < 0.9
    assert not recwarn.list  # who gives a number of samples has chosen it
    with pytest.warns(ChanceWarning, match="maps of rise for two seeds would have a correlation of about 0"):
        attribute(small_cat, cnn, "rise", "cat")
    assert "stable" not in attribute(small_cat, cnn, "occlusion", "cat").provenance
