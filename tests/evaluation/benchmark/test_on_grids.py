"""Grids in a benchmark: the numbers of ``grid_localization``, kept, resumed and reported like every other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import attribution as at
import evaluation as ev
from evaluation.benchmark import on_grids as runner
from evaluation.benchmark.grid_report import aggregates, head_scores, sweep
from evaluation.benchmark.on_grids import load_map
from evaluation.benchmark.report import write_report
from evaluation.benchmark.summary import score_matrix
from evaluation.study.records import read_log

NAMES = ("blue", "green", "red", "white")
SIDE = 8
METHODS: list[Any] = [
    "saliency",
    "input_x_gradient",
    {"method": "input_x_gradient", "label": "smooth", "options": {"smoothing": 5}},
    {"method": "rise", "options": {"samples": 8, "grid": 2}},
    {"method": "bidirectional", "options": {"show": "first"}},
    "random",
]


class Colours(nn.Module):
    """Says which of four colours an image has: features at half the size, pooled, no head beyond."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 2, stride=2), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.ReLU())
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 4)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
            for channel, weights in enumerate([(-1, -1, 2), (-1, 2, -1), (2, -1, -1), (1, 1, 1)]):
                self.stem[0].weight[channel] += torch.tensor(weights)[:, None, None] / 4
                self.body[0].weight[channel, channel, 1, 1] += 1
                self.head.weight[channel, channel] += 20
            self.stem[0].bias[3] -= 1.5

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.body(self.stem(x))).flatten(1))


def colours(name: str = "colours") -> at.Classifier:
    return at.Classifier(Colours().eval(), size=SIDE, class_names=NAMES, scores="logits", name=name)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five images of each colour, one folder a class."""
    pure = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0), "white": (255, 255, 255)}
    generator = np.random.default_rng(0)
    for name, colour in pure.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(5):
            noise = generator.integers(-40, 40, (SIDE, SIDE, 3))
            pixels = np.clip(np.array(colour) * 0.8 + 20 + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


def settings(data: Path, **changes: Any) -> ev.BenchmarkSettings:
    plain: dict[str, Any] = {
        "data": str(data),
        "models": [colours()],
        "methods": METHODS,
        "metrics": ["gridpg", "difull", "dipart"],
        "layers": ["input", "final"],
        "grids": 3,
        "confidence": 0.9,
        "regions": "grid",
        "region_options": {"count": 16},
    }
    return ev.make_settings({**plain, **changes})


def test_every_number_is_that_of_grid_localization(data: Path, tmp_path: Path) -> None:
    chosen = settings(data)
    results = ev.run_benchmark(chosen, tmp_path / "out")
    grid_set, classifier = results.grid_set, colours()
    assert grid_set is not None
    assert len(grid_set) == 3
    assert len(results.scores) == 3 * len(METHODS) * 6
    dataset = ev.open_dataset(str(data), class_names=NAMES)
    grids = torch.stack([grid_set.image(dataset, index, classifier) for index in range(3)])
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "saliency": ("saliency", {}),
        "input_x_gradient": ("input_x_gradient", {}),
        "smooth": ("input_x_gradient", {"smoothing": 5}),
        "bidirectional": ("bidirectional", {"show": "first", "regions": "grid", "region_options": {"count": 16}}),
    }
    for measure, layer in chosen.measured_on_grids():
        for label, (method, options) in cases.items():
            found = ev.grid_localization(classifier, grids, grid_set.labels, 2, measure.metric, layer, method, **options)
            kept = [score for score in results.scores if (score.measure, score.method) == (measure, label)]
            assert [score.sample for score in kept] == ["grid 0001", "grid 0002", "grid 0003"]
            np.testing.assert_allclose([score.heads for score in kept], found, atol=1e-5)
            np.testing.assert_allclose([score.value for score in kept], found.mean(dim=1), atol=1e-5)
    assert results.grid_models["colours"]["layers"] == {"input": "the model input", "final": "body"}


def test_stored_maps_are_those_of_the_first_head(data: Path, tmp_path: Path) -> None:
    chosen = settings(data, methods=["saliency"], grids=2)
    results = ev.run_benchmark(chosen, tmp_path / "out")
    assert results.grid_set is not None
    dataset = ev.open_dataset(str(data), class_names=NAMES)
    grids = torch.stack([results.grid_set.image(dataset, index, colours()) for index in range(2)])
    for measure, layer in chosen.measured_on_grids():
        expected = ev.grid_maps(colours(), grids, results.grid_set.labels, 2, measure.metric, layer, "saliency")[:, 0]
        kept = [each for each in results.grid_maps if each.measure == measure]
        for each, values in zip(kept, expected, strict=True):
            np.testing.assert_allclose(load_map(each.path), values, atol=1e-3 * float(values.abs().max()))
        judged = aggregates(results, "colours", measure)["saliency"]
        np.testing.assert_allclose(judged.scores, ev.localization_scores(expected, [0, 0], 2, (2 * SIDE, 2 * SIDE)), atol=2e-3)


def test_nothing_is_measured_twice(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ev.run_benchmark(settings(data), tmp_path / "out")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in ("records.jsonl", "grids.json")}
    monkeypatch.setattr(runner, "head_map", lambda *_a, **_k: pytest.fail("explained again"))
    again = ev.run_benchmark(settings(data), tmp_path / "out")
    assert again.scores == first.scores
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    fewer = ev.run_benchmark(settings(data, layers=["final"], metrics=["difull"]), tmp_path / "out")
    assert {(s.sample, s.method, s.value) for s in fewer.scores} <= {(s.sample, s.method, s.value) for s in first.scores}


def test_an_interrupted_run_ends_with_the_same_tables(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(data, methods=METHODS[:3])
    whole = ev.run_benchmark(chosen, tmp_path / "whole")
    head_map, left = runner.head_map, [0]

    def stopping(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return head_map(*args, **options)

    monkeypatch.setattr(runner, "head_map", stopping)
    for after in (1, 37, 100):
        left[0] = after
        with pytest.raises(KeyboardInterrupt):
            ev.run_benchmark(chosen, tmp_path / "out")
    left[0] = 10**9
    resumed = ev.run_benchmark(chosen, tmp_path / "out")
    assert resumed.scores == whole.scores
    assert ev.summary_csv(ev.summarise(resumed)) == ev.summary_csv(ev.summarise(whole))
    assert not list((tmp_path / "out").rglob("*.tmp*"))


def scored(out: Path) -> int:
    """How many scores of grids the folder holds."""
    return sum("heads" in record for record in read_log(out / "records.jsonl").values())


def test_more_grids_keep_the_first(data: Path, tmp_path: Path) -> None:
    few = ev.run_benchmark(settings(data, grids=2, methods=["saliency"]), tmp_path / "out")
    records = scored(tmp_path / "out")
    more = ev.run_benchmark(settings(data, grids=3, methods=["saliency"]), tmp_path / "out")
    assert {(s.sample, s.measure, s.value) for s in few.scores} < {(s.sample, s.measure, s.value) for s in more.scores}
    assert scored(tmp_path / "out") == records * 3 // 2


def test_images_and_grids_in_one_run(data: Path, tmp_path: Path) -> None:
    """Each measure is averaged over what it judges."""
    results = ev.run_benchmark(settings(data, metrics=["insertion", "difull"], samples=4, methods=["saliency", "random"]), tmp_path / "out")
    summary = ev.summarise(results)
    units = {measure.metric: len(results.units("colours", measure)) for measure in summary.measures}
    assert units == {"insertion": 4, "difull": 3}
    for measure in summary.measures:
        assert score_matrix(results, "colours", measure)["saliency"].shape == (units[measure.metric],)
        for entry in summary.column("colours", measure):
            assert (entry.validity.total, entry.validity.failed) == (units[measure.metric], 0)
    files = write_report(summary, tmp_path / "out")
    page = files.html.read_text(encoding="utf-8")
    assert "4 images, 3 grids" in page
    for section in ("curves", "grids", "aggregates", "gallery"):
        assert f'<h2 id="{section}">' in page


def test_a_model_with_scores_of_grids_alone_has_no_gallery(data: Path, tmp_path: Path) -> None:
    """Curves under dropped tokens are no measure of a CNN; its grids are still reported."""
    chosen = settings(data, metrics=["insertion", "gridpg"], fills=["drop"], samples=2, methods=["saliency", "random"], layers=["final"])
    results = ev.run_benchmark(chosen, tmp_path / "out")
    assert {score.measure.metric for score in results.scores} == {"gridpg"} and not results.failed
    page = write_report(ev.summarise(results), tmp_path / "out").html.read_text(encoding="utf-8")
    assert "insertion (regions, drop, p)" in page and "Chosen by rule" not in page and '<h2 id="grids">' in page


def test_models_share_grids_of_images_that_all_get_right(data: Path, tmp_path: Path) -> None:
    class Doubtful(Colours):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return torch.where(x.mean(dim=(1, 2, 3))[:, None] > 0.8, logits / 100, logits)  # of light white images it is not sure

    doubtful = at.Classifier(Doubtful().eval(), size=SIDE, class_names=NAMES, scores="logits", name="doubtful")
    alone = ev.run_benchmark(settings(data, models=[colours()], methods=["saliency"], grids=5), tmp_path / "alone").grid_set
    assert alone is not None
    assert (alone.kept, len(alone)) == (20, 5)
    with pytest.raises(at.UserError, match=r"0 can be made.*white 0, blue 5"):
        ev.run_benchmark(settings(data, models=[colours(), doubtful], methods=["saliency"]), tmp_path / "both")
    other = at.Classifier(Colours().eval(), size=SIDE, class_names=("a", "b", "c", "d"), scores="logits", name="other")
    with pytest.raises(at.UserError, match="other has other classes than colours"):
        ev.run_benchmark(settings(data, models=[colours(), other], methods=["saliency"]), tmp_path / "other")


def test_what_is_not_defined_is_refused_once(data: Path, tmp_path: Path) -> None:
    results = ev.run_benchmark(settings(data, methods=["saliency", "attention_rollout"], layers=["input", "body"]), tmp_path / "out")
    assert not results.failed
    assert {f.method for f in results.failures} == {"attention_rollout"}
    assert len(results.failures) == len({f.reason for f in results.failures})
    assert {score.method for score in results.scores} == {"saliency"}

    bypassed = settings(data, methods=["saliency"], layers=["final", "nowhere"])
    with pytest.raises(at.UserError, match="nowhere"):
        ev.run_benchmark(bypassed, tmp_path / "out2")


def test_a_method_that_breaks_costs_its_own_scores_only(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head_map = runner.head_map

    def broken(view: Any, setting: str, cell: int, classes: Any, spec: Any, seed: int = 0) -> Any:
        if spec.method == "saliency" and setting == "difull":
            raise RuntimeError("out of memory")
        return head_map(view, setting, cell, classes, spec, seed)

    monkeypatch.setattr(runner, "head_map", broken)
    results = ev.run_benchmark(settings(data, methods=["saliency", "random"], layers=["final"]), tmp_path / "out")
    assert {(f.method, f.reason) for f in results.failed} == {("saliency", "difull (final, 2x2): RuntimeError: out of memory")}
    assert len(results.scores) == 3 * (2 + 3)
    entry = next(e for e in ev.summarise(results).entries if (e.method, e.measure.metric) == ("saliency", "gridpg"))
    assert entry.validity.finite == 3


def test_an_image_lost_after_the_draw_costs_its_grid_only(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = ev.GridSet.image

    def lost(grid_set: ev.GridSet, dataset: Any, index: int, classifier: Any) -> Tensor:
        if index == 1:
            raise at.UserError("not an image")
        return image(grid_set, dataset, index, classifier)

    monkeypatch.setattr(ev.GridSet, "image", lost)
    results = ev.run_benchmark(settings(data, methods=["random"], layers=["final"], metrics=["difull"]), tmp_path / "out")
    assert [score.sample for score in results.scores] == ["grid 0001", "grid 0003"]
    assert [(failure.sample, failure.reason) for failure in results.failed] == [("grid 0002", "not an image")]


def test_an_image_that_cannot_be_read_any_more_is_in_no_grid(data: Path, tmp_path: Path) -> None:
    chosen = settings(data, methods=["random"], layers=["final"], metrics=["difull"])
    first = ev.run_benchmark(chosen, tmp_path / "out").grid_set
    assert first is not None
    lost = first.ids[1][2]
    (data / lost).write_bytes(b"no image")
    again = ev.run_benchmark(chosen, tmp_path / "out")
    assert again.grid_set is not None and len(again.grid_set) == 3
    assert lost not in {name for row in again.grid_set.ids for name in row}
    assert [name for name, _ in again.grid_set.failures] == [lost] and again.failures == ()


def test_other_pixels_are_judged_and_drawn_anew_and_the_same_are_not(data: Path, tmp_path: Path) -> None:
    forwarded = 0

    def count(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal forwarded
        forwarded += len(args[0])

    def run(out: str) -> ev.Results:
        classifier = colours()
        classifier.module.register_forward_pre_hook(count)  # type: ignore[union-attr]
        return ev.run_benchmark(settings(data, models=[classifier], methods=["saliency"]), tmp_path / out)

    first = run("out")
    forwarded, before = 0, forwarded
    again = run("out")
    assert again.scores == first.scores
    probes = colours()
    probes.module.register_forward_pre_hook(count)  # type: ignore[union-attr]
    forwarded, resumed = 0, forwarded
    for layer in ("input", "final"):
        model = ev.GridModel(probes, 2, layer)
        for setting in ("gridpg", "difull", "dipart"):
            model.require(setting)
    assert resumed == forwarded < before - 20  # what GridModel tries out is no image of the data
    assert first.grid_set is not None
    for number in range(5):  # what was green is red, under the same names
        Image.open(data / "red" / f"{number}.png").save(data / "green" / f"{number}.png")
    with pytest.raises(at.UserError, match="green 0"):
        run("out")
    for number in range(5):
        Image.fromarray(np.full((SIDE, SIDE, 3), (20 * number, 255, 0), np.uint8)).save(data / "green" / f"{number}.png")
    second = run("out")
    assert second.scores == run("fresh").scores and second.scores != first.scores


def test_report_of_grids_alone(data: Path, tmp_path: Path) -> None:
    methods = [*METHODS[:3], {"method": "input_x_gradient", "label": "smoother", "options": {"smoothing": 9}}, METHODS[4]]
    summary = ev.summarise(ev.run_benchmark(settings(data, methods=methods, layers=["final"]), tmp_path / "out"))
    files = write_report(summary, tmp_path / "out", "Grids")
    page = files.html.read_text(encoding="utf-8")
    for text in ("DiPart", "chance level 0.25", "final = body", "3 grids of 2 x 2 images", "Smoothing"):
        assert text in page, text
    for section in ("curves", "scores", "gallery", "sensitivity"):
        assert f'<h2 id="{section}">' not in page
    names = {path.stem.removeprefix("1-colours-") for path in files.figures}
    for setting in ("gridpg", "difull", "dipart"):
        assert {f"{setting}-boxes", f"{setting}-final-aggregates", f"{setting}-final-smoothing"} <= names
        assert any(name.startswith(f"{setting}-final-examples") for name in names)
    assert json.loads(files.json.read_text())["grids"] == {"count": 3, "chance": 0.25, "file": "grids.json"}
    measure = summary.measures[0]
    kernels, mean, low, high = sweep(summary.results, "colours", measure)["input_x_gradient"]
    assert kernels == [1, 5, 9]
    by_label = score_matrix(summary.results, "colours", measure)
    np.testing.assert_allclose(mean, [by_label[label].mean() for label in ("input_x_gradient", "smooth", "smoother")])
    assert (low <= mean).all()
    assert (mean <= high).all()
    assert head_scores(summary.results, "colours", measure)["saliency"].shape == (3 * 4,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ["final", "final"]}, "the layer 'final' was named twice among final, final"),
        ({"layers": []}, "layers is empty"),
        ({"cells": 1}, "cells is 1: expected a whole number of at least 2"),
        ({"grids": 0}, "grids is 0: expected a whole number of at least 1"),
        ({"confidence": 0}, "confidence is 0: expected a probability above 0"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        settings(tmp_path, **changes)


def test_command(data: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]) -> None:
    """The zoo knows none of these classes as the folder names them, so no grid can be made; the reason says so."""
    arguments = [
        "benchmark",
        "--data",
        data,
        "-m",
        "zoo:cnn",
        "--metrics",
        "gridpg,difull",
        "--layers",
        "input,final",
        "--out",
        tmp_path / "out",
    ]
    code, _, error = run_command(*arguments)
    assert code == 2
    assert len(error.strip().splitlines()) == 1
    code, output, _ = run_command("benchmark", "--list")
    assert code == 0
    for name in ("gridpg", "difull", "dipart"):
        assert name in output


@pytest.fixture
def guessed(tmp_path: Path, cnn: at.Classifier) -> Path:
    """Smooth random images in folders by what zoo:cnn takes them for, at least one in each of four or more."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(80, 3, 3, 3, generator=generator)
    images = (nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    inputs = cnn.preprocessing(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    for number, (image, label) in enumerate(zip(images, cnn.logits(inputs).argmax(dim=1).tolist(), strict=True)):
        folder = tmp_path / "guessed" / cnn.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    return tmp_path / "guessed"


@pytest.mark.slow
def test_workers_change_no_number(guessed: Path, tmp_path: Path) -> None:
    """Two processes, one of them stopped halfway in an earlier run, end with the tables and pages of one."""
    plain = {"models": ["zoo:cnn"], "methods": ["saliency", "random", "lrp"], "metrics": ["gridpg", "difull", "insertion"]}
    chosen = {"data": str(guessed), "confidence": 0.05, "grids": 3, "samples": 4, "layers": ["final"], "device": "cpu", **plain}
    one = ev.run_benchmark(ev.make_settings(chosen), tmp_path / "one")
    (tmp_path / "two").mkdir()
    lines = (tmp_path / "one" / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two" / "records-1.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    seen: list[tuple[int, int]] = []
    two = ev.run_benchmark(ev.make_settings({**chosen, "workers": 2}), tmp_path / "two", lambda done, total, _: seen.append((done, total)))
    assert two.scores == one.scores and two.failures == one.failures
    assert set(read_log(tmp_path / "two" / "records.jsonl")) == set(read_log(tmp_path / "one" / "records.jsonl"))
    assert not list((tmp_path / "two").glob("records-*.jsonl"))
    assert seen[-1][0] == seen[-1][1]
    assert all(done <= total for done, total in seen if total)
    for results in (one, two):
        write_report(ev.summarise(results), results.out)
    for name in ("summary.csv", "comparisons.csv", "summary.json", "report.html", "grids.json"):
        assert (one.out / name).read_bytes() == (two.out / name).read_bytes(), name


def test_workers_need_models_that_other_processes_can_have(data: Path, tmp_path: Path) -> None:
    classifier = colours()
    classifier.module.here = lambda: None  # type: ignore[union-attr,assignment]
    with pytest.raises(at.UserError, match="give models by name, or workers = 1"):
        ev.run_benchmark(settings(data, models=[classifier], workers=2), tmp_path / "out")
