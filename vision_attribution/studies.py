"""The commands of studies, made from the fields of their settings: an option is written once, where its setting is."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from attribution.errors import UserError, printable
from attribution.model.classifier import Classifier
from evaluation.studies import STUDIES
from evaluation.study.executors import executor_of
from evaluation.study.run import Study, held, run
from evaluation.study.settings import ModelSettings, Setting, StudySettings, hints_of, option_name, read_values, settings_of
from evaluation.study.shards import merged, parse_shard, run_shard
from vision_attribution.inputs import Stopped, say
from vision_attribution.progress import Bar

Given = dict[str, Any]
Instead = Callable[[Given, Given, Path], bool]


def study_command(
    study: Study[Any, Any, Any], extras: Sequence[inspect.Parameter] = (), instead: Instead | None = None
) -> Callable[..., None]:
    """The command of a study: a function whose parameters are the settings, for typer.

    Args:
        study: what it runs.
        extras: parameters of the command beside the settings.
        instead: called first, with the settings given on the command line or in the file, the extras, and the folder. If it returns
            True, the study is not run.
    """
    positional = any(isinstance(each.annotation.__metadata__[0], typer.models.ArgumentInfo) for each in extras)
    text = "TOML file of settings. Options on the command line override it."
    config = extra("config", Path, text, *(["--config"] if positional else []))
    folder, text = Path("out") / study.name, "Measure what is missing, or only show what --out holds."
    out = extra("out", Path, "Folder of records, tables, figures and the page.", "--out", "-o", default=folder, show=True)
    measure = extra("measure", bool, text, "--measure/--no-measure", default=True, show=True)
    text = "Measure one part of several, such as 3/16, for jobs that know nothing of each other; attribution merge joins their folders."
    shard = extra("shard", str, text, "--shard")
    options = [each for name in fields(study.settings) for each in _options(study.settings, name)]
    parameters = [*extras, config, *options, shard, out, measure]

    def command(**values: Any) -> None:
        path = values["config"]
        given = {**({} if path is None else read_values(path)), **given_options(study.settings, values)}
        further = {each.name: values[each.name] for each in extras}
        try:
            if instead is None or not instead(given, further, values["out"]):
                settings = study.settings.make(given, "the command" if path is None else str(path))
                if values["shard"] is not None and not values["measure"]:
                    raise UserError("--shard measures and --no-measure does not: leave one out")
                if values["shard"] is not None:
                    measure_shard(study, settings, values["out"], values["shard"])
                else:
                    run_study(study, settings, values["out"], measure=values["measure"])
        except KeyboardInterrupt:
            raise Stopped("interrupted: what was measured is kept, the same command continues") from None

    command.__name__ = study.name
    command.__doc__ = f"{study.summary}\n\n{inspect.cleandoc(study.details)}"
    keyword = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    command.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in keyword}
    return command


def with_settings(command: Callable[..., None], settings: type[ModelSettings]) -> Callable[..., None]:
    """Give a command written as a function the options of settings too. It gets those given, by field, as its last argument.

    Args:
        command: a function whose last parameter is ``given``.
        settings: whose fields become options, before the others.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    own = [each.replace(annotation=hints[each.name]) for each in inspect.signature(command).parameters.values() if each.name != "given"]
    options = [each for name in fields(settings) for each in _options(settings, name)]
    keyword = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *options)]

    def called(**values: Any) -> None:
        command(**{each.name: values[each.name] for each in own}, given=given_options(settings, values))

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
    called.__annotations__ = {each.name: each.annotation for each in keyword}
    return called


def run_study(study: Study[Any, Any, Any], settings: StudySettings, out: Path, *, measure: bool = True) -> None:
    """Run a study, write its page, and print its tables.

    Raises:
        UserError: settings that cannot be run, or some images that failed, after everything was written.
    """
    if measure:
        with Bar(unit=study.noun) as progress:
            results = run(study, settings, out, executor_of(settings), progress)
    else:
        results = held(study, settings, out)
    summary = study.summarise(results)
    files = study.write(summary, out)
    study.show(summary, console())
    say(f"report: {files.html}")
    if failures := study.failures(results):
        count = f"{len(failures)} measurement{'' if len(failures) == 1 else 's'}"
        raise UserError(f"{count} failed, such as {': '.join(failures[0])} (all are listed in {files.html}; the others count)")


def measure_shard(study: Study[Any, Any, Any], settings: StudySettings, out: Path, text: str) -> None:
    """Measure a part of a study, without a page.

    Raises:
        UserError: no such part, or settings that cannot be run.
    """
    shard = parse_shard(text)
    with Bar(unit=study.noun) as progress:
        count = run_shard(study, settings, out, shard, executor_of(settings), progress)
    say(f"shard {shard.number}/{shard.count}: {count} records in {out}; join all shards by: attribution merge FOLDERS --out {study.name}")


def merge_command() -> Callable[..., None]:
    """The command that joins the folders of shards and finishes their study."""

    def merge(folders: list[Path], out: Path) -> None:
        """Join the folders of shards, and finish their study.

        The shards of one study were measured by --shard 1/N to N/N. Shards of other settings are refused. What needs the records of all
        shards, or failed in one, is measured now; then the page is written.

        Example:

        - attribution merge out/shard* --out out/benchmark
        """
        try:
            name, settings = merged(folders, out, STUDIES)
            run_study(STUDIES[name], settings, out)
        except KeyboardInterrupt:
            raise Stopped("interrupted: what was joined is kept, the same command continues") from None

    merge.__annotations__ = {
        "folders": Annotated[list[Path], typer.Argument(help="Folders that --shard wrote, of all parts.", metavar="OUT...")],
        "out": Annotated[Path, typer.Option("--out", "-o", help="Folder of the whole study.")],
    }
    return merge


def console() -> Console:
    """Where tables are printed: as wide as the terminal, or 120 characters."""
    return _Console(width=None if sys.stdout.isatty() else 120, highlight=False)


class _Console(Console):
    """A console to which names of data cannot send control characters."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts with control characters as escapes; tables are made of such texts (see ``terminal_table``)."""
        super().print(*map(_plain, objects), **options)


def _plain(value: Any) -> Any:
    if isinstance(value, Text) and not value.spans:
        return Text("\n".join(map(printable, value.plain.split("\n"))), style=value.style)
    return "\n".join(map(printable, value.split("\n"))) if isinstance(value, str) else value


def extra(name: str, kind: Any, help: str, *names: str, default: Any = None, show: bool = False) -> inspect.Parameter:
    """A parameter of a command: an option, or an argument where no names are given. ``show`` adds the default to the help."""
    about: Any = typer.Option(*names, help=help, show_default=show) if names else typer.Argument(help=help, show_default=show)
    optional = kind if default is not None else kind | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[optional, about])


def _options(settings: type[ModelSettings], field: Field[Any]) -> list[inspect.Parameter]:
    """The options of a field; none has a default of its own, so that those of a file count."""
    name, about = field.name, settings_of(settings)[field.name]
    found = [extra(_keyed(name, key), kind, help, option_name(name, about, key)) for key, (kind, help) in about.keys.items()]
    if about.option == "" or about.keys:
        return found
    names = [option_name(name, about), *([about.short] if about.short else [])]
    return [extra(name, _kind(hints_of(settings)[name]), f"{about.help}{_choices(about)}{_default(field)}", *names)]


def _keyed(name: str, key: str) -> str:
    return f"{name.removesuffix('_options')}_{key}"


def _kind(hint: Any) -> Any:
    """The type of a setting's option in typer. Lists are text that is split at commas."""
    inner = [each for each in typing.get_args(hint) if each is not type(None)]
    if typing.get_origin(hint) is tuple:
        return list[str]
    if hint in (int, float, bool):
        return hint
    return _kind(inner[0]) if len(inner) == 1 and typing.get_origin(hint) is not typing.Literal else str


def _choices(about: Setting) -> str:
    names = about.names()
    return f" One of {', '.join(names)}." if names and not any(name in about.help for name in names) else ""


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is MISSING or value is None or value is False or value == ():
        return ""
    if isinstance(value, tuple):
        words = [getattr(each, "label", each.name if isinstance(each, Classifier) else str(each)) for each in value]
        return f" Default: {','.join(words)}." if len(words) <= 12 else f" Default: {len(words)} of them."
    return f" Default: {value}."


def given_options(settings: type[ModelSettings], values: Mapping[str, Any]) -> Given:
    """The options given on the command line, by field."""
    given: Given = {}
    for name, about in settings_of(settings).items():
        keyed = {key: values[_keyed(name, key)] for key in about.keys if values[_keyed(name, key)] is not None}
        if keyed:
            given[name] = keyed
        elif not about.keys and values.get(name) not in (None, []):
            given[name] = _parsed(name, values[name], hints_of(settings)[name])
    return given


def _parsed(name: str, value: Any, hint: Any) -> Any:
    if not isinstance(value, list):
        return value
    parts = [part.strip() for text in value for part in text.split(",") if part.strip()]
    hint = next((each for each in (hint, *typing.get_args(hint)) if typing.get_origin(each) is tuple), hint)
    kind = typing.get_args(hint)[0]
    if kind not in (int, float):
        return tuple(parts)
    try:
        return tuple(kind(part) for part in parts)
    except ValueError:
        wanted = "whole numbers, such as 1,5,20" if kind is int else "numbers, such as 0.1,0.5"
        raise UserError(f"--{name.replace('_', '-')} is {','.join(value)!r}: expected {wanted}") from None
