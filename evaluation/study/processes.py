"""Measures a study in several processes. Each keeps its records in a log of its own, which the study then takes over."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attribution.errors import UserError
from evaluation.study.records import open_log, read_log, shard_name, take_over
from evaluation.study.run import Executor, Run, Share, Unit

_PAUSE = 0.2  # seconds between looks at the processes


@dataclass(frozen=True)
class Processes(Executor):
    """Processes of this machine, each with an equal share of the CPU's threads.

    A process loads the model and the data by their names. Units are handed out one by one. The processes keep no failures: the study's
    own process then measures what has no record, and records what fails again.

    Attributes:
        count: number of processes.
    """

    count: int

    def measure(self, run: Run[Any], stage: int, missing: Mapping[int, Any]) -> None:
        """Measure items of a stage, given by their places. Afterwards the run's log holds their records.

        Raises:
            UserError: settings that hold objects instead of names, or a process that died.
        """
        if len(missing) < 2:
            return
        try:
            pickle.dumps((run.study.measure, run.settings))
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise UserError(f"these settings cannot be handed to other processes ({error}): give models by name, or workers = 1") from None
        context = multiprocessing.get_context("spawn")
        waiting, done = context.Queue(), context.Value("i", 0)
        for place in missing:
            waiting.put(place)
        count = min(self.count, len(missing))
        job = (run.study.measure, run.settings, run.out, stage, waiting, done, count)
        workers = [context.Process(target=_work, args=(*job, number)) for number in range(count)]
        try:
            _start(workers)
            while any(worker.is_alive() for worker in workers):
                time.sleep(_PAUSE)
                run.report(f"{count} processes", min(run.done + done.value, run.total))
        finally:
            for worker in workers:
                if worker.pid is not None:  # it was started
                    worker.terminate()
                    worker.join()
            waiting.cancel_join_thread()
            take_over(run.out, run.log)
        if failed := [worker.exitcode for worker in workers if worker.exitcode]:
            raise UserError(
                f"{len(failed)} of {count} processes stopped early (exit code {failed[0]}): run again with workers = 1 to see why"
            )


def _start(workers: Sequence[Any]) -> None:
    """Start processes that an interrupt from the keyboard does not reach: this one is told, and ends them."""
    block = getattr(signal, "pthread_sigmask", None)  # not on Windows
    held = None if block is None else block(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for worker in workers:
            worker.start()
    except OSError as error:
        raise UserError(f"a process could not be started ({error.strerror or error}): ask for fewer workers") from None
    finally:
        if block is not None:
            block(signal.SIG_SETMASK, held)


class _StageEnds(Exception):
    """The stage that a process was made for is measured."""


@dataclass
class _Share(Run[Any]):
    """The run inside a process. It measures the units of one stage that it is handed, and skips all other stages."""

    own_stage: int = 0
    waiting: Any = None
    counter: Any = None
    parent: int = field(default_factory=os.getppid)

    def stage(self, items: Any, unit_of: Any, what: Any = str, share: Share = "part") -> Any:
        stage, self.stages = self.stages, self.stages + 1
        if stage < self.own_stage:
            return {item: {} if share == "part" else self._known(item, unit_of) for item in items}
        while True:
            try:
                place = self.waiting.get(timeout=_PAUSE)
            except queue.Empty:
                raise _StageEnds from None
            if os.getppid() != self.parent:
                raise SystemExit(1)  # the study was killed: what is left belongs to its next run
            self._measured(items[place], unit_of)
            with self.counter.get_lock():
                self.counter.value += 1

    def fail(self, item: Any, part: Any, reason: str, refused: bool = False) -> None:
        """Failures are kept by the study itself."""

    def _known(self, item: Any, unit_of: Any) -> Any:
        return self._measured(item, lambda each: _unmeasured(unit_of(each)))


def _unmeasured(unit: Unit | None) -> Unit | None:
    return None if unit is None else Unit(unit.parts, lambda missing: (), unit.files)


def _work(measure: Any, settings: Any, out: Path, stage: int, waiting: Any, counter: Any, count: int, number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // count if hasattr(os, "sched_getaffinity") else 1))
    known = read_log(out / "records.jsonl")
    with open_log(out / shard_name(number)) as log:
        log.records.update(known)
        share = _Share(None, settings, out, log, own_stage=stage, waiting=waiting, counter=counter)  # type: ignore[arg-type]
        try:
            measure(share)
        except _StageEnds:
            return
