"""The command ``attribution benchmark``: which attribution method is most faithful, with what certainty."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from attribution.errors import UserError
from vision_attribution.progress import Bar


def benchmark(
    config: Annotated[Path | None, typer.Argument(help="TOML file of settings; options given beside it win.", show_default=False)] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="As for explain; repeat it to compare models. Default: zoo:cnn.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="A recipe name (with --root), a folder of images (one folder a class, or flat without labels), or a CSV or text "
            "list of path and label (also mask or x0, y0, x1, y1, and group). Default: photos, eight that installed packages "
            "bring along.",
            show_default=False,
        ),
    ] = None,
    root: Annotated[str | None, typer.Option(help="Where the data of a recipe lie.", show_default=False)] = None,
    split: Annotated[str | None, typer.Option(help="Split of a recipe. Default: test.", show_default=False)] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: region searches (bidirectional, greedy, ...) and attribution methods (grad_cam, rise, "
            "rise@lima with a preset, ...). --list shows them. Default: 18 of them.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Comma-separated; --list shows them. Default: those that need no mask.", show_default=False)
    ] = None,
    fill: Annotated[
        str | None,
        typer.Option(
            "--fill",
            "-f",
            help="Comma-separated fills of the curves: black, mean, blur, linear (imputed), model_mean, drop (tokens of a vision "
            "transformer), '#rrggbb', an image file. Several give the sensitivity panel. Default: black.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[str | None, typer.Option(help="regions, pixels, or both. Default: regions.", show_default=False)] = None,
    pixel_steps: Annotated[int | None, typer.Option(min=1, help="Number of pixel steps. Default: 50.", show_default=False)] = None,
    output: Annotated[str | None, typer.Option(help="probability or logit. Default: probability.", show_default=False)] = None,
    protocol: Annotated[
        str | None, typer.Option(help="A published protocol instead: lima, smdl, smdl-baselines, lima-compat.", show_default=False)
    ] = None,
    regions: Annotated[
        str | None, typer.Option("--regions", "-r", help="How images are cut, for all methods. Default: slico.", show_default=False)
    ] = None,
    region_count: Annotated[int | None, typer.Option(min=2, help="About how many regions.", show_default=False)] = None,
    method_fill: Annotated[
        str | None,
        typer.Option(help="What hides pixels while methods work. Default: the first fill but linear and drop.", show_default=False),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", min=1, help="So many images, drawn by the seed. Default: all.", show_default=False)
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="all, correct or wrong: images by the model's own prediction. Default: all.", show_default=False)
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="predicted or label. Default: predicted.", show_default=False)
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Of gridpg, difull, dipart: comma-separated input, middle, final, or modules. Default: all three.", show_default=False
        ),
    ] = None,
    grids: Annotated[
        int | None, typer.Option(min=1, help="So many grids of images for gridpg, difull and dipart. Default: 100.", show_default=False)
    ] = None,
    cells: Annotated[int | None, typer.Option(min=2, help="Images along each side of a grid. Default: 2.", show_default=False)] = None,
    confidence: Annotated[
        float | None,
        typer.Option(help="Least confidence of every model in the label of an image of a grid. Default: 0.99.", show_default=False),
    ] = None,
    repeat_corners: Annotated[bool, typer.Option("--repeat-corners", help="The last cell of a grid shows the class of the first.")] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the images, the methods and the metrics. Default: 0.", show_default=False)
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each stochastic method, for its spread. Default: 1.", show_default=False)
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights for a timm or torchvision model.", show_default=False)] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of records, explanations, tables and the report.")] = Path(
        "out/benchmark"
    ),
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps. Default: auto.", show_default=False)] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most images in memory at once; changes no number.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="So many processes judge grids side by side; changes no number. Default: 1.", show_default=False),
    ] = None,
    list_names: Annotated[bool, typer.Option("--list", help="Show methods, presets, metrics and protocols, and stop.")] = False,
) -> None:
    """Judge attribution methods by how faithful they are to a model, on a data set.

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
    """
    from evaluation.benchmark.measure import run_benchmark
    from evaluation.benchmark.report import write_report
    from evaluation.benchmark.settings import make_settings, read_settings
    from evaluation.benchmark.summary import summarise
    from evaluation.benchmark.terminal import print_summary

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if list_names:
        _print_names(console)
        return
    given: dict[str, Any] = {
        "models": tuple(model) if model else None,
        "data": data,
        "root": root,
        "split": split,
        "methods": _names(methods),
        "metrics": _names(metrics),
        "fills": _names(fill),
        "steps": _names(steps),
        "pixel_steps": pixel_steps,
        "output": output,
        "protocol": protocol,
        "regions": regions,
        "region_options": None if region_count is None else {"count": region_count},
        "method_fill": method_fill,
        "samples": samples,
        "only": only,
        "target": target,
        "layers": _names(layers),
        "grids": grids,
        "cells": cells,
        "confidence": confidence,
        "repeat_corners": repeat_corners or None,
        "seed": seed,
        "seeds": seeds,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "device": device,
        "batch_size": batch_size,
        "workers": workers,
    }
    overrides = {name: value for name, value in given.items() if value is not None}
    settings = make_settings({"data": "photos", **overrides}, "the command") if config is None else read_settings(config, overrides)
    try:
        with Bar(unit="expl") as progress:
            results = run_benchmark(settings, out, progress)
        summary = summarise(results)
        files = write_report(summary, out)
    except KeyboardInterrupt:
        typer.echo("interrupted: what was measured is kept, the same command continues", err=True)
        raise typer.Exit(130) from None
    print_summary(summary, console)
    typer.echo(f"report: {files.html}")
    if results.failed:
        first = results.failed[0]
        what = f"{len(results.failed)} measurements failed, such as {first.method} on {first.sample or first.model}: {first.reason}"
        raise UserError(f"{what} (all are listed in {files.html}; the others count)")


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _print_names(console: Console) -> None:
    from attribution.baselines import METHOD_PRESETS
    from attribution.baselines.attribute import METHODS
    from attribution.search import SEARCHES
    from evaluation.metrics.protocol import PROTOCOLS
    from evaluation.metrics.registry import METRICS

    console.print("[bold]region searches[/bold]: " + ", ".join(SEARCHES))
    console.print("[bold]methods[/bold]")
    for name, method in METHODS.items():
        presets = [preset for preset, settings in METHOD_PRESETS.items() if name in settings]
        extra = f" (presets {', '.join(presets)})" if presets else ""
        console.print(f"  {name} [dim]{method.family}[/dim]: {method.summary.split('(')[0].strip().rstrip('.')}{extra}", markup=True)
    console.print("[bold]metrics[/bold]")
    for name, metric in METRICS.items():
        console.print(f"  {name} [dim]{metric.direction} is better[/dim]: {metric.summary}")
    console.print("[bold]protocols[/bold]")
    for name, protocol in PROTOCOLS.items():
        console.print(f"  {name}: {protocol.label()}", markup=False)
