"""Judge explanations: one protocol, the same function for every method, no number without an interval.

>>> import evaluation as ev
>>> settings = ev.make_settings({"data": "photos", "methods": ["bidirectional", "grad_cam", "random"]})
>>> summary = ev.summarise(ev.run_benchmark(settings, "out/benchmark"))  # doctest: +SKIP
"""

from __future__ import annotations

from evaluation.benchmark.measure import run_benchmark
from evaluation.benchmark.methods import MethodSpec
from evaluation.benchmark.report import write_report
from evaluation.benchmark.results import Results
from evaluation.benchmark.settings import BenchmarkSettings, make_settings, read_settings
from evaluation.benchmark.summary import Summary, summarise, summary_csv
from evaluation.data.dataset import ImageDataset, Sample
from evaluation.data.recipes import load_dataset, load_recipe, open_dataset
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
from evaluation.statistics.comparisons import holm, pairwise_tests, sign_flip, wilcoxon
from evaluation.statistics.intervals import bootstrap_interval, share_interval
from evaluation.statistics.ranking import significance_groups

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "Aggregate",
    "BenchmarkSettings",
    "Curves",
    "GridMethod",
    "GridModel",
    "GridSet",
    "ImageDataset",
    "MethodSpec",
    "Metric",
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
    "sensitivity",
    "share_interval",
    "sign_flip",
    "significance_groups",
    "summarise",
    "summary_csv",
    "wilcoxon",
    "write_report",
]
