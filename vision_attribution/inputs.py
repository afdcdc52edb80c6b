"""What commands are given: images by file and folder, class names by file, and names for what is written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from attribution.errors import UserError
from attribution.image import IMAGE_SUFFIXES
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier


def model_with_names(model: str, classes: Path | None, *, device: str, checkpoint: Path | None, batch_size: int | None) -> str | Classifier:
    """The name of a model for a job on data, or the classifier itself where a file gives it its class names."""
    if classes is None:
        return model
    return load_classifier(model, device=device, checkpoint=checkpoint, class_names=read_class_names(classes), batch_size=batch_size)


def find_images(paths: list[Path], outside: Path) -> Iterator[Path]:
    """Files as they are, folders as the images directly and deeper inside, sorted by name, but none of the output folder.

    Raises:
        UserError: a path that is not there or a folder without images.
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
    """Names for the outputs: the file's own, with its folder, then a number, where two would be equal."""
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


def read_class_names(path: Path) -> list[str]:
    """One name a line; blank lines at the end are ignored."""
    try:
        names = path.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}): expected one class name a line") from None
    if not names:
        raise UserError(f"{path} is empty: expected one class name a line")
    return [name.strip() for name in names]
