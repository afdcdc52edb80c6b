"""Actors of Ray: the same tables as in one process, also where a worker, a node or the study itself is killed."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toys import image_folder

import attribution as at
from evaluation.benchmark.measure import measure_benchmark
from evaluation.studies import STUDIES
from evaluation.study.executors import executor_of
from evaluation.study.ray_workers import RayWorkers, _Worker
from evaluation.study.run import run

Run = Callable[..., tuple[int, str, str]]
BENCHMARK = STUDIES["benchmark"]
OPTIONS: dict[str, Any] = {
    "models": ["zoo:cnn", "zoo:vit"],
    "methods": ["budget", "saliency"],
    "metrics": ["insertion", "deletion", "mu_fidelity"],
    "regions": "grid",
    "region_options": {"count": 9},
}
COMMAND = [
    *(sys.executable, "-m", "vision_attribution", "benchmark", "--model", "zoo:cnn,zoo:vit", "--methods", "budget,saliency"),
    *("--metrics", "insertion,deletion,mu_fidelity", "--regions", "grid", "--region-count", "9"),
]
TABLES = ("summary.csv", "summary.json", "comparisons.csv", "report.html")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "data", 6)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tables of a run in one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    settings = BENCHMARK.settings.make({"data": str(data), **OPTIONS})
    BENCHMARK.write(BENCHMARK.summarise(run(BENCHMARK, settings, out)), out)
    return tables(out)


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


def tables(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in TABLES}


def test_the_engine_is_a_setting(data: Path) -> None:
    found = executor_of(BENCHMARK.settings.make({"data": str(data), "engine": "ray", "workers": 3, "cpus_per_worker": 2}))
    assert isinstance(found, RayWorkers) and (found.count, found.address, found.cpus) == (3, None, 2)
    with pytest.raises(at.UserError, match="engine is 'spark': expected one of processes, ray"):
        BENCHMARK.settings.make({"data": str(data), "engine": "spark"})


def test_what_an_actor_does(data: Path, tmp_path: Path) -> None:
    """Without Ray: it measures the units of a stage that it is asked for, and sends records with their files."""
    settings = BENCHMARK.settings.make({"data": str(data), **OPTIONS, "models": ["zoo:cnn"]})
    worker = _Worker((measure_benchmark, settings, 1, str(tmp_path)))
    worker.enter(0, [])
    records, files = worker.measure(1, {}, {})
    assert len(records) == 4 and len(files) == 2
    explained = next(key for key, record in records.items() if "evaluations" in record)
    kept = {name: data for name, data in files.items() if name.startswith("explanations")}
    again, sent = worker.measure(1, {explained: records[explained]}, kept)
    assert set(again) == set(records) - {explained}
    assert set(sent) == set(files) - set(kept)
    values = [{key: each["value"] for key, each in found.items() if "value" in each} for found in (records, again)]
    assert values[0] == values[1]


def test_a_study_that_cannot_begin_tells_why(tmp_path: Path) -> None:
    settings = BENCHMARK.settings.make({"data": str(tmp_path / "no"), **OPTIONS})
    worker = _Worker((measure_benchmark, settings, 1, str(tmp_path)))
    with pytest.raises(at.UserError, match="no such folder or list"):
        worker.enter(0, [])


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("nowhere", "the address of Ray is 'nowhere': expected HOST:PORT"),
        ("127.0.0.1:", "the address of Ray is '127.0.0.1:': expected HOST:PORT"),
        ("127.0.0.1:99999", "the address of Ray is '127.0.0.1:99999': expected HOST:PORT"),
        ("127.0.0.1:1", "Ray at 127.0.0.1:1 does not answer (Connection refused)"),
    ],
)
def test_an_address_that_does_not_answer(run_command: Run, data: Path, tmp_path: Path, address: str, line: str) -> None:
    pytest.importorskip("ray")
    more = ("--model", "zoo:cnn", "--methods", "saliency", "--engine", "ray", "--ray-address", address)
    code, _, err = run_command("benchmark", "--data", data, *more, "--out", tmp_path / "out")
    assert (code, err.count("\n"), line in err) == (2, 1, True), err
    assert not (tmp_path / "out").exists()


def start(data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "--data", str(data), "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_records(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has kept some records."""
    log = out / "records.jsonl"
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < count):
        time.sleep(0.05)


def pids(words: str) -> list[int]:
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words in each.read_text(errors="replace"):
                found.append(int(each.parent.name))
        except OSError:
            continue
    return sorted(found)


@pytest.mark.slow
def test_a_killed_worker_is_replaced(data: Path, whole: dict[str, bytes], tmp_path: Path, no_token: None) -> None:
    pytest.importorskip("ray")
    process = start(data, tmp_path / "out", "--engine", "ray", "--workers", "2")
    wait_for_records(tmp_path / "out", 6, process)
    workers = pids("ray::_Worker")
    assert workers, process.communicate()
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert tables(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_killed_study_goes_on_with_another_executor(data: Path, whole: dict[str, bytes], tmp_path: Path, no_token: None) -> None:
    pytest.importorskip("ray")
    process = start(data, tmp_path / "out", "--engine", "ray", "--workers", "2")
    wait_for_records(tmp_path / "out", 6, process)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "out" / "report.html").exists()
    process = start(data, tmp_path / "out", "--workers", "2")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert tables(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_worker_without_the_model(data: Path, tmp_path: Path, no_token: None) -> None:
    pytest.importorskip("ray")
    factory = tmp_path / "model.py"
    factory.write_text(
        "import torchvision\ndef make():\n    if 'ray::' in open('/proc/self/cmdline').read():\n"
        "        raise OSError('no weights on this node')\n    return torchvision.models.resnet18()\n"
    )
    options = ("--model", f"{factory}:make", "--image-size", "32", "--methods", "saliency", "--metrics", "insertion", "--data", str(data))
    command = [*COMMAND[:4], *options, "--engine", "ray", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, err = process.communicate(timeout=200)
    assert (process.returncode, err.count("\n")) == (2, 1), err
    assert err.startswith("error: a Ray worker: ") and "no weights on this node" in err


@pytest.fixture
def cluster(no_token: None) -> Iterator[tuple[str, list[int]]]:
    """Two nodes on this machine: the address, and the processes of the second node."""
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = str(Path(sys.executable).with_name("ray"))
    head = [ray, "start", "--head", f"--port={port}", "--num-cpus=1", "--include-dashboard=false", "--disable-usage-stats"]
    subprocess.run(head, check=True, capture_output=True, timeout=120)
    first = pids("raylet/raylet")
    subprocess.run([ray, "start", f"--address=127.0.0.1:{port}", "--num-cpus=1"], check=True, capture_output=True, timeout=120)
    yield f"127.0.0.1:{port}", [each for each in pids("raylet/raylet") if each not in first]
    subprocess.run([ray, "stop", "--force"], check=False, capture_output=True, timeout=120)


@pytest.mark.slow
def test_a_node_that_is_stopped_in_the_middle(data: Path, whole: dict[str, bytes], tmp_path: Path, cluster: tuple[str, list[int]]) -> None:
    address, node = cluster
    assert len(node) == 1
    process = start(data, tmp_path / "out", "--engine", "ray", "--workers", "2", "--ray-address", address)
    wait_for_records(tmp_path / "out", 8, process)
    os.kill(node[0], signal.SIGKILL)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert tables(tmp_path / "out") == whole


def test_an_answer_is_awaited_without_spinning(tmp_path: Path) -> None:
    """An actor that is asked before its thread has reached the stage waits for it."""
    reached = threading.Event()

    def measure(served: Any) -> None:
        reached.wait(5)
        served.stage([1, 2], lambda item: None)

    worker = _Worker((measure, BENCHMARK.settings.make({"data": "photos"}), 1, str(tmp_path)))
    said: queue.Queue[str] = queue.Queue()
    thread = threading.Thread(target=lambda: (worker.enter(0, []), said.put("ready")))
    thread.start()
    assert said.empty()
    reached.set()
    assert said.get(timeout=20) == "ready"
    assert worker.measure(0, {}, {}) == ({}, {})
    thread.join()
