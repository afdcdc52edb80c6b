"""Intervals, paired tests, ranks and checks of scores."""

from evaluation.statistics.comparisons import (
    PAIRED_TESTS,
    Comparison,
    benjamini_hochberg,
    holm,
    pairwise_tests,
    random_order_test,
    sign_flip,
    wilcoxon,
)
from evaluation.statistics.intervals import Interval, bootstrap_interval, bootstrap_ratio, share_interval
from evaluation.statistics.ranking import significance_groups

__all__ = [
    "PAIRED_TESTS",
    "Comparison",
    "Interval",
    "benjamini_hochberg",
    "bootstrap_interval",
    "bootstrap_ratio",
    "holm",
    "pairwise_tests",
    "random_order_test",
    "share_interval",
    "sign_flip",
    "significance_groups",
    "wilcoxon",
]
