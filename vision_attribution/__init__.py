"""The command ``attribution``: what a person types, composed from the library."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from attribution import __version__
from attribution.errors import UserError
from vision_attribution import benchmark, debug, explain, neurons

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


app.command()(explain.explain)

app.command()(benchmark.benchmark)

app.command()(debug.debug)

app.command()(neurons.neurons)


def main() -> None:
    """Entry point: one line and exit code 2 for what a user can mend, 130 when interrupted."""
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
