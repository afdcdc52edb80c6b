"""An append-only log of results, one JSON object a line. A process that is killed loses at most the line that it was writing.

Every line holds a digest of itself. A line that was changed, by hand or by a broken disk, is therefore known, and what it held is
measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
import zipfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from attribution.errors import UserError, reason_of
from attribution.files import TEMPORARY, CannotWrite, check_folder, read_file, read_text, whole_file

Record = dict[str, Any]
MARK = "study.json"  # names the study that a folder belongs to
LOG = "records.jsonl"  # of a study, in its folder
DIGEST = "digest"  # of a line, its last field
_HEADER = "header.npy"  # of a saved explanation: settings and seconds
FILE = "file_digest"  # of a record, that of the file which belongs to it


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
        line = _written({**full, DIGEST: _digest(full)}) + b"\n"
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


class MemoryLog(RecordLog):
    """Records that are kept in no file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, None, {})

    def append(self, key: str, record: Record) -> None:
        """Keep a record.

        Raises:
            ValueError: a number that is not finite, which no file could hold.
        """
        full = {"key": key, **record}
        _written(full)
        self.records[key] = full


@contextmanager
def open_log(path: Path) -> Iterator[RecordLog]:
    """Open a log for appending. Only one process at a time may have it open.

    Damaged lines are named in a warning, and blanked.

    Raises:
        UserError: another process has it open, or the folder cannot be written.
    """
    check_folder(path.parent)
    if path.exists() and not path.is_file():  # a pipe would wait, and a device may have no end
        raise CannotWrite(f"cannot write {path} (it is a folder, a pipe, a device or a socket): choose another output folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(path, "a+")
    except OSError as error:
        raise CannotWrite(f"cannot write {path} ({error.strerror or error}): choose another output folder") from None
    with file:
        _lock(file, path)
        file.seek(0)
        data = file.read()
        records, damaged = _parse(data, path)
        file.truncate(data.rfind(b"\n") + 1)
        if damaged:
            warnings.warn(f"{_named(path, damaged)} damaged or edited: what was there is measured again", stacklevel=3)
            _blank(path, damaged)
        yield RecordLog(path, file, records)
        os.fsync(file.fileno())


def read_log(path: Path) -> dict[str, Record]:
    """The records of a finished or running log, by key; an unfinished last line does not count.

    Raises:
        UserError: no such file, or lines that are damaged or were edited.
    """
    try:
        return _intact(_log_bytes(path), path)
    except FileNotFoundError:
        raise UserError(f"{path} is not there: name the output folder of an earlier run") from None


def _log_bytes(path: Path) -> bytes:
    """What a log holds.

    Raises:
        FileNotFoundError: nothing there.
        UserError: something else than a file.
    """
    try:
        return read_file(path, sys.maxsize)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}): name the output folder of an earlier run") from None


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


def is_intact(path: Path, digest: str | None = None) -> bool:
    """Whether an npz file is that of its record: it is there, it can be read to its end, and it has the digest that the record gives.

    Args:
        path: of the file.
        digest: from ``file_digest``; None takes any npz file whose arrays have their checksums.
    """
    if not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as arrays:
            whole = bool(arrays.namelist()) and arrays.testzip() is None
            return whole and digest in (None, _content(arrays))
    except Exception:  # a damaged file can raise any exception inside the decoder
        return False


def file_digest(path: Path) -> str:
    """A digest of the arrays of an npz file that belongs to a record. The header of an explanation, which tells its seconds, is left out.

    Raises:
        CannotWrite: it was not written.
    """
    try:
        with zipfile.ZipFile(path) as arrays:
            return _content(arrays)
    except (OSError, zipfile.BadZipFile) as error:
        raise CannotWrite(f"cannot write {path} ({reason_of(error)}): choose another output folder") from None


def _content(arrays: zipfile.ZipFile) -> str:
    told = sorted((each.filename, each.file_size, each.CRC) for each in arrays.infolist() if each.filename != _HEADER)
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def sweep(out: Path, below: bool = True) -> None:
    """Remove what killed runs were writing, also in the folders below. Only the process that holds the folder may do that."""
    for path in (out.rglob if below else out.glob)(f"{TEMPORARY}*"):
        if path.is_file():
            path.unlink(missing_ok=True)


def shard_name(number: int) -> str:
    """The file in which a further process of a study keeps its records."""
    return f"records-{number}.jsonl"


def take_over(out: Path, log: RecordLog) -> None:
    """Move the records that processes of this or an earlier run kept into the study's log."""
    for path in sorted(out.glob("records-*.jsonl")):
        with open_log(path) as shard:
            for key, record in shard.records.items():
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
            kept |= _intact(_log_bytes(path), path)
    return kept | read_log(out / LOG)


def _parse(data: bytes, path: Path) -> tuple[dict[str, Record], list[int]]:
    """The records of the complete lines, and the numbers of the lines that are damaged. Blank lines hold none: they are empty, or were
    damaged and are blanked.
    """
    records: dict[str, Record] = {}
    damaged: list[int] = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
        if not line.strip(b" "):
            continue
        try:
            record = json.loads(line, object_hook=partial(_kept, f"{path} line {number}"))
            if record.pop(DIGEST) != _digest(record):
                raise ValueError
            records[record["key"]] = record
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            damaged.append(number)
    return records, damaged


def _intact(data: bytes, path: Path) -> dict[str, Record]:
    """The records of a log that is read only.

    Raises:
        UserError: damaged lines.
    """
    records, damaged = _parse(data, path)
    if damaged:
        raise UserError(f"{_named(path, damaged)} damaged or edited: run again without --no-measure, and what was there is measured again")
    return records


def _named(path: Path, lines: Sequence[int]) -> str:
    """Such as "records.jsonl line 3 is" or "records.jsonl lines 3, 4, 8, ... are"."""
    few = ", ".join(map(str, lines[:3])) + (", ..." if len(lines) > 3 else "")
    return f"{path} line{'s' if len(lines) > 1 else ''} {few} {'are' if len(lines) > 1 else 'is'}"


def _blank(path: Path, lines: Collection[int]) -> None:
    """Write spaces over lines of a log. All others stay where they are, so that a process that is killed here loses none."""
    start = 0
    with path.open("r+b") as file:
        for number, line in enumerate(file.read().split(b"\n"), start=1):
            if number in lines:
                file.seek(start)
                file.write(b" " * len(line))
            start += len(line) + 1
        os.fsync(file.fileno())


def _written(record: Record) -> bytes:
    """A record as JSON. Parts of file names that are no UTF-8 stay as they are."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")


def _digest(record: Record) -> str:
    """The first 16 hexadecimal digits of sha256 over a record as it is written, without its digest."""
    return hashlib.sha256(_written(record)).hexdigest()[:16]


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
        held = json.loads(read_text(path, "utf-8"))["study"] if path.exists() else None
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
