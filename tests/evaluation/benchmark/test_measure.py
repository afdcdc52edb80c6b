"""The runner: what it measures, and that nothing is lost, doubled or invented when it is stopped, starved or given rubbish."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from toys import SIDE, SometimesNaN, image_folder, linear_classifier

import attribution as at
import evaluation as ev
from evaluation.benchmark import on_images as benchmark
from evaluation.benchmark.summary import score_matrix
from evaluation.study.records import RecordLog, read_log

METHODS = ["bidirectional", "input_x_gradient", "saliency", {"method": "rise", "options": {"samples": 20, "grid": 3}}, "random", "constant"]


def settings(data: Path, **changes: Any) -> ev.BenchmarkSettings:
    plain: dict[str, Any] = {
        "data": str(data),
        "models": [linear_classifier()],
        "methods": METHODS,
        "regions": "grid",
        "region_options": {"count": 16},
        "output": "logit",
        "target": "predicted",
    }
    return ev.make_settings({**plain, **changes})


def numbers(results: ev.Results) -> dict[tuple, float]:
    return {(s.model, s.sample, s.method, s.seed, s.measure.label): s.value for s in results.scores}


def test_every_number_is_the_metric_of_the_explanation(tmp_path: Path) -> None:
    """Against the evaluators called by hand on an explanation made by hand."""
    chosen = settings(image_folder(tmp_path / "data", 2), fills=["black", "mean"], steps=["regions", "pixels"], pixel_steps=8)
    results = ev.run_benchmark(chosen, tmp_path / "out")
    found = numbers(results)
    assert len(found) == len(results.scores) == 2 * len(METHODS) * (7 * 4 + 2)
    classifier = linear_classifier()
    for sample in results.samples["linear"]:
        image = at.load_image(tmp_path / "data" / sample)
        regions = at.make_regions(image, "grid", count=16)
        target = int(classifier.logits(classifier.inputs(image))[0].argmax())
        explanations = {
            "bidirectional": at.explain(image, classifier, target, regions=regions),
            "input_x_gradient": at.attribute(image, classifier, "input_x_gradient", target, fill="black"),
            "rise": at.attribute(
                image, classifier, "rise", target, fill="black", seed=benchmark.sample_seed(0, sample), samples=20, grid=3
            ),
        }
        for method, explanation in explanations.items():
            for protocol in chosen.protocols:
                curves = ev.perturbation_curves(image, classifier, explanation, target, protocol, regions=regions)
                where = ("linear", sample, method, 0)
                assert found[*where, f"insertion ({protocol.label()})"] == pytest.approx(curves.insertion_auc, abs=1e-6)
                assert found[*where, f"deletion ({protocol.label()})"] == pytest.approx(curves.deletion_auc, abs=1e-6)
                expected, area = curves.highest_confidence(0.5)
                assert found[*where, f"highest_confidence_50 ({protocol.label()})"] == pytest.approx(expected, abs=1e-6)
                score = next(
                    s
                    for s in results.scores
                    if (s.sample, s.method, s.measure.metric, s.measure.protocol)
                    == (sample, method, "highest_confidence_50", protocol.label())
                )
                assert score.area == pytest.approx(area, abs=1e-6)
            faithful = ev.mu_fidelity(image, classifier, explanation, target, output="logit")
            assert found[*where, "mu_fidelity (fill black)"] == pytest.approx(faithful, abs=1e-6)


def test_metrics_without_a_curve_are_measured_under_the_fill_that_they_state(tmp_path: Path) -> None:
    """In one folder each fill has numbers of its own; a fill that a metric cannot use is refused once, with the reason."""
    data = image_folder(tmp_path / "data", 1)
    chosen = {fill: settings(data, metrics=["mu_fidelity"], fills=[fill], method_fill="black") for fill in ("black", "blur", "linear")}
    found = {fill: ev.run_benchmark(each, tmp_path / "out") for fill, each in chosen.items()}
    for fill in ("black", "blur"):
        assert {score.measure.label for score in found[fill].scores} == {f"mu_fidelity (fill {fill})"}
        assert numbers(found[fill]) == numbers(ev.run_benchmark(chosen[fill], tmp_path / fill))
    first, second = ([score.value for score in found[fill].scores] for fill in ("black", "blur"))
    assert first != second
    assert found["linear"].scores == ()
    (failure,) = found["linear"].failures
    assert failure.refused and failure.method == "mu_fidelity (fill linear)" and "mu_fidelity cannot hide pixels by fill" in failure.reason


def test_the_true_order_of_a_linear_model_leads(tmp_path: Path) -> None:
    results = ev.run_benchmark(settings(image_folder(tmp_path / "data", 12)), tmp_path / "out")
    measure = next(m for m, _ in results.settings.measured() if m.metric == "insertion_deletion")
    scores = score_matrix(results, "linear", measure)
    for rival in ("saliency", "rise", "random", "constant"):
        assert (scores["input_x_gradient"] >= scores[rival] - 1e-5).all(), rival
    assert scores["input_x_gradient"].mean() == pytest.approx(scores["bidirectional"].mean(), rel=0.05)


def test_nothing_is_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(image_folder(tmp_path / "data", 2))
    first = ev.run_benchmark(chosen, tmp_path / "out")
    before = (tmp_path / "out" / "records.jsonl").read_bytes()
    for name in ("attribute", "explain"):
        monkeypatch.setattr(benchmark, name, lambda *_a, **_k: pytest.fail("explained again"))
    monkeypatch.setattr(benchmark, "attempted", lambda _: pytest.fail("measured again"))
    again = ev.run_benchmark(chosen, tmp_path / "out")
    assert again.scores == first.scores
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == before


def test_new_metrics_judge_the_stored_explanations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = image_folder(tmp_path / "data", 2)
    ev.run_benchmark(settings(data, metrics=["insertion"]), tmp_path / "out")
    for name in ("attribute", "explain"):
        monkeypatch.setattr(benchmark, name, lambda *_a, **_k: pytest.fail("explained again"))
    more = ev.run_benchmark(settings(data, metrics=["insertion", "mu_fidelity", "deletion"], fills=["black", "blur"]), tmp_path / "out")
    assert {score.measure.metric for score in more.scores} == {"insertion", "mu_fidelity", "deletion"}
    assert len(more.scores) == 2 * len(METHODS) * (2 * 2 + 1)


@pytest.mark.parametrize(
    "change",
    [
        {"methods": [{"method": "rise", "options": {"samples": 21, "grid": 3}}]},
        {"seed": 1},
        {"method_fill": "blur"},
        {"region_options": {"count": 9}},
    ],
    ids=["option", "seed", "fill", "regions"],
)
def test_what_a_number_depends_on_makes_it_a_new_one(tmp_path: Path, change: dict[str, Any]) -> None:
    data = image_folder(tmp_path / "data", 1)
    base = settings(data, methods=[{"method": "rise", "options": {"samples": 20, "grid": 3}}], metrics=["insertion", "mu_fidelity"])
    ev.run_benchmark(base, tmp_path / "out")
    count = len(read_log(tmp_path / "out" / "records.jsonl"))
    results = ev.run_benchmark(settings(data, **{"methods": base.methods, "metrics": base.metrics, **change}), tmp_path / "out")
    assert len(read_log(tmp_path / "out" / "records.jsonl")) > count
    fresh = ev.run_benchmark(results.settings, tmp_path / "fresh")
    assert numbers(fresh) == numbers(results)


def test_another_precision_is_measured_anew_and_named(tmp_path: Path) -> None:
    """Models made by name take the precision. Its figures differ a little, and no stored figure of another precision is taken for them."""
    data = image_folder(tmp_path / "data", 1, side=32)
    given = {"models": ["zoo:cnn"], "methods": ["grad_cam"], "metrics": ["insertion"], "output": "probability"}
    exact = ev.run_benchmark(settings(data, **given), tmp_path / "out")
    lower = ev.run_benchmark(settings(data, **given, precision="bfloat16"), tmp_path / "out")
    (one,), (other,) = (numbers(results).values() for results in (exact, lower))
    assert 0 < abs(one - other) < 0.05
    assert at.Explanation.load(lower.explained[0].path).provenance["precision"] == "bfloat16"
    assert lower.settings.plain()["precision"] == "bfloat16"
    with pytest.raises(at.UserError, match=r"precision 'bfloat' .*did you mean bfloat16|precision is 'bfloat'"):
        settings(data, **given, precision="bfloat")


def test_changed_pixels_under_the_same_name_are_measured_anew(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", 1)
    first = ev.run_benchmark(settings(data), tmp_path / "out")
    Image.fromarray(np.full((SIDE, SIDE, 3), 90, np.uint8)).save(data / "0.png")
    second = ev.run_benchmark(settings(data), tmp_path / "out")
    assert numbers(second) == numbers(ev.run_benchmark(settings(data), tmp_path / "fresh"))
    assert numbers(second) != numbers(first)


def test_unchanged_images_are_predicted_and_nothing_else(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", 3)
    forwarded = 0

    def count(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal forwarded
        forwarded += len(args[0])

    def run() -> ev.Results:
        classifier = linear_classifier()
        classifier.logits(classifier.inputs(data / "0.png"))  # the first call finds out about the module
        classifier.module.register_forward_pre_hook(count)  # type: ignore[union-attr]
        return ev.run_benchmark(settings(data, models=[classifier]), tmp_path / "out")

    first = run()
    assert forwarded > 100
    forwarded = 0
    assert numbers(run()) == numbers(first)
    assert forwarded == 3
    Image.fromarray(np.full((SIDE, SIDE, 3), 90, np.uint8)).save(data / "1.png")
    forwarded = 0
    run()
    assert forwarded > 100 / 3


def explained(out: Path) -> int:
    """How many explanations the folder holds."""
    return sum("evaluations" in record for record in read_log(out / "records.jsonl").values())


def test_corrected_labels_are_explained_anew(tmp_path: Path) -> None:
    data, table = image_folder(tmp_path / "data", 2), tmp_path / "list.csv"

    def judged(first: str, out: str) -> ev.Results:
        table.write_text(f"path,label\n{data.name}/0.png,{first}\n{data.name}/1.png,yes\n")
        return ev.run_benchmark(settings(table, methods=["saliency"], metrics=["insertion"], target="label"), tmp_path / out)

    wrong = judged("no", "out")
    mended = judged("yes", "out")
    assert explained(tmp_path / "out") == 3
    assert [(e.target, e.label) for e in mended.explained] == [(0, 0)] * 2
    assert numbers(mended) == numbers(judged("yes", "fresh")) != numbers(wrong)


def test_another_model_and_another_version_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = image_folder(tmp_path / "data", 2)

    def judged(seed: int, out: str) -> ev.Results:
        return ev.run_benchmark(
            settings(data, models=[linear_classifier(seed)], methods=["saliency"], metrics=["insertion"]), tmp_path / out
        )

    first, other = judged(0, "out"), judged(1, "out")
    assert numbers(other) == numbers(judged(1, "fresh")) != numbers(first)
    assert explained(tmp_path / "out") == 4
    monkeypatch.setattr("evaluation.study.identity.__version__", "99.0")
    assert numbers(judged(0, "out")) == numbers(first)
    assert explained(tmp_path / "out") == 6


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def test_killed_at_any_record_it_ends_with_the_same_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(image_folder(tmp_path / "data", 2), metrics=["insertion", "mu_fidelity"])
    whole = ev.summary_csv(ev.summarise(ev.run_benchmark(chosen, tmp_path / "whole")))
    append = RecordLog.append
    generator = random.Random(0)
    for attempt in range(6):
        out = tmp_path / f"out{attempt}"
        kills = 0
        while True:
            budget = [generator.randrange(1, 12)]

            def dying(log: RecordLog, key: str, record: dict, budget: list[int] = budget) -> None:
                budget[0] -= 1
                if budget[0] < 0:
                    line = json.dumps({"key": key, **record}).encode()
                    log._file.seek(0, 2)
                    log._file.write(line[: generator.randrange(len(line))])  # the line that was being written
                    raise Killed
                append(log, key, record)

            monkeypatch.setattr(RecordLog, "append", dying)
            try:
                results = ev.run_benchmark(chosen, out)
                break
            except Killed:
                kills += 1
        assert kills >= 2
        assert ev.summary_csv(ev.summarise(results)) == whole
        keys = [json.loads(line)["key"] for line in (out / "records.jsonl").read_text().splitlines()]
        assert len(keys) == len(set(keys)) == len(read_log(tmp_path / "whole" / "records.jsonl"))


def command(data: Path, out: Path) -> list[str]:
    options = [
        "--model",
        "zoo:cnn",
        "--methods",
        "grad_cam,saliency,rise,random",
        "--regions",
        "grid",
        "--region-count",
        "9",
        "--metrics",
        "insertion,mu_fidelity",
    ]
    return [sys.executable, "-m", "vision_attribution", "benchmark", "--data", str(data), *options, "--out", str(out)]


def run_killed(data: Path, out: Path, delays: list[float]) -> int:
    """Start the command and kill it that many seconds after its first record, each time."""
    killed = 0
    for delay in delays:
        size = (out / "records.jsonl").stat().st_size if (out / "records.jsonl").exists() else 0
        process = subprocess.Popen(command(data, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not ((out / "records.jsonl").exists() and (out / "records.jsonl").stat().st_size > size):
            time.sleep(0.02)
        time.sleep(delay)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    return killed


@pytest.mark.slow
def test_sigkill_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", 12, side=32)
    subprocess.run(command(data, tmp_path / "whole"), check=True, stdout=subprocess.DEVNULL)
    generator = random.Random(1)
    assert run_killed(data, tmp_path / "out", [generator.uniform(0, 0.6) for _ in range(5)]) >= 3
    subprocess.run(command(data, tmp_path / "out"), check=True, stdout=subprocess.DEVNULL)
    for name in ("summary.csv", "summary.json", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    keys = [json.loads(line)["key"] for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys))
    leftovers = [path for path in (tmp_path / "out").rglob(".*") if path.is_file()]
    assert len(leftovers) <= 5  # at most the file that each kill caught half-written


def test_a_full_disk_stops_the_run_and_room_continues_it(tmp_path: Path) -> None:
    chosen = settings(image_folder(tmp_path / "data", 2), metrics=["insertion", "mu_fidelity"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, before[1]))
    try:
        with pytest.raises(at.UserError, match=r"cannot write .*(make room|free some space)"):
            ev.run_benchmark(chosen, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert all(path.name[0] != "." for path in (tmp_path / "out").rglob("*"))  # no half-written file stays
    results = ev.run_benchmark(chosen, tmp_path / "out")
    assert numbers(results) == numbers(ev.run_benchmark(chosen, tmp_path / "whole"))
    assert results.failures == ()


def test_a_corrupt_image_is_recorded_and_the_others_count(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", 3)
    (data / "1.png").write_bytes((data / "1.png").read_bytes()[:60])
    (data / "3.png").write_bytes(b"no image at all")
    results = ev.run_benchmark(settings(data), tmp_path / "out")
    assert {score.sample for score in results.scores} == {"0.png", "2.png"}
    assert {(f.sample, f.method) for f in results.failed} == {(s, m.label) for s in ("1.png", "3.png") for m in results.settings.methods}
    assert any("damaged image" in f.reason for f in results.failed) and any("not an image" in f.reason for f in results.failed)
    records = read_log(tmp_path / "out" / "records.jsonl")
    again = ev.run_benchmark(settings(data), tmp_path / "out")
    assert read_log(tmp_path / "out" / "records.jsonl") == records  # a known failure is not written again
    entry = ev.summarise(again).column("linear", again.settings.measured()[0][0])[0]
    assert (entry.validity.total, entry.validity.finite, entry.validity.failed, entry.interval.count) == (4, 2, 2, 2)
    image_folder(data, 4)  # mended: measured now, and the tables are those of a fresh run
    mended = ev.run_benchmark(settings(data), tmp_path / "out")
    assert mended.failures == ()
    assert numbers(mended) == numbers(ev.run_benchmark(settings(data), tmp_path / "fresh"))


def test_a_model_that_returns_nan_for_an_image_fails_there_only(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", 2)
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[..., 0] = 255
    Image.fromarray(pixels).save(data / "2.png")
    results = ev.run_benchmark(settings(data, models=[linear_classifier(module=SometimesNaN)]), tmp_path / "out")
    assert {f.sample for f in results.failed} == {"2.png"}
    assert all("nan" in f.reason for f in results.failed)
    assert {score.sample for score in results.scores} == {"0.png", "1.png"}


def test_a_method_that_breaks_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = benchmark.attribute

    def broken(image: Any, classifier: Any, method: str, *args: Any, **options: Any) -> at.Explanation:
        explanation = original(image, classifier, method, *args, **options)
        if method == "saliency":
            explanation.pixel_map[0, 0] = torch.nan
        if method == "rise":
            raise RuntimeError("out of memory\nsecond line")
        return explanation

    monkeypatch.setattr(benchmark, "attribute", broken)
    results = ev.run_benchmark(settings(image_folder(tmp_path / "data", 1)), tmp_path / "out")
    reasons = {f.method: f.reason for f in results.failed}
    assert reasons == {"saliency": "1 values of the map are not finite", "rise": "RuntimeError: out of memory"}
    assert {score.method for score in results.scores} == {"bidirectional", "input_x_gradient", "random", "constant"}


def test_a_refused_method_is_named_once_and_is_no_failure(tmp_path: Path) -> None:
    chosen = settings(image_folder(tmp_path / "data", 3), methods=["attention_rollout", "saliency"])
    results = ev.run_benchmark(chosen, tmp_path / "out")
    assert results.failed == ()
    assert [(f.method, f.sample) for f in results.failures] == [("attention_rollout", "")]
    assert ev.summarise(results).refused[0].reason.startswith("attention_rollout does not apply to linear")


def test_a_bug_of_ours_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "attribute", lambda *_a, **_k: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        ev.run_benchmark(settings(image_folder(tmp_path / "data", 1), methods=["saliency"]), tmp_path / "out")


def test_samples_targets_and_filters(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", 8)
    classifier = linear_classifier()
    predicted = {f"{i}.png": int(classifier.logits(classifier.inputs(data / f"{i}.png"))[0].argmax()) for i in range(8)}
    rows = [f"{data.name}/{name},{'yes' if index < 4 else 'no'}" for index, name in enumerate(predicted)]
    table = tmp_path / "list.csv"
    table.write_text("path,label\n" + "\n".join(rows) + "\n")
    right = {f"{data.name}/{name}" for index, name in enumerate(predicted) if predicted[name] == (0 if index < 4 else 1)}

    def judged(**changes: Any) -> ev.Results:
        return ev.run_benchmark(settings(table, methods=["random"], metrics=["insertion"], **changes), tmp_path / "out")

    assert set(judged(only="correct").samples["linear"]) == right
    assert set(judged(only="wrong").samples["linear"]) == {row.split(",")[0] for row in rows} - right
    five, three = judged(samples=5).samples["linear"], judged(samples=3).samples["linear"]
    assert five[:3] == three and len(five) == 5
    labelled = {e.sample: e.target for e in judged(target="label").explained}
    assert labelled == {row.split(",")[0]: 0 if row.endswith("yes") else 1 for row in rows}
    with pytest.raises(at.UserError, match="labels"):
        ev.run_benchmark(settings(data, only="correct"), tmp_path / "out")


def test_masks_are_needed_by_pointing_games_only(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", 2)
    table = tmp_path / "list.csv"
    table.write_text(f"path,label,x0,y0,x1,y1\n{data.name}/0.png,yes,0,0,4,8\n{data.name}/1.png,yes,0,0,8,8\n")
    chosen = settings(table, metrics=["pointing_game", "energy_pointing_game"], methods=["center_prior"])
    results = ev.run_benchmark(chosen, tmp_path / "out")
    found = {(s.sample[-5:], s.measure.metric): s.value for s in results.scores}
    assert found["0.png", "energy_pointing_game"] == pytest.approx(0.5)
    assert found["1.png", "energy_pointing_game"] == found["1.png", "pointing_game"] == 1
    without = ev.run_benchmark(settings(data, metrics=["pointing_game", "insertion"], methods=["random"]), tmp_path / "out2")
    assert {s.measure.metric for s in without.scores} == {"insertion"}
    assert all("mask or box" in f.reason for f in without.failed)


def test_metrics_do_not_depend_on_which_others_are_asked(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", 1)
    together = numbers(ev.run_benchmark(settings(data), tmp_path / "a"))
    for name in ("deletion", "road", "mu_fidelity", "highest_confidence_25"):
        alone = numbers(ev.run_benchmark(settings(data, metrics=[name]), tmp_path / f"b-{name}"))
        assert alone.items() <= together.items()


def test_progress_counts_every_explanation(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    chosen = settings(image_folder(tmp_path / "data", 2), seeds=2)
    ev.run_benchmark(chosen, tmp_path / "out", lambda done, total, what: seen.append((done, total)))
    assert seen[-1] == (16, 16)  # two of the six methods draw, and run twice
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_classifier_leaves_as_it_came(tmp_path: Path) -> None:
    classifier = linear_classifier()
    classifier.module.train()
    digest = classifier.weights_digest
    ev.run_benchmark(settings(image_folder(tmp_path / "data", 1), models=[classifier]), tmp_path / "out")
    assert classifier.module.training
    assert classifier.weights_digest == digest
    assert classifier.module.weight.grad is None
    assert classifier.batch_size == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["grad_camm"]}, "unknown method 'grad_camm'"),
        ({"methods": ["rise@nobody"]}, "unknown preset 'nobody' of rise"),
        ({"methods": [{"method": "lime", "options": {"n_samples": 2.5}}]}, "lime: n_samples is 2.5: expected a whole number"),
        ({"methods": [{"method": "rise", "options": {"keep": "half"}}]}, "rise: keep is 'half': expected a finite number"),
        ({"methods": [{"method": "integrated_gradients", "options": {"steps": "5"}}]}, "integrated_gradients: n_steps is '5': expected a"),
        ({"methods": ["rise", "rise"]}, "was named twice"),
        ({"methods": [{"method": "rise", "option": 1}]}, "expected a name, or a table"),
        ({"methods": [{"method": "rise", "label": 3}]}, "the label of rise is int: expected text"),
        ({"methods": [{"method": "rise", "options": "samples"}]}, "the options of rise are 'samples': expected names with values"),
        ({"methods": []}, "methods is empty"),
        ({"metrics": ["accuracy"]}, "unknown metric 'accuracy'"),
        ({"fills": ["blak"]}, "blak"),
        ({"steps": ["patches"]}, "steps"),
        ({"protocol": "lime"}, "protocol is 'lime': expected one of lima"),
        ({"only": "some"}, "only is 'some'"),
        ({"samples": 0}, "samples is 0"),
        ({"seeds": True}, "seeds is True"),
        ({"regions": "squares"}, "regions is 'squares': expected one of"),
        ({"regions": "grid", "region_options": {"cells": 3}}, r"region_options do not fit \(.*'cells'\): grid takes count, rows, columns"),
        ({"region_options": {"count": "49"}}, "region_options count is '49': expected a whole number"),
        ({"fills": ["blur", "blur"]}, "the fill 'blur' was named twice among blur, blur: give each once"),
        ({"steps": ["pixels", "pixels"]}, "the step rule 'pixels' was named twice"),
        ({"fills": ["black+blur"]}, "names several at once, which explain takes and this does not"),
        ({"colour": "red"}, "unknown settings colour"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        settings(tmp_path, **change)


def test_settings_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'data = "photos"\nmodels = ["zoo:cnn", "zoo:vit"]\nsamples = 5\nfills = ["black", "blur"]\nmetrics = ["highest_confidence"]\n'
        'methods = ["grad_cam", {method = "rise", label = "rise-500", options = {samples = 500}}, '
        '{method = "bidirectional", options = {weights = {consistency = 1}}}]\n'
    )
    found = ev.read_settings(path, {"samples": 7})
    assert (found.samples, found.models, found.fills) == (7, ("zoo:cnn", "zoo:vit"), ("black", "blur"))
    assert [m.label for m in found.methods] == ["grad_cam", "rise-500", "bidirectional"]
    assert found.methods[2].options["weights"] == at.ScoreWeights(consistency=1, collaboration=0, confidence=0)
    assert found.metrics == ("highest_confidence_25", "highest_confidence_50", "highest_confidence_75", "highest_confidence_100")
    assert json.loads(json.dumps(found.plain())) == found.plain()
    path.write_text("data = [")
    with pytest.raises(at.UserError, match=r"mine\.toml cannot be read as TOML"):
        ev.read_settings(path, {})


def test_a_library_call_and_a_command_give_one_table(tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]) -> None:
    data = image_folder(tmp_path / "data", 2, side=32)
    (data / "2.png").write_bytes(b"rubbish")
    toml = tmp_path / "mine.toml"
    toml.write_text(
        f'data = "{data}"\nmodels = ["zoo:cnn"]\nmethods = ["saliency", "grad_cam"]\nmetrics = ["insertion"]\nregions = "grid"\n'
    )
    code, out, err = run_command("benchmark", toml, "--region-count", 9, "--out", tmp_path / "a")
    assert code == 2  # the corrupt image
    assert "2 measurements failed" in err and "2.png" in err and len(err.strip().splitlines()) == 1
    assert "grad_cam" in out and "insertion" in out
    values = ev.read_settings(toml, {"region_options": {"count": 9}})
    assert (tmp_path / "a" / "summary.csv").read_text() == ev.summary_csv(ev.summarise(ev.run_benchmark(values, tmp_path / "b")))
    page = (tmp_path / "a" / "report.html").read_bytes()
    code, _, err = run_command("benchmark", toml, "--region-count", 9, "--out", tmp_path / "a", "--no-measure")
    assert code == 2 and "2.png" in err and (tmp_path / "a" / "report.html").read_bytes() == page
    quick = ["--methods", "random", "--metrics", "insertion", "--regions", "grid", "--region-count", 4, "-n", 1]
    code, out, _ = run_command(
        "benchmark", "--data", image_folder(tmp_path / "one", 1, 32), "-m", "zoo:cnn", "-m", "zoo:vit", *quick, "--out", tmp_path / "d"
    )
    assert code == 0 and "zoo:cnn, " in out and "zoo:vit, " in out
    code, out, err = run_command("benchmark", "--data", tmp_path / "nowhere", "--out", tmp_path / "c")
    assert code == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1
    code, out, err = run_command("benchmark", "--list")
    assert code == 0 and all(name in out for name in [*at.METHODS, *ev.METRICS, *ev.PROTOCOLS])


def test_images_draw_independently(tmp_path: Path) -> None:
    """Two equal images under two names: the null control differs, and again under another seed."""
    data = image_folder(tmp_path / "data", 1)
    (data / "1.png").write_bytes((data / "0.png").read_bytes())
    found = numbers(ev.run_benchmark(settings(data, methods=["random", "saliency"], metrics=["insertion"], seeds=2), tmp_path / "out"))
    random_scores = {value for (_, _, method, _, _), value in found.items() if method == "random"}
    assert len(random_scores) == 4
    assert len({value for (_, _, method, _, _), value in found.items() if method == "saliency"}) == 1


def test_a_wrong_option_or_layer_is_found_before_any_image(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", 1)
    with pytest.raises(at.UserError, match="grad_cam takes no option bogus: expected layer, output"):
        settings(data, methods=[{"method": "grad_cam", "options": {"bogus": 2}}])
    chosen = settings(data, methods=["saliency", {"method": "grad_cam", "options": {"layer": "layer9"}}])
    with pytest.raises(at.UserError, match="grad_cam: linear has no layer 'layer9': its last layers are"):
        ev.run_benchmark(chosen, tmp_path / "out")
