"""The command ``attribution debug``: why a model is wrong about the images of a data set."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from attribution.errors import UserError
from attribution.files import slug, whole_file
from attribution.fills import FILLS
from attribution.regions import REGIONS
from attribution.search import SEARCHES
from vision_attribution.inputs import model_with_names
from vision_attribution.progress import Bar


def debug(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            "-d",
            help="Labelled images: a recipe name (with --root), a folder with one subfolder a class, or a CSV or text list of path and "
            "label (also mask or x0, y0, x1, y1, and group).",
            show_default=False,
        ),
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="zoo:cnn, zoo:vit, timm:NAME, torchvision:NAME or a saved .safetensors file.")
    ] = "zoo:cnn",
    root: Annotated[str | None, typer.Option(help="Where the data of a recipe lie.", show_default=False)] = None,
    split: Annotated[str, typer.Option(help="Split of a recipe.")] = "test",
    samples: Annotated[
        int | None,
        typer.Option("--samples", "-n", min=1, help="Look at so many images, drawn by the seed. Default: all.", show_default=False),
    ] = None,
    most: Annotated[int, typer.Option(min=0, help="Explain so many of the misclassified images; 0 for all.")] = 100,
    only: Annotated[
        str | None,
        typer.Option(help="Explain this one sample instead, by its id, and print and draw what was found.", show_default=False),
    ] = None,
    fill: Annotated[
        str, typer.Option("--fill", "-f", help=f"What hides a region: {', '.join(FILLS)}, model_mean, drop, '#rrggbb' or an image file.")
    ] = "black",
    regions: Annotated[str, typer.Option("--regions", "-r", help=f"How images are cut: {', '.join(REGIONS)}.")] = "slico",
    region_count: Annotated[
        int | None, typer.Option(min=2, help="About how many regions. Default: the published 49 or 50.", show_default=False)
    ] = None,
    search: Annotated[str, typer.Option("--search", "-s", help=f"{', '.join(SEARCHES)}.")] = "bidirectional",
    pending: Annotated[int, typer.Option(min=1, help="p of the bidirectional search.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples, the searches, the intervals and the clusters.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights for a timm or torchvision model.", show_default=False)] = None,
    classes: Annotated[Path | None, typer.Option(help="Text file with one class name a line.", show_default=False)] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of records, explanations, tables and the atlas.")] = Path("out/debug"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Most images forwarded at once.", show_default=False)] = None,
) -> None:
    """Find the images that a model gets wrong, show what causes each mistake, and what the mistakes have in common.

    Every misclassified image is explained towards its label and towards the predicted class: the smallest part whose removal makes
    the model right, and the smallest part that does alone. Writes records.jsonl, explanations, failures.csv, pairs.csv,
    failures.json and atlas.html, an interactive page; run again it continues where it stopped. Exit code 2 when images failed
    (they are listed, the others count).

    Examples:

    - `attribution debug --data images/ --model timm:vit_base_patch16_224`

    - `attribution debug --data cifar10 --root data --model zoo:vit --samples 1000 --most 100`

    - `attribution debug --data cifar10 --root data --model zoo:vit --only test/cat/0007.png`
    """
    from evaluation.failures.settings import FailureSettings

    given: dict[str, Any] = {
        "data": data,
        "root": root,
        "split": split,
        "model": model_with_names(model, classes, device=device, checkpoint=checkpoint, batch_size=batch_size),
        "samples": samples,
        "most": most or None,
        "seed": seed,
        "fill": fill,
        "regions": regions,
        "region_options": {} if region_count is None else {"count": region_count},
        "search": search,
        "pending": pending,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "device": device,
        "batch_size": batch_size,
    }
    settings = FailureSettings.make(given)
    try:
        if only is None:
            _all_failures(settings, out)
        else:
            _one_failure(settings, only, out)
    except KeyboardInterrupt:
        typer.echo("interrupted: what was found is kept, the same command continues", err=True)
        raise typer.Exit(130) from None


def _all_failures(settings: Any, out: Path) -> None:
    from evaluation.failures.measure import run_failures
    from evaluation.failures.report import print_failures, write_failures
    from evaluation.failures.summary import summarise_failures

    with Bar(unit="image") as progress:
        results = run_failures(settings, out, progress)
    summary = summarise_failures(results)
    files = write_failures(summary, out)
    print_failures(summary, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    typer.echo(f"atlas: {files.html}")
    if results.broken:
        sample, reason = results.broken[0]
        count = f"{len(results.broken)} image{'' if len(results.broken) == 1 else 's'}"
        raise UserError(f"{count} failed, such as {sample}: {reason} (all are listed in {files.html}; the others count)")


def _one_failure(settings: Any, sample: str, out: Path) -> None:
    from attribution.figures.failure import plot_failure
    from evaluation.failures.measure import explain_sample

    failure = explain_sample(settings, sample)
    figure = out / f"{slug(sample.removesuffix(Path(sample).suffix))}.png"
    with whole_file(figure) as temporary:
        plot_failure(failure).savefig(temporary, format="png")
    typer.echo(f"{sample}: {failure.text}")
    typer.echo(f"figure: {figure}")
