"""Lists of images and logs of records with any content: they are read, or refused by one line that says where."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attribution as at
import evaluation as ev
from attribution.errors import printable
from evaluation.study.records import open_log, read_log

PIECES = [
    *("path", "label", "labels", "mask", "x0", "y0", "x1", "y1", "group", "PATH", "Label"),
    *(",", "\t", "\n", "\r\n", "\r", " ", "|", '"', "'", "\\", "/", "..", "#", "\x00", "\x1b[31m", "\u2028", "\ufeff", "\ud800"),
    *("a.png", "b.jpg", "c.PNG", "/dev/zero", "/etc/passwd", "~", "0", "1", "-1", "99999", "100000", "1e400", "nan", "inf", "cat", "dog"),
    "path,label\n",
    "path,x0,y0,x1,y1\n",
    "é" * 300,
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=24).map("".join)
SUFFIXES = st.sampled_from([".csv", ".tsv", ".txt"])
CLASSES = st.sampled_from([None, ("cat", "dog"), ("0", "1")])


def read_or_refused(path: Path, class_names: tuple[str, ...] | None = None) -> None:
    """Open a list and its first images. Each may be refused by one line, but not break in another way."""
    refusals = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = ev.open_dataset(path, class_names=class_names)
        except at.UserError as error:
            refusals, dataset = [str(error)], None
        for index in range(0 if dataset is None else min(3, len(dataset))):
            assert dataset is not None and all(0 <= label < 100_000 for label in dataset.label_set(index) or ())
            try:
                dataset[index]
            except at.UserError as error:
                refusals.append(str(error))
    assert all("list" in refusal and len(printable(refusal)) < 6000 for refusal in refusals)


@pytest.mark.parametrize(
    "text",
    [
        *("", "\x00", "path", "path\n", "path,label\n\x00.png,cat\n", "path,label\n" + "é" * 3000 + ".png,cat\n", "path\n/dev/zero\n"),
        *("path\n..\n", "path\n.\n", "path\n~\n", 'path,label\n"a.png,cat\n', "path,label\r\na.png,cat\r\n", "path\na.png\n./a.png\n"),
        *("path,label\na.png,100000\n", "path,x0,y0,x1,y1\na.png,nan,0,1,1\n", "path,x0,y0,x1,y1\na.png,1e400,0,1,1\n"),
        "path,label\n" + "x" * 200_000 + ",cat\n",
        "," * 10_000,
    ],
)
def test_odd_lists_are_read_or_refused(tmp_path: Path, text: str) -> None:
    for suffix in (".csv", ".tsv", ".txt"):
        path = tmp_path / f"list{suffix}"
        path.write_text(text, encoding="utf-8", newline="")
        read_or_refused(path)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS | st.binary(max_size=60), suffix=SUFFIXES, class_names=CLASSES)
def test_no_list_at_all_breaks(tmp_path: Path, text: str | bytes, suffix: str, class_names: tuple[str, ...] | None) -> None:
    path = tmp_path / f"list{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    read_or_refused(path, class_names)


LINES = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["key", "digest", "value", "a"]), inner, max_size=3),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"NaN", b"9" * 10_000]),
)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=4), at_line=st.integers(0, 4))
def test_no_line_of_a_log_breaks(tmp_path: Path, lines: list[bytes], at_line: int) -> None:
    """A record among any other lines is kept; they are named and blanked."""
    path = tmp_path / "records.jsonl"
    path.unlink(missing_ok=True)
    with open_log(path) as log:
        log.append("kept", {"value": 1.5})
    record = path.read_bytes().rstrip(b"\n")
    path.write_bytes(b"".join(line + b"\n" for line in (*lines[:at_line], record, *lines[at_line:])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_log(path) as log:
            assert log.records["kept"] == {"key": "kept", "value": 1.5}
    assert read_log(path) == log.records
