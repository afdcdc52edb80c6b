"""Judge explanations: one protocol, the same function for every method, no number without an interval.

>>> import evaluation as ev
>>> settings = ev.make_settings({"data": "photos", "methods": ["bidirectional", "grad_cam", "random"]})
>>> summary = ev.summarise(ev.run_benchmark(settings, "out/benchmark"))  # doctest: +SKIP
"""

from evaluation.benchmark import run_benchmark
from evaluation.data import load_dataset, load_recipe, open_dataset
from evaluation.dataset import ImageDataset, Sample
from evaluation.fidelity import infidelity, mu_fidelity, sensitivity
from evaluation.grids.aggregate import Aggregate, aggregate
from evaluation.grids.localize import GridMethod, grid_localization, grid_maps
from evaluation.grids.networks import GridModel
from evaluation.grids.scores import localization_scores
from evaluation.grids.sets import GridSet, choose_grids
from evaluation.localization import box_mask, chance_level, energy_pointing_game, pointing_game, relevance_rank_accuracy
from evaluation.metrics import METRICS, Metric
from evaluation.perturbation import PROTOCOLS, Curves, Protocol, perturbation_curves, random_order_curves, road
from evaluation.ranking import significance_groups
from evaluation.report import write_report
from evaluation.results import Results
from evaluation.settings import BenchmarkSettings, MethodSpec, make_settings, read_settings
from evaluation.statistics import bootstrap_interval, holm, pairwise_tests, share_interval, sign_flip, wilcoxon
from evaluation.summary import Summary, summarise, summary_csv

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
