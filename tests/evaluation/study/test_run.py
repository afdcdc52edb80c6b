"""The skeleton of all studies, with the study of the extending page: resumption, identity, failures, processes, command, page."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

import attribution as at
from attribution.model.zoo import CLASS_NAMES
from evaluation.study import Study, executor_of, held, run, sample_seed
from evaluation.study.records import RecordLog
from vision_attribution.studies import study_command

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
WRITTEN = ("brightness.csv", "brightness.json", "report.html")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the extending page."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("brightness")


@pytest.fixture(scope="session")
def noise(cnn: at.Classifier) -> list[tuple[str, np.ndarray]]:
    """Six images of noise that zoo:cnn takes for another class as soon as their first quarter is hidden: that class is their label."""
    generator, found = np.random.default_rng(3), list[tuple[str, np.ndarray]]()
    while len(found) < 6:
        pixels = np.kron(generator.integers(0, 255, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        hidden = pixels.copy()
        hidden[:16, :16] = 0
        first, second = (int(cnn.probabilities(cnn.inputs(each))[0].argmax()) for each in (pixels, hidden))
        if first != second:
            found.append((cnn.class_names[second], pixels))
    return found


@pytest.fixture
def data(tmp_path: Path, noise: list[tuple[str, np.ndarray]]) -> Path:
    """The images of noise in one folder a class."""
    for index, (label, pixels) in enumerate(noise):
        folder = tmp_path / "data" / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "data"


def settings(example: ModuleType, data: Path, **values: Any) -> Any:
    return example.BrightnessSettings(**{"data": str(data), "region_count": 4, "device": "cpu", **values})


def made(example: ModuleType, chosen: Any, out: Path) -> dict[str, bytes]:
    """The files that the study writes."""
    study: Study[Any, Any, Any] = example.BRIGHTNESS
    study.write(study.summarise(run(study, chosen, out, executor_of(chosen))), out)
    return {name: (out / name).read_bytes() for name in WRITTEN}


def explained(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The samples that are explained from now on."""
    found: list[str] = []
    difference = example.difference

    def counted(classifier: at.Classifier, sample: Any, chosen: Any) -> float | None:
        found.append(sample.id)
        return difference(classifier, sample, chosen)  # type: ignore[no-any-return]

    monkeypatch.setattr(example, "difference", counted)
    return found


def test_the_numbers_are_those_of_a_loop(example: ModuleType, data: Path, tmp_path: Path, cnn: at.Classifier) -> None:
    results = run(example.BRIGHTNESS, settings(example, data), tmp_path / "out")
    expected = {}
    for path in sorted(data.rglob("*.png")):
        sample = f"{path.parent.name}/{path.name}"
        try:
            failure = at.explain_failure(
                path, cnn, path.parent.name, regions="grid", region_options={"count": 4}, seed=sample_seed(0, sample)
            )
        except at.NotMisclassified:
            continue
        if failure.cause is not None:
            image, labels = at.load_image(path), failure.truth.regions.labels  # type: ignore[union-attr]
            causing = np.isin(labels.numpy(), failure.cause.regions.numpy())
            expected[sample] = float(image.mean(dim=0).numpy()[causing].mean() - image.mean())
    assert len(expected) >= 3
    assert results.differences == pytest.approx(expected, abs=1e-6)


def test_what_processes_still_keep_is_read_as_well(example: ModuleType, data: Path, tmp_path: Path) -> None:
    chosen, out = settings(example, data), tmp_path / "out"
    whole = run(example.BRIGHTNESS, chosen, out).differences
    first, *others = (out / "records.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (out / "records.jsonl").write_text(first, encoding="utf-8")
    (out / "records-0.jsonl").write_text("".join(others[:2]) + others[2][:9], encoding="utf-8")
    (out / "records-1.jsonl").write_text("".join(others[2:]), encoding="utf-8")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert held(example.BRIGHTNESS, chosen, out).differences == whole
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_another_study_in_the_folder_is_refused_before_it_measures(
    example: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, out = settings(example, data), tmp_path / "out"
    made(example, chosen, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    found = explained(example, monkeypatch)
    other = replace(example.BRIGHTNESS, name="darkness")
    for start in (run, held):
        with pytest.raises(at.UserError, match=r"out holds the study 'brightness', whose page 'darkness' would overwrite"):
            start(other, chosen, out)
    assert found == []
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_record_without_its_fields_is_named_with_its_line_and_measured_again(example: ModuleType, data: Path, tmp_path: Path) -> None:
    chosen, out = settings(example, data), tmp_path / "out"
    first = run(example.BRIGHTNESS, chosen, out)
    lines = (out / "records.jsonl").read_text(encoding="utf-8").splitlines()
    lines[1] = json.dumps({"key": json.loads(lines[1])["key"]})
    (out / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(at.UserError, match=r"records\.jsonl line 2 is damaged or edited"):
        held(example.BRIGHTNESS, chosen, out)
    with pytest.warns(UserWarning, match=r"records\.jsonl line 2 is damaged or edited: what was there is measured again"):
        again = run(example.BRIGHTNESS, chosen, out)
    assert again.differences == first.differences == held(example.BRIGHTNESS, chosen, out).differences


def test_a_second_run_measures_nothing_and_ends_with_the_same_files(
    example: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(example, data)
    first = made(example, chosen, tmp_path / "out")
    found = explained(example, monkeypatch)
    assert made(example, chosen, tmp_path / "out") == first
    assert found == []
    assert len(held(example.BRIGHTNESS, chosen, tmp_path / "out").differences) >= 3


def replaced_pixels(data: Path) -> dict[str, Any]:
    for path in data.rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    return {}


def one_replaced(data: Path) -> dict[str, Any]:
    path = sorted(data.rglob("*.png"))[0]
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    return {}


def corrected_labels(data: Path) -> dict[str, Any]:
    folder = sorted(data.iterdir())[0]
    folder.rename(data / next(name for name in CLASS_NAMES if not (data / name).exists()))
    return {}


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (replaced_pixels, 6),
        (one_replaced, 1),
        (corrected_labels, None),
        (lambda data: {"fill": "blur"}, 6),
        (lambda data: {"seed": 1}, 6),
        (lambda data: {"device": "cpu", "batch_size": 7}, 0),
        (lambda data: {"samples": 2}, 0),
    ],
    ids=["pixels", "one-pixel", "labels", "fill", "seed", "batch size", "samples"],
)
def test_what_a_record_depends_on_is_measured_again(
    change: Callable[[Path], dict[str, Any]],
    count: int | None,
    example: ModuleType,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    made(example, settings(example, data), out)
    first_folder = len(list(sorted(data.iterdir())[0].iterdir()))
    chosen = settings(example, data, **change(data))
    found = explained(example, monkeypatch)
    again = made(example, chosen, out)
    assert len(found) == len(set(found)) == (first_folder if count is None else count)
    assert again == made(example, chosen, tmp_path / "fresh")


def test_another_model_file_and_another_version_are_noticed(
    example: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cnn: at.Classifier, vit: at.Classifier
) -> None:
    model, out = tmp_path / "model.safetensors", tmp_path / "out"
    at.save_classifier(cnn, model)
    first = made(example, settings(example, data, model=str(model)), out)
    at.save_classifier(vit, model)
    found = explained(example, monkeypatch)
    again = made(example, settings(example, data, model=str(model)), out)
    assert len(found) == 6 and again["brightness.csv"] != first["brightness.csv"]
    monkeypatch.setattr("evaluation.study.identity.__version__", "99.0")
    made(example, settings(example, data, model=str(model)), out)
    assert len(found) == 12


def test_a_run_that_ends_at_any_record_ends_with_the_same_files(
    example: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(example, data)
    whole = made(example, chosen, tmp_path / "whole")
    append = RecordLog.append
    for records in (0, 2, 5):
        left = records

        def killed(self: RecordLog, key: str, record: dict[str, Any]) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            append(self, key, record)

        monkeypatch.setattr(RecordLog, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            made(example, chosen, tmp_path / f"cut{records}")
        monkeypatch.setattr(RecordLog, "append", append)
        assert made(example, chosen, tmp_path / f"cut{records}") == whole


def test_images_that_fail_are_listed_and_tried_again(
    example: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sorted(data.rglob("*.png"))[2]
    good = path.read_bytes()
    path.write_bytes(good[:60])
    progress: list[tuple[int, int, str]] = []
    chosen = settings(example, data)
    results = run(example.BRIGHTNESS, chosen, tmp_path / "out", progress=lambda *told: progress.append(told))
    ((sample, reason),) = results.failures
    assert sample == f"{path.parent.name}/{path.name}" and "is a damaged image" in reason
    assert progress[0][:2] == (0, 6) and progress[-1][:2] == (6, 6)
    path.write_bytes(good)
    assert run(example.BRIGHTNESS, chosen, tmp_path / "out").failures == ()


def call(example: ModuleType, *words: object) -> None:
    app = typer.Typer(add_completion=False)
    app.command()(study_command(example.BRIGHTNESS))
    app([str(word) for word in words], standalone_mode=False)


def test_the_command_is_made_of_the_settings(
    example: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path / "out", tmp_path / "settings.toml"
    call(example, "--data", data, "--region-count", 4, "--out", out)
    printed = capsys.readouterr().out
    (row,) = csv.DictReader((out / "brightness.csv").read_text().splitlines())
    assert f"zoo:cnn: {float(row['difference']):+.3f}, {row['images']} images" in printed
    assert f"report: {out / 'report.html'}" in printed.replace("\n", "")
    found = explained(example, monkeypatch)
    file.write_text(f'data = "{data}"\nregion_count = 4\nfill = "blur"\n')
    call(example, file, "--fill", "black", "--out", out)  # options win over the file
    assert found == []
    with pytest.raises(at.UserError, match="holds no records of these settings"):  # an empty page would replace the one that is there
        call(example, file, "--out", out, "--no-measure")
    assert found == [] and json.loads((out / "brightness.json").read_text())["settings"]["fill"] == "black"
    call(example, file, "--out", out)
    assert found and json.loads((out / "brightness.json").read_text())["settings"]["fill"] == "blur"
    assert settings(example, data, fill="#102030").command_line("brightness") == (
        f"attribution brightness --device cpu --data {data} --region-count 4 --fill '#102030'"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("region_count = 1", "region_count is 1: expected a whole number of at least 2"),
        ("region_count = true", "region_count is True: expected a whole number"),
        ('region_count = "4"', "region_count is '4': expected a whole number"),
        ("fill = 5", "fill is int: expected text"),
        ("seed = 100000000000000000000", "seed is 100000000000000000000: expected a whole number from 0 to 9223372036854775807"),
        ("data = 5", "data is int: expected text"),
        ("colour = 1", "has unknown settings colour: expected some of batch_size, checkpoint"),
        ("fill = ", "cannot be read as TOML"),
    ],
)
def test_settings_files_are_checked_by_type(text: str, message: str, example: ModuleType, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(f"{text}\n")
    with pytest.raises(at.UserError) as caught:
        example.BrightnessSettings.read(file, {} if "data" in text else {"data": str(data)})
    assert message in str(caught.value)
    with pytest.raises(at.UserError, match="names no data"):
        example.BrightnessSettings.make({})


@pytest.mark.slow
def test_processes_change_no_byte_and_a_killed_one_is_named(
    example: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made(example, settings(example, data), tmp_path / "one")
    assert made(example, settings(example, data, workers=2), tmp_path / "two") == one
    records = [json.loads(line) for line in (tmp_path / "two" / "records.jsonl").read_text().splitlines()]
    assert len(records) == len({record["key"] for record in records}) == 6
    assert not list((tmp_path / "two").glob("records-*"))


@pytest.mark.slow
def test_a_killed_study_leaves_no_process_and_its_records_count(example: ModuleType, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import brightness as b; from evaluation.study import executor_of, run\n"
        f"s = b.BrightnessSettings(data={str(data)!r}, region_count=9, device='cpu', workers=2)\n"
        f"if __name__ == '__main__': run(b.BRIGHTNESS, s, {str(out)!r}, executor_of(s))\n"
    )
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parents[1]), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, str(tmp_path / "program.py")], env=environment)
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in out.glob("records-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    chosen = settings(example, data, region_count=9)
    while subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, check=False).stdout and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, check=False).stdout
    assert made(example, chosen, out) == made(example, chosen, tmp_path / "fresh")
    assert not list(out.glob("records-*"))
    shutil.rmtree(out)


def test_the_example_is_short() -> None:
    assert len((EXAMPLES / "brightness.py").read_text(encoding="utf-8").splitlines()) <= 150
