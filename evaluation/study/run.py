"""run: one skeleton for all studies. It handles keys, resumption, failures, progress, interruption, and several processes.

A study is a frozen value: the type of its settings, and functions that measure, summarise, write and print. To measure, it walks
through stages. A stage is a list of items, such as the images of a data set, and a function that makes the ``Unit`` of an item:
the keys of its records, and how to measure them. Only records that the folder does not hold yet are measured. Each is written the
moment it is known, so that a run that was killed continues where it stopped and ends with the same tables.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from rich.console import Console

from attribution.errors import NotApplicable, NotMisclassified, UserError
from attribution.provenance import digest_of
from evaluation.study.attempts import Broken, attempted, attempted_each
from evaluation.study.records import (
    FILE,
    LOG,
    MARK,
    Record,
    RecordLog,
    check_study,
    file_digest,
    is_intact,
    open_log,
    read_all,
    sweep,
    take_over,
)
from evaluation.study.report import ReportFiles
from evaluation.study.settings import StudySettings

S = TypeVar("S", bound=StudySettings)
R = TypeVar("R")
M = TypeVar("M")
Item = TypeVar("Item", bound=Hashable)
Progress = Callable[[int, int, str], None]
Found = Iterable[tuple[Any, "Record | Exception"]]
_TOLD = 5  # damaged files that a warning names


@dataclass(frozen=True)
class Unit:
    """The smallest piece of a measurement, such as one image by one method, or a batch of images.

    Attributes:
        parts: any name -> key of a record, from ``record_key``.
        measure: takes the parts that are missing and yields each with its record, or with ``Broken`` or ``NotApplicable`` and the
            reason. It may yield more parts than it was asked for; records that exist are kept.
        files: part -> file that belongs to the record; ``measure`` writes it before it yields the record.
    """

    parts: Mapping[Any, str]
    measure: Callable[[Sequence[Any]], Found]
    files: Mapping[Any, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A measurement that failed.

    Attributes:
        item, part: item of the stage, and part of its unit; part is None if the whole unit failed.
        reason: why.
        refused: whether the measurement is not defined for the model at all.
    """

    item: Any
    part: Any
    reason: str
    refused: bool = False


@dataclass(frozen=True)
class Study(Generic[S, R, M]):
    """One kind of study.

    Attributes:
        name: name of its command.
        summary: one sentence, the help of its command.
        settings: type of its settings; the command's options are made from its fields.
        measure: walks through the stages and returns the results.
        summarise: from results to a summary: means, intervals, tests.
        write: writes tables, figures and the page of a summary into a folder; the same summary gives the same bytes.
        show: prints the summary.
        failures: from results to what failed, such as a sample, with its reason.
        noun: what the progress counts.
        details: further paragraphs and examples of the command's help.
    """

    name: str
    summary: str
    settings: type[S]
    measure: Callable[[Run[S]], R]
    summarise: Callable[[R], M]
    write: Callable[[M, Path], ReportFiles]
    show: Callable[[M, Console], None]
    failures: Callable[[R], Sequence[tuple[str, str]]]
    noun: str = "image"
    details: str = ""


class Executor:
    """Where the units of a stage are measured first. What has no record afterwards, the study's own process measures."""

    def measure(self, run: Run[Any], stage: int, missing: Mapping[int, Callable[[], Unit | None]]) -> None:
        """Measure units of a stage and put the records into the run's log.

        Args:
            run: under way.
            stage: number of the stage, from 0.
            missing: place of an item in its stage -> function that makes its unit.
        """

    def leave(self, stage: int, found: Mapping[int, Mapping[Any, Record]] | None) -> None:
        """A stage is done.

        Args:
            stage: its number.
            found: place -> the records of the item, where later stages choose their items by them; else None.
        """

    def close(self) -> None:
        """The run is over, or was interrupted."""


Share = Literal["part", "all", "end"]


@dataclass(frozen=True)
class Shard:
    """The part of a study that one job of several measures, each alone and in a folder of its own; see ``run_shard``.

    Attributes:
        number: from 1.
        count: number of jobs.
    """

    number: int
    count: int

    def places(self, size: int) -> range:
        """The places of the items that are measured here."""
        return range(self.number - 1, size, self.count)


class ShardEnds(Exception):
    """What follows needs the records of all shards."""


@dataclass
class Run(Generic[S]):
    """A study under way in a folder.

    Attributes:
        study: what is run.
        settings: settings of the study.
        out: the folder.
        log: its records.
        executor: where units are measured first; None measures them here alone.
        progress: called with (items done, their total, words for the current one).
        reading: whether to return only what the folder holds, without measuring or writing.
        shard: which part is measured; None measures everything.
        failures: what failed so far.
        intact, damaged: files of records that were read to their end, and those that could not be.
        found: records that stages returned.
    """

    study: Study[S, Any, Any]
    settings: S
    out: Path
    log: RecordLog
    executor: Executor | None = None
    progress: Progress | None = None
    reading: bool = False
    shard: Shard | None = None
    failures: list[Failed] = field(default_factory=list)
    intact: set[Path] = field(default_factory=set)
    damaged: set[Path] = field(default_factory=set)
    found: int = 0
    done: int = 0
    total: int = 0
    stages: int = 0

    def expect(self, count: int) -> None:
        """Tell the progress how many more items will come than those of the stage that begins next."""
        self.total += count if self.shard is None else len(self.shard.places(count))

    def report(self, what: str, done: int | None = None, total: int | None = None) -> None:
        """Show how far the run is."""
        if self.progress is not None:
            self.progress(self.done if done is None else done, self.total if total is None else total, what)

    def file(self, folder: str, key: str, *names: str) -> Path:
        """The npz file of a record, inside the output folder."""
        return self.out.joinpath(folder, *names, f"{key}.npz")

    def stage(
        self, items: Sequence[Item], unit_of: Callable[[Item], Unit | None], what: Callable[[Item], str] = str, share: Share = "part"
    ) -> dict[Item, dict[Any, Record]]:
        """Measure the records of items that the folder does not hold yet.

        Args:
            items: distinct items.
            unit_of: makes the unit of an item; None leaves the item out. Where it fails, the item has failed.
            what: the words that the progress shows for an item.
            share: what a shard measures. "part": its own items; nothing that is measured later depends on the others. "all": all
                items, since later stages choose theirs by the records. "end": its own items, and nothing after them.

        Returns:
            The records of each item by part; what failed is not among them, but in ``failures``.
        """
        whole = self.shard is None or share == "all"
        places = range(len(items)) if self.shard is None or whole else self.shard.places(len(items))
        self.total = max(self.total, self.done + len(places))
        stage, self.stages = self.stages, self.stages + 1
        if self.executor is not None:
            missing = {place: partial(unit_of, items[place]) for place in places if self._is_missing(items[place], unit_of)}
            self.executor.measure(self, stage, missing)
        found: dict[Item, dict[Any, Record]] = {item: {} for item in items}
        for place in places:
            self.report(what(items[place]))
            found[items[place]] = self._measured(items[place], unit_of)
            self.done += 1
        self.report("" if not len(places) else what(items[places[-1]]))
        if self.executor is not None:
            self.executor.leave(stage, None if share == "part" else dict(enumerate(found.values())))
        if share == "end" and not whole:
            raise ShardEnds
        return found

    def fail(self, item: Any, part: Any, reason: str, refused: bool = False) -> None:
        """Record a failure. A failure that is on record already is not written again."""
        failed = Failed(item, part, reason, refused)
        self.failures.append(failed)
        if self.reading:
            return
        record = {"failed": str(item), "part": "" if part is None else str(part), "reason": reason, "refused": refused}
        key = "failure-" + digest_of(list(record.values()))
        if key not in self.log:
            self.log.append(key, record)

    def _is_missing(self, item: Item, unit_of: Callable[[Item], Unit | None]) -> bool:
        try:
            unit = attempted(partial(unit_of, item))
        except (Broken, NotApplicable, NotMisclassified):
            return False  # it fails here again, where failures are kept
        return unit is not None and bool(self._missing(unit))

    def _missing(self, unit: Unit) -> list[Any]:
        return [part for part, key in unit.parts.items() if key not in self.log or not self._has_file(unit, part)]

    def _has_file(self, unit: Unit, part: Any) -> bool:
        """Whether the file of a record, if it has one, is there and whole. Each is read once, and removed where it is damaged."""
        if part not in unit.files:
            return True
        path = unit.files[part]
        kept = self.log.records.get(unit.parts[part], {})
        if path in self.intact or is_intact(path, kept.get(FILE)):
            self.intact.add(path)
        elif kept and path not in self.damaged:
            self.damaged.add(path)
            self._tell_damage(path)
            if not self.reading:
                with suppress(OSError):  # it is not there, or a folder, which says so when the file is written
                    path.unlink()
        return path in self.intact

    def _tell_damage(self, path: Path) -> None:
        """Warn about a file; about the first few, where many are gone."""
        then = "what it held is left out" if self.reading else "what it held is measured again"
        if len(self.damaged) < _TOLD:
            warnings.warn(f"{path} is {'damaged' if path.exists() else 'missing'}: {then}", stacklevel=2)
        elif len(self.damaged) == _TOLD:
            warnings.warn(f"{path} and further files are damaged or missing: {then}", stacklevel=2)

    def _measured(self, item: Item, unit_of: Callable[[Item], Unit | None]) -> dict[Any, Record]:
        unit: Unit | None = None
        try:
            unit = attempted(partial(unit_of, item))
            if unit is None:
                return {}
            if (missing := self._missing(unit)) and not self.reading:
                for part, record in attempted_each(partial(unit.measure, missing)):
                    self._keep(item, unit, part, record, missing)
        except (NotApplicable, Broken) as error:
            self.fail(item, None, str(error), refused=isinstance(error, NotApplicable))
        if unit is None:
            return {}
        known = {part: self.log.records.get(key) for part, key in unit.parts.items() if self._has_file(unit, part)}
        kept = {part: record for part, record in known.items() if record is not None}
        self.found += len(kept)
        return kept

    def _keep(self, item: Any, unit: Unit, part: Any, record: Record | Exception, missing: Sequence[Any]) -> None:
        if isinstance(record, Exception):
            self.fail(item, part, str(record), refused=isinstance(record, NotApplicable))
        elif part in missing:
            if part in unit.files:
                record = {**record, FILE: file_digest(unit.files[part])}
            try:
                self.log.append(unit.parts[part], record)
            except ValueError:  # JSON holds no NaN
                self.fail(item, part, "the model or the method gave a number that is not finite")


def run(
    study: Study[S, R, Any],
    settings: S,
    out: str | Path,
    executor: Executor | None = None,
    progress: Progress | None = None,
    shard: Shard | None = None,
) -> R:
    """Measure what the folder does not hold yet, and return all results.

    Args:
        study: what to run.
        settings: what is measured.
        out: folder of ``records.jsonl`` and of the files beside it; one study, and one process at a time.
        executor: where units are measured; this process by default. See ``executor_of``. It is closed at the end.
        progress: called with (items done, their total, words for the current one).
        shard: measures a part only, see ``run_shard``; the results are then those of the part.

    Raises:
        ShardEnds: what follows in the study needs the records of all shards.
        UserError: settings that cannot be run at all, a folder of another study, or a full disk. Images that fail raise nothing:
            they are returned, and the next run tries them again.
    """
    out = Path(out)
    check_study(out, study.name)
    made = [path for path in (out / LOG, out / MARK, out) if not path.exists()]
    with open_log(out / LOG) as log:
        check_study(out, study.name, mark=True)
        sweep(out)
        take_over(out, log)
        try:
            return study.measure(Run(study, settings, out, log, executor, progress, shard=shard))
        except UserError:
            if not log.records:
                _leave(out, made)
            raise
        finally:
            if executor is not None:
                executor.close()


def _leave(out: Path, made: Sequence[Path]) -> None:
    """Remove the files of a run that could not begin, and its folder where that is new and holds nothing else."""
    for path in made:
        with suppress(OSError):
            path.rmdir() if path == out else path.unlink()


def held(study: Study[S, R, Any], settings: S, out: str | Path) -> R:
    """Read the results that a folder holds for some settings, without measuring. The run may be finished, under way or killed.

    Raises:
        UserError: no records of these settings in the folder, or those of another study.
    """
    check_study(Path(out), study.name)
    reading = Run(study, settings, Path(out), RecordLog(Path(out) / LOG, None, read_all(Path(out))), reading=True)
    results = study.measure(reading)
    if not reading.found:
        raise UserError(f"{out} holds no records of these settings: give those of the run, or measure first")
    return results


def batches(values: Sequence[Item], size: int) -> list[tuple[Item, ...]]:
    """Values in tuples of at most ``size``."""
    return [tuple(values[start : start + size]) for start in range(0, len(values), size)]


def problems(run: Run[Any], name: Callable[[Any], str] = str) -> Iterator[tuple[str, str]]:
    """(sample, reason) of each failure in the order of their occurrence, without refusals."""
    for failed in run.failures:
        if not failed.refused:
            yield name(failed.item if failed.part is None else failed.part), failed.reason
