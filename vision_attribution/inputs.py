"""What commands for single images do alike: find the images, name the outputs, and go on where an image fails."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from attribution.errors import UserError, printable
from attribution.figures.style import Figure
from attribution.files import held_folder, read_file, short_name, whole_file
from attribution.image import IMAGE_SUFFIXES, image_files
from evaluation.study.records import MARK, sweep


class Stopped(Exception):
    """A person interrupted a job. The message is one line that says what is kept."""


def say(text: str, err: bool = False) -> None:
    """Print one line. Names of files and classes in it cannot break it or steer the terminal."""
    typer.echo(printable(text), err=err)


@contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """Hold an output folder of single images (see ``held_folder``), and remove what killed runs were writing there."""
    with held_folder(out):
        if not (out / MARK).exists():  # a study sweeps its own folder
            sweep(out, below=False)
        yield


def find_images(paths: list[Path], outside: Path | None = None) -> Iterator[Path]:
    """List the given files, and the ``image_files`` of the given folders, without those in the output folder, if there is one.

    Raises:
        UserError: a path that does not exist, or a folder without images.
    """
    own_figures = None if outside is None else outside.resolve()
    for path in paths:
        if os.path.isdir(path):
            inside = [file for file in image_files(path) if own_figures not in (file.parent.resolve(), *file.parent.resolve().parents)]
            if not inside:
                raise UserError(f"{path} holds no images: expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
            yield from inside
        elif os.path.exists(path):
            yield path
        else:
            raise UserError(f"{path}: no such file or folder")


def distinct_stems(paths: list[Path]) -> list[str]:
    """Names for the outputs: the file's own name. Where two would be equal, the folder's name is added, and then a number."""
    taken: set[str] = set()
    repeats: Counter[str] = Counter()
    stems: list[str] = []
    for path in paths:
        stem = short_name(path.stem)
        if stem in taken:
            stem = f"{short_name(path.parent.name)}-{stem}"
        base = stem
        while stem in taken:
            repeats[base] += 1
            stem = f"{base}-{repeats[base] + 1}"
        taken.add(stem)
        stems.append(stem)
    return stems


def each_image(paths: Sequence[Path], do: Callable[[Path, str, str], None], done: str) -> UserError | None:
    """Do something for every image; one that fails does not end the others, and is named.

    Args:
        paths: the images.
        do: called with an image, the name of its outputs, and the words before a message about it.
        done: what was done, for the message.

    Returns:
        The error to raise in the end, if some failed.
    """
    errors: list[str] = []
    for number, (path, stem) in enumerate(zip(paths, distinct_stems(list(paths)), strict=True), start=1):
        try:
            do(path, stem, f"[{number}/{len(paths)}] " if len(paths) > 1 else "")
        except UserError as error:
            errors.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            if len(paths) > 1:
                say(f"error: {errors[-1]}", err=True)
    if not errors:
        return None
    return UserError(errors[0] if len(paths) == 1 else f"{len(errors)} of {len(paths)} images could not be {done} (see above)")


def digest_of_file(path: Path, *further: object) -> str:
    """Digest of what the result for an image depends on: the file's bytes, and everything further as text or bytes.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        digest = hashlib.sha256(read_file(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for each in further:
        digest.update(each if isinstance(each, bytes) else str(each).encode())
    return digest.hexdigest()


def save_figure(figure: Figure, path: Path, fields: Mapping[str, str] | None = None) -> None:
    """Write a figure as PNG with fields of text, whole or not at all."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata=dict(fields or {}))
