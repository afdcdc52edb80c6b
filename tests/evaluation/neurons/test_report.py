"""Neuron paths on a data set: kept, resumed, summed up and reported; and the command, for images and for data."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import attribution as at
from attribution.neurons import PathFinder, edited_probabilities, find_neurons, mean_activations
from evaluation.neurons import measure as runner
from evaluation.neurons.report import write_neuron_report
from evaluation.neurons.results import NeuronResults, relative
from evaluation.neurons.settings import NeuronSettings
from evaluation.neurons.study import NEURONS, run_neurons
from evaluation.neurons.summary import changed, summarise_neurons
from evaluation.study.records import RecordLog, read_log
from evaluation.study.run import held

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
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> NeuronResults:
    return run_neurons(settings(folder), tmp_path_factory.mktemp("run"))


def test_paths_are_those_of_each_image_on_its_own(results: NeuronResults) -> None:
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


def test_halves_replace_by_one_anothers_mean_and_judge_paths_of_the_other(results: NeuronResults) -> None:
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


def test_the_removal_path_lowers_the_target_most(results: NeuronResults) -> None:
    """By construction never less than the path of the largest contributions that it starts from; here than any other kind."""
    removed = {kind: changed(results, found, "own", "remove", "probability").mean() for kind, found in results.measured.items()}
    assert min(removed, key=lambda kind: removed[kind]) == "neuron_path_removal"
    assert removed["neuron_path_removal"] < removed["random"] < 0.05


def test_pruning_sweeps_every_combination(results: NeuronResults) -> None:
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


TABLES = ("changes.csv", "pruning.csv", "neurons.json", "report.html")


def written(results: NeuronResults, out: Path) -> dict[str, bytes]:
    write_neuron_report(summarise_neurons(results), out)
    return {name: (out / name).read_bytes() for name in TABLES}


def test_a_run_killed_at_any_record_ends_with_the_same_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after every fifth record, within batches too, until nothing is left; what is held meanwhile can be read or is refused."""
    chosen = settings(folder, paths=["neuron_path", "activation", "random"], shares=[0.5, 1.0], depths=[1, 3], steps=2)
    wanted = written(run_neurons(chosen, tmp_path / "whole"), tmp_path / "whole")
    append, left = RecordLog.append, 0

    def killed(self: RecordLog, key: str, record: dict[str, object]) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        append(self, key, record)

    monkeypatch.setattr(RecordLog, "append", killed)
    for _ in range(100):
        left = 5
        try:
            results = run_neurons(chosen, tmp_path / "cut")
            break
        except KeyboardInterrupt:
            continue
    assert len(read_log(tmp_path / "cut" / "records.jsonl")) == 3 * 18 + 9 + 3 + 2 * 2 * 2
    assert written(results, tmp_path / "cut") == wanted
    assert written(held(NEURONS, chosen, tmp_path / "cut"), tmp_path / "cut") == wanted
    lines = (tmp_path / "cut" / "records.jsonl").read_bytes().splitlines(keepends=True)
    for count, message in ((10, "holds 0 images"), (3 * 18 + 10, "does not hold them")):
        (tmp_path / "cut" / "records.jsonl").write_bytes(b"".join(lines[:count]))
        with pytest.raises(at.UserError, match=message):
            held(NEURONS, chosen, tmp_path / "cut")


@contextmanager
def forwarded(classifier: at.Classifier) -> Iterator[list[int]]:
    """Counts the images that pass the module, batch by batch."""
    counts: list[int] = []
    handle = classifier.module.register_forward_pre_hook(lambda _module, args: counts.append(len(args[0])))  # type: ignore[union-attr]
    yield counts
    handle.remove()


@pytest.fixture
def table(folder: Path, tmp_path: Path) -> Path:
    """The images in a folder of the test's own, with a list of paths and labels."""
    lines = ["path,label"]
    for path in sorted(folder.rglob("*.png")):
        name = f"{path.parent.name}-{path.name}"
        shutil.copy(path, tmp_path / name)
        lines.append(f"{name},{path.parent.name}")
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "list.csv"


def samples_of(records: dict[str, dict[str, object]]) -> list[object]:
    return [record["sample"] for record in records.values() if "sample" in record]


@pytest.mark.parametrize("target", ["label", "predicted"])
def test_replaced_pixels_and_corrected_labels_are_measured_again_and_nothing_else(table: Path, tmp_path: Path, target: str) -> None:
    model = colours()
    chosen = settings(table, model=model, target=target, paths=["neuron_path", "activation"], kept=[1], shares=[1.0], steps=2)
    run_neurons(chosen, tmp_path / "out")
    first = read_log(tmp_path / "out" / "records.jsonl")
    with forwarded(model) as counts:
        run_neurons(chosen, tmp_path / "out")
    with forwarded(model) as tried:
        find_neurons(model)
    assert counts == tried and read_log(tmp_path / "out" / "records.jsonl") == first, "nothing changed: only its layers are looked for"

    shutil.copy(tmp_path / "blue-5.png", tmp_path / "red-1.png")  # another image under the old name
    replaced = run_neurons(chosen, tmp_path / "out")
    second = read_log(tmp_path / "out" / "records.jsonl")
    assert samples_of({key: record for key, record in second.items() if key not in first}) == ["red-1.png"] * 2
    same_as(replaced, run_neurons(chosen, tmp_path / "anew"))

    table.write_text(table.read_text(encoding="utf-8").replace("red-1.png,red", "red-1.png,blue"), encoding="utf-8")
    corrected = run_neurons(chosen, tmp_path / "out")
    third = read_log(tmp_path / "out" / "records.jsonl")
    again = samples_of({key: record for key, record in third.items() if key not in second})
    assert again == (["red-1.png"] * 2 if target == "label" else [])
    same_as(corrected, run_neurons(chosen, tmp_path / "corrected"))
    assert sorted(corrected.labels.tolist()) == [0] * 7 + [1] * 6 + [2] * 5


def same_as(found: NeuronResults, wanted: NeuronResults) -> None:
    """Equal but for rounding, which depends on the batch."""
    for name in ("labels", "targets", "predicted", "selection"):
        assert getattr(found, name).tolist() == getattr(wanted, name).tolist()
    for kind, measured in wanted.measured.items():
        np.testing.assert_array_equal(found.measured[kind].neurons, measured.neurons)
        for edit in ("remove", "enhance", "mean"):
            np.testing.assert_allclose(found.measured[kind].probabilities[edit], measured.probabilities[edit], atol=1e-6)
            np.testing.assert_allclose(found.measured[kind].class_probabilities[edit], measured.class_probabilities[edit], atol=1e-6)
            np.testing.assert_array_equal(found.measured[kind].class_correct[edit], measured.class_correct[edit])
    for row, other in zip(found.pruned, wanted.pruned, strict=True):
        np.testing.assert_allclose(row.probabilities, other.probabilities, atol=1e-6)


def test_another_model_file_another_version_and_other_settings_are_measured_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {"paths": ["neuron_path"], "kept": [1], "shares": [1.0], "depths": [1], "steps": 2}
    run_neurons(settings(folder, **usual), tmp_path)
    count = len(read_log(tmp_path / "records.jsonl"))
    weights = run_neurons(settings(folder, **usual, model=colours(seed=1)), tmp_path)
    assert len(read_log(tmp_path / "records.jsonl")) == 2 * count, "the same name, other weights"
    alone = run_neurons(settings(folder, **usual, model=colours(seed=1)), tmp_path / "alone")
    np.testing.assert_array_equal(weights.measured["neuron_path"].scores, alone.measured["neuron_path"].scores)
    run_neurons(settings(folder, **{**usual, "steps": 3}), tmp_path)
    assert len(read_log(tmp_path / "records.jsonl")) == 3 * count
    monkeypatch.setattr("evaluation.study.identity.__version__", "9.9")
    run_neurons(settings(folder, **usual), tmp_path)
    assert len(read_log(tmp_path / "records.jsonl")) == 4 * count


def test_an_image_that_spoils_its_batch_fails_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(folder, paths=["neuron_path", "random"], kept=[1], shares=[1.0], steps=2)
    wanted = run_neurons(chosen, tmp_path / "whole")
    search, bad = PathFinder.search, wanted.inputs([4])[0]

    def spoilt(self: PathFinder, *args: object, **kwargs: object) -> object:
        if any(torch.equal(each, bad) for each in self.inputs):
            raise RuntimeError("out of memory")
        return search(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(PathFinder, "search", spoilt)
    found = run_neurons(chosen, tmp_path / "spoilt")
    others = [position for position in range(18) if position != 4]
    assert found.chosen == tuple(wanted.chosen[position] for position in others)
    assert found.failures == ((wanted.dataset.ids[wanted.chosen[4]], "RuntimeError: out of memory"),)
    for kind in ("neuron_path", "random"):
        np.testing.assert_array_equal(found.measured[kind].neurons, wanted.measured[kind].neurons[others])


@pytest.mark.slow
def test_several_processes_end_with_the_bytes_of_one(tmp_path: Path) -> None:
    photos = random_photos(tmp_path / "photos", 6)
    given = {"data": str(photos), "paths": ["neuron_path", "activation", "random"], "kept": [2], "depths": [4], "steps": 2}
    found = {
        workers: written(run_neurons(NeuronSettings.make({**given, "workers": workers}), tmp_path / str(workers)), tmp_path / str(workers))
        for workers in (1, 2)
    }
    assert found[2] == found[1]
    assert len(read_log(tmp_path / "2" / "records.jsonl")) == len(read_log(tmp_path / "1" / "records.jsonl"))


def random_photos(folder: Path, count: int) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def test_depths_beyond_the_model_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(at.UserError, match=r"depths are \[1, 4\]: expected 1 to 3 layers"):
        run_neurons(settings(folder, depths=[1, 4]), tmp_path)


def test_without_pruning_the_page_has_no_figure_of_it(folder: Path, tmp_path: Path) -> None:
    results = run_neurons(settings(folder, paths=["activation"], kept=[], steps=1), tmp_path)
    files = write_neuron_report(summarise_neurons(results), tmp_path)
    assert results.pruned == () and not any("pruning" in path.name for path in files.figures)


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


def test_the_tables_hold_what_was_measured(results: NeuronResults, tmp_path: Path) -> None:
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
        ({"paths": ["nonsense"]}, "paths is 'nonsense': expected one of neuron_path"),
        ({"paths": []}, "paths are none: expected different ones of neuron_path"),
        ({"paths": ["activation", "activation"]}, "paths are activation, activation: expected different"),
        ({"paths": ["activation", "random"]}, "random paths imitate"),
        ({"target": "truth"}, "target is 'truth': expected one of label, predicted"),
        ({"output": "odds"}, "output is 'odds': expected one of probability, logit"),
        ({"samples": 2}, "samples is 2: expected a whole number of at least 4"),
        ({"steps": 0}, "steps is 0: expected a whole number of at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"exemplars": -1}, "exemplars is -1: expected a whole number of at least 0"),
        ({"kept": [0]}, "kept is 0: expected a whole number of at least 1"),
        ({"kept": [True]}, "kept is True: expected a whole number of at least 1"),
        ({"shares": [2.0]}, "shares is 2.0: expected a number from 0 to 1"),
        ({"depths": [0]}, "depths is 0: expected a whole number of at least 1"),
        ({"enhance": -1}, "enhance is -1: expected a number of at least 0"),
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
    path = at.neuron_path(at.demo_image_path(), "zoo:vit", steps=3)
    assert kept["neurons"] == path.neurons.tolist()
    assert kept["edits"]["neuron_path"]["remove"] == pytest.approx(
        at.edited_probability(at.demo_image_path(), "zoo:vit", path.neurons, path.target), abs=1e-6
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
    photos = random_photos(tmp_path / "photos", 3)
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
    page = (tmp_path / "out" / "report.html").read_bytes()
    file = tmp_path / "settings.toml"
    file.write_text(f'data = {json.dumps(str(photos))}\nsteps = 2\nkept = [1]\npaths = ["neuron_path", "activation"]\n', encoding="utf-8")
    code, _, err = run_command("neurons", "--config", file, "--samples", 6, "--out", tmp_path / "out", "--no-measure")
    assert code == 0, err
    assert (tmp_path / "out" / "report.html").read_bytes() == page
    code, _, err = run_command("neurons", "photo.png", "--config", file)
    assert code == 2 and "do not go with --data" in err


def test_images_of_one_class_each_cannot_be_split(tmp_path: Path) -> None:
    names = ("airplane", "bird", "cat", "deer")
    for number, name in enumerate(names):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (SIDE, SIDE), (60 * number, 90, 120)).save(tmp_path / "data" / name / "0.png")
    chosen = settings(tmp_path / "data", model="zoo:vit", steps=1, kept=[1], paths=["activation"])
    with pytest.raises(at.UserError, match="each of 4 images has a class of its own: expected a class with two, to split"):
        run_neurons(chosen, tmp_path / "out")
    Image.new("RGB", (SIDE, SIDE), (0, 90, 0)).save(tmp_path / "data" / "cat" / "1.png")
    found = run_neurons(chosen, tmp_path / "out")
    assert len(found.chosen) == 5 and int((~found.selection).sum()) == 1
    write_neuron_report(summarise_neurons(found), tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "zoo:cnn"), "no MLP over tokens"),
        (("--mode", "fast"), "mode is 'fast'"),
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
