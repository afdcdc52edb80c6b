"""Methods that see only scores: they hide parts of the image behind the fill and read the score of the target.

They work on any callable. ``output`` is the score that is read, "probability" or "logit". Random draws depend on the seed alone.
Methods on regions cut the image as ``make_regions`` does and give every pixel of a region the region's value. Options of Captum's
methods have Captum's names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import captum.attr
import torch
import torch.nn.functional as F
from captum._utils.models.linear_model import SkLearnLasso, SkLearnRidge
from captum.attr._core.lime import get_exp_kernel_similarity_function
from torch import Tensor
from torch.quasirandom import SobolEngine

from attribution.baselines.method import Method
from attribution.checks import check_choice, check_number, check_whole, is_number, is_whole
from attribution.errors import UserError
from attribution.model.forwarding import even_chunks
from attribution.regions import make_regions
from attribution.task import Output, Task, enlarged, seeded

RegionOptions = Mapping[str, Any] | None


def occlusion(
    task: Task,
    *,
    sliding_window_shapes: int | list[int] | tuple[int, ...] | None = None,
    strides: int | list[int] | tuple[int, ...] | None = None,
    overlap: Literal["mean", "sum"] = "mean",
    border: Literal["inside", "across"] = "inside",
    output: Output = "logit",
) -> Tensor:
    """Drop of the score when a sliding window shows the fill (Zeiler & Fergus, ECCV 2014; Captum), signed.

    Args:
        task: what is explained.
        sliding_window_shapes: the window in pixels of the model input, as Captum's (channels, height, width) with all channels, or
            one number for a square; a square of 1/7 of the short side by default.
        strides: steps of the window, in the same forms; half the window by default.
        overlap: "mean" over the windows that cover a pixel (Captum), or their "sum" (xplique).
        border: "inside" starts the first window at the border (Captum). "across" lets windows reach beyond the border, cuts them off
            there, and spreads the drop of each over its own area, as Rao et al. (CVPR 2022) do: windows of even side begin before the
            border, so that all pixels are covered equally often; windows of odd side are centred on multiples of the stride.
        output: see the docstring of this module.
    """
    check_choice("border", border, ("inside", "across"))
    square = max(1, round(min(task.size) / 7))
    channels = task.inputs.shape[1]
    window = _sides("sliding_window_shapes", square if sliding_window_shapes is None else sliding_window_shapes, task.size, channels)
    halves = (channels, *(max(1, side // 2) for side in window))
    stride = _sides("strides", halves if strides is None else strides, window, channels)
    if border == "across":
        return _occlusion_across(task, window, stride, overlap, output)
    found = captum.attr.Occlusion(task.scores(output)).attribute(
        task.inputs,
        sliding_window_shapes=(channels, *window),
        strides=(channels, *stride),
        baselines=task.baseline,
        target=task.target,
        perturbations_per_eval=task.classifier.batch_size,
    )[0, 0]
    return found * _covering_windows(task.size, window, stride).to(found) if overlap == "sum" else found


def _sides(name: str, value: int | Sequence[int], most: tuple[int, int], channels: int) -> tuple[int, int]:
    """Height and width from Captum's (channels, height, width), or from one number for both."""
    shape = tuple(value) if isinstance(value, list | tuple) else (channels, value, value)
    known = len(shape) == 3 and shape[0] in (3, channels)  # 3 is the form of the settings of photos, also for maps of a layer
    if not known or not all(is_whole(side) and 1 <= side <= top for side, top in zip(shape[1:], most, strict=True)):
        raise UserError(
            f"{name} is {value!r}: expected a whole number from 1 to {min(most)}, or ({channels}, height, width), "
            f"at most ({channels}, {most[0]}, {most[1]})"
        )
    return int(shape[1]), int(shape[2])


def _occlusion_across(task: Task, window: tuple[int, int], stride: tuple[int, int], overlap: str, output: Output) -> Tensor:
    ends = [_window_ends(*axis) for axis in zip(task.size, window, stride, strict=True)]
    windows = torch.tensor([(*rows, *columns) for rows in ends[0] for columns in ends[1]])
    score = task.score_of(output)
    full = score(task.inputs)
    rows, columns = (torch.arange(side, device=task.inputs.device) for side in task.size)
    total, covered = (torch.zeros(task.size, dtype=torch.float64, device=task.inputs.device) for _ in range(2))
    for chunk in even_chunks(windows.to(rows), task.classifier.batch_size):
        top, bottom, left, right = chunk.T[:, :, None]
        vertical, horizontal = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
        hidden = (vertical[:, :, None] & horizontal[:, None]).double()
        drops = (full - score(task.blend(1 - hidden[:, None].to(task.inputs)))).double()
        total += torch.einsum("n,nhw->hw", drops / hidden.sum(dim=(1, 2)), hidden)
        covered += hidden.sum(dim=0)
    return (total / covered.clamp(min=1) if overlap == "mean" else total).float()  # a rest that no window reaches keeps 0


def _window_ends(side: int, window: int, stride: int) -> list[tuple[int, int]]:
    """(first, one past the last) position of each window along an axis, cut at the border."""
    count = side // stride + window // stride - 1
    before = (window // stride - 1) * stride if window % 2 == 0 else (window - 1) // 2
    ends = [(max(0, index * stride - before), min(side, index * stride - before + window)) for index in range(count)]
    return [(first, last) for first, last in ends if last > first]


def feature_ablation(task: Task, *, regions: Any = "slico", region_options: RegionOptions = None, output: Output = "logit") -> Tensor:
    """Drop of the score when one region shows the fill (Captum), signed."""
    return _on_regions(task, captum.attr.FeatureAblation, regions, region_options, output, {})


def shapley_value_sampling(
    task: Task, *, n_samples: int = 25, regions: Any = "slico", region_options: RegionOptions = None, output: Output = "logit"
) -> Tensor:
    """Shapley values of the regions from random orders (Strumbelj & Kononenko, JMLR 2010; Captum), signed; n_samples x R images."""
    return _on_regions(task, captum.attr.ShapleyValueSampling, regions, region_options, output, {"n_samples": n_samples})


def kernel_shap(
    task: Task, *, n_samples: int = 500, regions: Any = "slico", region_options: RegionOptions = None, output: Output = "logit"
) -> Tensor:
    """Shapley values of the regions by weighted regression (Lundberg & Lee, NeurIPS 2017, theorem 2; Captum), signed."""
    return _on_regions(task, captum.attr.KernelShap, regions, region_options, output, {"n_samples": n_samples})


def lime(
    task: Task,
    *,
    n_samples: int = 500,
    regions: Any = "slico",
    region_options: RegionOptions = None,
    interpretable_model: Literal["ridge", "lasso"] = "ridge",
    alpha: float = 1.0,
    distance_mode: Literal["cosine", "euclidean"] = "cosine",
    kernel_width: float = 0.25,
    output: Output = "probability",
) -> Tensor:
    """Coefficients of a local linear model over shown and hidden regions (Ribeiro et al., KDD 2016; Captum), signed.

    Args:
        task: what is explained.
        n_samples: random subsets of regions.
        regions, region_options: see ``make_regions``.
        interpretable_model, alpha: the linear model and the weight of its penalty.
        distance_mode, kernel_width: the weight of a sample is exp(-d^2 / (2 width^2)), with d its distance from the whole image.
        output: see the docstring of this module.
    """
    models = {"ridge": SkLearnRidge, "lasso": SkLearnLasso}
    check_choice("interpretable_model", interpretable_model, models)
    check_choice("distance_mode", distance_mode, ("cosine", "euclidean"))
    check_number("alpha", alpha, 0)
    if not is_number(kernel_width) or kernel_width <= 0:
        raise UserError(f"kernel_width is {kernel_width!r}: expected a positive number")
    made = {
        "interpretable_model": models[interpretable_model](alpha=alpha),
        "similarity_func": get_exp_kernel_similarity_function(distance_mode, kernel_width=kernel_width),
    }
    return _on_regions(task, lambda forward: captum.attr.Lime(forward, **made), regions, region_options, output, {"n_samples": n_samples})


def rise(
    task: Task,
    *,
    samples: int = 1000,
    grid: int = 7,
    keep: float = 0.5,
    normalisation: Literal["expected", "observed"] = "expected",
    output: Output = "probability",
) -> Tensor:
    """RISE (Petsiuk et al., BMVC 2018, equation 6): the average of random smooth masks, weighted by the score they leave.

    The provenance of the explanation says how ``stable`` the map is: the correlation that is expected between the maps of two seeds,
    from the maps of every other mask (Spearman-Brown).

    Args:
        task: what is explained.
        samples: N masks.
        grid: s, cells a side of the coarse masks.
        keep: p, probability that a cell is shown.
        normalisation: "expected" divides by N p (the paper), "observed" by the sum of the masks at each pixel (xplique).
        output: see the docstring of this module.
    """
    check_whole("samples", samples, 1)
    _check_grid(task, grid)
    if not is_number(keep) or not 0 < keep < 1:
        raise UserError(f"keep is {keep!r}: expected a probability between 0 and 1")
    height, width = task.size
    cell = (math.ceil(height / grid), math.ceil(width / grid))
    generator = torch.Generator().manual_seed(task.seed)
    cells = (torch.rand(samples, 1, grid, grid, generator=generator) < keep).float()
    shifts = torch.stack([torch.randint(0, side, (samples,), generator=generator) for side in cell], dim=1)
    score, device = task.score_of(output), task.inputs.device
    weighted, shown = (torch.zeros(2, *task.size, dtype=torch.float64) for _ in range(2))  # of the masks of even and of odd numbers
    for chunk in even_chunks(torch.arange(samples), task.classifier.batch_size):
        large = F.interpolate(
            cells[chunk].to(device), size=((grid + 1) * cell[0], (grid + 1) * cell[1]), mode="bilinear", align_corners=False
        )
        masks = torch.stack([m[:, y : y + height, x : x + width] for m, (y, x) in zip(large, shifts[chunk].tolist(), strict=True)])
        scores = score(task.blend(masks)).double()
        for half in (0, 1):
            own = chunk % 2 == half
            weighted[half] += torch.einsum("n,nhw->hw", scores[own], masks[own, 0].double()).cpu()
            shown[half] += masks[own, 0].double().sum(dim=0).cpu()

    def averaged(weighted: Tensor, shown: Tensor) -> Tensor:
        return weighted / (samples * keep) if normalisation == "expected" else weighted / (shown + 1e-4)

    task.notes["stable"] = _stability(averaged(weighted, shown).flatten(1))
    return averaged(weighted.sum(dim=0), shown.sum(dim=0)).float()


def _stability(halves: Tensor) -> float | None:
    """Correlation to be expected of two maps, from the maps [2, pixels] of half of the samples each; None where one is constant."""
    agreement = float(torch.corrcoef(halves)[0, 1])
    return round(2 * agreement / (1 + agreement), 3) if agreement > -1 else None  # not for nan


def hsic(
    task: Task, *, samples: int = 500, grid: int = 8, design: Literal["sobol", "latin_hypercube"] = "sobol", output: Output = "probability"
) -> Tensor:
    """Dependence of the score on each cell being shown (HSIC attribution; Novello et al., NeurIPS 2022, section 3).

    HSIC_i = sum(Kc_i o Lc) / n over binary masks, K = 1.5 where two masks agree in cell i and 0.5 where not, L a Gaussian kernel
    of the scores whose width is their median.

    Args:
        task: what is explained.
        samples: n masks, all the images forwarded.
        grid: cells a side.
        design: rounded Sobol' points, or a Latin hypercube (the paper).
        output: see the docstring of this module.
    """
    check_whole("samples", samples, 2)
    check_choice("design", design, ("sobol", "latin_hypercube"))
    _check_grid(task, grid)
    dimensions = grid * grid
    if design == "sobol":
        points = SobolEngine(dimensions, scramble=True, seed=task.seed).draw(samples)
    else:
        generator = torch.Generator().manual_seed(task.seed)
        ranks = torch.rand(samples, dimensions, generator=generator).argsort(dim=0)
        points = (ranks + torch.rand(samples, dimensions, generator=generator)) / samples
    masks = (points >= 0.5).float().to(task.inputs)
    scores = task.masked_chunks(masks.view(-1, 1, grid, grid), output)
    return enlarged(task, hsic_indices(masks, scores).view(grid, grid), "bicubic")


def hsic_indices(masks: Tensor, scores: Tensor) -> Tensor:
    """HSIC of each of d binary features with the scores: [n, d] in {0, 1}, [n] -> float32 [d]."""
    masks, scores = masks.double(), scores.double()
    count = len(scores)
    width = scores.quantile(0.5)
    distances = scores[:, None] - scores
    if width == 0:
        width = distances.abs().mean()
    if width == 0:
        return torch.zeros(masks.shape[1])  # the score never changes
    kernel = (-distances.square() / (2 * width.square())).exp()
    kernel = kernel - kernel.mean(dim=0, keepdim=True)
    kernel = kernel - kernel.mean(dim=1, keepdim=True)
    # K_ab = 0.5 + [m_a = m_b] = 1.5 - m_a - m_b + 2 m_a m_b; after centring only the product term is left
    centred = masks - masks.mean(dim=0)
    return (2 * torch.einsum("ad,ab,bd->d", centred, kernel, centred) / count).float()


def sobol(
    task: Task,
    *,
    designs: int = 32,
    grid: int = 8,
    perturbation: Literal["inpainting", "blurring", "amplitude"] = "inpainting",
    output: Output = "probability",
) -> Tensor:
    """Total-order Sobol' index of each cell (Fel et al., NeurIPS 2021), Jansen's estimator; designs x (grid^2 + 1) images.

    ST_i = sum_k (y_A[k] - y_Ci[k])^2 / (2 n Var(y_A)), masks in [0, 1] from scrambled Sobol' points.

    Args:
        task: what is explained.
        designs: n; a power of two keeps the points balanced.
        grid: cells a side.
        perturbation: a mask m blends with the fill, with a blurred image, or scales the input by m - 0.5.
        output: see the docstring of this module.
    """
    check_whole("designs", designs, 2)
    _check_grid(task, grid)
    check_choice("perturbation", perturbation, ("inpainting", "blurring", "amplitude"))
    dimensions = grid * grid
    points = SobolEngine(2 * dimensions, scramble=True, seed=task.seed).draw(designs)
    masks = sobol_design(points).to(task.inputs)
    score, behind = task.score_of(output), task.baseline
    if perturbation == "blurring":
        from torchvision.transforms.v2.functional import gaussian_blur

        side = 2 * min(5, (min(task.size) - 1) // 2) + 1
        behind = gaussian_blur(task.inputs, [side, side], [3.0, 3.0])
    parts = []
    for chunk in even_chunks(masks, task.classifier.batch_size):
        large = F.interpolate(chunk.view(-1, 1, grid, grid), size=task.size, mode="nearest-exact")
        parts.append(score(task.inputs * (large - 0.5) if perturbation == "amplitude" else behind + large * (task.inputs - behind)))
    return enlarged(task, jansen_indices(torch.cat(parts), designs).view(grid, grid), "bicubic")


def sobol_design(points: Tensor) -> Tensor:
    """Rows A and C_1 to C_d of Jansen's design from points [n, 2d]: C_i is A with column i of B -> [n (d + 1), d]."""
    first, second = points.chunk(2, dim=1)
    dimensions = first.shape[1]
    columns = torch.eye(dimensions, dtype=torch.bool)
    swapped = torch.where(columns[:, None], second[None], first[None])
    return torch.cat([first[None], swapped]).flatten(0, 1)


def jansen_indices(scores: Tensor, designs: int) -> Tensor:
    """Total-order indices from scores of a ``sobol_design``: [n (d + 1)] -> float32 [d]; zeros where the score never changes."""
    rows = scores.double().view(-1, designs)
    variance = rows[0].var() if designs > 1 else rows[0].new_zeros(())
    if variance <= (1e-6 * rows[0].abs().max()).square():  # rounding of float32 scores
        return torch.zeros(len(rows) - 1)
    return ((rows[1:] - rows[0]).square().sum(dim=1) / (2 * designs * variance)).float()


def _on_regions(task: Task, method: Any, regions: Any, region_options: RegionOptions, output: Output, options: dict[str, Any]) -> Tensor:
    """A Captum method over the vector of regions: 1 shown, 0 hidden; the value of a region goes to each of its pixels."""
    if "n_samples" in options:
        check_whole("n_samples", options["n_samples"], 1)
    cut = make_regions(task.image, regions, **(region_options or {}))
    if cut.library:
        task.notes["regions_by"] = cut.library
    if cut.count == 1 and method is captum.attr.KernelShap:  # its distribution over sizes of proper subsets is empty
        method, options = captum.attr.FeatureAblation, {}
    explained = method(task.subsets_model(cut.labels, output))
    shown = torch.ones(1, cut.count, device=task.inputs.device)
    with seeded(task.seed):
        values = explained.attribute(
            shown,
            baselines=torch.zeros_like(shown),
            target=task.target,
            perturbations_per_eval=task.classifier.batch_size,
            **options,
        )
    return values[0].detach().float().cpu()[cut.labels]


def _covering_windows(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """How many windows cover each pixel, the last one of a row or column cut at the border as Captum does."""
    counts = []
    for side, length, step in zip(size, window, stride, strict=True):
        covered = torch.zeros(side)
        for first in range(1 + math.ceil(max(0, side - length) / step)):
            covered[first * step : first * step + length] += 1
        counts.append(covered)
    return counts[0][:, None] * counts[1]


def _check_grid(task: Task, grid: int) -> None:
    check_whole("grid", grid, 1, min(task.size))  # cells a side: at most the pixels of the input's short side


METHODS: dict[str, Method] = {
    "occlusion": Method(occlusion, "perturbation"),
    "feature_ablation": Method(feature_ablation, "perturbation", "image"),
    "shapley_value_sampling": Method(shapley_value_sampling, "perturbation", "image", stochastic=True),
    "kernel_shap": Method(kernel_shap, "perturbation", "image", stochastic=True),
    "lime": Method(lime, "perturbation", "image", stochastic=True),
    "rise": Method(rise, "perturbation", stochastic=True),
    "hsic": Method(hsic, "perturbation", stochastic=True),
    "sobol": Method(sobol, "perturbation", stochastic=True),
}
