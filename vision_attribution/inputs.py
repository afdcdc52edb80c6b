"""Inputs of commands: images by file and folder, class names by file, and names for the outputs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from attribution.errors import UserError
from attribution.image import IMAGE_SUFFIXES, image_files


def find_images(paths: list[Path], outside: Path) -> Iterator[Path]:
    """List the given files, and the ``image_files`` of the given folders, without those in the output folder.

    Raises:
        UserError: a path that does not exist, or a folder without images.
    """
    own_figures = outside.resolve()
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
