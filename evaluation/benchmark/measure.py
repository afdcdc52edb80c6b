"""Measures the benchmark: every method on every image and grid, under every measure, for some models.

Explanations are stored, so that new metrics judge them without explaining again.
"""

from __future__ import annotations

from typing import Any

from attribution.model.classifier import Classifier
from evaluation.benchmark.on_grids import OnGrids, draw_grids
from evaluation.benchmark.on_images import OnImages
from evaluation.benchmark.results import Asked, Explained, Failure, GridMap, Refusals, Results, Score
from evaluation.benchmark.settings import BenchmarkSettings
from evaluation.study.run import Run
from evaluation.study.settings import named_data, named_model


def measure_benchmark(run: Run[BenchmarkSettings]) -> Results:
    """Measure all methods on the same images, and on the same grids, under each model.

    Raises:
        UserError: no image to judge, too few images for a grid, grids for models with different classes, or a full disk.
    """
    settings = run.settings
    grid_set = draw_grids(run) if settings.grid_settings else None
    models: dict[str, dict[str, Any]] = {}
    samples: dict[str, tuple[str, ...]] = {}
    scores: list[Score] = []
    on_grids: list[Score] = []
    explained: list[Explained] = []
    maps: list[GridMap] = []
    grid_models: dict[str, dict[str, Any]] = {}
    for model, name in zip(settings.models, settings.model_names, strict=True):
        classifier, refusals = named_model(settings, model), Refusals(run, name)
        if not run.reading:
            for spec in settings.methods:
                spec.check_layer(classifier)
        models[name] = _facts(classifier)
        dataset = named_data(settings, classifier.class_names)
        images = OnImages(run, classifier, dataset, refusals)
        chosen = images.choose() if settings.measured() else []
        if not samples:
            grids = 0 if grid_set is None else len(grid_set) * len(settings.layers)
            run.expect(settings.run_count() * (len(chosen) + grids) * len(settings.models))
        samples[name] = tuple(dataset.ids[index] for index in chosen)
        if chosen:
            judged = images.judge(chosen)
            scores += judged[0]
            explained += judged[1]
        if grid_set is not None:
            grid_judge = OnGrids(run, classifier, dataset, grid_set, refusals)
            found = grid_judge.judge()
            on_grids += found[0]
            maps += found[1]
            grid_models[name] = grid_judge.facts
    if grid_set is not None and not run.reading:
        grid_set.save(run.out / "grids.json")
    failures = tuple(
        Failure(item.model, item.sample, item.method, item.seed, failed.reason, failed.refused)
        for failed in run.failures
        if isinstance(item := failed.item, Asked)
    )
    return Results(settings, models, samples, (*scores, *on_grids), tuple(explained), failures, run.out, grid_set, tuple(maps), grid_models)


def _facts(classifier: Classifier) -> dict[str, Any]:
    """The facts about a model that the tables state."""
    return {
        "weights_digest": classifier.weights_digest,
        "size": list(classifier.preprocessing.size),
        "class_names": list(classifier.class_names),
        "precision": classifier.precision,
    }
