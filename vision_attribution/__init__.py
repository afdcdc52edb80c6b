"""The command ``attribution``: what a person types, composed from the library."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from attribution import __version__
from attribution.errors import UserError
from evaluation.benchmark.terminal import print_names
from evaluation.studies import STUDIES
from evaluation.study.settings import ModelSettings
from vision_attribution import doctor, explain, neurons
from vision_attribution.one_failure import ONLY, one_failure
from vision_attribution.studies import Instead, console, extra, study_command, with_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"attribution {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Explain, judge and debug image classifiers by submodular region selection."""


def _listed(_given: dict[str, Any], extras: dict[str, Any], _out: Path) -> bool:
    if extras["list_names"]:
        print_names(console())
    return bool(extras["list_names"])


_LIST = extra("list_names", bool, "Show methods, presets, metrics and protocols, and stop.", "--list", default=False)
# What the command of a study does beside the study: further parameters, and what they do instead.
BESIDE: dict[str, tuple[Sequence[inspect.Parameter], Instead]] = {
    "benchmark": ([_LIST], _listed),
    "debug": ([ONLY], one_failure),
    "neurons": (neurons.EXTRAS, neurons.follow_images),
}

app.command()(with_settings(explain.explain, ModelSettings))
app.command()(with_settings(doctor.doctor, ModelSettings))
for study in STUDIES.values():
    app.command()(study_command(study, *BESIDE.get(study.name, ())))


def main() -> None:
    """Entry point. Errors that a user can correct print one line and exit with code 2; an interrupt exits with code 130."""
    warnings.showwarning = lambda message, *_: typer.echo(f"warning: {message}", err=True)
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        code = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # the parser's own errors have it, wherever typer keeps their class
            raise
        if error.format_message():  # empty when there was no command and the help was shown
            typer.echo(f"error: {error.format_message()} (see attribution --help)", err=True)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)
