"""Neuron paths on a data set: kept, resumed, summed up and reported; and the command, for images and for data."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import attribution as at
from attribution.neurons import PathFinder, edited_probabilities, mean_activations
from evaluation.neurons import measure as runner
from evaluation.neurons.measure import relative, run_neurons
from evaluation.neurons.report import write_neuron_report
from evaluation.neurons.settings import NeuronSettings
from evaluation.neurons.summary import changed, summarise_neurons
from evaluation.study.records import read_log

NAMES = ("blue", "green", "red")
SIDE = 16
Run = Callable[..., tuple[int, str, str]]


def colours(name: str = "colours", seed: int = 0) -> at.Classifier:
    """A small vision transformer with random weights, strong enough that its neurons matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = VisionTransformer(
            img_size=SIDE, patch_size=8, embed_dim=16, depth=3, num_heads=2, mlp_ratio=1.5, num_classes=3, global_pool="token"
        )
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(3).add_(0.05 * torch.randn_like(parameter))
    return at.Classifier(module.eval(), size=SIDE, class_names=NAMES, scores="logits", name=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of each of three classes."""
    path = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (path / name).mkdir()
        for index in range(6):
            pixels = generator.integers(0, 120, (SIDE, SIDE, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(path / name / f"{index}.png")
    return path


def settings(folder: Path, **values: object) -> NeuronSettings:
    return NeuronSettings.make({"data": str(folder), "model": colours(), "samples": None, "steps": 4, "kept": [1, 2], **values})


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> runner.NeuronResults:
    return run_neurons(settings(folder), tmp_path_factory.mktemp("run"))


def test_paths_are_those_of_each_image_on_its_own(results: runner.NeuronResults) -> None:
    classifier = results.classifier
    assert len(results.chosen) == 18
    assert sorted(results.labels.tolist()) == sorted([0, 1, 2] * 6)
    for position in (0, 7, 17):
        sample = results.dataset[results.chosen[position]]
        inputs, target = classifier.inputs(sample.image), int(results.labels[position])
        assert sample.label == target == results.targets[position]
        assert results.clean[position] == pytest.approx(float(classifier.probabilities(inputs)[0, target]), abs=1e-6)
        finder = PathFinder(classifier, inputs, [target], steps=4)
        for kind, find in (("neuron_path", finder.search), ("activation", finder.activation)):
            (path,) = find()
            measured = results.measured[kind]
            assert measured.neurons[position].tolist() == path.neurons.tolist()
            assert measured.scores[position] == pytest.approx(path.score, rel=1e-3, abs=1e-6)
            for edit in ("remove", "enhance"):
                edited = edited_probabilities(classifier, inputs, path.neurons[None], edit)
                assert measured.probabilities[edit][position] == pytest.approx(float(edited[0, target]), abs=1e-6)
                assert measured.correct[edit][position] == (int(edited[0].argmax()) == target)


def test_halves_replace_by_one_anothers_mean_and_judge_paths_of_the_other(results: runner.NeuronResults) -> None:
    assert [int(results.selection[results.labels == label].sum()) for label in range(3)] == [3, 3, 3]
    first = np.flatnonzero(results.selection)
    means = mean_activations(results.classifier, results.inputs(first.tolist()))
    judged = np.flatnonzero(~results.selection)
    found = results.measured["neuron_path"]
    edited = edited_probabilities(
        results.classifier, results.inputs(judged.tolist()), torch.from_numpy(found.neurons[judged]), "mean", means=means
    ).numpy()
    np.testing.assert_allclose(found.probabilities["mean"][judged], edited[np.arange(len(judged)), results.labels[judged]], atol=1e-6)
    by_class = results.paths_of_classes("neuron_path")
    for label in range(3):
        own = found.neurons[results.selection & (results.labels == label)]
        for layer in range(3):
            values, counts = np.unique(own[:, layer], return_counts=True)
            assert by_class[label, layer] == values[counts.argmax()]
    edited = edited_probabilities(
        results.classifier, results.inputs(judged.tolist()), torch.from_numpy(by_class[results.labels[judged]]), "remove"
    ).numpy()
    expected = edited[np.arange(len(judged)), results.labels[judged]]
    np.testing.assert_allclose(found.class_probabilities["remove"], expected, atol=1e-6)


def test_the_removal_path_lowers_the_target_most(results: runner.NeuronResults) -> None:
    """By construction never less than the path of the largest contributions that it starts from; here than any other kind."""
    removed = {kind: changed(results, found, "own", "remove", "probability").mean() for kind, found in results.measured.items()}
    assert min(removed, key=lambda kind: removed[kind]) == "neuron_path_removal"
    assert removed["neuron_path_removal"] < removed["random"] < 0.05


def test_pruning_sweeps_every_combination(results: runner.NeuronResults) -> None:
    combinations = {(row.kept, row.depth, row.share) for row in results.pruned}
    assert combinations == {(k, d, q) for k in (1, 2) for d in (1, 2, 3) for q in (0.1, 0.3, 0.5, 1.0)}
    assert all(len(row.correct) == 9 for row in results.pruned)
    whole = [row for row in results.pruned if row.share == 1 and row.depth == 3]
    judged = np.flatnonzero(~results.selection)
    assert any(np.abs(row.probabilities - results.clean[judged]).max() > 1e-3 for row in whole)


def test_a_run_resumes_and_ends_with_the_same_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(folder, kept=[1])
    wanted = run_neurons(chosen, tmp_path / "whole")
    write_neuron_report(summarise_neurons(wanted), tmp_path / "whole")
    original, calls = PathFinder.search, 0

    def interrupted(self: PathFinder, *args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PathFinder, "search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_neurons(chosen, tmp_path / "part")
    before = set(read_log(tmp_path / "part" / "records.jsonl"))
    assert 0 < len(before) < len(read_log(tmp_path / "whole" / "records.jsonl"))
    monkeypatch.setattr(PathFinder, "search", original)
    monkeypatch.setattr(runner, "TOGETHER", 5)  # other batches, the same numbers
    resumed = run_neurons(chosen, tmp_path / "part")
    for kind, measured in resumed.measured.items():
        np.testing.assert_array_equal(measured.neurons, wanted.measured[kind].neurons)
        np.testing.assert_allclose(measured.scores, wanted.measured[kind].scores, rtol=1e-4, atol=1e-6)
    seen: list[int] = []
    monkeypatch.setattr(PathFinder, "search", lambda *a, **k: seen.append(1))
    run_neurons(chosen, tmp_path / "whole")
    assert not seen, "nothing was missing"
    files = {path: path.read_bytes() for path in sorted((tmp_path / "whole").rglob("*.*")) if path.suffix in (".csv", ".json", ".html")}
    write_neuron_report(summarise_neurons(run_neurons(chosen, tmp_path / "whole")), tmp_path / "whole")
    assert {path: path.read_bytes() for path in files} == files


def test_images_that_fail_are_named_and_the_others_count(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "data"
    for path in sorted(folder.rglob("*.png")):
        (broken / path.parent.name).mkdir(parents=True, exist_ok=True)
        (broken / path.parent.name / path.name).write_bytes(path.read_bytes())
    (broken / "red" / "2.png").write_bytes(b"no image")
    results = run_neurons(settings(broken, paths=["neuron_path"], kept=[1]), tmp_path / "out")
    assert len(results.chosen) == 17
    assert [sample for sample, _ in results.failures] == ["red/2.png"]
    files = write_neuron_report(summarise_neurons(results), tmp_path / "out")
    assert "red/<wbr>2.png" in files.html.read_text(encoding="utf-8")
    assert json.loads(files.json.read_text(encoding="utf-8"))["failures"][0]["sample"] == "red/2.png"


def test_the_tables_hold_what_was_measured(results: runner.NeuronResults, tmp_path: Path) -> None:
    summary = summarise_neurons(results)
    files = write_neuron_report(summary, tmp_path)
    rows = {
        (r["path"], r["whose"], r["edit"], r["quantity"]): r for r in csv.DictReader(files.csv.read_text(encoding="utf-8").splitlines())
    }
    assert len(rows) == 6 * 2 * 3 * 3
    for (kind, whose, edit, quantity), row in rows.items():
        values = changed(results, results.measured[kind], whose, edit, quantity)  # type: ignore[arg-type]
        assert float(row["mean"]) == pytest.approx(np.nanmean(values), rel=1e-4, abs=1e-6)
        assert float(row["low"]) <= float(row["mean"]) + 1e-9
        if kind != results.settings.paths[0]:
            first = changed(results, results.measured[results.settings.paths[0]], whose, edit, quantity)  # type: ignore[arg-type]
            assert float(row["difference"]) == pytest.approx(np.nanmean(values - first), rel=1e-3, abs=1e-6)
    pruned = list(csv.DictReader((tmp_path / "pruning.csv").read_text(encoding="utf-8").splitlines()))
    assert [float(r["accuracy"]) for r in pruned] == pytest.approx([row.correct.mean() for row in results.pruned], abs=1e-5)
    page = files.html.read_text(encoding="utf-8")
    assert page.count("<svg") == len(files.figures) == 6
    assert 'src="http' not in page and 'href="http' not in page
    for figure in files.figures:
        with Image.open(figure) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    plain = json.loads(files.json.read_text(encoding="utf-8"))
    assert plain["model"]["precision"] == "float32"
    assert [c["name"] for c in plain["classes"]] == list(NAMES)
    assert plain["classes"][0]["path"] == summary.class_paths[0].tolist()


def test_a_model_that_cannot_be_decoded_is_reported_with_the_reason(folder: Path, tmp_path: Path) -> None:
    base = colours()
    cosine = base.with_prototypes(
        torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), scale=5.0, normalize=True, class_names=NAMES
    )
    results = run_neurons(settings(folder, model=cosine, paths=["neuron_path"], kept=[1]), tmp_path)
    summary = summarise_neurons(results)
    assert "cosines" in summary.undecoded
    assert "were not decoded" in write_neuron_report(summary, tmp_path).html.read_text(encoding="utf-8")


def test_a_ratio_needs_a_clean_probability() -> None:
    found = relative(np.array([0.2, 0.5, 0.1]), np.array([0.4, 0.5, 0.0]))
    np.testing.assert_allclose(found[:2], [-0.5, 0])
    assert np.isnan(found[2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"paths": ["nonsense"]}, "paths are nonsense: expected"),
        ({"paths": ["activation", "random"]}, "random paths imitate"),
        ({"target": "truth"}, "target='truth'"),
        ({"samples": 2}, "samples is 2"),
        ({"kept": [0]}, "kept is [0]"),
        ({"shares": [2.0]}, "shares are [2.0]"),
        ({"colour": 1}, "unknown settings colour"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, object], message: str) -> None:
    with pytest.raises(at.UserError) as error:
        NeuronSettings.make({"data": "photos", **values})
    assert message in str(error.value)


def test_the_command_shows_a_path(run_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run_command("neurons", "--out", tmp_path, "--steps", 3)
    assert code == 0, err
    assert "chelsea.png: cat" in out and "layer integrated gradients" in out
    kept = json.loads((tmp_path / "chelsea-zoo-vit-path.json").read_text(encoding="utf-8"))
    path = at.neuron_path("zoo:vit", at.demo_image_path(), steps=3)
    assert kept["neurons"] == path.neurons.tolist()
    assert kept["edits"]["neuron_path"]["remove"] == pytest.approx(
        at.edited_probability("zoo:vit", at.demo_image_path(), path.neurons, path.target), abs=1e-6
    )
    with Image.open(tmp_path / "chelsea-zoo-vit-path.png") as picture:
        assert min(picture.size) > 400
    code, out, _ = run_command("neurons", "--out", tmp_path, "--steps", 3)
    assert code == 0 and "kept" in out
    code, out, _ = run_command("neurons", "--out", tmp_path, "--steps", 2)
    assert code == 0 and "kept" not in out, "other settings are another path"


def test_the_command_on_data(run_command: Run, folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "model.txt"
    saved.write_text("\n".join(NAMES), encoding="utf-8")
    arguments = ("--data", folder, "--model", "zoo:vit", "--steps", 2, "--samples", 6, "--kept", 1, "--paths", "neuron_path,activation")
    code, _, err = run_command("neurons", *arguments, "--out", tmp_path / "out")
    assert code == 2 and "red" in err, "the classes of the folder are not those of the model"
    photos = tmp_path / "photos"
    for name in ("cat", "dog"):
        (photos / name).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(photos / name / f"{index}.png")
    arguments = ("--data", photos, *arguments[2:])
    code, out, err = run_command("neurons", *arguments, "--out", tmp_path / "out")
    assert code == 0, err
    assert "own path of each of 6 images" in out and "report:" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "report.html",
        "changes.csv",
        "pruning.csv",
        "neurons.json",
        "records.jsonl",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "zoo:cnn"), "no MLP over tokens"),
        (("--mode", "fast"), "mode='fast'"),
        (("--target", "unicorn"), "no class 'unicorn'"),
        (("nowhere.png",), "no such file"),
        (("--data", "photos", "--kept", "a"), "--kept is 'a'"),
        (("photo.png", "--data", "photos"), "do not go with --data"),
        (("--data", "photos"), "no labels"),
    ],
)
def test_bad_commands_are_one_line(run_command: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run_command("neurons", *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert message in err and len(err.strip().splitlines()) == 1
