"""Write files completely or not at all, and turn names into parts of paths."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attribution.errors import UserError

MOST_BYTES = 2**30  # of a file that is read at once: an image of the most pixels that are read, or a list of ten million names
_LONGEST = 100  # bytes of a name; several make a file name, which may have 255
TEMPORARY = ".part-"  # begins the name of a file that is being written


class CannotWrite(UserError):
    """A file cannot be written: the folder is closed to us, or the disk is full."""


def check_folder(folder: str | Path) -> None:
    """Check before long work that files can be written into a folder, which need not exist yet.

    Raises:
        CannotWrite: a part of its path is a file, or closed to us.
    """
    nearest = next(each for each in (Path(folder).absolute(), *Path(folder).absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise CannotWrite(f"cannot write into {folder} ({nearest} is a file): choose another output folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise CannotWrite(f"cannot write into {folder} ({nearest} is closed to you): choose another output folder")


@contextmanager
def held_folder(folder: str | Path) -> Iterator[None]:
    """Make a folder and hold it: no other process that asks for it gets it meanwhile. A folder that stays empty is removed.

    Raises:
        UserError: another process holds it.
        CannotWrite: it cannot be made.
    """
    folder = Path(folder)
    check_folder(folder)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"cannot write into {folder} ({error.strerror or error}): choose another output folder") from None
    try:
        with _locked(folder):
            yield
    finally:
        if new:
            with suppress(OSError):  # it holds files
                folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows has no such lock; two processes in one folder are then the user's care
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder} is in use by another process: wait for it, or choose another output folder") from None
        yield
    finally:
        os.close(handle)


def read_file(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file. Pipes, devices and sockets, which may never end, are refused, as is a file that is too large.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        OSError: with a reason in ``strerror``, also where the file is of another kind, or too large.
        ValueError: a null byte in the name.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder: expected a file", str(path))
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))  # a pipe without a writer would wait
    with os.fdopen(handle, "rb") as file:
        kind = os.fstat(handle)
        if not stat.S_ISREG(kind.st_mode):
            raise OSError(errno.EINVAL, "it is a pipe, a device or a socket: expected a regular file", str(path))
        if kind.st_size > most:
            raise OSError(errno.EFBIG, f"it has {kind.st_size:,} bytes: expected at most {most:,}", str(path))
        return file.read(kind.st_size)


def read_text(path: str | Path, encoding: str = "utf-8-sig", most: int = MOST_BYTES) -> str:
    """The text of a regular file, its lines ended by "\\n"; see ``read_file``.

    Raises:
        OSError, ValueError: as ``read_file``; UnicodeDecodeError, which is a ValueError, where it is not text of this encoding.
    """
    return read_file(path, most).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``. It is renamed to ``path`` when the block succeeds, and removed when it raises.

    File and folder are written to the disk before the function returns, so that after a power cut the old file is there or the new one.
    The temporary path has the same suffix, because many writers choose the format by it.

    Raises:
        CannotWrite: the folder cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{TEMPORARY}{path.stem[:100]}-", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise CannotWrite(f"cannot write {path} ({error.strerror or error}): choose another output folder") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CannotWrite(
            f"cannot write {path} ({error.strerror or error}): nothing was changed; free some space, or choose another folder"
        ) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    try:
        os.chmod(temporary, 0o666 & ~_umask())
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CannotWrite(f"cannot write {path} ({error.strerror or error}): choose another name") from None


def _sync(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk, where the system can do that."""
    flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) if path.is_dir() else os.O_RDONLY
    try:
        handle = os.open(path, flags)
    except OSError:  # folders cannot be opened on Windows, and a file may be closed to reading
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def slug(name: str) -> str:
    """A name as part of a path: every character but letters, digits, dots, underscores and hyphens becomes a hyphen.

    A long name is cut, and a digest of it takes the place of what is cut off.
    """
    return short_name("".join(c if c.isalnum() or c in "._-" else "-" for c in name))


def short_name(name: str) -> str:
    """A name of at most 100 bytes: of a longer one the beginning and a digest."""
    data = os.fsencode(name)
    if len(data) <= _LONGEST:
        return name
    digest = hashlib.sha256(data).hexdigest()[:8]
    return f"{os.fsdecode(data[: _LONGEST - 9]).encode('utf-8', 'ignore').decode()}-{digest}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
