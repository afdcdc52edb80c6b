"""METRICS against a second derivation of each: a new metric fails here until it has one."""

from __future__ import annotations

import pytest
from derivations import check_derivations

from evaluation.metrics.registry import METRICS

HERE = "evaluation/metrics"
GRIDS = "evaluation/grids/test_localize.py::test_golden_values"
DERIVED_BY = {
    "insertion": f"{HERE}/test_curves.py::test_equals_the_naive_loop",
    "deletion": f"{HERE}/test_curves.py::test_equals_the_naive_loop",
    "insertion_deletion": f"{HERE}/test_curves.py::test_curves_of_a_linear_classifier",
    "highest_confidence_25": f"{HERE}/test_curves.py::test_highest_confidence",
    "highest_confidence_50": f"{HERE}/test_curves.py::test_highest_confidence",
    "highest_confidence_75": f"{HERE}/test_curves.py::test_highest_confidence",
    "highest_confidence_100": f"{HERE}/test_curves.py::test_highest_confidence",
    "mu_fidelity": f"{HERE}/test_fidelity.py::test_mu_fidelity_equals_a_naive_loop",
    "road": f"{HERE}/test_curves.py::test_road_equals_the_naive_loop",
    "infidelity": f"{HERE}/test_fidelity.py::test_infidelity_is_captums_with_the_same_squares",
    "sensitivity": f"{HERE}/test_fidelity.py::test_sensitivity_is_captums",
    "pointing_game": f"{HERE}/test_localization.py::test_equals_naive_loops",
    "energy_pointing_game": f"{HERE}/test_localization.py::test_equals_naive_loops",
    "gridpg": GRIDS,
    "difull": GRIDS,
    "dipart": GRIDS,
}


def test_every_metric_is_derived_a_second_time() -> None:
    check_derivations(METRICS, DERIVED_BY)


def test_a_missing_derivation_is_found() -> None:
    with pytest.raises(AssertionError, match="peak_share"):
        check_derivations([*METRICS, "peak_share"], DERIVED_BY)
