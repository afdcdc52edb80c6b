"""What a benchmark found: numbers, explanations and failures, in the order of its settings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluation.metrics import Measure
from evaluation.settings import BenchmarkSettings


@dataclass(frozen=True)
class Score:
    """One number: how one explanation does under one measure; NaN where the metric has no value."""

    model: str
    sample: str
    method: str
    seed: int
    measure: Measure
    value: float
    area: float | None


@dataclass(frozen=True)
class Explained:
    """One explanation: its file, its cost, and what makes its scores doubtful."""

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
    """What could not be explained or measured, and why; ``refused`` where the method is not defined for the model at all."""

    model: str
    sample: str
    method: str
    seed: int
    reason: str
    refused: bool = False


@dataclass(frozen=True)
class Results:
    """Everything a benchmark found, in the order of its settings.

    Attributes:
        settings: what was asked.
        models: name -> weights digest, input size and class names.
        samples: model -> ids of the images judged.
        scores, explained, failures: every number, every explanation, everything missing.
        out: the folder of the files.
    """

    settings: BenchmarkSettings
    models: dict[str, dict[str, Any]]
    samples: dict[str, tuple[str, ...]]
    scores: tuple[Score, ...]
    explained: tuple[Explained, ...]
    failures: tuple[Failure, ...]
    out: Path

    @property
    def failed(self) -> tuple[Failure, ...]:
        """Failures that are no refusals."""
        return tuple(failure for failure in self.failures if not failure.refused)

    @cached_property
    def scores_of(self) -> dict[tuple[str, Measure, str, int], list[Score]]:
        """The scores by (model, measure, method, seed)."""
        found: dict[tuple[str, Measure, str, int], list[Score]] = {}
        for score in self.scores:
            found.setdefault((score.model, score.measure, score.method, score.seed), []).append(score)
        return found

    @cached_property
    def explained_of(self) -> dict[tuple[str, str, int], dict[str, Explained]]:
        """The explanations by (model, method, seed), then by sample."""
        found: dict[tuple[str, str, int], dict[str, Explained]] = {}
        for each in self.explained:
            found.setdefault((each.model, each.method, each.seed), {})[each.sample] = each
        return found
