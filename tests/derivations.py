"""Every entry of a registry is derived a second time: by a naive loop, a closed form, or the library that has it."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from pathlib import Path

TESTS = Path(__file__).parent


def check_derivations(registry: Collection[str], derived_by: Mapping[str, str]) -> None:
    """Fail where an entry has no derivation, where one is listed for no entry, or where a listed test does not exist.

    Args:
        registry: names of the entries.
        derived_by: name of an entry -> "file::test", the file below ``tests``.
    """
    assert set(registry) == set(derived_by), f"no derivation, or one too many: {sorted(set(registry) ^ set(derived_by))}"
    for name, place in derived_by.items():
        file, _, test = place.partition("::")
        text = (TESTS / file).read_text(encoding="utf-8")
        assert test in {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}, f"{name}: no test {place}"
