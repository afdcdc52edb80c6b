"""Inputs of commands: images by file and folder, class names by file, and names for the outputs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from attribution.errors import UserError
from attribution.image import IMAGE_SUFFIXES


def find_images(paths: list[Path], outside: Path) -> Iterator[Path]:
    """List the given files, and the images at any depth in the given folders, sorted by name, without those in the output folder.

    Raises:
        UserError: a path that does not exist, or a folder without images.
    """
    own_figures = outside.absolute()
    for path in paths:
        if os.path.isdir(path):
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
            inside = [file for file in files if own_figures not in file.absolute().parents]
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
        stem = path.stem
        if stem in taken:
            stem = f"{path.parent.name}-{stem}"
        base = stem
        while stem in taken:
            repeats[base] += 1
            stem = f"{base}-{repeats[base] + 1}"
        taken.add(stem)
        stems.append(stem)
    return stems
