"""What a benchmark found: numbers, explanations and failures, in the order of its settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from attribution.errors import NotApplicable
from evaluation.benchmark.settings import BenchmarkSettings
from evaluation.grids.sets import GridSet
from evaluation.metrics.registry import METRICS, Measure
from evaluation.study.run import Run
from evaluation.study.tables import grouped


@dataclass(frozen=True)
class Asked:
    """One explanation that is asked for: of an image, or of a grid at a layer, by a method with a seed."""

    model: str
    sample: str
    method: str
    seed: int
    layer: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.model, self.sample, self.layer, self.method)))

    def names(self) -> dict[str, Any]:
        """The fields that name a score, a map or a record."""
        return {"model": self.model, "sample": self.sample, "method": self.method, "seed": self.seed}


class Refusals:
    """Methods, measures and layers that are not defined for a model, each once and with the reason."""

    def __init__(self, run: Run[BenchmarkSettings], model: str) -> None:
        self.model, self._run = model, run
        self._kept: set[tuple[str, str]] = set()

    def keep(self, what: str, error: NotApplicable) -> None:
        """Keep that a method, a measure or a layer is left out, and why."""
        if (what, str(error)) not in self._kept:
            self._kept.add((what, str(error)))
            self._run.fail(Asked(self.model, "", what, self._run.settings.seed), None, str(error), refused=True)


@dataclass(frozen=True)
class Score:
    """The number of one explanation under one measure.

    Attributes:
        value: NaN where the metric has no value. On a grid it is the mean over ``heads``, the scores of the heads.
        area: share of the image at which the value is reached, for measures that have one.
    """

    model: str
    sample: str
    method: str
    seed: int
    measure: Measure
    value: float
    area: float | None
    heads: tuple[float, ...] = ()


@dataclass(frozen=True)
class GridMap:
    """The maps of a method for the heads of one grid at one layer.

    Attributes:
        path: file of the first head's map.
        evaluations: masked maps or images forwarded for one head, on average.
        constant: whether the map of some head has the same value everywhere.
    """

    model: str
    grid: str
    method: str
    seed: int
    measure: Measure
    path: Path
    evaluations: float
    constant: bool


@dataclass(frozen=True)
class Explained:
    """One explanation of an image.

    Attributes:
        path: its file.
        curves: files of its curves by protocol.
        evaluations: images forwarded for it.
        confidence: probability of the class explained, ``target``.
        constant: whether its map has the same value everywhere.
        saturated: whether the confidence is so high that gradients vanish.
        label: of the image; None where it is not known.
    """

    model: str
    sample: str
    method: str
    seed: int
    path: Path
    curves: dict[str, Path]
    evaluations: int
    confidence: float
    constant: bool
    saturated: bool
    label: int | None
    target: int


@dataclass(frozen=True)
class Failure:
    """An explanation or measurement that failed, and why.

    Attributes:
        refused: whether the method, or the measure in its place, is not defined for the model at all.
    """

    model: str
    sample: str
    method: str
    seed: int
    reason: str
    refused: bool = False


@dataclass(frozen=True)
class Results:
    """What a benchmark found, in the order of its settings.

    Attributes:
        settings: settings of the benchmark.
        models: name -> weights digest, input size and class names.
        samples: model -> ids of the images judged.
        scores, explained, failures: every number, every explanation, everything missing.
        out: the folder of the files.
        grid_set: the grids, shared by all models; None where no setting of grids was measured.
        grid_maps: their maps.
        grid_models: model -> facts about it on grids: the module of each layer, whether position embeddings were interpolated.
    """

    settings: BenchmarkSettings
    models: dict[str, dict[str, Any]]
    samples: dict[str, tuple[str, ...]]
    scores: tuple[Score, ...]
    explained: tuple[Explained, ...]
    failures: tuple[Failure, ...]
    out: Path
    grid_set: GridSet | None = None
    grid_maps: tuple[GridMap, ...] = ()
    grid_models: dict[str, dict[str, Any]] = field(default_factory=dict)

    def units(self, model: str, measure: Measure) -> tuple[str, ...]:
        """Ids of what a measure judges: images, or grids of them."""
        if not METRICS[measure.metric].grid:
            return self.samples[model]
        return () if self.grid_set is None else tuple(grid_id(index) for index in range(len(self.grid_set)))

    def noun(self, measure: Measure | None) -> str:
        """What a measure judges: "image" or "grid"."""
        return "grid" if measure is not None and METRICS[measure.metric].grid else "image"

    @property
    def failed(self) -> tuple[Failure, ...]:
        """Failures that are no refusals."""
        return tuple(failure for failure in self.failures if not failure.refused)

    @cached_property
    def _scores(self) -> dict[tuple[str, Measure, str, int], list[Score]]:
        return grouped(self.scores, lambda each: (each.model, each.measure, each.method, each.seed))

    @cached_property
    def _explained(self) -> dict[tuple[str, str, int], list[Explained]]:
        return grouped(self.explained, lambda each: (each.model, each.method, each.seed))

    @cached_property
    def _maps(self) -> dict[tuple[str, Measure, str, int], list[GridMap]]:
        return grouped(self.grid_maps, lambda each: (each.model, each.measure, each.method, each.seed))

    def scores_of(self, model: str, measure: Measure, method: str, seed: int | None = None) -> list[Score]:
        """The scores of a method under a measure, with the seed of the settings where no other is given."""
        return self._scores.get((model, measure, method, self.settings.seed if seed is None else seed), [])

    def explained_of(self, model: str, method: str, seed: int | None = None) -> dict[str, Explained]:
        """The explanations of a method by sample."""
        found = self._explained.get((model, method, self.settings.seed if seed is None else seed), [])
        return {each.sample: each for each in found}

    def grid_maps_of(self, model: str, measure: Measure, method: str) -> dict[str, GridMap]:
        """The maps of a method, with the seed of the settings, by grid."""
        return {each.grid: each for each in self._maps.get((model, measure, method, self.settings.seed), [])}


def grid_id(index: int) -> str:
    """What records and tables call a grid."""
    return f"grid {index + 1:04d}"
