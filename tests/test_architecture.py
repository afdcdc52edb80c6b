"""The floors of the house: imports point down only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"errors"},
    {"files", "image", "hooks", "zoo"},
    {"classifier", "regions"},
    {"loading", "masking", "explanation", "tuning"},
    {"dropping"},
    {"objective"},
    {"budget"},
    {"search"},
    {"presets"},
    {"explain"},
    {"failure", "many"},
    {"baselines"},
    {"plotting"},
    {"failure_plotting"},
    {"neurons"},
    {"evaluation"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = sorted([*(ROOT / "attribution").rglob("*.py"), *(ROOT / "evaluation").rglob("*.py")])


def room(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "evaluation":
        return "evaluation"
    return parts[1] if parts[0] == "attribution" and len(parts) > 1 else None


@pytest.mark.parametrize("path", [f for f in FILES if f.parent.parent != ROOT or f.name != "__init__.py"], ids=lambda f: f.stem)
def test_imports_point_down(path: Path) -> None:
    package = path.relative_to(ROOT).parts
    own = "evaluation" if package[0] == "evaluation" else package[1].removesuffix(".py")
    assert own in LEVEL, f"{own} has no floor yet"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:  # imports inside functions are lazy on purpose
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for other in filter(None, map(room, names)):
            allowed = LEVEL[other] < LEVEL[own] or (other == own and len(package) > 1 + (own != "evaluation"))
            assert allowed, f"{own} imports {other}, which is not on a lower floor"


def test_every_public_name_is_documented() -> None:
    import attribution

    missing = [name for name in attribution.__all__ if not getattr(getattr(attribution, name), "__doc__", None)]
    assert missing == []
    assert attribution.__all__ == sorted(attribution.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))


def test_no_top_level_datasets_package() -> None:
    assert not (ROOT / "datasets" / "__init__.py").exists()
