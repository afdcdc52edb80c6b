"""The parts of the benchmark's report that show grids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from attribution.files import slug
from evaluation.benchmark.figures import metric_name
from evaluation.benchmark.grid_figures import plot_aggregate, plot_examples, plot_localization, plot_sweep
from evaluation.benchmark.grid_summary import aggregates, first_maps, grid_images, head_scores, sweep
from evaluation.benchmark.summary import Summary
from evaluation.grids.aggregate import Aggregate, aggregate
from evaluation.metrics.registry import Measure
from evaluation.study.report import Planned
from evaluation.study.tables import counted

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
        caption = f"{metric_name(setting)}, {settings.cells} x {settings.cells} cells"
        panels = {layer: head_scores(results, model, measure) for layer, measure in by_layer.items()}
        draw = partial(plot_localization, panels, families, settings.cells, f"{model}: {caption}")
        yield Planned("boxes", model, f"{name}-{setting}-boxes", f"Localisation of all methods on {model}: {caption}", caption, draw)
    for setting, by_layer in by_setting.items():
        for layer, measure in by_layer.items():
            caption = f"{metric_name(setting)} at layer {layer}"
            found = aggregates(results, model, measure)
            file = f"{name}-{setting}-{slug(layer)}"
            if found:
                alt = f"Aggregated maps on {model}: {caption}"
                draw = partial(plot_aggregate, found, settings.cells, 0, f"{model}: {caption}, first cell")
                yield Planned("aggregates", model, f"{file}-aggregates", alt, caption, draw, len(found) <= _MOST_AGGREGATES)
                if len(found) > _MOST_AGGREGATES:
                    leading = _leading(found, families)
                    draw = partial(plot_aggregate, leading, settings.cells, 0, f"{model}: {caption}, first cell")
                    yield Planned("aggregates", model, f"{file}-aggregates-leading", alt, caption, draw)
            swept = sweep(results, model, measure)
            if swept:
                draw = partial(plot_sweep, swept, settings.cells, f"{model}: {caption}")
                yield Planned("sweep", model, f"{file}-smoothing", f"Localisation against smoothing on {model}: {caption}", caption, draw)
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
                caption = f"{method}, {metric_name(setting)} at layer {layer}"
                draw = partial(plot_examples, found, maps, images, settings.cells, 0, 3, f"{model}: {caption}")
                file = f"{name}-{setting}-{slug(layer)}-examples-{slug(method)}"
                yield Planned("examples", model, file, f"Examples of each bin on {model}: {caption}", caption, draw, on_page=False)


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
