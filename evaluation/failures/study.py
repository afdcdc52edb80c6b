"""The study of failures: which images a model gets wrong, what causes each mistake, and what the mistakes have in common."""

from __future__ import annotations

from pathlib import Path

from evaluation.failures.measure import measure_failures
from evaluation.failures.report import print_failures, write_failures
from evaluation.failures.results import FailureResults
from evaluation.failures.settings import FailureSettings
from evaluation.failures.summary import FailureSummary, summarise_failures
from evaluation.study.executors import executor_of
from evaluation.study.run import Progress, Study, run

FAILURES: Study[FailureSettings, FailureResults, FailureSummary] = Study(
    name="debug",
    summary="Find the images that a model gets wrong, show what causes each mistake, and what the mistakes have in common.",
    settings=FailureSettings,
    measure=measure_failures,
    summarise=summarise_failures,
    write=write_failures,
    show=print_failures,
    failures=lambda results: results.broken,
    noun="step",
    details="""
    Every misclassified image is explained towards its label and towards the predicted class: the smallest part whose removal makes
    the model right, and the smallest part that suffices alone. Writes records.jsonl, explanations, failures.csv, pairs.csv,
    failures.json and atlas.html, an interactive page; run again it continues where it stopped. Exit code 2 when images failed
    (they are listed, the others count).

    Examples:

    - `attribution debug --data images/ --model timm:vit_base_patch16_224`

    - `attribution debug --data cifar10 --root data --model zoo:vit --samples 1000 --most 100`

    - `attribution debug --data cifar10 --root data --model zoo:vit --only test/cat/0007.png`
    """,
)


def run_failures(settings: FailureSettings, out: str | Path, progress: Progress | None = None) -> FailureResults:
    """Predict the images, explain those that the model gets wrong, and keep every result the moment it is known.

    Args:
        settings: what is explained, and how.
        out: folder of ``records.jsonl`` and ``explanations``; one process at a time.
        progress: called with (steps done, their total, words for the current one): first batches predicted, then images explained.

    Raises:
        UserError: settings that cannot be run, no labels, no image that can be read, or a full disk. Images that fail are
            returned instead, and tried again by the next run.
    """
    return run(FAILURES, settings, out, executor_of(settings), progress)
