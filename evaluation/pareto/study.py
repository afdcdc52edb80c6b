"""The study of quality against evaluations: how good an order is for the number of images forwarded to find it."""

from __future__ import annotations

from pathlib import Path

from evaluation.pareto.measure import measure_pareto
from evaluation.pareto.report import print_pareto, write_pareto
from evaluation.pareto.settings import ParetoResults, ParetoSettings
from evaluation.pareto.summary import ParetoSummary, summarise_pareto
from evaluation.study.executors import executor_of
from evaluation.study.run import Progress, Study, run

PARETO: Study[ParetoSettings, ParetoResults, ParetoSummary] = Study(
    name="pareto",
    summary="Measure how good an order of regions is for the number of images forwarded to find it.",
    settings=ParetoSettings,
    measure=measure_pareto,
    summarise=summarise_pareto,
    write=write_pareto,
    show=print_pareto,
    failures=lambda results: results.failures,
    noun="method",
    details="""
    The search by budget stands beside published searches and sampling methods. Every order is measured by the same function:
    region steps, one fill, the label's probability, on images that the model gets right with confidence. Run again, the same command
    continues where it stopped; several settings may share a folder.

    Examples:

    - `attribution pareto --data cifar10 --root data --model zoo:cnn,zoo:vit --samples 100`

    - `attribution pareto --data images/ --model timm:resnet50 --partition slico:49 --methods budget,bidirectional,rise`
    """,
)


def run_pareto(settings: ParetoSettings, out: str | Path, progress: Progress | None = None) -> ParetoResults:
    """Measure what the folder does not hold yet, and return all results.

    Args:
        settings: what is measured.
        out: folder of ``records.jsonl``; several settings may share it, one process at a time.
        progress: called with (explanations done, their total, words for the current one).

    Raises:
        UserError: settings that cannot be run, no image that the model gets right, or a full disk.
    """
    return run(PARETO, settings, out, executor_of(settings), progress)
