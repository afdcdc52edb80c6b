"""Shards: a study in several jobs that know nothing of each other, each with a folder of its own, and one folder made from theirs."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attribution import __version__
from attribution.checks import is_whole
from attribution.errors import UserError, describe, reason_of
from attribution.files import read_text, whole_file
from evaluation.study.records import LOG, check_study, open_log, read_all
from evaluation.study.run import Executor, Progress, Shard, ShardEnds, Study, run
from evaluation.study.settings import StudySettings

SHARD = "shard.json"  # says which part of which study a folder holds
_MOST = 10_000  # shards


@dataclass(frozen=True)
class _Part:
    folder: Path
    study: str
    shard: Shard
    values: dict[str, Any]
    told: dict[str, Any]
    done: bool


def parse_shard(text: str) -> Shard:
    """A shard from "3/16".

    Raises:
        UserError: not of that form, or no such part.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]) <= _MOST:
        raise UserError(f"shard is {text!r}: expected a part of several such as 3/16, from 1/16 to 16/16, of at most {_MOST}")
    return Shard(int(found[1]), int(found[2]))


def run_shard(
    study: Study[Any, Any, Any],
    settings: StudySettings,
    out: str | Path,
    shard: Shard,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> int:
    """Measure one part of a study. ``merged`` makes one folder from the folders of all parts.

    Items are dealt out in turn. What later stages choose their items by, such as the predictions of all images, every shard measures.
    What needs the records of all shards is left to the study on the merged folder.

    Args:
        study: what to run.
        settings: of the study; models and options by name, since the folder keeps them.
        out: folder of this shard alone.
        shard: the part.
        executor, progress: as in ``run``.

    Returns:
        How many records the folder holds.

    Raises:
        UserError: as ``run``; settings that no file can hold; a folder of another shard, or of a whole study.
    """
    out, mark = Path(out), Path(out) / SHARD
    values, told = plain_values_of(settings), settings.plain()
    if mark.exists():
        there = _read(out)
        if (there.study, there.shard, there.told) != (study.name, shard, told):
            which = "this study" if (there.study, there.told) == (study.name, told) else "another run"
            raise UserError(f"{out} holds shard {there.shard.number}/{there.shard.count} of {which}: each shard needs a folder of its own")
    elif (out / LOG).exists():
        raise UserError(f"{out} holds a study that is no shard: choose another output folder")
    held = {"study": study.name, "shard": [shard.number, shard.count], "settings": values, "told": told, "version": __version__}
    check_study(out, study.name)
    new = not out.exists()
    _write(mark, {**held, "done": False})
    try:
        with suppress(ShardEnds):
            run(study, settings, out, executor, progress, shard)
    except UserError:
        if not (out / LOG).exists():  # it could not begin
            mark.unlink()
            if new:
                with suppress(OSError):
                    out.rmdir()
        raise
    _write(mark, {**held, "done": True})
    return len(read_all(out))


def merged(folders: Sequence[str | Path], out: str | Path, studies: Mapping[str, Study[Any, Any, Any]]) -> tuple[str, StudySettings]:
    """Put the records and files of shards into one folder, on which ``run`` then finishes the study.

    Args:
        folders: of all shards, in any order.
        out: another folder; it may hold the study already.
        studies: by name.

    Returns:
        The name of the study, and its settings.

    Raises:
        UserError: a folder that holds no shard, shards of different settings or versions, or parts that are missing.
    """
    parts = [_read(Path(folder)) for folder in folders]
    if not parts:
        raise UserError("no folder was named: give those of all shards")
    first = parts[0]
    for part in parts[1:]:
        if (part.study, part.shard.count) != (first.study, first.shard.count):
            raise UserError(
                f"{part.folder} holds {part.study} {part.shard.number}/{part.shard.count}, and {first.folder} {first.study} "
                f"{first.shard.number}/{first.shard.count}: expected shards of one study"
            )
        if other := [name for name in sorted({*first.told, *part.told}) if first.told.get(name) != part.told.get(name)]:
            raise UserError(
                f"{part.folder} has other settings than {first.folder}: {other[0]} is {_brief(part.told.get(other[0]))} and "
                f"{_brief(first.told.get(other[0]))}; expected shards of one study"
            )
    count = first.shard.count
    if missing := sorted({*range(1, count + 1)} - {part.shard.number for part in parts}):
        raise UserError(f"shards {', '.join(f'{number}/{count}' for number in missing[:5])} are missing: give the folders of all {count}")
    if first.study not in studies:  # of a later version
        raise UserError(f"{first.folder} holds the study {first.study!r}: expected one of {', '.join(studies)}")
    out = Path(out)
    if (out / SHARD).exists():
        raise UserError(f"{out} holds a shard itself: choose another output folder (--out)")
    if inside := [part.folder for part in parts if part.folder.resolve() in (out.resolve(), *out.resolve().parents)]:
        raise UserError(f"{out} lies in {inside[0]}, a shard: choose an output folder outside of it (--out)")
    settings = studies[first.study].settings.make(first.values, str(first.folder / SHARD))
    if json.loads(json.dumps(settings.plain())) != first.told:
        raise UserError(f"{first.folder / SHARD} was edited: its settings are not those that were measured; measure this shard again")
    records = [_records_of(part) for part in parts]
    check_study(out, first.study)
    with open_log(out / LOG) as log:
        check_study(out, first.study, mark=True)
        for part, held in zip(parts, records, strict=True):
            if not part.done:
                warnings.warn(f"{part.folder} is not finished: what is missing is measured now", stacklevel=2)
            _copy(part.folder, out)
            for key, record in held.items():
                if key not in log and "failed" not in record:  # what failed is tried again
                    log.append(key, {name: value for name, value in record.items() if name != "key"})
    return first.study, settings


def plain_values_of(settings: StudySettings) -> dict[str, Any]:
    """The settings as values that JSON holds, from which ``make`` makes them again.

    Raises:
        UserError: one of them is an object, such as a classifier.
    """
    return {
        each.name: _plain(each.name, value) for each in dataclasses.fields(settings) if (value := getattr(settings, each.name)) is not None
    }


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(name, each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(name, each) for key, each in value.items() if each is not None}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(name, vars(value))
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise UserError(f"{name} has {describe(value)}: a shard needs settings that a file can hold, models by name")


def _write(path: Path, values: Mapping[str, Any]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _read(folder: Path) -> _Part:
    path = folder / SHARD
    if not path.exists():
        raise UserError(f"{folder} holds no shard (no {SHARD}): give folders that --shard wrote")
    try:
        held = json.loads(read_text(path, "utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({reason_of(error)}): measure this shard again in another folder") from None
    kinds = {"study": str, "shard": list, "settings": dict, "told": dict, "version": str, "done": bool}
    wrong = not isinstance(held, dict) or [name for name, kind in kinds.items() if not isinstance(held.get(name), kind)]
    if not wrong and (
        len(held["shard"]) != 2 or not all(map(is_whole, held["shard"])) or not 1 <= held["shard"][0] <= held["shard"][1] <= _MOST
    ):
        wrong = ["shard"]
    if wrong:
        what = "it is no object" if wrong is True else f"{wrong[0]} is missing or of another kind"
        raise UserError(f"{path} is damaged ({what}): measure this shard again in another folder")
    if held["version"] != __version__:
        raise UserError(f"{folder} was measured by version {held['version']}: expected {__version__}, this one, for all shards")
    return _Part(folder, held["study"], Shard(*held["shard"]), held["settings"], held["told"], held["done"])


def _records_of(part: _Part) -> dict[str, Any]:
    """The records of a shard.

    Raises:
        UserError: damaged ones.
    """
    try:
        return read_all(part.folder)
    except UserError as error:
        words = str(error).partition(": ")[0]
        raise UserError(f"{words}: run the command of shard {part.shard.number}/{part.shard.count} again, then merge") from None


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _copy(source: Path, out: Path) -> None:
    """Copy the files of records. Those that are there already are the same: their names are the digests of what they hold."""
    for path in sorted(source.rglob("*.npz")):
        to = out / path.relative_to(source)
        if not to.exists() and not path.name.startswith(".") and path.is_file():
            with whole_file(to) as temporary:
                shutil.copyfile(path, temporary)
