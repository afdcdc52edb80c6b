"""The command ``attribution doctor``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import attribution as at
from attribution import doctor

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SECONDS_A_SPEED", 0.01)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.open(at.demo_image_path()).resize((64, 48)).save(path)
    return path


def test_doctor(run_command: Command, photo: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    code, out, err = run_command("doctor", photo, "--model", "zoo:vit", "--out", file)
    assert code == 0 and err == ""
    assert "! black: cat" in out and "1 photo.png: " in out and "blocks.5.norm1" in out and "lines to look into, marked with !" in out
    found = json.loads(file.read_text())
    assert found["model"] == "zoo:vit" and "torch" in found["versions"]
    assert [each["what"] for each in found["findings"] if each["warning"]] == [
        line.strip("! ").partition(":")[0] for line in out.splitlines() if line.startswith("! ")
    ]
    assert run_command("doctor", photo, "--model", "zoo:vit", "--strict")[0] == 1


def test_bad_input(run_command: Command, photo: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    code, out, _ = run_command("doctor", photo, "--classes", names, "--strict", "--model", "zoo:cnn")
    assert code == 1 and "! failed: zoo:cnn returns 10 scores, but 2 class names were given" in out
    code, _, err = run_command("doctor", tmp_path / "none.png")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_a_folder_below_the_current_one(run_command: Command, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photo.parent)
    folder = Path("photos")
    folder.mkdir()
    photo.rename(folder / "a.png")
    code, out, err = run_command("doctor", folder, "--model", "zoo:cnn")
    assert (code, err) == (0, "") and "1 a.png: " in out
