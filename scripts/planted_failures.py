"""Planted failures: how well the causing regions find a pasted patch that flips the prediction, beside gradient methods; prints a table.

    python scripts/planted_failures.py --root DATA

DATA holds CIFAR-10 in a layout of datasets/cifar10.toml. Every map is judged by the same two functions against the patch.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import attribution as at
import evaluation as ev
from attribution.files import whole_file
from evaluation.failures.planted import OURS, chance, judge_planted, plant_failures
from evaluation.statistics.comparisons import holm, sign_flip


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
    """Print the table: mean, 95 % bootstrap interval, and the test against the causing regions."""
    classifier = at.load_classifier(model)
    dataset = ev.open_dataset("cifar10", root=root, class_names=classifier.class_names)
    scores: dict[str, list[tuple[float, float]]] = {}
    rows, shares = [], []
    planted = plant_failures(classifier, dataset, count, seed=seed)
    for each in tqdm(planted, total=count, file=sys.stderr, disable=None):
        found = judge_planted(classifier, each, regions=regions, region_options={"count": region_count}, fill=fill)
        shares.append(chance(each))
        for name, values in found.items():
            scores.setdefault(name, []).append(values)
            rows.append(
                [each.sample, each.donor, classifier.class_names[each.label], classifier.class_names[each.predicted], name, *values]
            )
    if out is not None:
        with whole_file(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["sample", "donor", "label", "predicted", "map", "energy", "hit"], *rows])
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{classifier.name}, {len(shares)} planted failures, patch {np.mean(shares):.1%} of the image, fill {fill}",
        title_justify="left",
    )
    for heading in ("map", "energy inside", "p", "first pixel inside", "p", "without a value"):
        table.add_column(heading, justify="left" if heading == "map" else "right")
    values = {name: np.array(found) for name, found in scores.items()}
    first = values[OURS[0]]
    tested = {name: [sign_flip(first[:, k], found[:, k]) for k in range(2)] for name, found in values.items() if name not in OURS}
    adjusted = {
        name: p for name, p in zip(tested, zip(*(holm([tested[n][k] for n in tested]) for k in range(2)), strict=True), strict=True)
    }
    for name, found in values.items():
        cells = []
        for k in range(2):
            interval = ev.bootstrap_interval(found[:, k])
            cells += [
                f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]",
                f"{adjusted[name][k]:.4f}" if name in adjusted else "",
            ]
        table.add_row(name, *cells, str(int(np.isnan(found[:, 0]).sum())))
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
