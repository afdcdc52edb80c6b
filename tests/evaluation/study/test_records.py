from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attribution as at
from evaluation.study.records import check_study, is_intact, open_log, read_log, store_arrays, stored_arrays, sweep

VALUES = st.one_of(st.none(), st.integers(), st.sampled_from(["", "x", "ü\u2028", "\n"]), st.floats(allow_nan=False, allow_infinity=False))
PLAIN = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


def write(path: Path, count: int, start: int = 0) -> None:
    with open_log(path) as log:
        for index in range(start, start + count):
            log.append(f"k{index}", {"value": index, "name": "ü\u2028"})


def test_what_is_appended_is_read_again_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "records.jsonl"
    write(path, 3)
    write(path, 2, start=3)
    found = read_log(path)
    assert list(found) == ["k0", "k1", "k2", "k3", "k4"]
    assert found["k4"] == {"key": "k4", "value": 4, "name": "ü\u2028"}
    with open_log(path) as log:
        assert "k4" in log and "k5" not in log
        assert log.records == found


@given(records=st.lists(PLAIN, max_size=5), cut=st.integers(0, 400))
def test_a_file_cut_anywhere_keeps_every_complete_line(tmp_path_factory: pytest.TempPathFactory, records: list[dict], cut: int) -> None:
    path = tmp_path_factory.mktemp("log") / "records.jsonl"
    with open_log(path) as log:
        for index, record in enumerate(records):
            log.append(str(index), record)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    complete = whole[:cut].count(b"\n")
    assert list(read_log(path)) == [str(i) for i in range(complete)]
    with open_log(path) as log:
        assert len(log.records) == complete
        log.append("new", {})
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["key"] for line in lines[:-1]] == [*map(str, range(complete)), "new"]
    assert lines[-1] == ""


def test_the_later_of_two_records_with_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write(path, 1)
    with open_log(path) as log:
        log.append("k0", {"value": 9})
    assert read_log(path)["k0"] == {"key": "k0", "value": 9}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write(path, 2)
    good = path.read_bytes()
    for line in (b'{"no key": 1}', b"[]", b"7", b"\x00\x00", b'{"key": "a"}', b'{"key": ["a"], "digest": 1}', b"[" * 100_000):
        path.write_bytes(good[: good.index(b"\n") + 1] + line + b"\n" + good[good.index(b"\n") + 1 :])
        with pytest.raises(at.UserError, match=r"records\.jsonl line 2 is damaged or edited: run again without --no-measure"):
            read_log(path)
        with pytest.warns(UserWarning, match=r"records\.jsonl line 2 is damaged or edited: what was there is measured again$"):
            write(path, 1, start=2)
        assert list(read_log(path)) == ["k0", "k1", "k2"]


def test_an_edited_value_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write(path, 9)
    edited = path.read_text(encoding="utf-8").replace('"value": 3', '"value": 30').replace('"value": 5', '"value": 5.0')
    path.write_text(edited, encoding="utf-8")
    with pytest.raises(at.UserError, match="lines 4, 6 are damaged or edited"):
        read_log(path)
    with pytest.warns(UserWarning, match="lines 4, 6 are"), open_log(path) as log:
        assert list(log.records) == ["k0", "k1", "k2", "k4", "k6", "k7", "k8"]


def test_a_damaged_line_is_blanked_and_no_other_byte_moves(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write(path, 6)
    damaged = path.read_bytes().replace(b"}\n", b"}\nnot a record\n", 2)
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match="lines 2, 4 are damaged"):
        write(path, 0)
    assert path.read_bytes() == damaged.replace(b"not a record", b" " * 12)
    write(path, 1, start=6)
    assert list(read_log(path)) == [f"k{index}" for index in range(7)]


def test_file_names_that_are_no_text_are_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    with open_log(tmp_path / "records.jsonl") as log:
        log.append(name, {"sample": name})
    assert read_log(tmp_path / "records.jsonl") == {name: {"key": name, "sample": name}}


def test_only_whole_archives_are_intact(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    store_arrays(path, a=np.arange(1000), b=np.ones(3))
    whole = path.read_bytes()
    assert is_intact(path) and not is_intact(tmp_path / "none.npz")
    for damaged in (b"", whole[:100], whole[:-1], whole[:500] + b"\xff" + whole[501:], b"PK\x05\x06" + bytes(18), b"x" * 5000):
        path.write_bytes(damaged)
        assert not is_intact(path)


def test_what_killed_runs_were_writing_is_swept(tmp_path: Path) -> None:
    (tmp_path / "curves" / "deep").mkdir(parents=True)
    program = (
        "import os, sys\nfrom attribution.files import whole_file\n"
        "with whole_file(sys.argv[1]) as path:\n    path.write_bytes(b'half')\n    os.kill(os.getpid(), 9)"
    )
    target = tmp_path / "curves" / "deep" / "k.npz"
    assert subprocess.run([sys.executable, "-c", program, str(target)], check=False).returncode == -9
    assert [path.suffix for path in target.parent.iterdir()] == [".npz"] and not target.exists()
    sweep(tmp_path)
    assert list(target.parent.iterdir()) == []


def test_a_field_that_a_line_lacks_is_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with open_log(path) as log:
        log.append("a", {"curves": [{"true": 1}]})
        log.append("b", {"value": 2})
    records = read_log(path)
    assert records["b"] == {"key": "b", "value": 2}
    for read, place in (
        (lambda: records["a"]["value"], r"line 1 has no field 'value'"),
        (lambda: records["a"]["curves"][0]["predicted"], r"line 1 has no field 'predicted'"),
        (lambda: records["b"]["probability"], r"line 2 has no field 'probability'"),
    ):
        with pytest.raises(at.UserError, match=rf"records\.jsonl {place}: remove that line; what it held is measured again"):
            read()


def test_a_folder_belongs_to_one_study(tmp_path: Path) -> None:
    check_study(tmp_path / "new", "benchmark")
    assert not (tmp_path / "new").exists()
    check_study(tmp_path, "benchmark", mark=True)
    check_study(tmp_path, "benchmark", mark=True)
    with pytest.raises(
        at.UserError, match=r"holds the study 'benchmark', whose page 'debug' would overwrite: choose another output folder"
    ):
        check_study(tmp_path, "debug")
    for text in ("", "[]", "{}", '{"study": '):
        (tmp_path / "study.json").write_text(text, encoding="utf-8")
        with pytest.raises(at.UserError, match=r"study\.json is damaged"):
            check_study(tmp_path, "benchmark")


def test_not_a_number_is_no_json(tmp_path: Path) -> None:
    with open_log(tmp_path / "records.jsonl") as log:
        with pytest.raises(ValueError, match="JSON compliant"):
            log.append("a", {"value": float("nan")})
        assert "a" not in log
    assert (tmp_path / "records.jsonl").read_bytes() == b""


def test_two_processes_cannot_write_one_log(tmp_path: Path) -> None:
    """Neither while the other holds the lock nor the other way round."""
    path = tmp_path / "records.jsonl"
    take = "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    program = f"import fcntl\nfile = open({str(path)!r}, 'ab')\n{take}\nprint('held', flush=True)\ninput()"
    other = [sys.executable, "-c", program]
    with open_log(path):
        result = subprocess.run(other, capture_output=True, text=True, check=False)
    assert "BlockingIOError" in result.stderr
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(at.UserError, match="is open in another process"), open_log(path):
            pass
        process.communicate("\n")
    write(path, 1)


def test_a_full_disk_leaves_complete_lines_only(tmp_path: Path) -> None:
    """A limit on the file's size makes the kernel refuse the rest of a write, as a full disk does."""
    path = tmp_path / "records.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with open_log(path) as log:
            log.append("k0", {"text": "x" * 50})
            line = path.stat().st_size
            for index in range(1, 1000 // line):
                log.append(f"k{index % 10}", {"text": "x" * 50})
            with pytest.raises(at.UserError, match=r"cannot write .*records\.jsonl .*kept; make room"):
                log.append("k1", {"text": "y" * 50})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_log(path) == log.records
    assert path.read_bytes().count(b"\n") == 1000 // line
    assert path.read_bytes().endswith(b"\n")


def test_missing_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(at.UserError, match="name the output folder of an earlier run"):
        read_log(tmp_path / "none.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(at.UserError, match="choose another output folder"), open_log(tmp_path / "file" / "records.jsonl"):
        pass


def test_a_damaged_file_beside_the_records_is_named(tmp_path: Path) -> None:
    path = tmp_path / "curve.npz"
    with pytest.raises(at.UserError, match=r"curve\.npz is missing: run again in its folder"):
        stored_arrays(path)
    np.savez(path, area=np.arange(3.0))
    assert stored_arrays(path)["area"].tolist() == [0, 1, 2]
    whole = path.read_bytes()
    for damaged in (b"x", b"", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(at.UserError, match=r"curve\.npz is damaged: remove that file; what it held is measured again"):
            stored_arrays(path)
