"""Quality against evaluations: every point is what that search gives for that budget, measured by the common function."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import attribution as at
import evaluation as ev
from attribution.objective import BALANCED
from attribution.search.budget import anytime_from, search_orders
from evaluation.metrics.protocol import Protocol
from evaluation.pareto.figures import plot_pareto
from evaluation.pareto.settings import ParetoResults, ParetoSettings, Point
from evaluation.pareto.study import PARETO, run_pareto
from evaluation.pareto.summary import pareto_csv, summarise_pareto
from evaluation.study.identity import sample_seed
from evaluation.study.records import RecordLog, open_log
from evaluation.study.run import held

METHODS = ("budget", "bidirectional", "bidirectional 1:1", "polished", "rise", "kernel_shap", "hsic", "occlusion")
BUDGETS = (10, 40, 60, 90, 120)


@pytest.fixture(scope="module")
def classifier() -> at.Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16 * 16, 3))
    return at.Classifier(module.eval(), size=16, class_names=("a", "b", "c"), scores="logits", name="small")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, classifier: at.Classifier) -> Path:
    """Random images in the folder of the class that the model sees, and one in a wrong one."""
    folder = tmp_path_factory.mktemp("pareto")
    generator = np.random.default_rng(0)
    for name in classifier.class_names:
        (folder / name).mkdir()
    for index in range(8):
        pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        seen = int(classifier.probabilities(classifier.inputs(pixels))[0].argmax())
        Image.fromarray(pixels).save(folder / classifier.class_names[(seen + (index == 7)) % 3] / f"{index}.png")
    return folder


def settings(data: Path, classifier: at.Classifier, **values: object) -> ParetoSettings:
    chosen = {
        "samples": 4,
        "confidence": 0.0,
        "partitions": ("grid:9",),
        "methods": METHODS,
        "budgets": BUDGETS,
        "sampled_budgets": (10, 40, 120),
        **values,
    }
    return ParetoSettings(data=str(data), models=(classifier,), **chosen)  # type: ignore[arg-type]


def points_of(results: ParetoResults) -> dict[str, tuple[Point, ...]]:
    ((_, points),) = results.points.items()
    return dict(points)


def read_pareto(chosen: ParetoSettings, out: Path) -> ParetoResults:
    return held(PARETO, chosen, out)


def test_points_are_what_each_method_finds(data: Path, classifier: at.Classifier, tmp_path: Path) -> None:
    results = run_pareto(settings(data, classifier), tmp_path)
    assert len(points_of(results)) == 4 and not any(sample.endswith("7.png") for sample in points_of(results))
    dataset = ev.open_dataset(str(data), class_names=classifier.class_names)
    for sample, points in points_of(results).items():
        found = dataset[dataset.ids.index(sample)]
        regions = at.make_regions(found.image, "grid", count=9)
        by_name = {(point.method, point.budget): point for point in points}
        for point in points:
            assert point.budget == 0 or point.evaluations <= point.budget

        def measured(explanation: at.Explanation, found: ev.Sample = found, regions: at.Regions = regions) -> tuple[float, float]:
            curves = ev.perturbation_curves(found.image, classifier, explanation, found.label, Protocol(), regions=regions)
            return curves.insertion_auc, curves.deletion_auc

        def check(point: Point, explanation: at.Explanation) -> None:
            assert (point.insertion, point.deletion) == pytest.approx(measured(explanation), abs=1e-6)
            assert point.evaluations == explanation.evaluations

        check(by_name["bidirectional", 0], at.explain(found.image, classifier, found.label, regions=regions, preset="published"))
        check(
            by_name["bidirectional 1:1", 0],
            at.explain(found.image, classifier, found.label, regions=regions, search="bidirectional", weights=BALANCED),
        )
        own = sample_seed(0, sample)
        for budget in (40, 120):
            check(by_name["rise", budget], at.attribute(found.image, classifier, "rise", found.label, samples=budget, seed=own))
        masked = at.MaskedInputs(classifier, found.image, regions.labels, torch.zeros_like(found.image))
        objective = at.SubmodularObjective(classifier, masked, found.label, BALANCED)
        assert BUDGETS[0] < anytime_from(objective) == 54 < BUDGETS[-1]
        for budget in BUDGETS:
            orders = list(search_orders(objective, evaluations=budget if budget < 54 else 10**6, seed=own))
            last = [each for each in orders if each.evaluations <= budget][-1]
            shell = at.explain(found.image, classifier, found.label, regions=regions, search=lambda _, last=last: last.order)
            point = by_name["budget", budget]
            assert (point.insertion, point.deletion) == pytest.approx(measured(shell), abs=1e-6)
            assert point.evaluations == last.evaluations
        # all prefixes are known by then; the study takes the last whole round within the budget, the search what it knows at its end
        whole = at.explain(found.image, classifier, found.label, regions=regions, search="budget", evaluations=120, seed=own)
        insertion, deletion = measured(whole)
        assert by_name["budget", 120].difference <= insertion - deletion + 1e-6
        start = by_name["bidirectional", 0]
        assert by_name["polished", 120].difference >= start.difference - 1e-6
        assert not {("polished", 10), ("occlusion", 10)} & set(by_name) and ("occlusion", 40) in by_name


def test_points_of_the_white_box(data: Path, classifier: at.Classifier, tmp_path: Path) -> None:
    chosen = settings(data, classifier, samples=1, methods=("budget", "budget gradients"), budgets=(48, 120), partitions=("grid:36",))
    ((sample, points),) = points_of(run_pareto(chosen, tmp_path)).items()
    dataset = ev.open_dataset(str(data), class_names=classifier.class_names)
    found = dataset[dataset.ids.index(sample)]
    explained = at.explain(
        found.image,
        classifier,
        found.label,
        regions="grid",
        region_options={"count": 36},
        search="budget",
        evaluations=48,
        seed=sample_seed(0, sample),
        search_options={"gradients": True},
    )
    by_name = {(point.method, point.budget): point for point in points}
    white = by_name["budget gradients", 48]
    assert white.evaluations == explained.evaluations == 48
    assert (white.insertion, white.deletion) == pytest.approx((explained.insertion_auc, explained.deletion_auc), abs=1e-6)
    assert white.difference != by_name["budget", 48].difference
    assert by_name["budget gradients", 120].difference == by_name["budget", 120].difference


def test_a_run_continues_and_settings_share_a_folder(data: Path, classifier: at.Classifier, tmp_path: Path) -> None:
    first = run_pareto(settings(data, classifier, samples=2, methods=("budget", "bidirectional")), tmp_path)
    forwarded = 0

    def count(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal forwarded
        forwarded += len(args[0])

    handle = classifier.module.register_forward_pre_hook(count)  # type: ignore[union-attr]
    again = run_pareto(settings(data, classifier, samples=2, methods=("budget", "bidirectional")), tmp_path)
    assert forwarded <= 8  # predictions only
    only_held = read_pareto(settings(data, classifier, samples=3, methods=("budget", "rise")), tmp_path)
    assert forwarded <= 24
    assert [len(points) for points in points_of(only_held).values()] == [len(BUDGETS), len(BUDGETS)]
    more = run_pareto(settings(data, classifier, samples=3, methods=("bidirectional", "budget")), tmp_path)
    handle.remove()
    fewer = run_pareto(settings(data, classifier, samples=2, methods=("budget",), budgets=(60, 90)), tmp_path / "alone")
    assert {sample: tuple(p for p in points if p.budget in (60, 90)) for sample, points in points_of(first).items()} == points_of(fewer)
    assert again.points == first.points
    assert {sample: set(points) for sample, points in points_of(first).items()}.items() <= {
        s: set(p) for s, p in points_of(more).items()
    }.items()


def test_a_run_killed_between_two_points_of_an_image_ends_with_the_same(
    data: Path, classifier: at.Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(data, classifier, samples=1, methods=("budget", "polished"))
    whole = run_pareto(chosen, tmp_path / "whole")
    append, left = RecordLog.append, 3

    def killed(self: RecordLog, *arguments: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        append(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RecordLog, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        run_pareto(chosen, tmp_path / "cut")
    left = 10**6
    assert [len(points) for points in points_of(read_pareto(chosen, tmp_path / "cut")).values()] == [3]
    assert run_pareto(chosen, tmp_path / "cut").points == whole.points


def test_what_is_held_is_read_without_a_lock_and_must_be_there(data: Path, classifier: at.Classifier, tmp_path: Path) -> None:
    chosen = settings(data, classifier, samples=1, methods=("bidirectional",))
    with pytest.raises(at.UserError, match="is not there"):
        read_pareto(chosen, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    run_pareto(chosen, tmp_path)
    with open_log(tmp_path / "records.jsonl"):
        assert len(points_of(read_pareto(chosen, tmp_path))) == 1
    with pytest.raises(at.UserError, match="holds no record for these settings"):
        read_pareto(settings(data, classifier, methods=("rise",)), tmp_path)


def test_rows_compare_with_the_published_search(data: Path, classifier: at.Classifier, tmp_path: Path) -> None:
    results = run_pareto(settings(data, classifier), tmp_path)
    rows = summarise_pareto(results).rows
    by_name = {(row.method, row.budget): row for row in rows}
    quality = {
        (method, budget): np.array(
            [next(p.difference for p in points if (p.method, p.budget) == (method, budget)) for points in all_points]
        )
        for method, budget in by_name
        for all_points in [list(points_of(results).values())]
    }
    for key, row in by_name.items():
        assert row.quality.estimate == pytest.approx(quality[key].mean()) and row.quality.count == 4
        if key == ("bidirectional", 0):
            assert row.gain is None
        else:
            assert row.gain is not None
            assert row.gain.estimate == pytest.approx((quality[key] - quality["bidirectional", 0]).mean())
    table = list(csv.DictReader(io.StringIO(pareto_csv(rows))))
    assert [(row["method"], row["images"]) for row in table] == [(row.method, "4") for row in rows]
    assert float(table[0]["quality"]) == pytest.approx(rows[0].quality.estimate, rel=1e-5)
    figure = plot_pareto(rows)
    assert {text.get_text() for text in figure.axes[0].texts} == {name.replace("_", " ") for name in METHODS}
    figure.canvas.draw()


def test_the_gap_is_what_the_best_order_has_more(data: Path, classifier: at.Classifier, tmp_path: Path) -> None:
    methods = ("exact", "budget", "greedy")
    chosen = settings(data, classifier, methods=methods, budgets=(20, 200), partitions=("grid:2x3",))
    results = run_pareto(chosen, tmp_path)
    rows = {(row.method, row.budget): row for row in summarise_pareto(results).rows}
    assert rows["exact", 0].evaluations == 2**6 and rows["exact", 0].gap is None
    for name in (("budget", 20), ("budget", 200), ("greedy", 0)):
        gap = rows[name].gap
        assert gap is not None and gap.estimate == pytest.approx(rows["exact", 0].quality.estimate - rows[name].quality.estimate)
        assert gap.estimate >= -1e-6 and gap.low >= -1e-6
    table = list(csv.DictReader(io.StringIO(pareto_csv(tuple(rows.values())))))
    assert [bool(row["gap"]) for row in table] == [row["method"] != "exact" for row in table]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ("budget", "magic")}, "methods is 'magic': expected one of bidirectional"),
        ({"budgets": (40, 10)}, "expected ascending numbers of images"),
        ({"partitions": ("hexagons:9",)}, "partition is 'hexagons:9'"),
        ({"partitions": ("grid:0x9",)}, "partition is 'grid:0x9'.*such as grid:64, or grid:2x7"),
        ({"partitions": ("slico:3x3",)}, "partition is 'slico:3x3'"),
        ({"methods": ()}, "methods are none: expected at least one, each once"),
        ({"methods": ("budget", "budget")}, "methods are budget, budget: expected at least one, each once"),
        ({"partitions": ("grid:9", "grid:9")}, "partitions are grid:9, grid:9"),
        ({"partitions": ()}, "partitions are none"),
        ({"fill": "blak"}, "unknown fill 'blak'"),
        ({"fill": "black+blur"}, "names several at once"),
        ({"fill": "linear"}, "fill is 'linear', which is no image"),
        ({"fill": "drop"}, "fill is 'drop', which is no image"),
        ({"methods": ("polished",), "budgets": (3,)}, "no image has an order by polished: every budget is too small for its method"),
        ({"samples": 0}, "samples is 0"),
        ({"confidence": 1.1}, "confidence is 1.1: expected a number from 0 to 1"),
        ({"confidence": 1.0}, "has no image that small gets right"),
    ],
)
def test_bad_settings(data: Path, classifier: at.Classifier, tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        run_pareto(settings(data, classifier, **values), tmp_path)


def test_what_has_no_row_is_said(data: Path, classifier: at.Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = settings(data, classifier, samples=1, methods=("bidirectional", "polished"), budgets=(10, 120))
    summary = summarise_pareto(run_pareto(chosen, tmp_path))
    sentence = "small, grid 9: no image has an order of polished 10: the budget is too small, or it failed or is not measured yet."
    assert summary.missing == (sentence,)
    PARETO.show(summary, Console(width=200))
    assert sentence in capsys.readouterr().out
    assert sentence in PARETO.write(summary, tmp_path).html.read_text(encoding="utf-8")
    all_known = summarise_pareto(run_pareto(settings(data, classifier, samples=1, methods=("bidirectional",)), tmp_path))
    assert all_known.missing == ()
    assert "Without a row" not in PARETO.write(all_known, tmp_path).html.read_text(encoding="utf-8")
