"""The command ``attribution doctor``: what a person should know of a classifier before trusting any explanation of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
from rich.text import Text

from attribution.doctor import Finding, examine
from attribution.model.zoo import DEFAULT_MODEL
from evaluation.data.recipes import PHOTOS, open_dataset
from evaluation.study.page import write_text
from evaluation.study.settings import MODEL_HELP, ModelSettings
from vision_attribution.inputs import find_images
from vision_attribution.studies import console


def doctor(
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Photos of the kind that the model is for, at least 4. None: photos that installed packages bring along.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = DEFAULT_MODEL,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file for what was found.", show_default=False)] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 1 if there is a warning.")] = False,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Examine a model before you trust an explanation of it.

    It says which preprocessing, scores, layers and tokens were found; whether photos look more familiar to the model when they are
    preprocessed in another way; whether a softmax is taken twice, classes are dead or a fill is a class of its own; which methods apply,
    and why others do not; and how fast the model is here. Lines to look into are marked.

    Examples:

    - `attribution doctor`

    - `attribution doctor photos/ --model timm:resnet50 --checkpoint mine.pt --classes names.txt --strict`
    """
    classifier = ModelSettings(**given).load(model)
    found = examine(list(find_images(images)) if images else _photos(), classifier, found=_Screen())
    count = len(found.warnings)
    total = "nothing to look into" if not count else f"{count} {'line' if count == 1 else 'lines'} to look into, marked with !"
    console().print(Text(f"\n{found.model}: {total} ({found.seconds:.0f} s)", style="bold"))
    if out is not None:
        write_text(out, json.dumps(found.plain(), indent=2) + "\n")
    if strict and found.warnings:
        raise typer.Exit(1)


def _photos() -> list[Path]:
    photos = open_dataset(PHOTOS)
    return [Path(photos.read(index)) for index in range(len(photos))]


class _Screen:
    """Prints findings as they come, by part; those to look into are marked."""

    def __init__(self) -> None:
        self._console, self._part = console(), ""

    def __call__(self, finding: Finding) -> None:
        if finding.part != self._part:
            self._part = finding.part
            self._console.print(Text(f"\n{finding.part}", style="bold"))
        mark = "! " if finding.warning else "  "
        self._console.print(Text(f"{mark}{finding.what}: {finding.value}", style="yellow" if finding.warning else ""))
