"""What figures of grids show, from the results of a benchmark: scores of every head, aggregated maps, sweeps over the smoothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from attribution.baselines.smoothing import Smoothing
from attribution.errors import UserError
from evaluation.benchmark.methods import MethodSpec
from evaluation.benchmark.on_grids import load_map
from evaluation.benchmark.results import Results
from evaluation.grids.aggregate import Aggregate, aggregate
from evaluation.metrics.registry import Measure
from evaluation.statistics.intervals import bootstrap_interval
from evaluation.study.opening import named_data

Sweep = dict[str, tuple[list[int], np.ndarray, np.ndarray, np.ndarray]]


def head_scores(results: Results, model: str, measure: Measure) -> dict[str, np.ndarray]:
    """The scores of all heads of all grids by method, float64 [grids x heads]."""
    found = {}
    for spec in results.settings.methods:
        scores = results.scores_of.get((model, measure, spec.label, results.settings.seed), [])
        if scores:
            found[spec.label] = np.concatenate([score.heads for score in scores])
    return found


def first_maps(results: Results, model: str, measure: Measure, method: str) -> Tensor | None:
    """The maps of the first head of every grid, float32 [grids, h', w']; None where there are none or their files are gone."""
    kept = results.grid_maps_of.get((model, method, results.settings.seed, measure), {})
    try:
        return torch.stack([load_map(each.path, measure.metric) for each in kept.values()]) if kept else None
    except UserError:
        return None


def aggregates(results: Results, model: str, measure: Measure) -> dict[str, Aggregate]:
    """AggAtt of every method at the first head, best mean first."""
    height, width = results.models[model]["size"]
    cells = results.settings.cells
    found = {}
    for spec in results.settings.methods:
        maps = first_maps(results, model, measure, spec.label)
        if maps is not None:
            found[spec.label] = aggregate(maps, 0, cells, (cells * height, cells * width))
    return dict(sorted(found.items(), key=lambda item: -float(item[1].scores.mean())))


def sweep(results: Results, model: str, measure: Measure) -> Sweep:
    """Mean localisation against the kernel of the smoothing, for methods that ran with several: (kernels, mean, low, high)."""
    by_method: dict[str, dict[int, np.ndarray]] = {}
    for spec in results.settings.methods:
        scores = results.scores_of.get((model, measure, spec.label, results.settings.seed), [])
        if scores:
            by_method.setdefault(_unsmoothed(spec), {})[kernel_of(spec)] = np.array([score.value for score in scores])
    found: Sweep = {}
    for method, by_kernel in by_method.items():
        if len(by_kernel) > 1:
            kernels = sorted(by_kernel)
            intervals = [bootstrap_interval(by_kernel[kernel], seed=results.settings.seed) for kernel in kernels]
            mean, low, high = (np.array([getattr(each, name) for each in intervals]) for name in ("estimate", "low", "high"))
            found[method] = (kernels, mean, low, high)
    return found


def kernel_of(spec: MethodSpec) -> int:
    """Side of the Gaussian kernel of a method in pixels; 1 where it is not smoothed."""
    smoothing = Smoothing.parse(spec.options.get("smoothing"))
    return 1 if smoothing is None else smoothing.kernel


def grid_images(results: Results, model: str) -> Callable[[int], Tensor] | None:
    """The images of grids by number, float32 [3, n h, n w], read again from the data; None where they are gone."""
    from attribution.model.loading import load_classifier

    settings, grid_set = results.settings, results.grid_set
    assert grid_set is not None
    classifier = next(m for m, name in zip(settings.models, settings.model_names, strict=True) if name == model)
    if isinstance(classifier, str):
        classifier = load_classifier(classifier, device="cpu", checkpoint=settings.checkpoint)
    try:
        dataset = named_data(settings, classifier.class_names)
        grid_set.image(dataset, 0, classifier)
    except UserError:
        return None
    return lambda index: grid_set.image(dataset, index, classifier)


def _unsmoothed(spec: MethodSpec) -> str:
    options = {name: value for name, value in spec.plain_options().items() if name != "smoothing"}
    extra = ", ".join(f"{name} {value}" for name, value in options.items())
    return spec.method + (f"@{spec.preset}" if spec.preset else "") + (f" ({extra})" if extra else "")
