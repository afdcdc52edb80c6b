"""Output folders that were damaged, edited, shared or left by killed runs: what is damaged is measured again, and said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from toys import image_folder

import attribution as at
import evaluation as ev
from evaluation.study.records import read_log

Run = Callable[..., tuple[int, str, str]]
BENCHMARK = ("--model", "zoo:cnn", "--methods", "greedy,saliency", "--regions", "grid", "--region-count", "4", "--metrics", "insertion")
TABLES = ("summary.csv", "summary.json", "report.html")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of a small benchmark, and its results in out."""
    folder = tmp_path_factory.mktemp("finished")
    image_folder(folder / "data", 2)
    (folder / "run.json").write_text(json.dumps([*BENCHMARK, "--data", str(folder / "data")]), encoding="utf-8")
    assert benchmark(folder, folder / "out")[0] == 0
    return folder


def benchmark(folder: Path, out: Path, *more: str) -> tuple[int, str, str]:
    options = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "vision_attribution", "benchmark", *options, *more, "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout, result.stderr


def copied(finished: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", str(finished / "out"), str(to)], check=True)
    return to


def tables(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in TABLES}


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "one byte": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) + data[len(data) // 2 + 1 :],
    "text": lambda data: b"no archive",
    "an empty archive": lambda data: b"PK\x05\x06" + bytes(18),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["explanations", "curves"])
def test_a_damaged_file_is_measured_again(finished: Path, tmp_path: Path, kind: str, damage: str) -> None:
    out = copied(finished, tmp_path / "out")
    broken = sorted((out / kind).rglob("*.npz"))[0]
    broken.write_bytes(DAMAGE[damage](broken.read_bytes()))
    code, _, err = benchmark(finished, out, "--no-measure")
    assert f"warning: {broken} is damaged: what it held is left out" in err
    code, _, err = benchmark(finished, out)
    assert code == 0, err
    assert [line for line in err.splitlines() if line.startswith("warning")] == [
        f"warning: {broken} is damaged: what it held is measured again"
    ]
    assert tables(out) == tables(finished / "out")


EDITS: dict[str, Callable[[str], str]] = {
    "a score": lambda line: line.replace('"value": 0.', '"value": 0.9'),
    "a type": lambda line: line.replace('"value": 0.', '"value": "high", "was": 0.'),
    "no fields": lambda line: json.dumps({"key": json.loads(line)["key"]}),
    "a list": lambda line: "[1, 2]",
    "no JSON": lambda line: line[:-3],
}


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_record_is_not_believed(finished: Path, tmp_path: Path, edit: str) -> None:
    out = copied(finished, tmp_path / "out")
    log = out / "records.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()
    at_line = next(number for number, line in enumerate(lines) if '"value": 0.' in line)
    lines[at_line] = EDITS[edit](lines[at_line])
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    code, _, err = benchmark(finished, out, "--no-measure")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {log} line {at_line + 1} is damaged or edited: run again without --no-measure")
    code, _, err = benchmark(finished, out)
    assert (code, err) == (0, f"warning: {log} line {at_line + 1} is damaged or edited: what was there is measured again\n")
    assert tables(out) == tables(finished / "out")
    assert read_log(log).keys() == read_log(finished / "out" / "records.jsonl").keys()


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.0, 0.5, 2.0, 3.0, 3.5, 4.0, 5.0, 6.0])
def test_one_line_after_an_interrupt_at_any_moment(finished: Path, tmp_path: Path, moment: float) -> None:
    """Also while Python and the libraries are imported, and with several processes at work."""
    options = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    for workers in ("1", "2"):
        out = tmp_path / f"out{workers}"
        command = [sys.executable, "-m", "vision_attribution", "benchmark", *options, "--workers", workers, "--out", str(out)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        time.sleep(0.15 + moment)  # by then Python itself runs
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes get it
        printed, err = process.communicate(timeout=120)
        if "report: " in printed:  # it was done before
            continue
        assert process.returncode == 130, err
        assert err.startswith("interrupted") and err.count("\n") == 1, err


def test_what_killed_runs_left_is_swept_at_the_next_start(tmp_path: Path) -> None:
    chosen = ev.make_settings({"data": str(image_folder(tmp_path / "data", 1)), "models": ["zoo:cnn"], "methods": ["saliency"]})
    ev.run_benchmark(chosen, tmp_path / "out")
    folder = next((tmp_path / "out" / "explanations").rglob("*.npz")).parent
    left = [folder / ".part-key-abc.npz", tmp_path / "out" / ".part-report-xyz.html"]
    for path in left:
        path.write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ev.run_benchmark(chosen, tmp_path / "out")
    assert not any(path.exists() for path in left)


def test_files_of_an_explanation_differ_in_their_seconds_only(run_command: Run, tmp_path: Path) -> None:
    photo = next(image_folder(tmp_path / "data", 1).rglob("*.png"))
    fast = ("--model", "zoo:cnn", "--regions", "grid", "--region-count", "4", "--evaluations", "8")
    for out in ("one", "two"):
        assert run_command("explain", photo, *fast, "--out", tmp_path / out)[0] == 0
    one, two = (json.loads(next((tmp_path / out).glob("*.json")).read_text(encoding="utf-8")) for out in ("one", "two"))
    for record in (one, two):
        assert record["provenance"].pop("seconds") > 0
    assert one == two
    saved = [at.Explanation.load(next((tmp_path / out).glob("*.npz"))) for out in ("one", "two")]
    for explanation in saved:
        explanation.provenance.pop("seconds")
    assert saved[0] == saved[1]
    assert len({next((tmp_path / out).glob("*.png")).read_bytes() for out in ("one", "two")}) == 1
    for suffix in ("svg", "pdf"):
        written = [tmp_path / f"{number}.{suffix}" for number in range(2)]
        for explanation, path in zip(saved, written, strict=True):
            explanation.plot().savefig(path)
        assert written[0].read_bytes() == written[1].read_bytes()


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        ("train_pets", ("nowhere", "--out", "a.pt"), "--out is a.pt: expected a file that ends in .safetensors"),
        ("train_pets", ("nowhere", "--rate", "x"), "Invalid value for '--rate'"),
        ("train_zoo", ("nowhere",), "nowhere"),
        ("train_zoo", (), "Missing argument 'data'"),
        ("make_pictures", ("--pictures",), "No such option: --pictures"),
        ("bench_speed", ("--photos", "x"), "No such option: --photos"),
        ("planted_failures", ("--nothing",), "No such option: --nothing"),
    ],
)
def test_scripts_answer_as_the_command_does(script: str, arguments: tuple[str, ...], line: str) -> None:
    path = Path(__file__).parents[2] / "scripts" / f"{script}.py"
    result = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 2, result.stderr
    assert line in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
