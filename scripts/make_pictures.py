"""Draws the pictures of README and site afresh, by the commands and programs that these pages show.

    python scripts/make_pictures.py --imagenet out/imagenet --benchmark out/cifar10 --grids out/grids --neurons out/neurons \\
        --pareto out/pareto

Without options it draws the pictures of the demo photos, in about two minutes. A picture that shows the result of a study is taken from the
study's output folder, where the study has drawn it: give the folder that the command on the page of results wrote.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from PIL import Image

import attribution as at
from attribution.files import whole_file
from vision_attribution.command import run_script

ROOT = Path(__file__).parents[1]
PICTURES = {  # option: {picture: its file in the folder of the study}
    "imagenet": {"curves_imagenet.png": "figures/*zoo-imagenet-curves-1-*.png"},
    "benchmark": {"curves.png": "figures/*zoo-vit-curves-1-*.png"},
    "grids": {"grids.png": "figures/*-gridpg-boxes.png", "aggatt.png": "figures/*-gridpg-input-aggregates-leading.png"},
    "neurons": {"neuron_edits.png": "figures/*-own-paths.png"},
    "pareto": {"pareto.png": "figures/pareto.png"},
}


def main(
    imagenet: Annotated[Path | None, typer.Option(help="Of scripts/benchmark_imagenet.toml.", show_default=False)] = None,
    benchmark: Annotated[Path | None, typer.Option(help="Of scripts/benchmark_cifar10.toml.", show_default=False)] = None,
    grids: Annotated[Path | None, typer.Option(help="Of scripts/grids_cifar10.toml.", show_default=False)] = None,
    neurons: Annotated[Path | None, typer.Option(help="Of attribution neurons --data cifar10.", show_default=False)] = None,
    pareto: Annotated[Path | None, typer.Option(help="Of attribution pareto --data cifar10.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = ROOT / "docs" / "images",
) -> None:
    """Draw the pictures of the demo photos, and take those of the studies whose folders are given."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        command("explain", "--out", str(folder))
        keep([folder / "chelsea-zoo-imagenet.png", folder / "coffee-zoo-imagenet.png"], out / "photos.png")
        command("neurons", "--among", "photos", "--out", str(folder))
        keep([folder / "chelsea-zoo-vit-path.png"], out / "neurons.png")
        failure = at.explain_failure(ROOT / "docs" / "photo.png", "zoo:imagenet", true_class="tabby", fill="mean")
        failure.plot().savefig(folder / "failure.png")
        keep([folder / "failure.png"], out / "failure.png")
    studies = {"imagenet": imagenet, "benchmark": benchmark, "grids": grids, "neurons": neurons, "pareto": pareto}
    for option, study in studies.items():
        for picture, pattern in PICTURES[option].items() if study is not None else ():
            found = sorted(study.glob(pattern))
            if not found:
                raise typer.BadParameter(f"{study} has no {pattern}: expected the folder of a finished study", param_hint=f"--{option}")
            keep(found[:1], out / picture)


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "vision_attribution", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def keep(sources: list[Path], target: Path) -> None:
    """The figures, one below the other, on opaque white, so that they can be read on a dark page too."""
    figures = [Image.open(source).convert("RGBA") for source in sources]
    sheet = Image.new("RGBA", (max(each.width for each in figures), sum(each.height for each in figures)), "white")
    top = 0
    for figure in figures:
        sheet.alpha_composite(figure, (0, top))
        top += figure.height
    with whole_file(target) as temporary:
        sheet.convert("RGB").save(temporary, format="PNG", optimize=True)
    print(target)


if __name__ == "__main__":
    run_script(main)
