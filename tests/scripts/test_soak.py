"""scripts/soak.py in small."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType


def test_it_prints_what_a_process_holds(script_named: Callable[[str], ModuleType], called: Callable[..., tuple[int, str]]) -> None:
    code, printed = called(script_named("soak"), "--explanations", "10", "--records", "10")
    assert code == 0, printed
    assert printed.count("explanations") >= 10 and "10 records: 0.0 MiB" in printed
    code, printed = called(script_named("soak"), "--explanations", "1")
    assert code == 2 and "--explanations" in printed
