"""Runs that are killed at any moment, and machines that lose power: the next run ends with the same tables."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from toys import image_folder

import attribution as at
from evaluation.studies import STUDIES
from evaluation.study.run import run

TABLES = (".csv", ".json", ".html")
OPTIONS: dict[str, dict[str, Any]] = {
    "benchmark": {
        "models": ["zoo:cnn"],
        "methods": ["greedy", "saliency", "rise"],
        "metrics": ["insertion", "deletion", "mu_fidelity"],
        "regions": "grid",
        "region_options": {"count": 4},
    },
    "pareto": {"models": ["zoo:cnn"], "methods": ["budget", "greedy"], "budgets": [8, 20], "partitions": ["grid:4"], "confidence": 0.0},
    "debug": {"model": "zoo:cnn", "regions": "grid", "region_options": {"count": 4}},
    "neurons": {"samples": 8, "paths": ["neuron_path", "random"], "steps": 3, "kept": [1], "shares": [1.0], "depths": [2]},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, cnn: at.Classifier) -> Path:
    """Eight pictures. Half of them lie under the class that zoo:cnn sees in them."""
    folder = tmp_path_factory.mktemp("data")
    for number, picture in enumerate(sorted(image_folder(folder / "made", 8).rglob("*.png"))):
        seen = int(cnn.logits(cnn.inputs(at.load_image(picture)))[0].argmax())
        to = folder / "photos" / cnn.class_names[(seen + number % 2) % 10] / f"{number}.png"
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, to)
    return folder / "photos"


def finish(name: str, data: Path, out: Path) -> None:
    """Run a study to its end, and write its page."""
    study = STUDIES[name]
    results = run(study, study.settings.make({"data": str(data), **OPTIONS[name]}), out)
    study.write(study.summarise(results), out)


def tables(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in TABLES and path.name != "study.json"}


class Disk:
    """What a machine that loses power would find: of each file what was synchronised last, under the names that folders had then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents: dict[int, bytes] = {}  # inode -> what is on the disk
        self.names: dict[Path, int] = {}  # path -> inode
        self.states: list[dict[Path, bytes]] = []

    def sync(self, handle: int, real: Any) -> None:
        real(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_dir():
            self.names = {name: inode for name, inode in self.names.items() if name.parent != path}
            self.names |= {each: each.stat().st_ino for each in path.iterdir() if each.is_file()}
        else:
            self.contents[os.fstat(handle).st_ino] = path.read_bytes()
        self.states.append({name: self.contents.get(inode, b"") for name, inode in self.names.items()})

    def restore(self, state: dict[Path, bytes], to: Path) -> None:
        for path, content in state.items():
            if path.is_relative_to(self.folder):
                target = to / path.relative_to(self.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)


@contextmanager
def watched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk, real = Disk(folder), os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: disk.sync(handle, real))
        yield disk


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.filterwarnings("ignore:.*damaged")
def test_a_power_cut_at_any_moment_loses_no_table(name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(tmp_path / "out", monkeypatch) as disk:
        finish(name, data, tmp_path / "out")
    wanted = tables(tmp_path / "out")
    assert wanted and len(disk.states) > 10
    moments = random.Random(0).sample(range(len(disk.states)), 8)
    for moment in moments:
        again = tmp_path / f"after-{moment}"
        disk.restore(disk.states[moment], again)
        finish(name, data, again)
        assert tables(again) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_runs_killed_at_random_moments_end_with_the_same_tables(name: str, workers: int, data: Path, tmp_path: Path) -> None:
    """13 kills of each study, alone and with two processes: 104 in all."""
    finish(name, data, tmp_path / "whole")
    wanted = tables(tmp_path / "whole")
    program = (
        "import sys; from pathlib import Path; from test_kills import OPTIONS, STUDIES, run\n"
        "from evaluation.study.executors import executor_of\n"
        "name, data, out, workers = sys.argv[1:]\n"
        "study = STUDIES[name]\n"
        "if __name__ == '__main__':\n"
        "    print('begun', flush=True)\n"
        "    settings = study.settings.make({'data': data, 'workers': int(workers), **OPTIONS[name]})\n"
        "    results = run(study, settings, out, executor_of(settings))\n"
        "    study.write(study.summarise(results), Path(out))\n"
    )
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "program.py"), name, str(data), str(tmp_path / "out"), str(workers)]
    places = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    draws, longest = random.Random(f"{name} {workers}"), 0.0
    for kill in range(14):
        started = time.monotonic()
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": places},
            start_new_session=True,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            begun = time.monotonic() - started
            if kill == 0:  # how long a whole run takes
                assert process.wait(300) == 0
                longest = time.monotonic() - started - begun
            else:
                time.sleep(draws.uniform(0, longest))
                os.killpg(process.pid, signal.SIGKILL)
        if kill == 0 or ((tmp_path / "out" / "records.jsonl").exists() and draws.random() < 0.3):
            shutil.rmtree(tmp_path / "out")  # begin again, so that early moments are met too
    finish(name, data, tmp_path / "out")
    assert tables(tmp_path / "out") == wanted
