"""Shards: each measures its part in a folder of its own, and the merged folder has the tables of one run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from toys import image_folder

import attribution as at
from evaluation.studies import STUDIES
from evaluation.study.run import Shard, run
from evaluation.study.shards import merged, parse_shard, plain_values_of, run_shard

Run = Callable[..., tuple[int, str, str]]
OPTIONS: dict[str, dict[str, Any]] = {
    "benchmark": {"models": ["zoo:cnn"], "methods": ["saliency", {"method": "rise", "options": {"samples": 8}}], "metrics": ["insertion"]},
    "grids": {"models": ["zoo:cnn"], "methods": ["saliency"], "metrics": ["gridpg"], "grids": 1, "confidence": 1e-9, "layers": ["input"]},
    "pareto": {"models": ["zoo:cnn"], "methods": ["budget", "greedy"], "budgets": [8, 20], "partitions": ["grid:4"], "confidence": 0.0},
    "debug": {"model": "zoo:cnn", "regions": "grid", "region_options": {"count": 4}},
    "neurons": {"samples": 8, "paths": ["neuron_path", "random"], "steps": 3, "kept": [1], "shares": [1.0], "depths": [2]},
}
FAST = ("--model", "zoo:cnn", "--methods", "saliency", "--metrics", "insertion", "--regions", "grid", "--region-count", "4")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, cnn: at.Classifier) -> Path:
    """Eight pictures. Half of them lie under the class that zoo:cnn sees in them, the others under four classes."""
    folder = tmp_path_factory.mktemp("data")
    for number, picture in enumerate(sorted(image_folder(folder / "made", 8).rglob("*.png"))):
        seen = int(cnn.logits(cnn.inputs(at.load_image(picture)))[0].argmax())
        to = folder / "photos" / cnn.class_names[number if number % 2 else seen] / f"{number}.png"
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, to)
    return folder / "photos"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, cnn: at.Classifier) -> Path:
    """Pictures of four classes, as zoo:cnn sees them."""
    folder = tmp_path_factory.mktemp("seen") / "photos"
    noise = torch.rand(400, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pictures = F.interpolate(noise, size=(32, 32), mode="bicubic").clamp(0, 1)
    classes = cnn.logits(torch.cat([cnn.inputs(picture) for picture in pictures])).argmax(dim=1).tolist()
    for index in sorted(set(classes), key=classes.count, reverse=True)[:4]:
        to = folder / cnn.class_names[index] / f"{index}.png"
        to.parent.mkdir(parents=True)
        Image.fromarray((pictures[classes.index(index)] * 255).byte().permute(1, 2, 0).numpy()).save(to)
    return folder


def tables(out: Path) -> dict[str, bytes]:
    names = [path for path in out.iterdir() if path.suffix in (".csv", ".json", ".html")]
    return {path.name: path.read_bytes() for path in names if path.name not in ("study.json", "shard.json")}


def finish(name: str, settings: Any, out: Path) -> None:
    study = STUDIES[name]
    study.write(study.summarise(run(study, settings, out)), out)


@pytest.mark.parametrize("name", ["benchmark", *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS if name != "benchmark")])
def test_merged_shards_have_the_tables_of_one_run(data: Path, seen: Path, tmp_path: Path, name: str) -> None:
    kind = "benchmark" if name == "grids" else name
    settings = STUDIES[kind].settings.make({"data": str(seen if name == "grids" else data), **OPTIONS[name]})
    finish(kind, settings, tmp_path / "whole")
    counts = [run_shard(STUDIES[kind], settings, tmp_path / f"part{number}", Shard(number, 3)) for number in (1, 2, 3)]
    assert any(counts) and not list(tmp_path.glob("part*/report.html"))
    found, made = merged([tmp_path / f"part{number}" for number in (3, 1, 2)], tmp_path / "joined", STUDIES)
    assert (found, made) == (kind, settings)
    calls: list[tuple[int, int, str]] = []
    results = run(STUDIES[kind], made, tmp_path / "joined", progress=lambda *call: calls.append(call))
    STUDIES[kind].write(STUDIES[kind].summarise(results), tmp_path / "joined")
    assert tables(tmp_path / "joined") == tables(tmp_path / "whole")


def test_shards_share_the_work(data: Path, tmp_path: Path) -> None:
    settings = STUDIES["benchmark"].settings.make({"data": str(data), **OPTIONS["benchmark"]})
    held = []
    for number in (1, 2, 3):
        run_shard(STUDIES["benchmark"], settings, tmp_path / f"part{number}", Shard(number, 3))
        held.append({path.name for path in (tmp_path / f"part{number}" / "explanations").rglob("*.npz")})
    assert [len(names) for names in held] == [6, 5, 5]
    assert len(set.union(*held)) == 16


def test_the_command(run_command: Run, data: Path, tmp_path: Path) -> None:
    code, out, err = run_command("benchmark", *FAST, "--data", data, "--out", tmp_path / "whole")
    assert code == 0, err
    for number in (1, 2):
        code, _, err = run_command("benchmark", *FAST, "--data", data, "--shard", f"{number}/2", "--out", tmp_path / f"s{number}")
        assert code == 0, err
    code, out, err = run_command("merge", tmp_path / "s1", tmp_path / "s2", "--out", tmp_path / "joined")
    assert (code, err) == (0, "") and f"report: {tmp_path / 'joined'}" in out.replace("\n", "")
    assert tables(tmp_path / "joined") == tables(tmp_path / "whole")
    answers = {
        ("merge", tmp_path / "s1", "--out", tmp_path / "x"): "error: shards 2/2 are missing: give the folders of all 2",
        ("merge", tmp_path / "whole", "--out", tmp_path / "x"): "holds no shard (no shard.json): give folders that --shard wrote",
        ("merge", tmp_path / "s1", tmp_path / "s2", "--out", tmp_path / "s1"): "s1 holds a shard itself: choose another output folder",
        (
            "benchmark",
            *FAST,
            "--data",
            data,
            "--shard",
            "3/2",
            "--out",
            tmp_path / "x",
        ): "error: shard is '3/2': expected a part of several",
        ("benchmark", *FAST, "--data", data, "--shard", "0/2", "--out", tmp_path / "x"): "error: shard is '0/2'",
        ("benchmark", *FAST, "--data", data, "--shard", "a", "--out", tmp_path / "x"): "error: shard is 'a'",
        ("benchmark", *FAST, "--data", data, "--shard", "1/2", "--no-measure", "--out", tmp_path / "x"): "error: --shard measures and",
        (
            "benchmark",
            *FAST,
            "--data",
            data,
            "--ray-address",
            "1.2.3.4:5",
            "--out",
            tmp_path / "x",
        ): "error: ray_address is '1.2.3.4:5', but",
        (
            "benchmark",
            *FAST,
            "--data",
            data,
            "--shard",
            "1/3",
            "--out",
            tmp_path / "s1",
        ): "s1 holds shard 1/2 of this study: each shard needs",
        ("benchmark", *FAST, "--data", data, "--shard", "1/2", "--out", tmp_path / "whole"): "whole holds a study that is no shard",
        ("benchmark", *FAST, "--data", tmp_path / "no", "--shard", "1/2", "--out", tmp_path / "x"): "no such folder or list",
    }
    for arguments, line in answers.items():
        code, _, err = run_command(*arguments)
        assert (code, err.count("\n")) == (2, 1) and line in err, arguments
        assert not (tmp_path / "x").exists(), arguments


def test_shards_of_other_settings_are_refused(data: Path, tmp_path: Path) -> None:
    make = STUDIES["benchmark"].settings.make
    plain = {"data": str(data), **OPTIONS["benchmark"]}
    run_shard(STUDIES["benchmark"], make({**plain, "samples": 2}), tmp_path / "s1", Shard(1, 2))
    run_shard(STUDIES["benchmark"], make({**plain, "samples": 3}), tmp_path / "s2", Shard(2, 2))
    with pytest.raises(at.UserError, match=r"s2 has other settings than .*s1: samples is 3 and 2; expected shards of one study"):
        merged([tmp_path / "s1", tmp_path / "s2"], tmp_path / "joined", STUDIES)
    run_shard(STUDIES["benchmark"], make({**plain, "samples": 2}), tmp_path / "s3", Shard(2, 3))
    with pytest.raises(at.UserError, match=r"expected shards of one study"):
        merged([tmp_path / "s1", tmp_path / "s3"], tmp_path / "joined", STUDIES)
    mark = tmp_path / "s1" / "shard.json"
    for text in ("", "[]", "{}", '{"study": 5}', '{"study": "benchmark", "shard": "x", "settings": {}, "told": {}, "done": true}'):
        mark.write_text(text)
        with pytest.raises(at.UserError, match=r"shard.json is damaged .* measure this shard again in another folder"):
            merged([tmp_path / "s1"], tmp_path / "joined", STUDIES)
    assert not (tmp_path / "joined").exists()


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another seed": (lambda held: held["settings"].update(seed=7), r"shard.json was edited: its settings are not those that were measured"),
    "another model": (lambda held: held["settings"].update(models=["zoo:vit"]), r"shard.json was edited"),
    "another version": (lambda held: held.update(version="0.0.1"), r"s1 was measured by version 0.0.1: expected"),
    "text": (lambda held: held.update(shard="12"), r"shard.json is damaged \(shard is missing or of another kind\)"),
    "infinite": (lambda held: held.update(shard=[1, float("inf")]), r"shard.json is damaged \(shard is"),
    "huge": (lambda held: held.update(shard=[1, 10**9]), r"shard.json is damaged \(shard is"),
    "true": (lambda held: held.update(shard=[True, 2]), r"shard.json is damaged \(shard is"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_shard_is_not_believed(data: Path, tmp_path: Path, name: str) -> None:
    settings = STUDIES["benchmark"].settings.make({"data": str(data), **OPTIONS["benchmark"], "samples": 1})
    run_shard(STUDIES["benchmark"], settings, tmp_path / "s1", Shard(1, 1))
    mark = tmp_path / "s1" / "shard.json"
    held = json.loads(mark.read_text())
    edit, line = EDITS[name]
    edit(held)
    mark.write_text(json.dumps(held))
    with pytest.raises(at.UserError, match=line):
        merged([tmp_path / "s1"], tmp_path / "joined", STUDIES)
    assert not (tmp_path / "joined").exists()


def test_shards_are_left_alone(data: Path, tmp_path: Path) -> None:
    settings = STUDIES["benchmark"].settings.make({"data": str(data), **OPTIONS["benchmark"], "samples": 1})
    run_shard(STUDIES["benchmark"], settings, tmp_path / "s1", Shard(1, 1))
    with pytest.raises(at.UserError, match=r"joined lies in .*s1, a shard: choose an output folder outside of it"):
        merged([tmp_path / "s1"], tmp_path / "s1" / "joined", STUDIES)
    log = tmp_path / "s1" / "records.jsonl"
    log.write_text(log.read_text().replace('"value"', '"worth"', 1))
    with pytest.raises(at.UserError, match=r"records.jsonl line \d+ is damaged or edited: run the command of shard 1/1 again, then merge"):
        merged([tmp_path / "s1"], tmp_path / "joined", STUDIES)
    assert not (tmp_path / "joined").exists()


def test_a_shard_that_was_killed_is_finished_by_the_merged_run(data: Path, tmp_path: Path) -> None:
    settings = STUDIES["benchmark"].settings.make({"data": str(data), **OPTIONS["benchmark"]})
    finish("benchmark", settings, tmp_path / "whole")
    for number in (1, 2):
        run_shard(STUDIES["benchmark"], settings, tmp_path / f"s{number}", Shard(number, 2))
    log, mark = tmp_path / "s2" / "records.jsonl", tmp_path / "s2" / "shard.json"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:5]))
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "done": False}))
    with pytest.warns(UserWarning, match="s2 is not finished: what is missing is measured now"):
        _, made = merged([tmp_path / "s1", tmp_path / "s2"], tmp_path / "joined", STUDIES)
    finish("benchmark", made, tmp_path / "joined")
    assert tables(tmp_path / "joined") == tables(tmp_path / "whole")


def test_settings_go_through_a_file(data: Path) -> None:
    for name, options in OPTIONS.items():
        kind = STUDIES["benchmark" if name == "grids" else name].settings
        settings = kind.make({"data": str(data), **options})
        assert kind.make(json.loads(json.dumps(plain_values_of(settings)))) == settings
    kind = STUDIES["benchmark"].settings
    module = at.Classifier(torch.nn.Flatten(), size=(2, 2), mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(at.UserError, match=r"models has Classifier: a shard needs settings that a file can hold, models by name"):
        plain_values_of(kind.make({"data": str(data), "models": [module]}))


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "0/1", "2/1", "1/2/3", "-1/2", "1.0/2", "9999999999/9999999999"])
def test_a_shard_is_a_part_of_several(text: str) -> None:
    with pytest.raises(at.UserError, match=r"expected a part of several such as 3/16"):
        parse_shard(text)
    assert parse_shard("3/16") == Shard(3, 16)
