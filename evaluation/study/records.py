"""An append-only log of results, one JSON object a line. A process that is killed loses at most the line that it was writing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from attribution.errors import UserError
from attribution.files import CannotWrite, whole_file

Record = dict[str, Any]
MARK = "study.json"  # names the study that a folder belongs to
LOG = "records.jsonl"  # of a study, in its folder


class _Kept(Record):
    """A record, or an object inside one, as it stands in a file. A field that is missing is an error of that line."""

    place = ""

    def __missing__(self, field: str) -> Any:
        raise UserError(f"{self.place} has no field {field!r}: remove that line; what it held is measured again")


class RecordLog:
    """Records of one folder, written by one process at a time.

    A record reaches the file with its newline before ``append`` returns. A line that a killed process left unfinished is cut off
    when the log is opened again. Of two records with the same key only the later one counts.

    Attributes:
        path: the file.
        records: what it holds, by key, in the order of first appearance.
    """

    def __init__(self, path: Path, file: FileIO | None, records: dict[str, Record]) -> None:
        self.path, self.records, self._file = path, records, file

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def append(self, key: str, record: Record) -> None:
        """Write a record. If writing fails, the file is left unchanged.

        Raises:
            CannotWrite: the disk is full or the file cannot be written.
        """
        assert self._file is not None, "this log was opened for reading"
        full = {"key": key, **record}
        line = (json.dumps(full, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except BaseException as error:
            self._file.truncate(end)
            if not isinstance(error, OSError):
                raise
            raise CannotWrite(
                f"cannot write {self.path} ({error.strerror or error}): what was measured so far is kept; make room and start again"
            ) from None
        self.records[key] = full


@contextmanager
def open_log(path: Path) -> Iterator[RecordLog]:
    """Open a log for appending. Only one process at a time may have it open.

    Raises:
        UserError: another process has it open, the folder cannot be written, or a line inside it is damaged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(path, "a+")
    except OSError as error:
        raise CannotWrite(f"cannot write {path} ({error.strerror or error}): choose another output folder") from None
    with file:
        _lock(file, path)
        file.seek(0)
        data = file.read()
        records, complete = _parse(data, path)
        if complete != len(data):
            file.truncate(complete)
        yield RecordLog(path, file, records)


def read_log(path: Path) -> dict[str, Record]:
    """The records of a finished or running log, by key; an unfinished last line does not count.

    Raises:
        UserError: no such file, or a damaged line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): name the output folder of an earlier run") from None
    return _parse(data, path)[0]


def store_arrays(path: Path, **arrays: np.ndarray | np.generic) -> None:
    """Write arrays as an npz file beside the records, whole or not at all."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def stored_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file that lies beside the records.

    Raises:
        UserError: the file is gone, as after moving a report alone, or damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:  # a path would stay open where it is damaged
            return dict(arrays)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run again in its folder") from None
    except Exception:  # a damaged file can raise any exception inside the decoders
        raise UserError(f"{path} is damaged: remove that file; what it held is measured again") from None


def shard_name(number: int) -> str:
    """The file in which a further process of a study keeps its records."""
    return f"records-{number}.jsonl"


def take_over(out: Path, log: RecordLog) -> None:
    """Move the records that processes of this or an earlier run kept into the study's log."""
    for path in sorted(out.glob("records-*.jsonl")):
        for key, record in read_log(path).items():
            if key not in log:
                log.append(key, {name: value for name, value in record.items() if name != "key"})
        path.unlink()


def read_all(out: Path) -> dict[str, Record]:
    """The records of a folder, with those that processes of a run under way, or killed, still keep in files of their own.

    Raises:
        UserError: no log in the folder, or a damaged line.
    """
    kept: dict[str, Record] = {}
    for path in sorted(out.glob("records-*.jsonl")):  # before the log, into which they may move at any moment
        with suppress(FileNotFoundError):
            kept |= _parse(path.read_bytes(), path)[0]
    return kept | read_log(out / LOG)


def _parse(data: bytes, path: Path) -> tuple[dict[str, Record], int]:
    """The complete lines, and how many bytes they take."""
    complete = data.rfind(b"\n") + 1
    records: dict[str, Record] = {}
    for number, line in enumerate(data[:complete].split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line, object_hook=partial(_kept, f"{path} line {number}"))
            records[record["key"]] = record
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path} line {number} is damaged: remove that line; what it held is measured again") from None
    return records, complete


def _kept(place: str, fields: Record) -> _Kept:
    kept = _Kept(fields)
    kept.place = place
    return kept


def check_study(out: Path, name: str, mark: bool = False) -> None:
    """Refuse a folder that holds another study, whose page and figures would be overwritten.

    Args:
        out: the folder.
        name: of the study.
        mark: whether to mark the folder as that of this study.

    Raises:
        UserError: another study, or a mark that cannot be read.
    """
    path = out / MARK
    try:
        held = json.loads(path.read_text(encoding="utf-8"))["study"] if path.exists() else None
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{path} is damaged, so whose folder this is cannot be known: remove that file, or choose another folder") from None
    if held not in (None, name):
        raise UserError(f"{out} holds the study {held!r}, whose page {name!r} would overwrite: choose another output folder (--out)")
    if mark and held is None:
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps({"study": name}) + "\n", encoding="utf-8")


def _lock(file: FileIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no such lock; two processes in one folder are then the user's care
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{path} is open in another process: wait for it, or choose another output folder") from None
