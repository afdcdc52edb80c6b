"""Judge explanations: one protocol, the same function for every method, no number without an interval.

>>> import evaluation as ev
>>> settings = ev.make_settings({"data": "photos", "methods": ["bidirectional", "grad_cam", "random"]})
>>> summary = ev.summarise(ev.run_benchmark(settings, "out/benchmark"))  # doctest: +SKIP
"""

from __future__ import annotations

from evaluation.benchmark.methods import MethodSpec
from evaluation.benchmark.report import write_report
from evaluation.benchmark.results import Results
from evaluation.benchmark.settings import BenchmarkSettings, make_settings, read_settings
from evaluation.benchmark.study import run_benchmark
from evaluation.benchmark.summary import Summary, summarise, summary_csv
from evaluation.data.dataset import ImageDataset, Sample
from evaluation.data.recipes import load_dataset, load_recipe, open_dataset
from evaluation.failures.report import write_failures
from evaluation.failures.results import FailureResults
from evaluation.failures.settings import FailureSettings
from evaluation.failures.study import run_failures
from evaluation.failures.summary import FailureSummary, summarise_failures
from evaluation.grids.aggregate import Aggregate, aggregate
from evaluation.grids.draw import choose_grids
from evaluation.grids.localize import GridMethod, grid_localization, grid_maps
from evaluation.grids.model import GridModel
from evaluation.grids.scores import localization_scores
from evaluation.grids.sets import GridSet
from evaluation.metrics.curves import Curves, perturbation_curves, random_order_curves
from evaluation.metrics.fidelity import infidelity, mu_fidelity, sensitivity
from evaluation.metrics.localization import box_mask, chance_level, energy_pointing_game, pointing_game, relevance_rank_accuracy
from evaluation.metrics.protocol import PROTOCOLS, Protocol
from evaluation.metrics.registry import METRICS, Metric
from evaluation.metrics.road import road
from evaluation.neurons.report import write_neuron_report
from evaluation.neurons.results import NeuronResults
from evaluation.neurons.settings import NeuronSettings
from evaluation.neurons.study import run_neurons
from evaluation.neurons.summary import NeuronSummary, summarise_neurons
from evaluation.pareto.report import write_pareto
from evaluation.pareto.settings import ParetoResults, ParetoSettings
from evaluation.pareto.study import run_pareto
from evaluation.pareto.summary import ParetoSummary, summarise_pareto
from evaluation.statistics.comparisons import holm, pairwise_tests, sign_flip, wilcoxon
from evaluation.statistics.intervals import bootstrap_interval, share_interval
from evaluation.statistics.ranking import significance_groups
from evaluation.studies import STUDIES

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "STUDIES",
    "Aggregate",
    "BenchmarkSettings",
    "Curves",
    "FailureResults",
    "FailureSettings",
    "FailureSummary",
    "GridMethod",
    "GridModel",
    "GridSet",
    "ImageDataset",
    "MethodSpec",
    "Metric",
    "NeuronResults",
    "NeuronSettings",
    "NeuronSummary",
    "ParetoResults",
    "ParetoSettings",
    "ParetoSummary",
    "Protocol",
    "Results",
    "Sample",
    "Summary",
    "aggregate",
    "bootstrap_interval",
    "box_mask",
    "chance_level",
    "choose_grids",
    "energy_pointing_game",
    "grid_localization",
    "grid_maps",
    "holm",
    "infidelity",
    "load_dataset",
    "load_recipe",
    "localization_scores",
    "make_settings",
    "mu_fidelity",
    "open_dataset",
    "pairwise_tests",
    "perturbation_curves",
    "pointing_game",
    "random_order_curves",
    "read_settings",
    "relevance_rank_accuracy",
    "road",
    "run_benchmark",
    "run_failures",
    "run_neurons",
    "run_pareto",
    "sensitivity",
    "share_interval",
    "sign_flip",
    "significance_groups",
    "summarise",
    "summarise_failures",
    "summarise_neurons",
    "summarise_pareto",
    "summary_csv",
    "wilcoxon",
    "write_failures",
    "write_neuron_report",
    "write_pareto",
    "write_report",
]
