"""Tables: numbers, counts and lists as text, for pages, CSV files and terminals."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from rich import box
from rich.table import Table
from rich.text import Text

from attribution.errors import printable
from evaluation.statistics.intervals import Interval

T = TypeVar("T")
K = TypeVar("K")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what formulas begin with in spreadsheets


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


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by their key, keys in the order of their first appearance."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def terminal_table(
    title: str | None, headings: Sequence[str], rows: Iterable[Sequence[str]], left: Container[str] = (), whole: Container[str] = ()
) -> Table:
    """Rows of text as a table for the terminal.

    Args:
        title: above the table.
        headings: of the columns.
        rows: a cell for each heading; nothing in it is markup.
        left: headings of the columns that are aligned left, such as names; numbers are aligned right.
        whole: headings of the columns whose cells are never broken over lines.
    """
    table = Table(box=box.SIMPLE_HEAD, title=None if title is None else Text(printable(title)), title_justify="left")
    for heading in headings:
        side = {"overflow": "fold"} if heading in left else {"justify": "right"}
        table.add_column(heading, no_wrap=heading in whole, **side)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text("\n".join(map(printable, cell.split("\n")))) for cell in row))
    return table


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV text with a line of headings. Numbers have six digits, intervals are three cells, what is not known is empty.

    Text that a spreadsheet would take for a formula, such as a class named "=1+1", gets an apostrophe before it.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([columns, *([cell for value in row for cell in _csv_cells(value)] for row in rows)])
    return buffer.getvalue()


def _csv_cells(value: Any) -> list[Any]:
    if isinstance(value, Interval):
        return csv_interval(value)
    if isinstance(value, str) and value.startswith(_FORMULA) and not _is_number(value):
        return [f"'{value}"]
    return [csv_number(value) if isinstance(value, float) else value]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def csv_interval(interval: Interval | None) -> list[str]:
    """Estimate and both ends as cells; empty where there is no interval."""
    return [""] * 3 if interval is None else [csv_number(each) for each in (interval.estimate, interval.low, interval.high)]


def interval_columns(*names: str) -> list[str]:
    """The headings of ``csv_interval``: name, name_low, name_high."""
    return [f"{name}{end}" for name in names for end in ("", "_low", "_high")]


def csv_number(value: float | None) -> str:
    """A number as a cell, six digits; empty where there is none."""
    return "" if value is None or not math.isfinite(value) else f"{value:.6g}"
