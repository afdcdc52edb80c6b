"""Tables: numbers, counts and lists as text."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from evaluation.statistics.intervals import Interval


def written(interval: Interval, write: Callable[[float], str]) -> str:
    """The ends of an interval in brackets."""
    return f"[{write(interval.low)}, {write(interval.high)}]"


def estimated(interval: Interval, write: Callable[[float], str], unit: str = "") -> str:
    """An estimate with the ends of its interval, such as "0.42 [0.30, 0.55]"; without the ends where there are none, and empty without an
    estimate.
    """
    if not math.isfinite(interval.estimate):
        return ""
    ends = f" {written(interval, write)}" if math.isfinite(interval.low) and math.isfinite(interval.high) else ""
    return f"{write(interval.estimate)}{unit}{ends}"


def percent(interval: Interval) -> str:
    """A share, such as "42 % [30, 55]"; see ``estimated``."""
    return estimated(interval, lambda share: f"{100 * share:.0f}", " %")


def mean(interval: Interval) -> str:
    """A mean with two digits, such as "0.42 [0.30, 0.55]"; see ``estimated``."""
    return estimated(interval, "{:.2f}".format)


def p_value(p: float) -> str:
    """A p value with three digits; empty where there is none."""
    return "" if not math.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: Iterable[str]) -> str:
    *firsts, last = names
    return f"{', '.join(firsts)} and {last}" if firsts else last


def plain_values(value: Any) -> Any:
    """As JSON can hold it: intervals as objects, what is not a number as null."""
    if isinstance(value, Interval):
        return plain_values(vars(value))
    if isinstance(value, Mapping):
        return {str(key): plain_values(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [plain_values(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV text with a line of headings."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([columns, *rows])
    return buffer.getvalue()


def csv_interval(interval: Interval | None) -> list[str]:
    """Estimate and both ends as cells; empty where there is no interval."""
    return [""] * 3 if interval is None else [csv_number(each) for each in (interval.estimate, interval.low, interval.high)]


def interval_columns(*names: str) -> list[str]:
    """The headings of ``csv_interval``: name, name_low, name_high."""
    return [f"{name}{end}" for name in names for end in ("", "_low", "_high")]


def csv_number(value: float | None) -> str:
    """A number as a cell, six digits; empty where there is none."""
    return "" if value is None or not math.isfinite(value) else f"{value:.6g}"
