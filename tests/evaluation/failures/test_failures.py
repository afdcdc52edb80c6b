"""The failures of a data set: found, explained, resumed, summed up and written; and the command."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from scipy import stats
from torch import Tensor, nn

import attribution as at
from attribution.regions import Regions, grid
from evaluation.data.dataset import ImageDataset
from evaluation.data.recipes import open_dataset
from evaluation.failures import clusters
from evaluation.failures import measure as runner
from evaluation.failures.causes import cause_place, cell_words
from evaluation.failures.clusters import cluster_numbers, coordinates, medoid_of, tightness_test
from evaluation.failures.measure import explain_sample, object_shares
from evaluation.failures.report import failures_csv, pairs_csv, plain_summary, print_failures, write_failures
from evaluation.failures.results import Failed, FailureResults
from evaluation.failures.settings import FailureSettings
from evaluation.failures.study import FAILURES, run_failures
from evaluation.failures.summary import Cluster, FailureSummary, _appearances, summarise_failures
from evaluation.statistics.comparisons import holm
from evaluation.statistics.intervals import bootstrap_interval, share_interval
from evaluation.study.identity import sample_seed
from evaluation.study.records import RecordLog, read_log
from evaluation.study.run import held

NAMES = ("cat", "dog", "ship")
SIDE = 8
Run = Callable[..., tuple[int, str, str]]


class SometimesNaN(nn.Sequential):
    """Not a number for images whose first pixel is red."""

    def forward(self, x: Tensor) -> Tensor:
        red = x[:, 0, 0, 0] > 0.99
        return torch.where(red[:, None], torch.nan, super().forward(x))


def linear(seed: int = 0, module: type[nn.Sequential] = nn.Sequential) -> at.Classifier:
    """Logits that are weighted sums of all pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = module(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 3))
        with torch.no_grad():
            network[1].weight.normal_(std=0.6)
            network[1].bias.zero_()
    return at.Classifier(network.eval(), size=SIDE, class_names=NAMES, scores="logits", name="linear")


def write_images(folder: Path, count: int = 6, side: int = SIDE, names: Sequence[str] = NAMES) -> Path:
    """Random images in a folder for each class."""
    generator = np.random.default_rng(1)
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 250, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def settings(data: Path, **values: object) -> FailureSettings:
    return FailureSettings.make({"data": str(data), "model": linear(), "regions": "grid", "region_options": {"count": 9}, **values})


@pytest.fixture(autouse=True)
def few_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tightness of clusters; tests that judge it ask for more."""
    monkeypatch.setattr(clusters, "_SIMULATIONS", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FailureResults:
    return run_failures(settings(folder), tmp_path_factory.mktemp("run"))


def predictions(data: Path, classifier: at.Classifier) -> dict[str, tuple[int, int]]:
    """(label, predicted) of every sample, one by one."""
    dataset = open_dataset(str(data), class_names=NAMES)
    return {s.id: (int(s.label), int(classifier.logits(classifier.inputs(s.image))[0].argmax())) for s in dataset}  # type: ignore[arg-type]


# the runner


def test_every_mistake_is_found_and_explained_as_on_its_own(folder: Path, results: FailureResults) -> None:
    classifier = results.classifier
    known = predictions(folder, classifier)
    wrong = {sample for sample, (label, predicted) in known.items() if label != predicted}
    assert 5 < len(wrong) < 18
    assert {failed.sample for failed in results.failures} == wrong
    assert (results.looked_at, results.right) == (18, 18 - len(wrong))
    assert results.by_class == {0: 6, 1: 6, 2: 6}
    assert sum(results.confusions.values()) == len(wrong)
    order = [results.dataset.ids[index] for index in results.dataset.choose(None, 0)]
    assert [failed.sample for failed in results.failures] == [sample for sample in order if sample in wrong]
    for failed in results.failures:
        sample = results.dataset[failed.index]
        cut: dict[str, Any] = {"regions": "grid", "region_options": {"count": 9}}
        alone = at.explain_failure(sample.image, classifier, failed.label, seed=sample_seed(0, failed.sample), **cut)
        assert failed.found == json.loads(json.dumps(alone.plain()))
        assert (failed.label, failed.predicted) == known[failed.sample] == (alone.truth.target, alone.mistake.target)
        kept = failed.explanation()
        assert kept.order is not None and alone.truth.order is not None
        assert torch.equal(kept.order, alone.truth.order) and torch.equal(kept.image, alone.truth.image)
        assert failed.truth.parent == results.out / "explanations"


def test_the_first_failures_of_the_permutation_are_explained(folder: Path, results: FailureResults, tmp_path: Path) -> None:
    fewer = run_failures(settings(folder, most=3, samples=12), tmp_path)
    assert fewer.looked_at == 12
    looked_at = [fewer.dataset.ids[index] for index in fewer.dataset.choose(12, 0)]
    wrong = [failed.sample for failed in results.failures if failed.sample in looked_at]
    assert [failed.sample for failed in fewer.failures] == wrong[:3]
    assert sum(fewer.confusions.values()) == len(wrong) > 3, "all mistakes are counted, not only those explained"
    pairs = summarise_failures(fewer).pairs
    pair = pairs[0]
    assert pair.seen == fewer.confusions[pair.label, pair.predicted] == max(fewer.confusions[p.label, p.predicted] for p in pairs)
    assert pair.share == pytest.approx(pair.seen / fewer.by_class[pair.label])


@pytest.mark.parametrize("interrupted", ["predictions", "explanations"])
def test_a_run_resumes_and_ends_with_the_same_files(
    folder: Path, results: FailureResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    monkeypatch.setattr(runner, "TOGETHER", 5)
    run_failures(settings(folder), tmp_path / "whole")
    owner, name = (at.Classifier, "probabilities") if interrupted == "predictions" else (runner, "explain_failure")
    original, calls = getattr(owner, name), 0

    def stopped(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopped)
        with pytest.raises(KeyboardInterrupt):
            run_failures(settings(folder), tmp_path / "part")
    before = len(read_log(tmp_path / "part" / "records.jsonl"))
    assert before == (10 if interrupted == "predictions" else 18 + 2)
    for out in ("part", "whole"):
        write_failures(summarise_failures(run_failures(settings(folder), tmp_path / out)), tmp_path / out)
    for file in ("records.jsonl", "failures.csv", "pairs.csv", "failures.json", "atlas.html"):
        assert (tmp_path / "part" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    monkeypatch.setattr(runner, "explain_failure", lambda *a, **k: pytest.fail("nothing is missing"))
    again = run_failures(settings(folder), tmp_path / "part")
    assert [failed.found for failed in again.failures] == [failed.found for failed in results.failures]
    other = run_failures(settings(folder, most=1, min_confidence=0.5), tmp_path / "part")
    assert len(other.failures) == 1, "what changes no explanation makes none anew"


WRITTEN = ("failures.csv", "pairs.csv", "failures.json", "atlas.html")


def written(chosen: FailureSettings, out: Path) -> dict[str, bytes]:
    """The files of a run that is finished now."""
    write_failures(summarise_failures(run_failures(chosen, out)), out)
    return {name: (out / name).read_bytes() for name in WRITTEN}


@contextmanager
def counted_images(classifier: at.Classifier) -> Iterator[list[int]]:
    """The number of images in each forward pass."""
    passes: list[int] = []
    handle = classifier.module.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))  # type: ignore[union-attr]
    yield passes
    handle.remove()


def test_a_run_killed_at_any_record_ends_with_the_same_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "TOGETHER", 3)
    chosen = settings(folder, samples=5)
    whole = written(chosen, tmp_path / "whole")
    total = len(read_log(tmp_path / "whole" / "records.jsonl"))
    assert total > 7
    append = RecordLog.append
    for kept in range(total):
        left = kept

        def killed(self: RecordLog, *arguments: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            append(self, *arguments)

        out = tmp_path / f"cut {kept}"
        with monkeypatch.context() as patch:
            patch.setattr(RecordLog, "append", killed)
            with pytest.raises(KeyboardInterrupt):
                run_failures(chosen, out)
        assert len(read_log(out / "records.jsonl")) == kept
        assert written(chosen, out) == whole
        assert (out / "records.jsonl").read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()


def test_what_is_unchanged_is_not_measured_again(folder: Path, tmp_path: Path) -> None:
    classifier = linear()
    with counted_images(classifier) as passes:
        first = run_failures(settings(folder, model=classifier), tmp_path)
        assert sum(passes) > 18
        passes.clear()
        again = run_failures(settings(folder, model=classifier), tmp_path)
        assert passes == []
        kept = held(FAILURES, settings(folder, model=classifier), tmp_path)
        assert passes == []
    assert [f.found for f in again.failures] == [f.found for f in kept.failures] == [f.found for f in first.failures]


def test_replaced_images_are_measured_again(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data")
    classifier = linear()
    before = run_failures(settings(data, model=classifier), tmp_path / "out")
    victim = before.failures[0].sample
    Image.fromarray(np.random.default_rng(7).integers(0, 250, (SIDE, SIDE, 3), dtype=np.uint8)).save(data / victim)
    with counted_images(classifier) as passes:
        one = run_failures(settings(data, model=classifier), tmp_path / "out")
    assert passes[0] == 18, "its batch, whole"
    assert all(f.found == b.found for f in one.failures for b in before.failures if f.sample == b.sample != victim)
    assert victim not in {f.sample for f in one.failures} or by_path(one, victim).found != before.failures[0].found  # type: ignore[union-attr]
    for path in sorted(data.rglob("*.png")):
        with Image.open(path) as picture:
            turned = np.asarray(picture)[::-1, :, ::-1].copy()
        Image.fromarray(turned).save(path)
    all_new = written(settings(data), tmp_path / "out")
    assert all_new == written(settings(data), tmp_path / "fresh")
    assert not {f.truth.name for f in before.failures} & {f.truth.name for f in run_failures(settings(data), tmp_path / "fresh").failures}


@pytest.mark.parametrize("changed", ["weights", "version"])
def test_another_model_or_version_is_measured_anew(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    run_failures(settings(folder), tmp_path / "out")
    other = linear(seed=1 if changed == "weights" else 0)
    if changed == "version":
        monkeypatch.setattr("evaluation.study.identity.__version__", "0.0.0")
    with counted_images(other) as passes:
        run_failures(settings(folder, model=other), tmp_path / "out")
    assert 18 in passes and sum(passes) > 18 + 100
    found = read_log(tmp_path / "out" / "records.jsonl")
    fresh = run_failures(settings(folder, model=other), tmp_path / "fresh")
    assert len(fresh.failures) and read_log(tmp_path / "fresh" / "records.jsonl").items() <= found.items()


def test_what_is_held_must_be_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(at.UserError, match="is not there"):
        held(FAILURES, settings(folder), tmp_path / "nowhere")
    run_failures(settings(folder, samples=3), tmp_path)
    with pytest.raises(at.UserError, match="holds no prediction for these settings"):
        held(FAILURES, settings(folder, model=linear(seed=5)), tmp_path)
    assert held(FAILURES, settings(folder), tmp_path).looked_at == 3


@pytest.mark.slow
def test_workers_change_no_number(tmp_path: Path) -> None:
    data = write_images(tmp_path / "animals", count=40, side=32, names=("cat", "dog"))
    chosen = {"data": str(data), "model": "zoo:cnn", "regions": "grid", "region_options": {"count": 4}, "most": 5, "device": "cpu"}
    whole = written(FailureSettings.make(chosen), tmp_path / "one")
    assert written(FailureSettings.make({**chosen, "workers": 2}), tmp_path / "two") == whole
    assert not list((tmp_path / "two").glob("records-*.jsonl"))


def test_other_settings_or_labels_are_other_explanations(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "list.csv"
    paths = [f"{folder}/{name}/{index}.png" for name in NAMES for index in range(2)]

    def write(labels: Sequence[str]) -> None:
        data.write_text("path,label\n" + "".join(f"{p},{label}\n" for p, label in zip(paths, labels, strict=True)), encoding="utf-8")

    write([NAMES[0]] * 6)
    first = run_failures(settings(data), tmp_path / "out")
    assert first.failures
    white = run_failures(settings(data, fill="white"), tmp_path / "out")
    assert {f.truth for f in white.failures}.isdisjoint(f.truth for f in first.failures)
    write([NAMES[failed.predicted] if failed else NAMES[0] for failed in (by_path(first, path) for path in paths)])
    corrected = run_failures(settings(data), tmp_path / "out")
    assert not corrected.failures and corrected.right == 6, "a corrected label needs no new prediction"
    assert len(read_log(tmp_path / "out" / "records.jsonl")) == 6 + 2 * len(first.failures)


def by_path(results: FailureResults, path: str) -> Failed | None:
    return next((failed for failed in results.failures if failed.sample == path or path.endswith(failed.sample)), None)


def test_images_that_fail_are_named_and_the_others_count(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_images(tmp_path / "data")
    (data / "cat" / "2.png").write_bytes(b"no image")
    with Image.open(data / "dog" / "1.png") as picture:
        red = np.asarray(picture).copy()
    red[0, 0] = (255, 0, 0)
    Image.fromarray(red).save(data / "dog" / "1.png")
    found = run_failures(settings(data, model=linear(module=SometimesNaN)), tmp_path / "out")
    assert {sample for sample, _ in found.broken} == {"cat/2.png", "dog/1.png"}
    reasons = dict(found.broken)
    assert "image" in reasons["cat/2.png"] and "nan" in reasons["dog/1.png"]
    assert found.looked_at == 16 and found.by_class == {0: 5, 1: 5, 2: 6}
    whole = predictions(folder, linear())
    wrong = {s for s, (label, predicted) in whole.items() if label != predicted} - set(reasons)
    assert {failed.sample for failed in found.failures} == wrong, "one image did not spoil its batch"
    original, victim = runner.explain_failure, found.failures[1].sample

    def fails(image: Tensor, *args: object, **kwargs: object) -> object:
        if torch.equal(image, found.dataset[found.failures[1].index].image):
            raise RuntimeError("out of memory")
        return original(image, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "explain_failure", fails)
    again = run_failures(settings(data, model=linear(module=SometimesNaN)), tmp_path / "other")
    assert dict(again.broken)[victim] == "RuntimeError: out of memory"
    assert {failed.sample for failed in again.failures} == wrong - {victim}
    summary = summarise_failures(again)
    assert {row["sample"] for row in plain_summary(summary)["broken"]} == {"cat/2.png", "dog/1.png", victim}


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", count=1)
    for path in data.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(at.UserError, match="none of 3 images could be predicted"):
        run_failures(settings(data), tmp_path / "out")
    with pytest.raises(at.UserError, match="no labels"):
        run_failures(settings(write_images(tmp_path / "flat", names=["cat"]) / "cat"), tmp_path / "out2")


def test_masks_say_how_much_of_the_cause_lies_on_the_object(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "list.csv"
    rows = [f"{folder}/{name}/{index}.png,{name},2,1,7,6" for name in NAMES for index in range(5)]
    rows.append(f"{folder}/ship/5.png,ship,,,,")
    data.write_text("path,label,x0,y0,x1,y1\n" + "\n".join(rows) + "\n", encoding="utf-8")
    found = run_failures(settings(data), tmp_path / "out")
    assert found.failures
    for failed in found.failures:
        if failed.sample.endswith("ship/5.png"):
            assert failed.on_mask is failed.chance_on_mask is failed.object_share is None
            continue
        regions = failed.explanation().regions
        assert regions is not None
        inside = total = 0
        for y in range(SIDE):
            for x in range(SIDE):
                if failed.found["cause"] is not None and int(regions.labels[y, x]) in failed.found["cause"]["regions"]:
                    total += 1
                    inside += 2 <= x < 7 and 1 <= y < 6
        assert failed.chance_on_mask == pytest.approx(25 / 64)
        assert failed.on_mask == (pytest.approx(inside / total) if total else None)
    summary = summarise_failures(found)
    masked = [failed for failed in found.failures if failed.object_share is not None]
    expected = np.mean([failed.on_mask is not None and failed.on_mask < 0.5 for failed in masked])
    assert summary.shares["background"].estimate == pytest.approx(expected)
    assert summary.shares["background"].count == len(masked)
    rows_written = list(csv.DictReader(io.StringIO(failures_csv(summary))))
    for row, failed in zip(rows_written, found.failures, strict=True):
        assert row["on_object"] == ("" if failed.on_mask is None else f"{failed.on_mask:.6g}")


def test_object_shares_of_a_mask_of_another_size() -> None:
    regions = Regions(torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]))
    mask = torch.tensor([[True] * 6 + [False] * 2] * 4)
    assert object_shares(mask, regions).tolist() == [1.0, 0.5]


def test_object_shares_count_the_pixels_that_the_model_sees() -> None:
    labels = torch.tensor([[0, 0, 1, 2], [0, 0, 1, 2]])
    mask = torch.tensor([[True, False, True, True], [True, False, False, True]])
    whole = at.Regions(labels)
    assert object_shares(mask, whole).tolist() == [0.5, 0.5, 1.0]
    assert object_shares(mask, replace(whole, seen=(0, 1, 2, 3))).tolist() == [0.0, 0.5, 0.0]


def test_one_sample_is_explained_as_in_the_run(folder: Path, results: FailureResults) -> None:
    failed = results.failures[0]
    assert json.loads(json.dumps(explain_sample(results.settings, failed.sample).plain())) == failed.found
    right = next(s for s, (label, predicted) in predictions(folder, results.classifier).items() if label == predicted)
    with pytest.raises(at.UserError, match="is right about this image"):
        explain_sample(results.settings, right)
    with pytest.raises(at.UserError, match=f"no sample 'x{failed.sample}': expected an id such as '{failed.sample}'"):
        explain_sample(results.settings, f"x{failed.sample}")
    with pytest.raises(at.UserError, match="has no label"):
        explain_sample(settings(folder / "cat"), "0.png")


def test_searches_that_draw_get_the_seed_of_the_sample(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    original = runner.explain_failure

    def watched(*args: object, **kwargs: object) -> object:
        seen.append(kwargs["seed"])
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "explain_failure", watched)
    found = run_failures(settings(folder, most=2, seed=3), tmp_path)
    assert seen == [sample_seed(3, failed.sample) for failed in found.failures] and len(set(seen)) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"regions": "hexagons"}, "regions is 'hexagons': expected one of slico"),
        ({"search": "best"}, "search is 'best': expected one of"),
        ({"samples": 0}, "samples is 0"),
        ({"most": True}, "most is True"),
        ({"most": -1}, "most is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": None}, "seed is None"),
        ({"pending": 0}, "pending is 0"),
        ({"clusters": 0}, "clusters is 0"),
        ({"min_confidence": 1.5}, "min_confidence is 1.5: expected a number from 0 to 1"),
        ({"region_options": {"cells": 3}}, "region_options do not fit (got an unexpected keyword argument 'cells'): slico takes"),
        ({"region_options": 9}, "region_options is int: expected names with values"),
        ({"region_options": {"count": 1}}, "region_options count is 1: expected a whole number of at least 2"),
        ({"fill": "linear"}, "fill is 'linear'"),
        ({"fill": "purple haze"}, "unknown fill 'purple haze'"),
        ({"colour": 1}, "unknown settings colour"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, object], message: str) -> None:
    with pytest.raises(at.UserError) as error:
        FailureSettings.make({"data": "photos", **values})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_most_of_0_explains_all(folder: Path, results: FailureResults, tmp_path: Path) -> None:
    few = run_failures(settings(folder, most=0), tmp_path)
    assert [f.sample for f in few.failures] == [f.sample for f in results.failures]
    none = run_failures(settings(folder, most=None), tmp_path)
    assert [f.sample for f in none.failures] == [f.sample for f in results.failures]


def test_settings_without_data() -> None:
    with pytest.raises(at.UserError, match="no data"):
        FailureSettings.make({})
    plain = FailureSettings.make({"data": "photos", "fill": (0.5, 0.5, 0.5), "most": None}).plain()
    assert json.loads(json.dumps(plain))["fill"] == [0.5, 0.5, 0.5] and plain["most"] is None


# the summary, on planted records


class Colours(nn.Module):
    """Features that are the mean colour of the image, and a head on them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(x.mean(dim=(2, 3)))
        return scores


class Planter:
    """Failures with known records on 16x16 images of 8x8 regions."""

    def __init__(self, out: Path, classifier: at.Classifier | None = None, **values: object) -> None:
        self.out = out
        self.by_class: dict[int, int] = {0: 100, 1: 100, 2: 100}
        self.by_group: dict[str, tuple[int, int]] = {}
        self.classifier = classifier or at.Classifier(Colours().eval(), size=16, class_names=NAMES, scores="logits", name="colours")
        self.settings = FailureSettings.make({"data": "planted", "model": self.classifier, **values})
        self.failures: list[Failed] = []
        self.regions = grid(torch.zeros(3, 16, 16), rows=8, columns=8)

    def plant(
        self,
        label: int = 0,
        predicted: int = 1,
        cause: Sequence[int] | None = (9,),
        sufficient: Sequence[int] | None = (9, 10),
        confidence: float = 0.8,
        colour: Sequence[float] = (1, 1, 1),
        group: str | None = None,
        highest: float | None = 0.5,
        object_share: tuple[float, ...] | None = None,
        fill_right: bool = False,
    ) -> Failed:
        number = len(self.failures)
        sample = f"s{number:03d}"
        image = torch.tensor(colour, dtype=torch.float32)[:, None, None].expand(3, 16, 16).contiguous()
        probabilities = torch.full((3,), (1 - confidence) / 2)
        probabilities[predicted] = confidence
        steps = torch.linspace(0, 1, 65)
        path = self.out / "explanations" / f"{sample}.npz"
        at.Explanation(
            image, label, NAMES, probabilities, self.regions, torch.arange(64), insertion_scores=steps, deletion_scores=1 - steps
        ).save(path)

        def repair(regions: Sequence[int] | None) -> dict[str, Any] | None:
            return None if regions is None else {"regions": list(regions), "area": len(regions) / 64, "true": 0.6, "predicted": 0.3}

        found = {
            "true": label,
            "predicted": predicted,
            "probability_true": float(probabilities[label]),
            "probability_predicted": confidence,
            "curves": {"shown": {"right": [fill_right, *[False] * 64]}},
            "cause": repair(cause),
            "sufficient": repair(sufficient),
            "highest_confidence": {"0.25": None, "0.5": highest, "0.75": highest, "1": highest},
            "text": f"text of {sample}",
            "evaluations": 7,
        }
        failed = Failed(sample, number, label, predicted, group, found, path, object_share=object_share)
        self.failures.append(failed)
        return failed

    def summary(self) -> FailureSummary:
        dataset = ImageDataset("planted", NAMES, (), (), lambda index: None)
        return summarise_failures(
            FailureResults(
                self.settings,
                self.classifier,
                dataset,
                looked_at=300,
                right=300 - len(self.failures),
                by_class=self.by_class,
                by_group=self.by_group,
                failures=tuple(self.failures),
                broken=(),
                out=self.out,
            )
        )


def black_box() -> at.Classifier:
    return at.Classifier(lambda x: x.mean(dim=(2, 3)), size=16, class_names=NAMES, scores="logits", name="box")


def same(first: Any, second: Any) -> None:
    for name in ("estimate", "low", "high", "count"):
        assert getattr(first, name) == pytest.approx(getattr(second, name), nan_ok=True)


def test_pairs_are_ranked_with_intervals_of_their_areas(tmp_path: Path) -> None:
    planter = Planter(tmp_path, black_box())
    sizes = [1, 3, 2, 5]
    for size in sizes:
        planter.plant(2, 0, cause=range(size), sufficient=None)
    planter.plant(2, 0, cause=None, sufficient=None)
    planter.plant(1, 0, cause=None, sufficient=range(6))
    planter.plant(1, 0, cause=[1], sufficient=range(2))
    first, second = planter.summary().pairs
    assert (first.label, first.predicted, first.count, first.repaired) == (2, 0, 5, 4)
    assert first.share == pytest.approx(0.05) and first.seen == 5
    same(first.cause_area, bootstrap_interval([size / 64 for size in sizes]))
    assert first.sufficient_area.count == 0 and math.isnan(first.sufficient_area.estimate)
    assert (second.label, second.predicted, second.count, second.repaired) == (1, 0, 2, 2)
    same(second.sufficient_area, bootstrap_interval([6 / 64, 2 / 64]))
    rows = list(csv.DictReader(io.StringIO(pairs_csv(planter.summary()))))
    found = [tuple(row[name] for name in ("label", "predicted", "images", "repaired")) for row in rows]
    assert found == [("ship", "cat", "5", "4"), ("dog", "cat", "2", "2")]
    assert float(rows[0]["cause_area"]) == pytest.approx(np.mean(sizes) / 64, rel=1e-5)
    assert rows[0]["sufficient_area"] == rows[0]["sufficient_area_low"] == ""


def test_shares_of_errors_by_border_few_regions_and_background(tmp_path: Path) -> None:
    planter = Planter(tmp_path, black_box())
    left_half = tuple(float(region % 8 < 4) for region in range(64))
    for _ in range(6):
        planter.plant(cause=[0], object_share=left_half)  # at the border, on the object
    for _ in range(3):
        planter.plant(cause=[28, 29, 36], object_share=left_half)  # inside, off the object
    planter.plant(cause=None, sufficient=None, object_share=left_half)
    planter.plant(cause=[7, 15, 18], sufficient=None)  # mostly at the border, no mask
    planter.plant(cause=None, sufficient=[1, 2], fill_right=True)
    summary = planter.summary()
    assert summary.shares["border"].estimate == pytest.approx(7 / 12)
    assert summary.shares["few regions"].estimate == pytest.approx(6 / 12)
    assert summary.shares["repaired"].estimate == pytest.approx(11 / 12)
    assert summary.shares["background"].estimate == pytest.approx(3 / 10) and summary.shares["background"].count == 10
    assert summary.fill_right is not None and summary.fill_right.estimate == pytest.approx(1 / 12)
    assert summary.border_share["s010"] == pytest.approx(2 / 3) and summary.border_share["s006"] == 0
    assert set(summary.border_share) == {f"s{n:03d}" for n in range(11)} - {"s009"}
    border = 28 / 64  # of one region; of three, two or more of them at the border
    three = stats.hypergeom(64, 28, 3).sf(1)
    assert summary.by_chance["border"].estimate == pytest.approx((6 * border + 4 * three) / 12, abs=0.03)
    assert summary.by_chance["background"].estimate == pytest.approx(9 * 0.5 / 10, abs=0.04)
    same(summary.shares["border"], share_interval([1] * 6 + [0] * 4 + [1, 0]))
    assert "background" not in Planter(tmp_path / "none", black_box()).summary().shares


def test_the_place_of_a_cause_against_a_naive_loop() -> None:
    labels = torch.randint(0, 6, (11, 13), generator=torch.Generator().manual_seed(0))
    regions, cause = Regions(labels), [1, 4]
    place = cause_place(regions, cause, None, seed=0)
    at_border = {int(labels[y, x]) for y in range(11) for x in range(13) if y in (0, 10) or x in (0, 12)}
    inside = sum(int((labels == region).sum()) for region in cause)
    assert place.border_share == pytest.approx(sum(int((labels == r).sum()) for r in cause if r in at_border) / inside)
    for cell in range(64):
        pixels = [(y, x) for y in range(11) for x in range(13) if (y * 8 // 11) * 8 + x * 8 // 13 == cell]
        covered = sum(int(labels[y, x]) in cause for y, x in pixels)
        assert bool(place.cells[cell]) == (covered >= 0.5 * len(pixels))
    everything = cause_place(regions, range(6), [0.2] * 6, seed=0)
    assert everything.cells.all() and everything.background and everything.background_by_chance == 1
    np.testing.assert_allclose(everything.cells_by_chance, 1)
    tiny = cause_place(Regions(torch.arange(4).view(2, 2)), [3], [1, 1, 1, 0.4], seed=0)
    assert int(np.isfinite(tiny.cells_by_chance).sum()) == 4 and tiny.cells.sum() == 1
    assert tiny.background is True and tiny.background_by_chance == pytest.approx(0.25, abs=0.07)


def test_a_place_that_causes_many_errors_is_found(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    planter, samples = Planter(tmp_path, black_box()), []
    for number in range(60):
        planted = number % 4 == 0
        failed = planter.plant(label=number % 3, predicted=(number + 1) % 3, cause=[14] if planted else [int(generator.integers(0, 64))])
        if failed.found["cause"]["regions"] == [14]:
            samples.append(failed.sample)
    planter.plant(cause=None)
    (shortcut,) = planter.summary().shortcuts
    assert shortcut.kind == "area" and shortcut.samples == tuple(samples) and len(samples) >= 15
    assert shortcut.text.startswith("Causes lie at the top right (row 2, column 7 of 8x8): there in ")
    assert f"{len(samples)} of 60 failures" in shortcut.text
    expected = 64 * stats.binomtest(len(samples), 60, 1 / 64, alternative="greater").pvalue
    assert 0.01 * expected < shortcut.p < 1e-8


@pytest.mark.parametrize("seed", range(3))
def test_no_place_is_found_where_causes_lie_anywhere(tmp_path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    planter = Planter(tmp_path, black_box())
    for _ in range(60):
        planter.plant(cause=generator.choice(64, generator.integers(1, 9), replace=False).tolist())
    assert planter.summary().shortcuts == ()


def test_few_failures_make_no_shortcut(tmp_path: Path) -> None:
    planter = Planter(tmp_path, black_box())
    for _ in range(4):
        planter.plant(cause=[14])
    assert planter.summary().shortcuts == ()
    planter.plant(cause=[14])
    assert [shortcut.kind for shortcut in planter.summary().shortcuts] == ["area"]


def test_words_for_cells() -> None:
    assert cell_words([0]) == "the top left (row 1, column 1 of 8x8)"
    assert cell_words([27, 28, 35, 36]) == "the centre (rows 4 to 5, columns 4 to 5 of 8x8)"
    assert cell_words([59, 60]) == "the bottom centre (row 8, columns 4 to 5 of 8x8)"


def coloured(tmp_path: Path, pairs: Sequence[Sequence[tuple[int, int]]], **values: object) -> Planter:
    """Three kinds of causes, red, green and blue, of somewhat different brightness, anywhere; others are white."""
    generator = np.random.default_rng(2)
    planter = Planter(tmp_path, **values)
    for kind, theirs in enumerate(pairs):
        for number in range(12 - kind):
            colour = np.eye(3)[kind] * generator.uniform(0.9, 1) + generator.uniform(0, 0.05, 3) * (1 - np.eye(3)[kind])
            label, predicted = theirs[number % len(theirs)]
            planter.plant(label, predicted, cause=generator.choice(64, 8, replace=False).tolist(), colour=colour.tolist())
    return planter


def test_an_odd_point_makes_no_clusters_of_the_others() -> None:
    points = np.random.default_rng(0).standard_normal((30, 5))
    odd = np.concatenate([points, np.full((1, 5), 40.0)])
    assert not cluster_numbers(odd, None, 0).any()
    assert sorted(np.bincount(cluster_numbers(odd, 2, 0)).tolist()) == [1, 30]  # as asked for
    two = np.concatenate([points, points + 40])
    assert cluster_numbers(two, None, 0).tolist() == [0] * 30 + [1] * 30


def test_what_most_failures_look_like_is_no_shortcut() -> None:
    """A cluster of nearly all failures beside a few odd ones: it is tight only because these are not in it."""
    failures = [SimpleNamespace(sample=f"s{n}", label=n % 3, predicted=(n + 1) % 3) for n in range(20)]
    results = SimpleNamespace(names=("cat", "dog", "fox"), failures=failures)
    for inside, found in ((10, 1), (11, 0), (18, 0)):
        groups = (failures[:inside], failures[inside:])
        clusters = [
            Cluster(n, tuple(failed.sample for failed in group), group[0].sample, (0, 1), 4, (0.001, 0.5)[n])
            for n, group in enumerate(groups)
        ]
        assert len(_appearances(results, clusters)) == found


def test_planted_clusters_are_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_SIMULATIONS", 79)
    many, one = [(0, 1), (0, 1), (1, 2), (2, 0)], [(2, 1)]
    planter = coloured(tmp_path, [many, one, one])
    planter.plant(cause=None)
    summary = planter.summary()
    assert summary.unclustered == ""
    wanted = [{f"s{n:03d}" for n in numbers} for numbers in (range(12), range(12, 23), range(23, 33))]
    assert [set(cluster.members) for cluster in summary.clusters] == wanted
    assert [cluster.number for cluster in summary.clusters] == [0, 1, 2]
    assert [cluster.top_pair for cluster in summary.clusters] == [(0, 1), (2, 1), (2, 1)]
    assert [(cluster.top_count, cluster.has_main_pair) for cluster in summary.clusters] == [(6, False), (11, True), (10, True)]
    assert summary.cluster_of == {**{sample: n for n, members in enumerate(wanted) for sample in members}, "s033": -1}
    assert all(cluster.tightness_p < 0.05 for cluster in summary.clusters)
    appearances = [shortcut for shortcut in summary.shortcuts if shortcut.kind == "appearance"]
    assert [set(shortcut.samples) for shortcut in appearances] == wanted[:1], "the others mislead within one pair only"
    assert "12 failures of 3 different pairs, such as cat taken for dog" in appearances[0].text
    for cluster in summary.clusters:
        assert cluster.medoid in cluster.members
    monkeypatch.setattr(clusters, "_SIMULATIONS", 1)
    fixed = coloured(tmp_path / "fixed", [many, one, one], clusters=2).summary()
    assert len(fixed.clusters) == 2


def test_points_without_clusters_have_no_tight_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_SIMULATIONS", 79)
    generator = np.random.default_rng(0)
    cloud = generator.standard_normal((60, 4)) * [4, 2, 1, 1]
    numbers = cluster_numbers(cloud, None, 0)
    assert (np.diff(np.bincount(numbers)) <= 0).all(), "the largest first"
    assert (holm(tightness_test(cloud, numbers, 0)) > 0.05).all()
    split = cloud + np.where(np.arange(60)[:, None] < 30, -1, 1) * [30, 0, 0, 0]
    numbers = cluster_numbers(split, None, 0)
    assert sorted(np.bincount(numbers).tolist()) == [30, 30]
    assert (holm(tightness_test(split, numbers, 0)) < 0.05).all()
    assert np.isnan(tightness_test(cloud, np.zeros(60, dtype=int), 0)).all()


def test_coordinates_keep_the_distances_of_standardised_features() -> None:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((12, 20)) * generator.uniform(0.1, 50, 20)
    features[:, 3] = 7
    varied = np.delete(features, 3, axis=1)
    standard = (varied - varied.mean(axis=0)) / varied.std(axis=0)
    points = coordinates(features)
    for a in range(12):
        for b in range(a):
            assert np.linalg.norm(points[a] - points[b]) == pytest.approx(np.linalg.norm(standard[a] - standard[b]))
    medoid = medoid_of(points)
    sums = [sum(np.linalg.norm(points[a] - points[b]) for b in range(12)) for a in range(12)]
    assert medoid == int(np.argmin(sums))
    equal = coordinates(np.ones((5, 3)))
    assert cluster_numbers(equal, None, 0).tolist() == cluster_numbers(equal, 4, 0).tolist() == [0] * 5


def test_what_the_model_is_sure_of_and_nothing_repairs_is_suspected(tmp_path: Path) -> None:
    planter = Planter(tmp_path, black_box(), min_confidence=0.9)
    planter.plant(cause=None, sufficient=None, confidence=0.91)
    planter.plant(cause=None, sufficient=None, confidence=0.89)
    planter.plant(cause=[3], sufficient=None, confidence=0.99)
    planter.plant(cause=None, sufficient=[3], confidence=0.99)
    planter.plant(2, 0, cause=None, sufficient=None, confidence=0.97, highest=0.25)
    summary = planter.summary()
    assert [suspect.sample for suspect in summary.suspected] == ["s004", "s000"]
    assert summary.suspected[0].reason == (
        "The model is sure of cat (0.97), and no set of regions, shown or hidden, makes it say ship (at most 0.25)."
    )
    rows = list(csv.DictReader(io.StringIO(failures_csv(summary))))
    assert [row["suspected_label"] for row in rows] == ["yes", "", "", "", "yes"]


def test_groups_are_compared_with_the_rest(tmp_path: Path) -> None:
    planter = Planter(tmp_path, black_box())
    planter.by_group = {"day": (100, 5), "dusk": (100, 7), "night": (100, 40)}
    sizes = {"day": [1, 2, 1, 2, 3], "dusk": [2, 1, 2, 1, 2, 1, 1], "night": [20, 30, 25, 22, 31, 18, 40, 33]}
    for group, each in sizes.items():
        for size in each:
            planter.plant(group=group, cause=range(size))
    planter.plant(group="night", cause=None)
    rows = planter.summary().groups
    assert [row.group for row in rows] == ["night", "dusk", "day"]
    by_name = {row.group: row for row in rows}
    tests = {g: stats.fisher_exact([[w, n - w], [52 - w, 300 - n - 52 + w]]).pvalue for g, (n, w) in planter.by_group.items()}
    for group, p in zip(tests, holm(list(tests.values())), strict=True):
        assert by_name[group].p_error == pytest.approx(p)
    assert by_name["night"].p_error < 1e-6 and by_name["night"].p_area < 0.01
    assert by_name["night"].error_rate.estimate == pytest.approx(0.4) and by_name["night"].error_rate.count == 100
    same(by_name["dusk"].cause_area, bootstrap_interval(np.array(sizes["dusk"]) / 64))
    assert by_name["night"].cause_area.count == 8
    del planter.by_group["dusk"]
    planter.failures = [failed for failed in planter.failures if failed.group != "dusk"]
    night, day = planter.summary().groups
    assert night.p_error == day.p_error == pytest.approx(stats.fisher_exact([[5, 95], [40, 60]]).pvalue), "one test, not two"
    planter.by_group = {"night": (100, 40)}
    (alone,) = planter.summary().groups
    assert math.isnan(alone.p_error) and math.isnan(alone.p_area)


def test_groups_without_a_difference_are_not_told_apart(tmp_path: Path) -> None:
    planter = Planter(tmp_path, black_box())
    planter.by_group = {"a": (50, 8), "b": (60, 9), "c": (40, 7)}
    for number in range(24):
        planter.plant(group="abc"[number % 3], cause=range(1 + number // 3))
    assert all(row.p_error > 0.5 and row.p_area > 0.5 for row in planter.summary().groups)


def test_highest_confidences_leave_out_what_is_not_known(tmp_path: Path) -> None:
    planter = Planter(tmp_path, black_box())
    for value in (0.2, 0.4, None):
        planter.plant(highest=value)
    highest = planter.summary().highest
    assert list(highest) == [0.25, 0.5, 0.75, 1.0]
    assert math.isnan(highest[0.25].estimate) and highest[0.25].count == 0
    same(highest[0.5], bootstrap_interval([0.2, 0.4]))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_failures_or_none(folder: Path, tmp_path: Path, count: int) -> None:
    classifier = linear()
    known = predictions(folder, classifier)
    right = [s for s, (label, predicted) in known.items() if label == predicted]
    wrong = [s for s, (label, predicted) in known.items() if label != predicted]
    data = tmp_path / "list.csv"
    rows = [f"{folder}/{sample},{sample.split('/')[0]}" for sample in [*right[:4], *wrong[:count]]]
    data.write_text("path,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    found = run_failures(settings(data), tmp_path / "out")
    summary = summarise_failures(found)
    files = write_failures(summary, tmp_path / "out")
    assert len(summary.cluster_of) == len(found.failures) == count
    assert summary.clusters == summary.shortcuts == () and "clusters need at least 3" in summary.unclustered
    plain = json.loads(files.json.read_text(encoding="utf-8"))
    assert plain["looked_at"] == 4 + count and len(plain["failures"]) == count and files.html.exists()
    assert len(files.csv.read_text(encoding="utf-8").splitlines()) == 1 + count
    console = Console(record=True, width=120, file=io.StringIO())
    print_failures(summary, console)
    assert f"{count} of {4 + count} images" in console.export_text()


def test_the_tables_hold_what_was_found(results: FailureResults, tmp_path: Path) -> None:
    unclustered = summarise_failures(results)
    assert (unclustered.clusters, unclustered.unclustered) == ((), "the causes of these failures form no groups")
    summary = summarise_failures(replace(results, settings=replace(results.settings, clusters=2)))
    assert summary.clusters and summary.unclustered == ""
    files = write_failures(summary, tmp_path)
    rows = list(csv.DictReader(io.StringIO(files.csv.read_text(encoding="utf-8"))))
    plain = json.loads(files.json.read_text(encoding="utf-8"))
    assert len(rows) == len(results.failures) == len(plain["failures"])
    for row, kept, failed in zip(rows, plain["failures"], results.failures, strict=True):
        found = failed.found
        assert row["sample"] == kept["sample"] == failed.sample and row["text"] == kept["text"] == found["text"]
        assert (row["label"], row["predicted"]) == (NAMES[failed.label], NAMES[failed.predicted])
        assert kept["cause"] == found["cause"] and kept["highest_confidence"] == found["highest_confidence"]
        assert row["cause_regions"] == ("" if found["cause"] is None else str(len(found["cause"]["regions"])))
        assert row["sufficient_area"] == ("" if found["sufficient"] is None else f"{found['sufficient']['area']:.6g}")
        assert (results.out / row["explanation"]).resolve() == failed.truth.resolve()
        assert int(row["cluster"] or -1) == summary.cluster_of[failed.sample]
    assert {(c["label"], c["predicted"]): c["images"] for c in plain["confusions"]} == {
        (NAMES[label], NAMES[predicted]): count for (label, predicted), count in results.confusions.items()
    }
    console = Console(record=True, width=120, file=io.StringIO())
    print_failures(summary, console)
    text = console.export_text()
    assert "linear: classes confused" in text and "As many random regions would lie at the border" in text
    assert f"{summary.highest[1.0].estimate:.2f} [" in text


def test_a_model_without_features_has_no_clusters(tmp_path: Path) -> None:
    planter = Planter(tmp_path, black_box())
    for _ in range(4):
        planter.plant()
    summary = planter.summary()
    assert summary.clusters == () and "black box" in summary.unclustered
    assert set(summary.cluster_of.values()) == {-1}


# the command


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("animals"), count=3, side=32, names=("cat", "dog"))


def test_the_command(run_command: Run, animals: Path, tmp_path: Path) -> None:
    arguments = ("debug", "--data", animals, "--model", "zoo:cnn", "--regions", "grid", "--region-count", 4, "--most", 2, "--out", tmp_path)
    code, out, err = run_command(*arguments)
    assert code == 0, err
    assert "classes confused" in out and f"report: {tmp_path / 'atlas.html'}" in out
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"records.jsonl", "explanations", "failures.csv", "pairs.csv", "failures.json", "atlas.html"}
    plain = json.loads((tmp_path / "failures.json").read_text(encoding="utf-8"))
    assert plain["looked_at"] == 6 and len(plain["failures"]) == 2
    assert plain["model"]["name"] == "zoo:cnn" and plain["model"]["precision"] == "float32"
    before = (tmp_path / "failures.json").read_bytes()
    assert run_command(*arguments)[0] == 0
    assert (tmp_path / "failures.json").read_bytes() == before
    failed = plain["failures"][0]
    code, out, err = run_command(*arguments, "--only", failed["sample"])
    assert code == 0, err
    assert f"{failed['sample']}: {failed['text']}" in out
    figure = tmp_path / failed["sample"].replace("/", "-")
    assert f"figure: {figure}" in out
    with Image.open(figure) as picture:
        assert min(picture.size) > 200 and np.asarray(picture.convert("L")).std() > 5
    file = tmp_path / "study.toml"
    file.write_text(f'data = "{animals}"\nmodel = "zoo:cnn"\nregions = "grid"\nregion_options = {{ count = 4 }}\n', encoding="utf-8")
    code, out, err = run_command("debug", file, "--only", failed["sample"], "--out", tmp_path)
    assert code == 0 and f"{failed['sample']}: {failed['text']}" in out, err
    code, out, err = run_command("debug", file, "--no-measure", "--most", 2, "--out", tmp_path)
    assert code == 0 and "classes confused" in out, err
    assert json.loads((tmp_path / "failures.json").read_text(encoding="utf-8"))["failures"] == plain["failures"]


def test_the_command_says_what_failed(run_command: Run, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    for path in animals.rglob("*.png"):
        (data / path.parent.name).mkdir(parents=True, exist_ok=True)
        (data / path.parent.name / path.name).write_bytes(path.read_bytes())
    (data / "cat" / "1.png").write_bytes(b"no image")
    arguments = ("debug", "--data", data, "-m", "zoo:cnn", "--regions", "grid", "--region-count", 4, "--most", 1, "--out", tmp_path / "out")
    code, out, err = run_command(*arguments)
    assert code == 2 and "1 measurement failed, such as cat/1.png" in err and len(err.strip().splitlines()) == 1
    assert "report:" in out, "the others count"

    def stopped(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "explain_failure", stopped)
    code, _, err = run_command(*arguments, "--seed", 1)
    assert code == 130 and "the same command continues" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--data"),
        (("--data", "photos"), "no labels"),
        (("--data", "nowhere"), "no such folder or list"),
        (("--data", "photos", "--regions", "hexagons"), "regions is 'hexagons'"),
        (("--data", "photos", "--fill", "linear"), "fill is 'linear'"),
        (("--data", "photos", "--search", "best"), "search is 'best'"),
        (("--data", "photos", "--only", "nothing.png"), "no sample 'nothing.png'"),
        (("--data", "photos", "--only", "chelsea.png"), "chelsea.png has no label"),
    ],
)
def test_bad_commands_are_one_line(run_command: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run_command("debug", *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert message in err and len(err.strip().splitlines()) == 1


def test_an_image_that_is_right_alone_but_wrong_in_its_batch_counts_as_right(folder: Path, tmp_path: Path) -> None:
    plain = run_failures(settings(folder), tmp_path / "plain")
    near = plain.failures[0]

    class Near(nn.Module):
        """Two classes so close that the batch decides: right about the near image alone."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = linear().module
            self.image = nn.Parameter(near_inputs)

        def forward(self, x: Tensor) -> Tensor:
            found = self.inner(x)
            if len(x) == 1 and torch.equal(x, self.image):
                return torch.nn.functional.one_hot(torch.tensor([near.label]), 3).float()
            return found

    near_inputs = linear().inputs(plain.dataset[near.index].image)
    model = at.Classifier(Near().eval(), size=SIDE, class_names=NAMES, scores="logits", name="near")
    found = run_failures(settings(folder, model=model), tmp_path / "near")
    assert near.sample not in {failed.sample for failed in found.failures} and not found.broken
    assert found.right == plain.right + 1 and len(found.failures) == len(plain.failures) - 1
    assert found.confusions.get((near.label, near.predicted), 0) == plain.confusions[near.label, near.predicted] - 1
    with counted_images(model) as forwarded:
        again = run_failures(settings(folder, model=model), tmp_path / "near")
    assert forwarded == [] and (again.right, again.confusions) == (found.right, found.confusions), "what is known is not asked again"
    assert held(FAILURES, settings(folder, model=model), tmp_path / "near").right == found.right
