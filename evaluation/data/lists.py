"""Open a list of images: a .csv, .tsv or .txt file whose lines name images, their labels, masks and groups.

Only the list is read here. An error in it is reported with its line number, before any image is opened.
"""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path
from typing import NamedTuple

from attribution.errors import UserError, reason_of
from attribution.files import read_text
from attribution.image import IMAGE_SUFFIXES
from evaluation.data.dataset import CLASS_INDEX, ImageDataset, class_index, some_names

LIST_SUFFIXES = frozenset({".csv", ".tsv", ".txt"})
_BOX = ("x0", "y0", "x1", "y1")
_COLUMNS = ("path", "label", "labels", "mask", *_BOX, "group")
_PATH_AND_LABEL = re.compile(rf"(.*(?:{'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))}))(?:\s+(.*))?", re.IGNORECASE)


class _Row(NamedTuple):
    """One line of a list: its place in the file, and its fields by column name, without the empty ones."""

    place: str
    fields: dict[str, str]


def open_list(path: Path, class_names: tuple[str, ...] | None) -> ImageDataset:
    """The images of a list. ``open_dataset`` documents the format and the errors."""
    rows = _list_rows(path)
    if not rows:
        raise UserError(f"{path} lists no images: expected a header 'path,label' and one line for each image")
    ids = _list_ids(path, rows)
    several = any("labels" in row.fields for row in rows)
    classes, sets = _list_labels(rows, class_names, "labels" if several else "label")
    masks = [_list_mask(path, row) for row in rows]
    groups = tuple(row.fields.get("group") for row in rows)
    return ImageDataset(
        name=path.stem,
        class_names=classes,
        ids=ids,
        labels=tuple(None if several or each is None else next(iter(each)) for each in sets),
        label_sets=tuple(each or frozenset() for each in sets) if several else None,
        read=lambda index: path.parent / ids[index],
        read_mask=(lambda index: masks[index]) if any(mask is not None for mask in masks) else None,
        groups=groups if any(groups) else None,
        places=tuple(row.place for row in rows),
    )


def _list_rows(path: Path) -> list[_Row]:
    if path.suffix.lower() not in LIST_SUFFIXES:
        raise UserError(f"{path} is not a list of images: expected {', '.join(sorted(LIST_SUFFIXES))}, or a folder")
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({reason_of(error)}): save it as a UTF-8 list of images") from None
    suffix, first = path.suffix.lower(), text.lstrip().partition("\n")[0].rstrip()
    has_header = "path" in re.split(r"[,\s]+", first.lower()) and not _PATH_AND_LABEL.fullmatch(first)
    if suffix == ".txt" and not has_header:
        return _bare_rows(path, text)
    tabs = suffix == ".tsv" or (suffix == ".txt" and "\t" in first)
    return _table_rows(path, text, "\t" if tabs else ",")


def _bare_rows(path: Path, text: str) -> list[_Row]:
    """Lines "path label" or "path". A path ends with the suffix of an image file. Paths and class names may contain spaces."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        place, line = f"{path.name} line {number}", line.strip()
        found = _PATH_AND_LABEL.fullmatch(line)
        if line and not found:
            raise UserError(f"{place}: {line!r} is not 'path label' with the path of an image: use a header 'path,label' for other names")
        if found:
            rows.append(_Row(place, {name: value for name, value in zip(("path", "label"), found.groups(), strict=True) if value}))
    return rows


def _table_rows(path: Path, text: str, delimiter: str) -> list[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    rows: list[_Row] = []
    while True:
        place = f"{path.name} line {reader.line_num + 1}"
        try:
            values = [value.strip() for value in next(reader)]
        except StopIteration:
            return rows
        except csv.Error as error:
            raise UserError(
                f"{place}: not a row of a table ({error}): put fields that contain a {delimiter!r} or a quote into quotes"
            ) from None
        if not any(values):
            continue
        if not columns:
            columns = _checked_columns(place, [value.lower() for value in values])
            continue
        if len(values) != len(columns):
            raise UserError(f"{place}: {len(values)} fields, but the header has {len(columns)} columns ({', '.join(columns)})")
        fields = zip(columns, values, strict=True)
        rows.append(_Row(place, {name: value for name, value in fields if value or name == "labels"}))  # without labels is a fact too


def _checked_columns(place: str, columns: list[str]) -> list[str]:
    unknown = [name for name in columns if name not in _COLUMNS]
    if "path" not in columns:
        raise UserError(f"{place}: no column 'path' among {', '.join(map(repr, columns[:5]))}: expected a header such as 'path,label'")
    if unknown:
        raise UserError(f"{place}: unknown columns {', '.join(map(repr, unknown))}: expected some of {', '.join(_COLUMNS)}")
    if len(set(columns)) < len(columns):
        raise UserError(f"{place}: a column appears twice in {', '.join(columns)}: give each column once")
    if "label" in columns and "labels" in columns:
        raise UserError(f"{place}: columns 'label' and 'labels': keep 'label' (one class) or 'labels' (several, such as cat|dog)")
    if 0 < sum(name in columns for name in _BOX) < 4:
        raise UserError(f"{place}: a box needs the four columns {', '.join(_BOX)}")
    return columns


def _list_ids(path: Path, rows: list[_Row]) -> tuple[str, ...]:
    """The paths as written in the list, which must be different files."""
    seen: dict[str, str] = {}
    ids = []
    for row in rows:
        if "path" not in row.fields:
            raise UserError(f"{row.place}: the path is empty")
        name = Path(row.fields["path"]).as_posix()
        file = os.path.normpath(path.parent / name)
        if file in seen:
            raise UserError(f"{row.place}: {name} is already in {seen[file]}: list each image once")
        seen[file] = row.place
        ids.append(name)
    return tuple(ids)


def _list_labels(
    rows: list[_Row], class_names: tuple[str, ...] | None, column: str
) -> tuple[tuple[str, ...], tuple[frozenset[int] | None, ...]]:
    """The class names, and the labels of each row; several are separated by "|"."""
    told = [(row.place, _names_of(row.fields[column], column)) if column in row.fields else (row.place, None) for row in rows]
    labelled = [(place, name) for place, names in told for name in names or ()]
    classes = _names_in_list(labelled) if class_names is None else class_names
    indices = {}
    for place, name in labelled:
        if name not in indices:
            try:
                indices[name] = _label_index(name, classes)
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
    return classes, tuple(None if names is None else frozenset(indices[name] for name in names) for _, names in told)


def _names_of(field: str, column: str) -> list[str]:
    return [name.strip() for name in field.split("|") if name.strip()] if column == "labels" else [field]


def _names_in_list(labelled: list[tuple[str, str]]) -> tuple[str, ...]:
    numbers = [(place, label) for place, label in labelled if re.fullmatch(r"-?[0-9]+", label)]
    if numbers and len(numbers) < len(labelled):
        place, name = next(entry for entry in labelled if entry not in numbers)
        raise UserError(f"{place}: the label {name!r} is a name, but {numbers[0][0]} has the index {numbers[0][1]}: give class_names")
    if not numbers:
        return tuple(sorted({label for _, label in labelled}))
    for place, label in numbers:
        if not CLASS_INDEX.fullmatch(label):
            raise UserError(f"{place}: class index {label} is out of range: expected 0 to 99999")
    return tuple(f"class {index}" for index in range(1 + max(int(label) for _, label in numbers)))


def _list_mask(path: Path, row: _Row) -> Path | tuple[float, ...] | None:
    corners = [row.fields[name] for name in _BOX if name in row.fields]
    if not corners:
        return path.parent / row.fields["mask"] if "mask" in row.fields else None
    if "mask" in row.fields:
        raise UserError(f"{row.place}: a mask and a box are given: leave one empty")
    try:
        x0, y0, x1, y1 = map(float, corners)
    except ValueError:
        raise UserError(f"{row.place}: the box is {', '.join(corners)}: expected the four numbers {', '.join(_BOX)}") from None
    if not (x0 < x1 and y0 < y1):
        raise UserError(f"{row.place}: the box {', '.join(corners)} is empty or reversed: expected x0 < x1 and y0 < y1")
    return x0, y0, x1, y1


def _label_index(label: str, class_names: tuple[str, ...]) -> int:
    index = class_index(label, class_names)
    if index is None:
        raise UserError(f"no class {label!r}: expected an index below {len(class_names)}, or one of {some_names(class_names)}")
    return index
