"""Measure the cost of the neuron path search: rows compared with the reference code, rows per second, peak memory.

    python scripts/bench_neurons.py

The reference code differentiates each overridden layer on its own, which is m L (L + 1) / 2 backward rows for the search. This
library gets all gradients of a pass from one backward pass. Weights do not affect the speed, so timm models are randomly
initialised.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import attribution as at
from attribution.hooks import frozen_parameters
from attribution.neurons import PathFinder, find_neurons
from evaluation.study.tables import terminal_table
from vision_attribution.command import run_script


def reference_rows(layers: int, steps: int) -> tuple[int, int]:
    """(forward, backward) rows of the reference code for one image: clean passes, search, and the score of the path."""
    return layers + layers * steps + steps, steps * layers * (layers + 1) // 2 + steps * layers


def measure(name: str, steps: int, repeats: int, threads: int) -> dict[str, Any]:
    """Measure one model. Run it in its own process, so that the peak memory is that of this model."""
    torch.set_num_threads(threads)
    classifier = at.load_classifier(name) if name.startswith("zoo:") else at.load_classifier(name, pretrained=False)
    layers = find_neurons(classifier)
    inputs = classifier.inputs(at.demo_image_path())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = min(classifier.batch_size, steps)
    batch = inputs.expand(rows, -1, -1, -1)
    forward = min(_seconds(partial(_forward, classifier, batch)) for _ in range(repeats)) / rows
    both = min(_seconds(partial(_both, classifier, batch)) for _ in range(repeats)) / rows
    finder = PathFinder(classifier, inputs, [0], steps=steps, layers=layers)
    seconds = min(_seconds(finder.search) for _ in range(repeats))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"layers": len(layers), "forwards": finder.forwards, "backwards": finder.backwards, "seconds": seconds}
    return {**found, "forward": forward, "both": both, "model_mib": before / 1024, "peak_mib": after / 1024, "rows": rows}


def main(
    models: Annotated[list[str] | None, typer.Argument(help="zoo:NAME or timm:NAME.", show_default=False)] = None,
    steps: Annotated[int, typer.Option(min=1, help="m, points of the Riemann sums.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="The fastest repeat counts.")] = 2,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Print the tables."""
    rows = []
    for name in models or ["zoo:vit", "timm:vit_tiny_patch16_224", "timm:vit_base_patch16_224"]:
        print(f"{name} ...", file=sys.stderr)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (name, steps, repeats, threads))
        theirs_forward, theirs_backward = reference_rows(found["layers"], steps)
        backward = max(0.0, found["both"] - found["forward"])
        theirs = theirs_forward * found["forward"] + theirs_backward * backward  # the reference's rows at the rates measured here
        pure = (found["forwards"] - found["backwards"]) * found["forward"] + found["backwards"] * found["both"]
        counts = (found["layers"], found["forwards"], found["backwards"], theirs_forward, theirs_backward)
        ratios = (pure / found["seconds"], theirs / found["seconds"])
        rows.append(
            [
                *(name, *map(str, counts), f"{found['seconds']:.2f}", f"{found['forwards'] / found['seconds']:.1f}"),
                *(*(f"{ratio:.2f}" for ratio in ratios), f"{found['peak_mib']:.0f}", f"{found['model_mib']:.0f}"),
            ]
        )
    title = f"One image, m = {steps}, {threads} threads, torch {torch.__version__}"
    headings = ("model", "layers", "rows forward", "backward", "reference forward", "backward", "seconds", "rows/s", "of pure rate")
    Console(width=170).print(terminal_table(title, [*headings, "reference / ours", "peak MiB", "of it model"], rows, ("model",)))


def _seconds(job: Any) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def _forward(classifier: at.Classifier, batch: torch.Tensor) -> None:
    with torch.no_grad():
        classifier.logits(batch)


def _both(classifier: at.Classifier, batch: torch.Tensor) -> None:
    inputs = batch.clone().requires_grad_()
    with frozen_parameters(classifier.module):
        torch.autograd.grad(classifier.probabilities(inputs)[:, 0].sum(), inputs)


if __name__ == "__main__":
    run_script(main)
