"""Numbers as text."""

from __future__ import annotations

import math

import pytest

from evaluation.statistics.intervals import Interval
from evaluation.study.tables import estimated, mean, p_value, percent


def interval(estimate: float, low: float, high: float) -> Interval:
    return Interval(estimate, low, high, 0.95, "bca", 5)


def test_intervals_as_text() -> None:
    known, alone, nothing = interval(0.42, 0.304, 0.556), interval(0.42, math.nan, math.nan), interval(math.nan, math.nan, math.nan)
    assert (percent(known), percent(alone), percent(nothing)) == ("42 % [30, 56]", "42 %", "")
    assert (mean(known), mean(alone), mean(nothing)) == ("0.42 [0.30, 0.56]", "0.42", "")
    assert estimated(known, "{:+.3f}".format, " px") == "+0.420 px [+0.304, +0.556]"


@pytest.mark.parametrize(("p", "text"), [(0.0004, "< 0.001"), (0.001, "0.001"), (0.0426, "0.043"), (1.0, "1.000"), (math.nan, "")])
def test_p_values_as_text(p: float, text: str) -> None:
    assert p_value(p) == text
