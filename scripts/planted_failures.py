"""Measure how well the causing regions, and gradient methods, find a pasted patch that changes the prediction; prints a table.

    python scripts/planted_failures.py --root DATA

DATA holds CIFAR-10 in a layout of datasets/cifar10.toml. Every map is compared with the patch by the same two functions.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import attribution as at
import evaluation as ev
from evaluation.failures.planted import OURS, chance, judge_planted, plant_failures
from evaluation.statistics.comparisons import holm, sign_flip
from evaluation.study.page import write_text
from evaluation.study.tables import csv_text, estimated, terminal_table
from vision_attribution.command import run_script


def main(
    root: Annotated[Path, typer.Option(help="Folder with CIFAR-10.")],
    model: Annotated[str, typer.Option()] = "zoo:cnn",
    count: Annotated[int, typer.Option(min=2, help="Planted failures.")] = 100,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    regions: Annotated[str, typer.Option()] = "grid",
    region_count: Annotated[int, typer.Option(min=2)] = 36,
    fill: Annotated[str, typer.Option(help="What hides regions.")] = "mean",
    out: Annotated[Path | None, typer.Option(help="CSV file of every score.", show_default=False)] = None,
) -> None:
    """Print the table: means, 95 % bootstrap intervals, and tests against the causing regions."""
    classifier = at.load_classifier(model)
    dataset = ev.open_dataset("cifar10", root=root, class_names=classifier.class_names)
    names = classifier.class_names
    scores: dict[str, list[tuple[float, float]]] = {}
    rows, shares = [], []
    for each in tqdm(plant_failures(classifier, dataset, count, seed=seed), total=count, file=sys.stderr, disable=None):
        found = judge_planted(classifier, each, regions=regions, region_options={"count": region_count}, fill=fill)
        shares.append(chance(each))
        for name, values in found.items():
            scores.setdefault(name, []).append(values)
            rows.append([each.sample, each.donor, names[each.label], names[each.predicted], name, *map(str, values)])
    if out is not None:
        write_text(out, csv_text(["sample", "donor", "label", "predicted", "map", "energy", "hit"], rows))
    title = f"{classifier.name}, {len(shares)} planted failures, patch {np.mean(shares):.1%} of the image, fill {fill}"
    Console(width=140).print(table_of({name: np.array(found) for name, found in scores.items()}, title))


def table_of(scores: Mapping[str, np.ndarray], title: str) -> Table:
    """A row for each map: both scores with their intervals, and p of the difference from the causing regions (Holm)."""
    others = [name for name in scores if name not in OURS]
    p = {(name, k): value for k in range(2) for name, value in zip(others, _compared(scores, others, k), strict=True)}
    rows = []
    for name, found in scores.items():
        cells = []
        for k in range(2):
            cells += [estimated(ev.bootstrap_interval(found[:, k]), "{:.3f}".format), f"{p[name, k]:.4f}" if (name, k) in p else ""]
        rows.append([name, *cells, str(int(np.isnan(found[:, 0]).sum()))])
    return terminal_table(title, ("map", "energy inside", "p", "first pixel inside", "p", "without a value"), rows, ("map",))


def _compared(scores: Mapping[str, np.ndarray], others: Sequence[str], k: int) -> np.ndarray:
    return holm([sign_flip(scores[OURS[0]][:, k], scores[name][:, k]) for name in others])


if __name__ == "__main__":
    run_script(main)
