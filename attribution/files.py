"""Write files completely or not at all, and turn names into parts of paths."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attribution.errors import UserError


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
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``. It is renamed to ``path`` when the block succeeds, and removed when it raises.

    The temporary path has the same suffix, because many writers choose the format by it.

    Raises:
        CannotWrite: the folder cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:100]}-", suffix=path.suffix, dir=path.parent)
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
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CannotWrite(f"cannot write {path} ({error.strerror or error}): choose another name") from None


def slug(name: str) -> str:
    """A name as part of a path: every character but letters, digits, dots, underscores and hyphens becomes a hyphen."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
