"""Tables from results whose every number is known."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import attribution as at
import evaluation as ev
from evaluation.benchmark.results import Explained, Failure, Results, Score
from evaluation.benchmark.summary import AXIS, comparisons_csv, score_matrix
from evaluation.metrics.registry import Measure
from evaluation.statistics.comparisons import holm, sign_flip
from evaluation.statistics.intervals import bootstrap_interval

INSERTION = Measure("insertion", "regions, black, p", "higher")
DELETION = Measure("deletion", "regions, black, p", "lower")


def synthetic(folder: Path, scores: dict[str, np.ndarray]) -> Results:
    """Results of one model "m": scores[method] is [N], insertion and deletion take the same values."""
    measures = (INSERTION, DELETION)
    settings = ev.make_settings({"data": "photos", "models": ["m"], "methods": list(scores), "metrics": [m.metric for m in measures]})
    count = len(next(iter(scores.values())))
    samples = tuple(f"{index}.png" for index in range(count))
    found, explained = [], []
    for method, values in scores.items():
        for sample, value in zip(samples, values, strict=True):
            found += [Score("m", sample, method, 0, measure, float(value), 0.25) for measure in measures]
            path = folder / f"{method}-{sample}.npz"
            line = np.array([0, 0.5, 1], dtype=np.float32)
            np.savez(path, insertion_area=line, insertion=line * value, deletion_area=line, deletion=(1 - line) * value)
            curves = {measures[0].protocol: path}
            explained.append(Explained("m", sample, method, 0, path, curves, 7, 0.5, method == "constant", value > 0.9, 0, 0))
    return Results(settings, {"m": {}}, {"m": samples}, tuple(found), tuple(explained), (), folder)


@pytest.fixture
def scores() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    base = generator.uniform(0.2, 0.6, 40)
    return {"saliency": base, "grad_cam": base + 0.2, "random": base + generator.normal(0, 0.05, 40), "constant": np.full(40, 0.1)}


def test_columns_hold_means_intervals_ranks_and_letters(tmp_path: Path, scores: dict[str, np.ndarray]) -> None:
    summary = ev.summarise(synthetic(tmp_path, scores))
    column = summary.column("m", INSERTION)
    assert column[0].method == "grad_cam" and column[-1].method == "constant"
    assert [e.rank for e in column] == [1, 2, 3, 4]
    for e in column:
        expected = bootstrap_interval(scores[e.method])
        assert e.interval == expected and e.interval.method in ("bca", "percentile", "percentile (bca undefined)")
        assert e.interval.estimate == pytest.approx(scores[e.method].mean())
    reversed_column = summary.column("m", DELETION)
    assert reversed_column[0].method == "constant" and reversed_column[-1].method == "grad_cam"


def test_letters_follow_the_corrected_tests(tmp_path: Path, scores: dict[str, np.ndarray]) -> None:
    summary = ev.summarise(synthetic(tmp_path, scores))
    tests = summary.comparisons["m", INSERTION]
    raw = {pair: sign_flip(scores[pair[0]], scores[pair[1]]) for pair in tests}
    adjusted = dict(zip(raw, holm(list(raw.values())), strict=True))
    letters = {e.method: set(e.group) for e in summary.column("m", INSERTION)}
    for (a, b), p in adjusted.items():
        assert tests[a, b].adjusted_p == pytest.approx(p)
        assert bool(letters[a] & letters[b]) == (p >= 0.05), (a, b)
    assert letters["saliency"] & letters["random"] and not letters["saliency"] & letters["grad_cam"]
    best, same = summary.separation("m", INSERTION)
    assert (best, same) == ("grad_cam", ())


def test_missing_numbers_are_counted_and_left_out(tmp_path: Path, scores: dict[str, np.ndarray]) -> None:
    scores["saliency"] = scores["saliency"].copy()
    scores["saliency"][:3] = np.nan
    results = synthetic(tmp_path, scores)
    dropped = tuple(e for e in results.explained if (e.method, e.sample) != ("saliency", "0.png"))
    results = replace(results, explained=dropped, failures=(Failure("m", "0.png", "saliency", 0, "broken"),))
    entries = {e.method: e for e in ev.summarise(results).column("m", INSERTION)}
    assert (entries["saliency"].validity.total, entries["saliency"].validity.finite, entries["saliency"].validity.failed) == (40, 37, 1)
    assert entries["saliency"].interval.count == 37
    assert entries["constant"].validity.constant_maps == 40
    assert entries["grad_cam"].validity.saturated == 0


def test_csv_says_which_protocol_a_number_belongs_to(tmp_path: Path, scores: dict[str, np.ndarray]) -> None:
    rows = list(csv.DictReader(io.StringIO(ev.summary_csv(ev.summarise(synthetic(tmp_path, scores))))))
    assert len(rows) == 8
    first = rows[0]
    assert (first["model"], first["metric"], first["protocol"], first["direction"]) == ("m", "insertion", "regions, black, p", "higher")
    assert (first["rank"], first["method"], first["images"], first["evaluations"], first["area"]) == ("1", "grad_cam", "40", "7", "0.25")
    assert float(first["low"]) < float(first["mean"]) < float(first["high"])
    assert float(first["mean"]) == pytest.approx(scores["grad_cam"].mean(), rel=1e-5)


def test_tables_do_not_depend_on_the_order_of_records(tmp_path: Path, scores: dict[str, np.ndarray]) -> None:
    results = synthetic(tmp_path, scores)
    shuffled = np.random.default_rng(1).permutation(len(results.scores))
    other = replace(results, scores=tuple(results.scores[i] for i in shuffled), explained=results.explained[::-1])
    assert ev.summary_csv(ev.summarise(other)) == ev.summary_csv(ev.summarise(results))
    first, second = ev.summarise(results).curves[0], ev.summarise(other).curves[0]
    assert np.allclose(first.insertion, second.insertion)


def test_mean_curves_lie_in_their_bands(tmp_path: Path, scores: dict[str, np.ndarray]) -> None:
    summary = ev.summarise(synthetic(tmp_path, scores))
    curve = next(c for c in summary.curves if c.method == "grad_cam")
    assert np.allclose(curve.insertion, AXIS * scores["grad_cam"].mean(), atol=1e-6)
    assert np.allclose(curve.deletion, (1 - AXIS) * scores["grad_cam"].mean(), atol=1e-6)
    low, high = curve.insertion_band
    assert (low <= curve.insertion + 1e-12).all() and (curve.insertion <= high + 1e-12).all()
    width = 2 * 1.96 * scores["grad_cam"].std() / np.sqrt(40)
    assert high[-1] - low[-1] == pytest.approx(width, rel=0.15)


def test_agreement_of_rankings_between_protocols(tmp_path: Path) -> None:
    """Three methods, ranked alike under one fill and reversed under another: tau is 1 and -1. The control does not count."""
    methods = {"saliency": 0.1, "grad_cam": 0.2, "layer_cam": 0.3, "random": 0.25}
    settings = ev.make_settings(
        {"data": "photos", "models": ["m"], "methods": list(methods), "metrics": ["insertion"], "fills": ["black", "white", "mean"]}
    )
    found = []
    for fill, sign in (("black", 1), ("white", 1), ("mean", -1)):
        measure = Measure("insertion", f"regions, {fill}, p", "higher")
        found += [Score("m", f"{i}", name, 0, measure, sign * value, None) for name, value in methods.items() for i in range(3)]
    results = Results(settings, {"m": {}}, {"m": ("0", "1", "2")}, tuple(found), (), (), tmp_path)
    taus = {(a.first.split(", ")[1], a.second.split(", ")[1]): a.tau for a in ev.summarise(results).agreements}
    assert taus == {("black", "white"): 1, ("black", "mean"): -1, ("white", "mean"): -1}


def test_score_matrix_keeps_the_images_in_order(tmp_path: Path) -> None:
    results = synthetic(tmp_path, {"random": np.array([0.3, 0.1, 0.2])})
    missing = replace(results, scores=results.scores[2:])
    assert np.array_equal(score_matrix(missing, "m", INSERTION)["random"], [np.nan, 0.1, 0.2], equal_nan=True)


def test_no_mean_stands_without_an_interval(tmp_path: Path) -> None:
    summary = ev.summarise(synthetic(tmp_path, {"random": np.array([0.3]), "saliency": np.array([0.2])}))
    rows = list(csv.DictReader(io.StringIO(ev.summary_csv(summary))))
    assert all(row["mean"] == row["low"] == row["high"] == "" for row in rows)
    assert summary.separation("m", INSERTION) is None


def test_seeds_that_disagree_are_told(tmp_path: Path) -> None:
    """The maps of seed 1 are those of seed 0 plus a constant, or reversed: their rank correlation is 1 and -1."""
    settings = ev.make_settings({"data": "photos", "models": ["m"], "methods": ["rise", "hsic"], "metrics": ["insertion"], "seeds": 2})
    image, samples = torch.rand(3, 4, 4), ("0", "1", "2")
    scores, explained = [], []
    for method, sign in (("rise", 1), ("hsic", -1)):
        for index, sample in enumerate(samples):
            for seed in (0, 1):
                values = torch.arange(16.0).view(4, 4) * (1 if seed == 0 else sign) + seed
                path = tmp_path / f"{method}{sample}{seed}.npz"
                at.Explanation(image, 0, ("a", "b"), torch.tensor([0.5, 0.5]), pixel_map=values).save(path)
                scores.append(Score("m", sample, method, seed, INSERTION, index + 0.1 * seed, None))
                explained.append(Explained("m", sample, method, seed, path, {}, 7, 0.5, False, False, 0, 0))
    results = Results(settings, {"m": {}}, {"m": samples}, tuple(scores), tuple(explained), (), tmp_path)
    spread = {e.method: e.spread for e in ev.summarise(results).entries}
    assert (spread["rise"].rank_correlation, spread["rise"].stable) == (pytest.approx(1), True)
    assert (spread["hsic"].rank_correlation, spread["hsic"].stable) == (pytest.approx(-1), False)
    assert spread["rise"].seed_sd == pytest.approx(0.1 / np.sqrt(2))
    assert spread["rise"].image_sd == pytest.approx(1)


def test_every_pair_is_compared_by_both_tests(tmp_path: Path, scores: dict[str, np.ndarray]) -> None:
    summary = ev.summarise(synthetic(tmp_path, scores))
    rows = [row for row in csv.DictReader(io.StringIO(comparisons_csv(summary))) if row["metric"] == "insertion"]
    assert len(rows) == 6
    raw = [ev.wilcoxon(scores[row["first"]], scores[row["second"]]) for row in rows]
    for row, p, adjusted in zip(rows, raw, holm(raw), strict=True):
        first, second = scores[row["first"]], scores[row["second"]]
        assert float(row["difference"]) == pytest.approx((first - second).mean(), abs=1e-5)
        assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])
        assert float(row["sign_flip_p"]) == pytest.approx(sign_flip(first, second), rel=1e-4)
        assert (float(row["wilcoxon_p"]), float(row["wilcoxon_holm"])) == (pytest.approx(p, rel=1e-4), pytest.approx(adjusted, rel=1e-4))
