"""Measures a study by actors of Ray, on this machine or on a cluster. Ray starts, places and watches them; nothing of that is ours.

Each actor walks through the study once, in a thread. It stops in each stage, measures the units that it is handed, and sends back
records and the files that belong to them. So a cluster needs no common file system: only the study's own process writes.
"""

from __future__ import annotations

import importlib
import os
import queue
import shutil
import socket
import sys
import tempfile
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attribution.errors import UserError, printable, reason_of
from attribution.files import whole_file
from evaluation.study.attempts import Broken, attempted
from evaluation.study.records import LOG, MemoryLog, Record
from evaluation.study.run import Executor, Item, Run, Share, Unit

_PAUSE = 0.5  # seconds between two reports of the progress
_ANSWER = 10.0  # seconds within which a cluster must answer
_LOSSES = 3  # workers that an item may take with it
_Found = Mapping[int, Mapping[Any, Record]]
_Sent = tuple[dict[str, Record], dict[str, bytes]]  # records by key, files by their path in the output folder


class RayWorkers(Executor):
    """Actors of Ray.

    An actor that is lost, with its node or alone, is replaced, and its unit measured again. Where a cluster has GPUs, each actor gets
    one. Models and data are loaded by name on the node of the actor; models given as objects go into the object store once.
    """

    def __init__(self, count: int, address: str | None = None, cpus: int = 1) -> None:
        """
        Args:
            count: number of actors.
            address: of a cluster; None starts Ray on this machine, and ends it with the run.
            cpus: processor cores of each actor.
        """
        self.count, self.address, self.cpus = count, address, cpus
        self._ray: Any = None
        self._started = False
        self._crew: list[Any] = []
        self._founds: list[Any] = []  # of each stage that is done, what later stages need
        self._job: Any = None

    def measure(self, run: Run[Any], stage: int, missing: Mapping[int, Callable[[], Unit | None]]) -> None:
        """Measure units of a stage. Afterwards the run's log holds their records, and its folder their files.

        Raises:
            UserError: Ray is not installed or does not answer, a worker cannot load the model or the data, or a unit took three workers
                with it.
        """
        if not missing:
            return
        if self._ray is None:
            self._connect(run)
        ray, waiting, losses = self._ray, deque(missing), Counter[int]()
        busy: dict[Any, tuple[Any, int | None]] = {}  # what is awaited -> the actor, and the place of its unit; None while it gets ready

        def begin(actor: Any) -> None:
            busy[actor.enter.remote(stage, self._founds)] = actor, None

        for actor in self._crew:
            begin(actor)
        while len(self._crew) < self.count:
            begin(self._hired())
        done = 0
        while done < len(missing):
            run.report(f"{self._words(busy)}", min(run.done + done, run.total))
            ready, _ = ray.wait(list(busy), num_returns=1, timeout=_PAUSE)
            for reference in ready:
                actor, place = busy.pop(reference)
                try:
                    sent = ray.get(reference)
                except ray.exceptions.RayActorError:
                    self._crew.remove(actor)
                    losses[-1 if place is None else place] += 1
                    self._give_up(run, losses, place, missing)
                    if place is not None:
                        waiting.appendleft(place)
                    begin(self._hired())
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise _in_one_line(error) from None
                if place is not None:
                    _keep(run, sent)
                    done += 1
                if waiting:
                    place = waiting.popleft()
                    busy[actor.measure.remote(place, *_known(run, missing[place]))] = actor, place

    def leave(self, stage: int, found: _Found | None) -> None:
        """Tell the actors what a stage has found, once they are asked for the next one."""
        self._founds.append(None if found is None or self._ray is None else self._ray.put({key: dict(each) for key, each in found.items()}))

    def close(self) -> None:
        """End the actors, and Ray where it was started for this run."""
        if self._ray is None:
            return
        for actor in self._crew:
            with suppress(Exception):
                self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()
        self._ray, self._crew, self._founds = None, [], []

    def _connect(self, run: Run[Any]) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong is told by one line of ours
        try:
            ray = importlib.import_module("ray")
        except ImportError:
            raise UserError("the engine ray needs Ray: pip install 'vision-attribution[distributed]'") from None
        where = {"num_cpus": self.count * self.cpus} if self.address is None else {}
        run.report("Ray starts" if self.address is None else f"Ray at {self.address}", 0)
        if not ray.is_initialized():
            if self.address is not None:
                _check_answer(self.address)
            try:
                with _silence():
                    ray.init(
                        self.address or "local", include_dashboard=False, log_to_driver=False, configure_logging=False, **where
                    )  # fmt: skip
            except Exception as error:  # of Ray, of gRPC, of the network
                words = printable(str(error).strip().partition("\n")[0])[:200]
                if self.address is None:
                    raise UserError(f"Ray does not start on this machine ({words}): measure with --engine processes") from None
                raise UserError(
                    f"Ray at {self.address} refuses ({words}): give the address that `ray start --head` printed, and where the cluster "
                    "asks for a token, RAY_AUTH_MODE=token and its file as RAY_AUTH_TOKEN_PATH"
                ) from None
            self._started = True
        self._ray = ray
        resources = ray.cluster_resources()
        if resources.get("CPU", 0) < self.cpus:
            raise UserError(f"the cluster has {resources.get('CPU', 0):.0f} cores: expected at least {self.cpus}, those of one worker")
        gpus = 1 if resources.get("GPU", 0) >= 1 else 0
        settings = (run.study.measure, run.settings, self.cpus, os.getcwd())
        try:
            self._job = ray.put(settings)
        except Exception as error:
            raise UserError(f"these settings cannot be handed to workers ({printable(str(error))[:200]}): give models by name") from None
        # each actor measures one unit at a time; a method for the next stage waits behind it
        self._actor = ray.remote(_Worker).options(num_cpus=self.cpus, num_gpus=gpus, max_restarts=0)

    def _hired(self) -> Any:
        actor = self._actor.remote(self._job)
        self._crew.append(actor)
        return actor

    def _words(self, busy: Mapping[Any, tuple[Any, int | None]]) -> str:
        at_work = sum(place is not None for _, place in busy.values())
        return f"{at_work} Ray worker{'' if at_work == 1 else 's'}"

    def _give_up(self, run: Run[Any], losses: Counter[int], place: int | None, missing: Mapping[int, Any]) -> None:
        if losses[-1 if place is None else place] < (_LOSSES if place is not None else _LOSSES * self.count):
            return
        what = "before they were ready" if place is None else f"by the unit at place {place + 1}"
        raise UserError(
            f"{max(losses.values())} Ray workers were lost {what}, perhaps for lack of memory: what was measured is kept in {run.out}"
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what is written to the standard streams within the block, also by libraries that are not Python."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        for number, handle in zip((1, 2), kept, strict=True):
            os.dup2(handle, number)
            os.close(handle)
        os.close(nowhere)


def _check_answer(address: str) -> None:
    """Refuse an address at which nothing listens; Ray itself would wait for minutes.

    Raises:
        UserError: no answer, or no address.
    """
    if address == "auto" or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"the address of Ray is {address!r}: expected HOST:PORT, as `ray start --head` prints it")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER).close()
    except OSError as error:
        raise UserError(
            f"Ray at {address} does not answer ({reason_of(error)}): give the address that `ray start --head` printed"
        ) from None


def _known(run: Run[Any], unit_of: Callable[[], Unit | None]) -> _Sent:
    """The records that there are of a unit, and their files."""
    try:
        unit = attempted(unit_of)
    except Exception:
        return {}, {}
    if unit is None:
        return {}, {}
    held = {key: dict(run.log.records[key]) for key in unit.parts.values() if key in run.log}
    files = {unit.files[part] for part, key in unit.parts.items() if key in held and part in unit.files and unit.files[part].is_file()}
    return held, {path.relative_to(run.out).as_posix(): path.read_bytes() for path in files}


def _keep(run: Run[Any], sent: _Sent) -> None:
    """Write what a worker sent: the files first, so that no record is without its file."""
    records, files = sent
    for name, data in files.items():
        with whole_file(run.out / name) as temporary:
            temporary.write_bytes(data)
    for key, record in records.items():
        run.log.append(key, {name: value for name, value in record.items() if name != "key"})


def _in_one_line(error: Any) -> UserError:
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return UserError(f"a Ray worker: {cause}")
    words = printable(str(cause or error).strip().splitlines()[-1])[:300]
    return UserError(f"a Ray worker failed ({words}): run again without --engine ray to see why")


class _Worker:
    """The actor: it walks through the study in a thread, and stops in each stage."""

    def __init__(self, job: tuple[Any, Any, int, str]) -> None:
        measure, settings, cpus, folder = job
        with suppress(OSError):  # the driver's, by which relative names are meant; another node may lack it
            os.chdir(folder)
        torch.set_num_threads(cpus)
        out = Path(tempfile.mkdtemp(prefix="vision-attribution-"))
        weakref.finalize(self, shutil.rmtree, out, True)
        self._run = _Served(None, settings, out, MemoryLog(out / LOG))  # type: ignore[arg-type]
        self._stage: int | None = None  # where the thread stands
        self._thread = threading.Thread(target=self._run.walk, args=(measure,), daemon=True)

    def enter(self, stage: int, founds: list[Any]) -> None:
        """Get ready for a stage: the model is loaded, and earlier stages are passed by with what they found."""
        if self._stage is None:
            self._thread.start()
            self._stage = self._run.answer()
        while self._stage < stage:
            found = founds[self._stage]
            self._run.asked.put((None, None if found is None else importlib.import_module("ray").get(found)))
            self._stage = self._run.answer()

    def measure(self, place: int, records: dict[str, Record], files: dict[str, bytes]) -> _Sent:
        """Measure the unit at a place; its new records and their files."""
        self._run.asked.put((place, (records, files)))
        return self._run.answer()


@dataclass
class _Served(Run[Any]):
    """The run inside an actor. In each stage it measures the units that it is asked for."""

    asked: queue.Queue[tuple[int | None, Any]] = field(default_factory=queue.Queue)
    answers: queue.Queue[Any] = field(default_factory=queue.Queue)

    def walk(self, measure: Callable[[Run[Any]], Any]) -> None:
        """Go through the study; what ends it is an answer."""
        try:
            measure(self)
            self.answers.put(UserError("the study ended before its last stage"))
        except BaseException as error:
            self.answers.put(error)

    def answer(self) -> Any:
        """What the thread says next: the number of the stage that it has reached, or what it measured.

        Raises:
            Exception: what ended the study there.
        """
        found = self.answers.get()
        if isinstance(found, BaseException):
            self.answers.put(found)
            raise found
        return found

    def stage(self, items: Any, unit_of: Any, what: Any = str, share: Share = "part") -> Any:
        self.stages += 1
        self.answers.put(self.stages - 1)
        while True:
            place, given = self.asked.get()
            if place is None:
                return {item: (given or {}).get(number, {}) for number, item in enumerate(items)}
            self.answers.put(self._sent(items[place], unit_of, *given))

    def _sent(self, item: Item, unit_of: Callable[[Item], Unit | None], records: dict[str, Record], files: dict[str, bytes]) -> _Sent:
        try:
            unit = attempted(partial(unit_of, item))
        except Exception as error:
            return ({}, {}) if isinstance(error, Broken | UserError) else _raised(error)
        for name, data in files.items():
            with whole_file(self.out / name) as temporary:
                temporary.write_bytes(data)
        self.log.records.clear()
        self.log.records.update(records)
        self._measured(item, lambda _item: unit)
        new = {key: record for key, record in self.log.records.items() if records.get(key) != record}
        held = set() if unit is None else {path for path in unit.files.values() if path.is_file()}
        wanted = {unit.files[part] for part, key in unit.parts.items() if key in new and part in unit.files} if unit is not None else set()
        sent = {path.relative_to(self.out).as_posix(): path.read_bytes() for path in wanted & held}
        for path in held:
            path.unlink()
        self.intact.clear()
        self.damaged.clear()
        return new, sent

    def fail(self, item: Any, part: Any, reason: str, refused: bool = False) -> None:
        """Failures are kept by the study itself."""


def _raised(error: Exception) -> Any:
    raise error
