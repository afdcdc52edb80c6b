"""Every command and program of the README does what it says; run by make readme and CI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line and line != "make test"]  # make test is what CI runs first


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what the README's commands read, so that they write nothing into the checkout."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "photo.png", tmp_path / "docs")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "COLUMNS": "120"}


@pytest.mark.readme
@pytest.mark.parametrize("command", commands())
def test_command(command: str, checkout: Path) -> None:
    if command.startswith("make"):
        command += f" VENV={Path(sys.executable).parents[1]} --assume-old=pyproject.toml --assume-old=constraints.txt"
    result = subprocess.run(command, shell=True, cwd=checkout, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    if "--help" not in command and "--list" not in command:
        out = re.search(r"--out (\S+)", command)
        folder = checkout / (out[1] if out else "out/demo" if command.startswith("make") else "out")
        assert list(folder.rglob("*.png")), result.stdout


@pytest.mark.readme
@pytest.mark.parametrize("program", blocks("python"), ids=range(len(blocks("python"))))
def test_program(program: str, checkout: Path) -> None:
    (checkout / "out").mkdir()
    result = subprocess.run([sys.executable, "-c", program], cwd=checkout, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(r"Explanation\(|tensor\(", result.stdout)


def test_there_is_something_to_run() -> None:
    assert len(commands()) >= 4
    assert len(blocks("python")) >= 2


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_named_files_exist(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for named in re.findall(r"`((?:scripts|tests|attribution|datasets|evaluation|docs)/[\w./*-]*)`", text):
        assert list(ROOT.glob(named.rstrip("/"))), named
