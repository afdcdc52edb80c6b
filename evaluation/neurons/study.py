"""The study of neuron paths: which neurons a vision transformer's predictions rest on, over a data set."""

from __future__ import annotations

from pathlib import Path

from evaluation.neurons.measure import measure_neurons
from evaluation.neurons.report import print_neuron_summary, write_neuron_report
from evaluation.neurons.results import NeuronResults
from evaluation.neurons.settings import NeuronSettings
from evaluation.neurons.summary import NeuronSummary, summarise_neurons
from evaluation.study.executors import executor_of
from evaluation.study.run import Progress, Study, run

NEURONS: Study[NeuronSettings, NeuronResults, NeuronSummary] = Study(
    name="neurons",
    summary="Show which neurons of a vision transformer act together in a prediction, and what it becomes without them.",
    settings=NeuronSettings,
    measure=measure_neurons,
    summarise=summarise_neurons,
    write=write_neuron_report,
    show=print_neuron_summary,
    failures=lambda results: results.failures,
    noun="batch",
    details="""
    For IMAGES: the path, one neuron a layer, as a figure (.png) and numbers (.json), with the probability when its neurons are
    removed or doubled, beside those of baseline paths. With --data: the same over a data set with intervals, how classes
    differ, what neurons mean, and a report. Run again, the same command continues where it stopped.

    Examples:

    - `attribution neurons`

    - `attribution neurons photo.jpg --model timm:vit_base_patch16_224 --among photos/`

    - `attribution neurons --data cifar10 --root data/cifar10 --samples 500`
    """,
)


def run_neurons(settings: NeuronSettings, out: str | Path, progress: Progress | None = None) -> NeuronResults:
    """Measure what the folder does not hold yet, and return all results.

    Args:
        settings: what is measured.
        out: folder of ``records.jsonl``; several settings may share it, one process at a time.
        progress: called with (steps done, their total, words for the current one).

    Raises:
        NotApplicable: the model has no neurons that can be followed.
        UserError: settings that cannot be run, no labels, fewer than 4 images that could be followed, or a full disk. Images that
            fail are returned instead, and tried again by the next run.
    """
    return run(NEURONS, settings, out, executor_of(settings), progress)
