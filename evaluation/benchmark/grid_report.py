"""The parts of the benchmark's report that show grids: scores of every head, aggregated maps, sweeps over the smoothing, examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from attribution.baselines.smoothing import Smoothing
from attribution.errors import UserError
from attribution.files import slug
from evaluation.benchmark.grid_figures import plot_aggregate, plot_examples, plot_localization, plot_sweep
from evaluation.benchmark.methods import MethodSpec
from evaluation.benchmark.on_grids import load_map
from evaluation.benchmark.results import Results
from evaluation.benchmark.summary import Summary
from evaluation.grids.aggregate import Aggregate, aggregate
from evaluation.metrics.registry import Measure, metric_title
from evaluation.statistics.intervals import bootstrap_interval
from evaluation.study.report import Planned
from evaluation.study.settings import named_data, named_model
from evaluation.study.tables import counted

Sweep = dict[str, tuple[list[int], np.ndarray, np.ndarray, np.ndarray]]
_MOST_AGGREGATES = 10  # methods whose aggregated maps the page shows


def grid_figures(summary: Summary, model: str, name: str) -> Iterator[Planned]:
    """Box plots of every setting, aggregated maps of every setting at every layer, examples of the leader, sweeps of the smoothing."""
    results, settings = summary.results, summary.results.settings
    families = {spec.label: spec.family for spec in settings.methods}
    by_setting: dict[str, dict[str, Measure]] = {}
    for measure, layer in settings.measured_on_grids():
        if summary.column(model, measure):
            by_setting.setdefault(measure.metric, {})[layer] = measure
    for setting, by_layer in by_setting.items():
        caption = f"{metric_title(setting)}, {settings.cells} x {settings.cells} cells"
        panels = {layer: head_scores(results, model, measure) for layer, measure in by_layer.items()}
        draw = partial(plot_localization, panels, families, settings.cells, f"{model}: {caption}")
        alt = f"Localisation of all methods on {model}: {caption}"
        yield Planned(f"boxes {model}", f"{name}-{setting}-boxes", alt, draw, caption)
    for setting, by_layer in by_setting.items():
        for layer, measure in by_layer.items():
            caption = f"{metric_title(setting)} at layer {layer}"
            found = aggregates(results, model, measure)
            file = f"{name}-{setting}-{slug(layer)}"
            if found:
                alt = f"Aggregated maps on {model}: {caption}"
                draw = partial(plot_aggregate, found, settings.cells, 0, f"{model}: {caption}, first cell")
                yield Planned(f"aggregates {model}", f"{file}-aggregates", alt, draw, caption, len(found) <= _MOST_AGGREGATES)
                if len(found) > _MOST_AGGREGATES:
                    leading = _leading(found, families)
                    draw = partial(plot_aggregate, leading, settings.cells, 0, f"{model}: {caption}, first cell")
                    yield Planned(f"aggregates {model}", f"{file}-aggregates-leading", alt, draw, caption)
            swept = sweep(results, model, measure)
            if swept:
                draw = partial(plot_sweep, swept, settings.cells, f"{model}: {caption}")
                yield Planned(f"sweep {model}", f"{file}-smoothing", f"Localisation against smoothing on {model}: {caption}", draw, caption)
    yield from _grid_examples(summary, model, name, by_setting)


def _leading(found: Mapping[str, Aggregate], families: Mapping[str, str]) -> dict[str, Aggregate]:
    """The best methods and every region search, in the order given."""
    searches = [method for method in found if families[method] == "region search"]
    others = [method for method in found if method not in searches][: max(1, _MOST_AGGREGATES - len(searches))]
    return {method: each for method, each in found.items() if method in {*searches, *others}}


def _grid_examples(summary: Summary, model: str, name: str, by_setting: Mapping[str, Mapping[str, Measure]]) -> Iterator[Planned]:
    """Examples of the best method of every setting at the first layer, and of the best region search."""
    results, settings = summary.results, summary.results.settings
    searches = [spec.label for spec in settings.methods if spec.is_search]
    images = grid_images(results, model) if by_setting else None
    for setting, by_layer in by_setting.items():
        layer, measure = next(iter(by_layer.items()))
        ranked = [entry.method for entry in summary.column(model, measure)]
        for method in dict.fromkeys([*ranked[:1], *[each for each in ranked if each in searches][:1]]):
            maps = first_maps(results, model, measure, method)
            if maps is not None and images is not None:
                height, width = results.models[model]["size"]
                found = aggregate(maps, 0, settings.cells, (settings.cells * height, settings.cells * width))
                caption = f"{method}, {metric_title(setting)} at layer {layer}"
                draw = partial(plot_examples, found, maps, images, settings.cells, 0, 3, f"{model}: {caption}")
                file = f"{name}-{setting}-{slug(layer)}-examples-{slug(method)}"
                yield Planned(f"examples {model}", file, f"Examples of each bin on {model}: {caption}", draw, caption, on_page=False)


def grid_rows(summary: Summary) -> list[tuple[str, list[str]]]:
    """How grids were made and explained."""
    results, settings, grid_set = summary.results, summary.results.settings, summary.results.grid_set
    if grid_set is None:
        return []
    n = settings.cells
    corners = ", the last cell of the class of the first" if settings.repeat_corners else ""
    every = "the model" if len(results.models) == 1 else "every model"
    made = (
        f"{counted(len(grid_set), 'grid')} of {n} x {n} images of distinct classes{corners}, each image once; {every} is right with a "
        f"confidence of at least {grid_set.threshold:g} ({grid_set.kept:,} of {grid_set.judged:,} images); chance level {1 / n**2:.3g}"
    )
    layers = []
    for model, found in results.grid_models.items():
        where = ", ".join(f"{layer} = {module}" for layer, module in found["layers"].items())
        layers.append(f"{model}: {where}{'; position embeddings were interpolated for grids' if found['interpolated'] else ''}")
    scored = (
        "share of the positive attribution in the cell of the class after bilinear enlargement to the grid, 0 for an empty map; the "
        "logit of the cell's label is explained; mean over the heads of a grid (GridPG all cells, DiFull and DiPart the first and the last)"
    )
    cut = f"methods that cut the image: {settings.regions}, each cell on its own"
    return [("Grids", [made]), ("Layers", layers), ("Localisation", [scored, f"hidden is zero at the layer; {cut}"])]


def head_scores(results: Results, model: str, measure: Measure) -> dict[str, np.ndarray]:
    """The scores of all heads of all grids by method, float64 [grids x heads]."""
    found = {spec.label: results.scores_of(model, measure, spec.label) for spec in results.settings.methods}
    return {method: np.concatenate([score.heads for score in scores]) for method, scores in found.items() if scores}


def first_maps(results: Results, model: str, measure: Measure, method: str) -> Tensor | None:
    """The maps of the first head of every grid, float32 [grids, h', w']; None where there are none or their files are gone."""
    kept = results.grid_maps_of(model, measure, method)
    try:
        return torch.stack([load_map(each.path) for each in kept.values()]) if kept else None
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
        if scores := results.scores_of(model, measure, spec.label):
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
    settings, grid_set = results.settings, results.grid_set
    assert grid_set is not None
    named = next(m for m, name in zip(settings.models, settings.model_names, strict=True) if name == model)
    classifier = named_model(replace(settings, device="cpu"), named)
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
