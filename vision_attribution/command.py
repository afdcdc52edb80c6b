"""The command ``attribution``, composed from the library."""

from __future__ import annotations

import inspect
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from attribution import __version__
from attribution.errors import UserError
from evaluation.benchmark.terminal import print_names
from evaluation.studies import STUDIES
from evaluation.study.settings import ModelSettings
from vision_attribution import INTERRUPTED, doctor, explain, neurons
from vision_attribution.inputs import Stopped, say
from vision_attribution.one_failure import ONLY, one_failure
from vision_attribution.studies import Instead, console, extra, merge_command, study_command, with_settings

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
app.command()(merge_command())


def run(program: typer.Typer) -> int:
    """Run a program on the arguments of this process, and return its exit code.

    Errors that a user can correct print one line, code 2. An interrupt prints one line, code 130, even where a library turns it into an
    error of its own or Python cannot pass it on. Programming errors keep their traceback.
    """
    warnings.showwarning = lambda message, *_: say(f"warning: {message}", err=True)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no text, and terminals may lack letters
    interrupts: list[int] = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        interrupts.append(signum)
        raise KeyboardInterrupt

    def hook(unraisable: Any) -> None:
        if not interrupts:
            sys.__unraisablehook__(unraisable)

    handled = threading.current_thread() is threading.main_thread()  # only there can signals be handled
    if handled:
        signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = hook
    try:
        return _answered(program, interrupts)
    finally:
        sys.unraisablehook = sys.__unraisablehook__
        if handled:  # a second interrupt ends the process without a word
            signal.signal(signal.SIGINT, signal.SIG_DFL if interrupts else signal.default_int_handler)


def run_script(function: Callable[..., None]) -> None:
    """Run a function as a command of its own, such as a script, with the errors and interrupts of ``run``."""
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    script.command()(function)
    sys.exit(run(script))


def _answered(program: typer.Typer, interrupts: Sequence[int]) -> int:
    try:
        code = program(standalone_mode=False)
    except UserError as error:
        say(f"error: {error}", err=True)
        return 2
    except Stopped as error:
        say(str(error), err=True)
        return INTERRUPTED
    except (KeyboardInterrupt, typer.Abort) as error:
        if isinstance(error.__cause__, EOFError) and not interrupts:  # the parser takes it for the end of what a person types
            raise error.__cause__ from None
        say("interrupted", err=True)
        return INTERRUPTED
    except Exception as error:
        if interrupts:
            say("interrupted", err=True)
            return INTERRUPTED
        if not hasattr(error, "format_message"):  # the parser's own errors have it, wherever typer keeps their class
            raise
        if error.format_message():  # empty when there was no command and the help was shown
            say(f"error: {error.format_message()} (see {'attribution' if program is app else Path(sys.argv[0]).name} --help)", err=True)
        return 2
    if code == INTERRUPTED:  # the parser met it
        say("interrupted", err=True)
    return code if isinstance(code, int) else 0
