"""The benchmark as a study: which attribution method is most faithful, with what certainty."""

from __future__ import annotations

from pathlib import Path

from evaluation.benchmark.measure import measure_benchmark
from evaluation.benchmark.report import write_report
from evaluation.benchmark.results import Results
from evaluation.benchmark.settings import BenchmarkSettings
from evaluation.benchmark.summary import Summary, summarise
from evaluation.benchmark.terminal import print_summary
from evaluation.study.executors import executor_of
from evaluation.study.run import Progress, Study, run


def failed(results: Results) -> list[tuple[str, str]]:
    """What could not be explained or measured, each with its reason. Refusals do not count as failures."""
    return [(f"{each.method} on {each.sample or each.model}", each.reason) for each in results.failed]


BENCHMARK: Study[BenchmarkSettings, Results, Summary] = Study(
    name="benchmark",
    summary="Judge attribution methods by how faithful they are to a model, on a data set.",
    settings=BenchmarkSettings,
    measure=measure_benchmark,
    summarise=summarise,
    write=write_report,
    show=print_summary,
    failures=failed,
    noun="explanation",
    details="""
    Every method, region search included, explains the same images and is measured by the same functions under one stated
    protocol. Numbers are kept the moment they are known: run again, the same command continues where it stopped, and other
    metrics judge the same explanations. Writes records.jsonl, summary.csv, summary.json, figures and report.html. Exit code 2
    when images failed (they are listed, the others count).

    Examples:

    - `attribution benchmark`

    - `attribution benchmark --data images/ --model timm:vit_base_patch16_224 --samples 100`

    - `attribution benchmark --data cifar10 --root data -m zoo:cnn -m zoo:vit --methods bidirectional,grad_cam,rise --fill black,blur`

    - `attribution benchmark --data images/ --metrics gridpg,difull,dipart --layers input,middle,final --grids 200`

    - `attribution benchmark settings.toml --out out/mine`
    """,
)


def run_benchmark(settings: BenchmarkSettings, out: str | Path, progress: Progress | None = None) -> Results:
    """Measure what the folder does not hold yet, and return all results.

    Args:
        settings: what is measured.
        out: folder of ``records.jsonl``, explanations, curves and maps; one process at a time.
        progress: called with (explanations judged, their total, words for the current one).

    Raises:
        UserError: settings that cannot be run at all, or a full disk. Images that fail are kept and returned instead.
    """
    return run(BENCHMARK, settings, out, executor_of(settings), progress)
