"""Where a study is measured: in this process, in several of this machine, or on a cluster."""

from __future__ import annotations

from evaluation.study.processes import Processes
from evaluation.study.ray_workers import RayWorkers
from evaluation.study.run import Executor
from evaluation.study.settings import StudySettings


def executor_of(settings: StudySettings) -> Executor | None:
    """The workers that the settings ask for; None for this process alone."""
    if settings.engine == "ray":
        return RayWorkers(settings.workers, settings.ray_address, settings.cpus_per_worker)
    return Processes(settings.workers) if settings.workers > 1 else None
