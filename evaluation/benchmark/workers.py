"""Several processes judge the grids of a benchmark side by side, each with a log of its own that the benchmark then takes over."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attribution.errors import UserError
from attribution.model.loading import load_classifier
from evaluation.benchmark.on_grids import GridRunner
from evaluation.benchmark.settings import BenchmarkSettings
from evaluation.grids.sets import GridSet
from evaluation.study.identity import identity_of
from evaluation.study.records import RecordLog, open_log, read_log

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

_SHARD = "records-{}.jsonl"
_PAUSE = 0.5  # seconds between looks at the workers


def judge_side_by_side(settings: BenchmarkSettings, out: Path, log: RecordLog, progress: Callable[[int], None]) -> None:
    """Measure what is missing on all grids with ``settings.workers`` processes; afterwards the log holds it.

    Failures are not kept here: who judges the grids again in one process meets them again, and finds everything else done.

    Args:
        settings: their models must be names, since a worker loads them itself.
        out: folder of the benchmark, with its ``grids.json``.
        log: the benchmark's, which takes over the records of the workers, also those of an earlier run that was stopped.
        progress: called with the number of records made so far.

    Raises:
        UserError: models given as objects, or a worker that died.
    """
    if not all(isinstance(model, str) for model in settings.models):
        raise UserError("workers load the models themselves: give models by name, or workers = 1")
    try:
        pickle.dumps(settings)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise UserError(f"these settings cannot be handed to workers ({error}): give workers = 1") from None
    absorb(out, log)
    context = multiprocessing.get_context("spawn")
    workers: list[SpawnProcess] = [context.Process(target=_work, args=(settings, out, number)) for number in range(settings.workers)]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            time.sleep(_PAUSE)
            progress(sum(path.read_bytes().count(b"\n") for path in out.glob(_SHARD.format("*"))))
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
            worker.join()
        absorb(out, log)
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(workers)} workers stopped early (exit code {failed[0]}): run again with workers = 1 to see why"
        )


def absorb(out: Path, log: RecordLog) -> None:
    """Take over the records of workers, and remove their logs."""
    for path in sorted(out.glob(_SHARD.format("*"))):
        for key, record in read_log(path).items():
            if key not in log:
                log.append(key, {name: value for name, value in record.items() if name != "key"})
        path.unlink()


def _work(settings: BenchmarkSettings, out: Path, number: int) -> None:
    """One worker: every so manieth grid under every model."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.workers))
    parent = os.getppid()

    def step(_what: str) -> None:
        if os.getppid() != parent:
            raise SystemExit(1)  # the benchmark was killed: what is left belongs to its next run

    known = read_log(out / "records.jsonl")
    with open_log(out / _SHARD.format(number)) as log:
        log.records.update(known)
        runner = GridRunner(settings, out, log, lambda _failure: None, step, GridSet.load(out / "grids.json"))
        for model in settings.models:
            assert isinstance(model, str)
            classifier = load_classifier(model, device=settings.device, checkpoint=settings.checkpoint, batch_size=settings.batch_size)
            runner.judge(classifier, identity_of(classifier, model), model, every=settings.workers, first=number)
