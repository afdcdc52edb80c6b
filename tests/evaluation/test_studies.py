"""What every study owes its users: kill and resume without a trace, and records that depend on pixels, model, labels and version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import tiny_vit
from PIL import Image

import attribution as at
from evaluation.studies import STUDIES
from evaluation.study import executor_of, run
from evaluation.study.records import RecordLog

NAMES = ("a", "b", "c", "d", "e")
SIDE = 16
WRITTEN = (".csv", ".json", ".html", ".png")
# Settings by the name of a study; the grids are the fifth study, which the benchmark runs. A study without settings fails below.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "benchmark": (
        "benchmark",
        {
            "methods": ["greedy", "saliency", "random"],
            "regions": "grid",
            "region_options": {"count": 4},
            "metrics": ["insertion", "mu_fidelity"],
        },
    ),
    "grids": (
        "benchmark",
        {"methods": ["input_x_gradient", "random"], "metrics": ["gridpg"], "layers": ["input"], "grids": 2, "confidence": 0.01},
    ),
    "debug": ("debug", {"regions": "grid", "region_options": {"count": 4}, "search": "greedy"}),
    "neurons": ("neurons", {"steps": 2, "kept": [1, 2], "shares": [0.5], "paths": ["neuron_path", "activation", "random"], "exemplars": 1}),
    "pareto": (
        "pareto",
        {"partitions": ["grid:4"], "methods": ["budget", "greedy", "rise"], "budgets": [8, 20], "sampled_budgets": [8], "confidence": 0.0},
    ),
}


def a_model(seed: int = 0) -> at.Classifier:
    """A small vision transformer with random weights that predicts all of its classes: the bias makes them equally likely."""
    with torch.random.fork_rng():
        module = tiny_vit(seed)
    with torch.no_grad():
        noise = torch.rand(64, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        module.head.bias -= module(noise).mean(dim=0)
    return at.Classifier(module, size=SIDE, class_names=NAMES, scores="logits", name="tiny")


@pytest.fixture(scope="module")
def drawn() -> list[tuple[str, np.ndarray]]:
    """Random images with labels: eight of each of four classes that the model predicts, every fourth in a wrong class."""
    generator, classifier = np.random.default_rng(0), a_model()
    found: dict[int, list[np.ndarray]] = {}
    for _ in range(4000):
        if sum(len(images) == 8 for images in found.values()) == 4:
            break
        pixels = (generator.random((SIDE, SIDE, 3)) * 255).astype(np.uint8)
        predicted = int(classifier.probabilities(classifier.inputs(pixels))[0].argmax())
        images = found.setdefault(predicted, [])
        if len(images) < 8:
            images.append(pixels)
    assert sum(len(images) == 8 for images in found.values()) == 4
    full = [(label, pixels) for label, images in found.items() if len(images) == 8 for pixels in images]
    return [(NAMES[label if index % 4 else (label + 1) % 5], pixels) for index, (label, pixels) in enumerate(full)]


@pytest.fixture
def data(tmp_path: Path, drawn: list[tuple[str, np.ndarray]]) -> Path:
    """The images in one folder a class."""
    for index, (label, pixels) in enumerate(drawn):
        folder = tmp_path / "data" / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return tmp_path / "data"


def made(name: str, data: Path, out: Path, classifier: at.Classifier | None = None) -> dict[str, bytes]:
    """Run a study and write its page: its tables, pages and figures. Stored explanations tell their seconds, so they are left out."""
    command, values = SETTINGS[name]
    study = STUDIES[command]
    model = a_model() if classifier is None else classifier
    which = {"model": model} if command in ("debug", "neurons") else {"models": (model,)}
    chosen = study.settings.make({"data": str(data), "samples": 8, **which, **values})
    study.write(study.summarise(run(study, chosen, out, executor_of(chosen))), out)
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.suffix in WRITTEN}


def test_no_study_is_missing() -> None:
    assert {command for command, _ in SETTINGS.values()} == set(STUDIES)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_killed_study_ends_with_the_same_bytes(name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(name, data, tmp_path / "whole")
    count = len((tmp_path / "whole" / "records.jsonl").read_text().splitlines())
    assert count >= 4
    append = RecordLog.append
    out, left = tmp_path / "out", 0

    def killed(self: RecordLog, key: str, record: dict[str, Any]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        append(self, key, record)

    monkeypatch.setattr(RecordLog, "append", killed)
    for part in (1, max(1, count // 3), max(1, count // 2)):
        left = part
        with pytest.raises(KeyboardInterrupt):
            made(name, data, out)
    monkeypatch.setattr(RecordLog, "append", append)
    assert made(name, data, out) == whole
    assert made(name, data, out) == whole


def replaced_pixels(data: Path) -> dict[str, Any]:
    for path in data.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path))[::-1].copy()).save(path)
    return {}


def another_model_file(_data: Path) -> dict[str, Any]:
    return {"classifier": a_model(seed=7)}


@pytest.mark.parametrize("change", [replaced_pixels, another_model_file], ids=["pixels", "model"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_change_is_noticed(name: str, change: Callable[[Path], dict[str, Any]], data: Path, tmp_path: Path) -> None:
    """What a folder of older results ends with is what a fresh folder ends with."""
    before = outcome(name, data, tmp_path / "out")
    changed = change(data)
    after = outcome(name, data, tmp_path / "out", **changed)
    assert after == outcome(name, data, tmp_path / "fresh", **changed)
    assert after != before


def outcome(name: str, data: Path, out: Path, **changed: Any) -> dict[str, bytes] | str:
    """The tables of a study, or why there are none: nothing that it needs may be left after a change."""
    try:
        return made(name, data, out, **changed)
    except at.UserError as error:
        return str(error)


@pytest.mark.parametrize("name", SETTINGS)
def test_another_version_measures_again(name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(name, data, tmp_path / "out")
    before = keys(tmp_path / "out")
    monkeypatch.setattr("evaluation.study.identity.__version__", "99.0")
    made(name, data, tmp_path / "out")
    after = keys(tmp_path / "out")
    assert len(after) == 2 * len(before)


def keys(out: Path) -> list[str]:
    text = (out / "records.jsonl").read_text()
    return [line for line in text.splitlines() if '"key": "failure-' not in line]


@pytest.mark.parametrize("name", ["benchmark", "debug", "pareto"])
def test_the_data_of_a_recipe_choose_the_model_and_say_so(name: str) -> None:
    """The default model does not know the classes of CIFAR-10."""
    settings, field = STUDIES[name].settings, "model" if name == "debug" else "models"

    def model_of(**values: Any) -> Any:
        found = getattr(settings.make(values), field)
        return found if name == "debug" else found[0]

    with pytest.warns(UserWarning, match="no model was given: zoo:cnn is taken, which knows the classes of cifar10"):
        chosen = settings.make({"data": "cifar10", "root": "data"})
    assert "--model zoo:cnn" in chosen.command_line(name)
    assert model_of(data="cifar10", root="data", **{field: "zoo:vit"}) == "zoo:vit"
    assert model_of(data="images") == model_of(data="images", root="data") == "zoo:imagenet"
    assert STUDIES["neurons"].settings.make({"data": "cifar10", "root": "data"}).model == "zoo:vit"  # type: ignore[attr-defined]
