"""Every state in which an output folder can be found: what the command answers, measuring and reading, as a table."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from toys import image_folder

Run = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("nothing_hangs")
BENCHMARK = ("--model", "zoo:cnn", "--methods", "saliency", "--regions", "grid", "--region-count", "4", "--metrics", "insertion")
TABLES = ("summary.csv", "summary.json", "report.html")


class State(NamedTuple):
    """What is done to a finished folder, and how the answers begin: "" is exit code 0 without a word, an error exit code 2."""

    damage: Callable[[Path], object]
    measuring: str
    reading: str


def emptied(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def folder(path: Path) -> None:
    emptied(path)
    path.mkdir()
    (path / "x").write_text("x")


def text(path: Path, words: str = "x") -> None:
    emptied(path)
    path.write_text(words)


def pipe(path: Path) -> None:
    emptied(path)
    os.mkfifo(path)


def endless(path: Path) -> None:
    emptied(path)
    path.symlink_to("/dev/zero")


def log(out: Path) -> Path:
    return out / "records.jsonl"


def mark(out: Path) -> Path:
    return out / "study.json"


def map_of(out: Path) -> Path:
    return min((out / "explanations").rglob("*.npz"))


def curve_of(out: Path) -> Path:
    return min((out / "curves").rglob("*.npz"))


NO_FILE = "it is a folder, a pipe, a device or a socket"
MAP, CURVE = "warning: OUT/explanations/zoo-cnn/saliency/", "warning: OUT/curves/zoo-cnn/saliency/"
NOTHING = "error: OUT holds no records of these settings: give those of the run, or measure first"
WHOSE = "error: OUT/study.json is damaged, so whose folder this is cannot be known: remove that file, or choose another folder"
STATES = {
    "log empty": State(lambda out: log(out).write_bytes(b""), "", NOTHING),
    "log of zeros": State(lambda out: log(out).write_bytes(bytes(4096)), "", NOTHING),
    "log binary": State(
        lambda out: log(out).write_bytes(bytes(range(256)) * 20),
        "warning: OUT/records.jsonl lines 1, 2, 3, ... are damaged or edited: what was there is measured again",
        "error: OUT/records.jsonl lines 1, 2, 3, ... are damaged or edited: run again without --no-measure",
    ),
    "log in UTF-16": State(
        lambda out: log(out).write_bytes(log(out).read_text().encode("utf-16")),
        "warning: OUT/records.jsonl lines ",
        "error: OUT/records.jsonl lines ",
    ),
    "log twice": State(lambda out: log(out).write_bytes(log(out).read_bytes() * 2), "", ""),
    "log gone": State(lambda out: log(out).unlink(), "", "error: OUT/records.jsonl is not there: name the output folder of an earlier run"),
    "log a folder": State(
        lambda out: folder(log(out)),
        f"error: cannot write OUT/records.jsonl ({NO_FILE}): choose another output folder",
        "error: OUT/records.jsonl cannot be read (it is a folder: expected a file)",
    ),
    "log a pipe": State(
        lambda out: pipe(log(out)),
        f"error: cannot write OUT/records.jsonl ({NO_FILE}): choose another output folder",
        "error: OUT/records.jsonl cannot be read (it is a pipe, a device or a socket: expected a regular file)",
    ),
    "log without end": State(
        lambda out: endless(log(out)),
        f"error: cannot write OUT/records.jsonl ({NO_FILE}): choose another output folder",
        "error: OUT/records.jsonl cannot be read (it is a pipe, a device or a socket: expected a regular file)",
    ),
    "log of a process bad": State(
        lambda out: text(out / "records-1.jsonl", "xx\n"),
        "warning: OUT/records-1.jsonl line 1 is damaged or edited: what was there is measured again",
        "error: OUT/records-1.jsonl line 1 is damaged or edited: run again without --no-measure",
    ),
    "log of a process a folder": State(
        lambda out: folder(out / "records-1.jsonl"),
        f"error: cannot write OUT/records-1.jsonl ({NO_FILE}): choose another output folder",
        "error: OUT/records-1.jsonl cannot be read (it is a folder: expected a file)",
    ),
    "mark empty": State(lambda out: text(mark(out), ""), WHOSE, WHOSE),
    "mark a list": State(lambda out: text(mark(out), "[]"), WHOSE, WHOSE),
    "mark a folder": State(lambda out: folder(mark(out)), WHOSE, WHOSE),
    "mark of another study": State(
        lambda out: text(mark(out), '{"study": "debug"}'),
        "error: OUT holds the study 'debug', whose page 'benchmark' would overwrite: choose another output folder (--out)",
        "error: OUT holds the study 'debug', whose page 'benchmark' would overwrite: choose another output folder (--out)",
    ),
    "mark of no study": State(
        lambda out: text(mark(out), '{"study": 5}'), "error: OUT holds the study 5, whose page", "error: OUT holds the study 5, whose page"
    ),
    "mark gone": State(lambda out: mark(out).unlink(), "", ""),
    "page a folder": State(
        lambda out: folder(out / "report.html"), "error: cannot write OUT/report.html (", "error: cannot write OUT/report.html ("
    ),
    "table a folder": State(
        lambda out: folder(out / "summary.csv"), "error: cannot write OUT/summary.csv (", "error: cannot write OUT/summary.csv ("
    ),
    "table gone": State(lambda out: (out / "summary.csv").unlink(), "", ""),
    "figures a file": State(lambda out: text(out / "figures"), "error: cannot write OUT/figures/1-", "error: cannot write OUT/figures/1-"),
    "maps a file": State(lambda out: text(out / "explanations"), f"{MAP}*.npz is missing: what it held is measured again", MAP),
    "maps gone": State(lambda out: emptied(out / "explanations"), f"{MAP}*.npz is missing: what it held is measured again", MAP),
    "curves a file": State(lambda out: text(out / "curves"), f"{CURVE}*.npz is missing: what it held is measured again", CURVE),
    "curves gone": State(lambda out: emptied(out / "curves"), f"{CURVE}*.npz is missing: what it held is measured again", CURVE),
    "map gone": State(lambda out: map_of(out).unlink(), f"{MAP}*.npz is missing: what it held is measured again", MAP),
    "map empty": State(lambda out: text(map_of(out), ""), f"{MAP}*.npz is damaged: what it held is measured again", MAP),
    "map a folder": State(lambda out: folder(map_of(out)), f"{MAP}*.npz is damaged: what it held is measured again", MAP),
    "map a pipe": State(lambda out: pipe(map_of(out)), f"{MAP}*.npz is damaged: what it held is measured again", MAP),
    "map without end": State(lambda out: endless(map_of(out)), f"{MAP}*.npz is damaged: what it held is measured again", MAP),
    "map another file": State(
        lambda out: shutil.copy(curve_of(out), map_of(out)), f"{MAP}*.npz is damaged: what it held is measured again", MAP
    ),
    "map of another image": State(
        lambda out: shutil.copy(max((out / "explanations").rglob("*.npz")), map_of(out)), f"{MAP}*.npz is damaged: what it held", MAP
    ),
    "curve gone": State(lambda out: curve_of(out).unlink(), f"{CURVE}*.npz is missing: what it held is measured again", CURVE),
    "curve a folder": State(lambda out: folder(curve_of(out)), f"{CURVE}*.npz is damaged: what it held is measured again", CURVE),
    "curve another file": State(
        lambda out: shutil.copy(map_of(out), curve_of(out)), f"{CURVE}*.npz is damaged: what it held is measured again", CURVE
    ),
    "left by a killed run": State(lambda out: text(out / ".part-x.npz"), "", ""),
    "a folder of such a name": State(lambda out: folder(out / ".part-x"), "", ""),
}
BLOCKED = ("maps a file", "curves a file", "map a folder", "curve a folder")  # what is measured again has no place


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("states") / "data", 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("name", STATES)
def test_the_answer_to_a_folder(run_command: Run, data: Path, tmp_path: Path, name: str) -> None:
    finished, state = tmp_path / "finished", STATES[name]

    def answer(out: Path, *more: str) -> tuple[int, list[str]]:
        code, _, err = run_command("benchmark", *BENCHMARK, "--data", data, "--out", out, *more)
        return code, err.replace(str(out), "OUT").splitlines()

    assert answer(finished) == (0, [])
    tables = {table: (finished / table).read_bytes() for table in TABLES}
    for more, expected in (((), state.measuring), (("--no-measure",), state.reading)):
        out = Path(shutil.copytree(finished, tmp_path / f"out{len(more)}"))
        state.damage(out)
        code, lines = answer(out, *more)
        first, *_ = [*lines, ""]
        begins, _, ends = expected.partition("*")
        assert first.startswith(begins) and ends in first and bool(first) == bool(expected), lines
        errors = [line for line in lines if line.startswith("error: ")]
        blocked = expected.startswith("error") or (name in BLOCKED and not more)
        assert (code, len(errors)) == ((2, 1) if blocked else (0, 0)), lines
        kept = {table: (out / table).read_bytes() for table in TABLES if (out / table).is_file()}
        if not expected.startswith("warning") or not more:  # what is left out is not in the tables
            assert kept.items() <= tables.items()
