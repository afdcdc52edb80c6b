"""The studies by the name of their command. A new study is a folder of its own, and one line here."""

from __future__ import annotations

from typing import Any

from evaluation.benchmark.study import BENCHMARK
from evaluation.failures.study import FAILURES
from evaluation.neurons.study import NEURONS
from evaluation.pareto.study import PARETO
from evaluation.study.run import Study

STUDIES: dict[str, Study[Any, Any, Any]] = {study.name: study for study in (BENCHMARK, FAILURES, NEURONS, PARETO)}
