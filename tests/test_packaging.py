"""What an installed package holds, and what the repository must not."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import attribution as at

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_what_the_demo_needs_and_no_datasets_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "attribution/py.typed",
        "evaluation/py.typed",
        "evaluation/recipes/cifar10.toml",
        "evaluation/templates/report.html.j2",
        "vision_attribution/explain.py",
    ):
        assert name in names
    for model in ("cnn", "vit"):
        assert f"attribution/assets/{model}.safetensors" in names
    for model in ("imagenet", "cnn", "vit"):
        assert f"attribution/assets/{model}.md" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"attribution", "evaluation", "vision_attribution"}


@pytest.mark.slow
def test_the_installed_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own that borrows only the dependencies."""
    venv.create(tmp_path / "venv", system_site_packages=False, with_pip=False)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    borrowed = tmp_path / "dependencies"
    borrowed.mkdir()
    for entry in Path(np_folder()).iterdir():
        if not entry.name.startswith(("_editable", "vision_attribution", "evaluation")):
            (borrowed / entry.name).symlink_to(entry)
    (site / "borrowed.pth").write_text(str(borrowed))
    program = (
        "import attribution, evaluation as ev; print(attribution.__file__); print(ev.load_recipe('cifar10').title);"
        "print(attribution.explain(attribution.demo_image_path(), 'zoo:cnn', regions='grid', region_options={'count': 4}));"
        "print(attribution.explain(attribution.demo_image_path(), 'zoo:imagenet', regions='grid', region_options={'count': 4}))"
    )
    result = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "python"), "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    where, title, explanation, photo = result.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert title == "CIFAR-10"
    assert explanation.startswith("Explanation(cat 0.858, 4 regions")
    assert photo.startswith("Explanation(tiger cat 0.399, 4 regions")


def np_folder() -> str:
    import numpy

    return str(Path(numpy.__file__).parents[1])


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert project["version"] == at.__version__ == re.search(r"^version: (\S+)", citation, flags=re.M)[1]


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", line) for line in lines)  # no address, no path
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["docs"], *extras["dev"]]
    assert {re.split(r"[>=<\[]", name)[0].lower() for name in wanted} - {project["name"]} <= pinned
