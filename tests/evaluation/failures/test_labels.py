"""Failures of models with independent labels and of models with one score: missing and false labels."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import attribution as at
from evaluation.data.recipes import open_dataset
from evaluation.failures.measure import explain_sample
from evaluation.failures.results import FailureResults
from evaluation.failures.settings import FailureSettings
from evaluation.failures.study import FAILURES, run_failures
from evaluation.failures.summary import summarise_failures
from evaluation.study.run import held

NAMES = ("left", "right", "bright")
SIDE = 8


class Halves(nn.Module):
    """Three labels by closed form: the left half is bright, the right half is bright, the whole is bright."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gray = x.mean(dim=1)
        return 20 * (torch.stack([gray[:, :, :4].mean((1, 2)), gray[:, :, 4:].mean((1, 2)), gray.mean((1, 2))], dim=1) - 0.5)


def classifier() -> at.Classifier:
    return at.Classifier(Halves().eval(), size=SIDE, class_names=NAMES, scores="sigmoid", name="halves")


# the brightness of each half, the labels that the list says, and the decisions of the model that are wrong (label: what it says)
PICTURES: dict[str, tuple[float, float, str, dict[str, str]]] = {
    "both": (0.9, 0.9, "left|right|bright", {}),
    "dark": (0.1, 0.1, "", {}),
    "false": (0.9, 0.2, "", {"left": "left", "bright": "bright"}),
    "missing": (0.3, 0.9, "left|right|bright", {"left": "no left"}),
}


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    rows = []
    for name, (left, right, labels, _) in PICTURES.items():
        pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
        pixels[:, :4], pixels[:, 4:] = round(255 * left), round(255 * right)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        rows.append((f"{name}.png", labels))
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "labels"), *rows])
    return folder / "list.csv"


def settings(data: Path, **values: Any) -> FailureSettings:
    given = {"data": str(data), "model": classifier(), "regions": "grid", "region_options": {"rows": 1, "columns": 4}, "search": "greedy"}
    return FailureSettings.make({**given, **values})


@pytest.fixture(scope="module")
def results(listed: Path, tmp_path_factory: pytest.TempPathFactory) -> FailureResults:
    return run_failures(settings(listed), tmp_path_factory.mktemp("run"))


def test_missing_and_false_labels_are_found(results: FailureResults) -> None:
    assert not results.broken
    assert (results.looked_at, results.right, results.noun) == (12, 9, "decision")
    names = results.names
    found = {failed.sample: (names[failed.label], names[failed.predicted]) for failed in results.failures}
    wanted = {}
    for picture, (*_, wrong) in PICTURES.items():
        for label, said in wrong.items():
            other = label if said.startswith("no ") else f"no {label}"
            wanted[f"{picture}.png:{label}"] = (other, said)
    assert found == wanted


def test_the_cause_of_a_false_label_is_the_half_that_makes_it(results: FailureResults) -> None:
    failed = next(each for each in results.failures if each.sample == "false.png:left")
    cause = failed.found["cause"]
    assert cause is not None and set(cause["regions"]) <= {0, 1}
    assert "The model says left (1.00), the image shows no left (0.00)." in failed.found["text"]
    alone = at.explain_failure(
        open_dataset(failed_list(results), class_names=NAMES)[failed.index].image,
        classifier().of_label("left"),
        "no left",
        regions="grid",
        region_options={"rows": 1, "columns": 4},
        search="greedy",
        seed=failed.explanation().provenance["settings"]["seed"],
    )
    assert alone.plain()["cause"] == cause


def failed_list(results: FailureResults) -> str:
    return results.settings.data


def test_a_second_run_measures_nothing_and_the_page_names_the_labels(results: FailureResults, tmp_path: Path) -> None:
    kept = held(FAILURES, results.settings, results.out)
    assert [failed.found for failed in kept.failures] == [failed.found for failed in results.failures]
    FAILURES.write(summarise_failures(kept), tmp_path)
    page = (tmp_path / "atlas.html").read_text()
    assert "The model is wrong about 3 of 12 decisions" in page
    assert "no left" in page
    with (tmp_path / "failures.csv").open() as file:
        rows = {row["sample"]: (row["label"], row["predicted"]) for row in csv.DictReader(file)}
    assert rows["missing.png:left"] == ("left", "no left")


def test_one_decision_by_its_id(listed: Path) -> None:
    failure = explain_sample(settings(listed), "missing.png:left")
    assert (failure.predicted_name, failure.true_name) == ("no left", "left")
    with pytest.raises(at.NotMisclassified):
        explain_sample(settings(listed), "both.png:left")
    with pytest.raises(at.UserError, match=r"no sample 'gone\.png': expected an id such as '.*\.png:left'"):
        explain_sample(settings(listed), "gone.png:left")


def test_what_does_not_fit_is_refused(listed: Path, tmp_path: Path) -> None:
    exclusive = at.Classifier(Halves().eval(), size=SIDE, class_names=NAMES, scores="softmax", name="classes")
    with pytest.raises(at.UserError, match="list has several labels for an image, and classes has classes of which one is right"):
        run_failures(settings(listed, model=exclusive), tmp_path)
    with pytest.raises(at.UserError, match=r"halves has independent labels.*give classifier\.of_label\(LABEL\)"):
        at.explain_failure(torch.rand(3, SIDE, SIDE), classifier(), "left")
    (tmp_path / "two.csv").write_text("path,label,labels\na.png,left,left\n")
    with pytest.raises(at.UserError, match="line 1: columns 'label' and 'labels': keep"):
        open_dataset(tmp_path / "two.csv")


def test_a_model_with_one_score_is_debugged_like_one_of_two_classes(tmp_path: Path) -> None:
    class Bright(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Halves()(x)[:, 2:]

    for name, values in {"no": (0.1, 0.2, 0.9), "yes": (0.9, 0.8)}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for index, value in enumerate(values):
            Image.fromarray(np.full((SIDE, SIDE, 3), round(255 * value), dtype=np.uint8)).save(tmp_path / "data" / name / f"{index}.png")
    one = at.Classifier(Bright().eval(), size=SIDE, class_names=["no", "yes"], scores="sigmoid", name="bright")
    results = run_failures(settings(tmp_path / "data", model=one), tmp_path / "out")
    assert (results.looked_at, results.right) == (5, 4)
    (failed,) = results.failures
    assert (failed.sample, results.names[failed.label], results.names[failed.predicted]) == ("no/2.png", "no", "yes")
