"""Quality against evaluations: the search by budget beside published searches and sampling methods; prints a table, draws a figure.

    python scripts/pareto.py --root DATA --out out/pareto

DATA holds CIFAR-10 in a layout of datasets/cifar10.toml. Every order is measured by the same function: region steps, one fill.
Images that the model gets right with p >= 0.7. A run that was killed continues where it stopped; several settings may share --out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from attribution.files import whole_file
from evaluation.pareto.figures import plot_pareto
from evaluation.pareto.measure import read_pareto, run_pareto
from evaluation.pareto.settings import BUDGETS, SAMPLED_BUDGETS, ParetoSettings
from evaluation.pareto.summary import Row, pareto_csv, summarise_pareto
from evaluation.statistics.intervals import Interval


def main(
    root: Annotated[Path, typer.Option(help="Folder with CIFAR-10.")],
    out: Annotated[Path, typer.Option(help="Folder of records, table and figure.")] = Path("out/pareto"),
    model: Annotated[list[str] | None, typer.Option(help="Repeat it for several. Default: both zoo models.", show_default=False)] = None,
    partition: Annotated[list[str] | None, typer.Option(help="Such as grid:64; repeat it. Default: grid:64.", show_default=False)] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "budget,bidirectional",
    budgets: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(map(str, BUDGETS)),
    sampled_budgets: Annotated[str, typer.Option(help="Comma-separated, of rise, kernel_shap, hsic and occlusion.")] = ",".join(
        map(str, SAMPLED_BUDGETS)
    ),
    measure: Annotated[bool, typer.Option(help="Whether to measure what is missing, or to show what --out holds.")] = True,
    samples: Annotated[int, typer.Option(min=1, help="Images of each model.")] = 100,
    fill: Annotated[str, typer.Option()] = "black",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Measure what is missing, print the table, write pareto.csv and pareto.svg."""
    rows: list[Row] = []
    for name in model or ["zoo:cnn", "zoo:vit"]:
        for cut in partition or ["grid:64"]:
            regions, _, count = cut.partition(":")
            settings = ParetoSettings(
                data="cifar10",
                root=str(root),
                model=name,
                regions=regions,
                count=int(count or 64),
                methods=tuple(methods.split(",")),
                budgets=tuple(int(budget) for budget in budgets.split(",")),
                sampled_budgets=tuple(int(budget) for budget in sampled_budgets.split(",")),
                samples=samples,
                fill=fill,
                seed=seed,
            )
            if not measure:
                rows += summarise_pareto(read_pareto(settings, out))
                continue
            with tqdm(total=samples, desc=f"{name} {cut}", file=sys.stderr, disable=None) as bar:
                results = run_pareto(settings, out, lambda done, _, sample, bar=bar: bar.update(done - bar.n))  # type: ignore[misc]
            rows += summarise_pareto(results)
    with whole_file(out / "pareto.csv") as temporary:
        temporary.write_text(pareto_csv(rows), encoding="utf-8")
    for suffix in ("svg", "png"):
        with whole_file(out / f"pareto.{suffix}") as temporary:
            plot_pareto(rows).savefig(temporary, format=suffix)
    table = Table(box=box.SIMPLE_HEAD, title=f"fill {fill}, region steps, p of the label, seed {seed}", title_justify="left")
    for heading in ("model", "regions", "method", "images forwarded", "images", "Ins - Del", "against bidirectional", "p"):
        table.add_column(heading, justify="left" if heading in ("model", "regions", "method") else "right")
    for row in rows:
        shown = "" if row.gain is None else _text(row.gain, "+.3f")
        p = "" if row.gain is None else f"{row.p:.4f}"
        name = f"{row.method} {row.budget}" if row.budget else row.method
        quality = _text(row.quality, ".3f")
        table.add_row(row.model, row.partition, name, f"{row.evaluations:.0f}", str(row.quality.count), quality, shown, p)
    Console(width=140).print(table)


def _text(interval: Interval, form: str) -> str:
    return f"{interval.estimate:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


if __name__ == "__main__":
    typer.run(main)
