"""What the public reference implementation computed on the two zoo classifiers, record by record."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import reference
import torch

import attribution as at


@pytest.fixture(scope="module")
def records(shared: Path) -> list[dict]:
    return json.loads((shared / "golden" / "submodular_search.json").read_text())


def explained(record: dict, shared: Path, classifiers: dict[str, at.Classifier], regions: dict[str, np.ndarray]) -> at.Explanation:
    classifier = classifiers[record["model"]]
    if "probability" in record:
        head = classifier.module.fc if record["model"] == "cnn" else classifier.module.head
        classifier = classifier.with_prototypes(head.weight)
    with tarfile.open(shared / "data" / "cifar10" / "test.tar") as archive:
        data = archive.extractfile(record["file"]).read()
    return at.explain(
        data,
        classifier,
        record["target"],
        regions=regions[record["regions"]].astype(np.int64),
        search=record["algorithm"],
        weights=at.ScoreWeights(**record["weights"]),
        pending=record["pending_samples"],
    )


@pytest.mark.slow
def test_region_search_of_all_records(shared: Path, records: list[dict], cnn: at.Classifier, vit: at.Classifier) -> None:
    check(records, shared, {"cnn": cnn, "vit": vit})


def test_region_search_of_some_records(shared: Path, records: list[dict], cnn: at.Classifier, vit: at.Classifier) -> None:
    """As few as have each model, search, pending, probability and kind of regions among them; all of them by ``make test-all``."""

    def traits(record: dict) -> set:
        named = {("pending", record["pending_samples"]), ("probability", "probability" in record), ("regions", record["regions"][-5:])}
        return named | {("model", record["model"]), ("search", record["algorithm"])}

    chosen, missing = [], set.union(*map(traits, records))
    while missing:
        chosen.append(max(records, key=lambda record: len(traits(record) & missing)))
        missing -= traits(chosen[-1])
    check(chosen, shared, {"cnn": cnn, "vit": vit})


def check(records: list[dict], shared: Path, classifiers: dict[str, at.Classifier]) -> None:
    regions = dict(np.load(shared / "golden" / "submodular_search_regions.npz"))
    identical = 0
    for record in records:
        explanation = explained(record, shared, classifiers, regions)
        identical += explanation.order.tolist() == record["order"]
        if explanation.order.tolist() != record["order"]:
            continue
        where = f"{record['model']} {record['file']} {record['regions']}"
        insertion, deletion = explanation.insertion_scores[1:], explanation.deletion_scores[1:]
        assert np.allclose(insertion, record["insertion_scores"], atol=1e-4), where
        assert np.allclose(1 - deletion, record["one_minus_deletion_scores"], atol=1e-4), where
        if "insertion_auc" in record:
            assert explanation.insertion_auc == pytest.approx(record["insertion_auc"], abs=1e-3), where
            assert explanation.deletion_auc == pytest.approx(record["deletion_auc"], abs=1e-3), where
            assert explanation.confidence == pytest.approx(record["full_score"], abs=1e-5), where
            assert explanation.fill_confidence == pytest.approx(record["baseline_score"], abs=1e-5), where
    assert identical >= 0.97 * len(records)


def test_naive_loop_agrees_with_the_reference(shared: Path, records: list[dict], cnn: at.Classifier) -> None:
    """The loop in tests/reference.py, on real scores: the second derivation is itself held against the published code."""
    record = next(r for r in records if r["model"] == "cnn" and r["regions"].endswith("slico") and r["pending_samples"] == 8)
    labels = torch.from_numpy(np.load(shared / "golden" / "submodular_search_regions.npz")[record["regions"]].astype(np.int64))
    with tarfile.open(shared / "data" / "cifar10" / "test.tar") as archive:
        image = at.load_image(archive.extractfile(record["file"]).read())
    masked = at.MaskedInputs(cnn, image, labels, torch.zeros_like(image))
    cache: dict[frozenset[int], float] = {}

    def f(subset: frozenset[int]) -> float:
        if subset not in cache:
            row = torch.zeros(1, masked.size, dtype=torch.bool)
            row[0, list(subset)] = True
            logits = cnn.logits(masked(torch.cat([row, ~row])))
            p = logits.softmax(1)[:, record["target"]].tolist()
            cache[subset] = 20 * p[0] + 5 * (1 - p[1]) + 0.01 * reference.entropy_confidence(logits[0])
        return cache[subset]

    order, _ = reference.bidirectional(f, masked.size, 8)
    assert order == record["order"]
