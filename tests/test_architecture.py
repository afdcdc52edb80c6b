"""The floors of the house: imports point down only, also inside evaluation and inside functions, and there are no circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("attribution", "evaluation", "vision_attribution")
# From the ground up. A name is a module or a whole package; the longest name that fits a module counts.
FLOORS = [
    ["attribution.errors"],
    ["attribution.files", "attribution.checks"],
    ["attribution.figures"],
    ["attribution.image", "attribution.hooks"],
    ["attribution.model"],
    ["attribution.fills", "attribution.regions", "attribution.provenance", "attribution.deprecation"],
    ["attribution.masking", "attribution.explanation"],
    ["attribution.task"],
    ["attribution.network", "attribution.objective"],
    ["attribution.search", "attribution.dropping"],
    ["attribution.presets", "attribution.tuning"],
    ["attribution.baselines"],
    ["attribution.priors"],
    ["attribution.explain"],
    ["attribution.failure", "attribution.many", "attribution.neurons", "attribution.concepts", "attribution.doctor"],
    ["attribution"],
    ["evaluation.statistics", "evaluation.metrics"],
    ["evaluation.data"],
    ["evaluation.grids"],
    ["evaluation.study"],
    ["evaluation.benchmark", "evaluation.failures", "evaluation.neurons", "evaluation.pareto"],
    ["evaluation.studies"],
    ["evaluation"],
    ["vision_attribution"],
]


def floor_of(module: str) -> tuple[str, int]:
    """The entry of FLOORS that a module belongs to, and its height."""
    heights = {name: height for height, names in enumerate(FLOORS) for name in names}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in heights and (length == len(parts) or length > 1 or name == "vision_attribution"):
            return name, heights[name]
    raise AssertionError(f"{module} has no floor yet: give it one in FLOORS")


def modules_of(root: Path) -> dict[str, Path]:
    """The modules of our packages below a folder, by dotted name."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports_of(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Our modules that a file imports, at its top, for type checking, or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            assert node.level == 0
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES)


def import_graph(root: Path) -> dict[str, set[str]]:
    modules = modules_of(root)
    return {name: set(imports_of(path, modules)) - {name} for name, path in modules.items()}


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    found = []
    for module, imported in graph.items():
        own, height = floor_of(module)
        for other in sorted(imported):
            name, other_height = floor_of(other)
            # the version is written in the package's __init__, and provenance needs it
            if name != own and other_height >= height and other != "attribution":
                found.append(f"{module} imports {other}, which is not on a lower floor")
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others; an __init__ that only gathers its package's names is left out."""
    left = {name: {other for other in imported if other in graph} for name, imported in graph.items()}
    while ends := [name for name, imported in left.items() if not imported]:
        for name in ends:
            del left[name]
        for imported in left.values():
            imported.difference_update(ends)
    found = []
    for start in sorted(left):
        trail, here = [start], start
        while (here := min(left[here])) not in trail:
            trail.append(here)
        if start == here:
            found.append(trail)
    return found


def test_imports_point_down() -> None:
    assert upward_imports(import_graph(ROOT)) == []


def test_there_are_no_circles() -> None:
    graph = import_graph(ROOT)
    for imported in graph.values():
        imported.discard("attribution")  # for its version
    assert circles(graph) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("attribution/image.py", "from attribution.explain import explain"),
        ("attribution/search/greedy.py", "def lazy() -> None:\n    from evaluation.metrics import curves"),
        ("evaluation/statistics/ranking.py", "if False:\n    import evaluation.benchmark.summary"),
        ("evaluation/failures/summary.py", "from evaluation.benchmark.figures import plot_curves"),
        ("evaluation/study/page.py", "from vision_attribution import progress"),
    ],
)
def test_a_planted_upward_import_is_found(module: str, line: str, tmp_path: Path) -> None:
    copy_of_the_house(tmp_path)
    planted = tmp_path / module
    planted.write_text(f"{planted.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    (found,) = upward_imports(import_graph(tmp_path))
    assert found.startswith(module.removesuffix(".py").replace("/", "."))


def test_a_planted_circle_is_found_also_a_lazy_one(tmp_path: Path) -> None:
    copy_of_the_house(tmp_path)
    planted = tmp_path / "attribution" / "baselines" / "cams.py"
    text = planted.read_text(encoding="utf-8")
    planted.write_text(f"{text}\ndef lazy() -> None:\n    from attribution.baselines.attribute import attribute\n", encoding="utf-8")
    graph = import_graph(tmp_path)
    for imported in graph.values():
        imported.discard("attribution")
    assert ["attribution.baselines.attribute", "attribution.baselines.cams"] in circles(graph)


def copy_of_the_house(folder: Path) -> None:
    for name, path in modules_of(ROOT).items():
        there = folder / path.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        assert name


def test_every_public_name_is_documented() -> None:
    import attribution
    import evaluation

    for package in (attribution, evaluation):
        missing = [name for name in package.__all__ if not getattr(getattr(package, name), "__doc__", None)]
        assert missing == []
        assert package.__all__ == sorted(package.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))


def test_no_top_level_datasets_package() -> None:
    assert not (ROOT / "datasets" / "__init__.py").exists()
