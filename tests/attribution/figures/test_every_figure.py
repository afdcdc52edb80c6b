"""Every function that plots a figure ends with ``as_written``, so that no text of data is taken for a formula."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_plot_goes_through_as_written() -> None:
    checked = []
    for path in [*ROOT.glob("attribution/**/*.py"), *ROOT.glob("evaluation/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.FunctionDef)
                and node.name.startswith("plot_")
                and ast.unparse(node.returns or ast.Constant(0)) == "Figure"
            ):
                returned = [ast.unparse(each.value or ast.Constant(0)) for each in ast.walk(node) if isinstance(each, ast.Return)]
                assert all(each.startswith(("as_written(", "plot_")) for each in returned), f"{path.name} {node.name} returns {returned}"
                checked.append(node.name)
    assert len(checked) >= 17
