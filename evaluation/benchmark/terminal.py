"""The tables of a benchmark in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from attribution.baselines import METHOD_PRESETS
from attribution.baselines.attribute import METHODS
from attribution.search import SEARCHES
from evaluation.benchmark.summary import Summary
from evaluation.benchmark.wording import ARROWS, LETTERS, by_protocol, conclusions, explained_class, refusals, writer
from evaluation.metrics.protocol import PROTOCOLS
from evaluation.metrics.registry import METRICS, Measure, metric_title
from evaluation.study.style import has_interval
from evaluation.study.tables import counted, written

_PER_TABLE = 6  # measures side by side in a terminal
_METHOD_WIDTH = 26


def print_summary(summary: Summary, console: Console) -> None:
    """Leaderboards with ranks, intervals and letters, in as many tables as the width of the console requires."""
    settings = summary.results.settings
    arrows = ARROWS if console.encoding.startswith("utf") else {"higher": "(higher)", "lower": "(lower)"}
    for model in summary.results.models:
        for protocol, measures in by_protocol(summary.measures):
            measured = [m for m in measures if summary.column(model, m)]
            units = counted(len(summary.results.units(model, measures[0])), summary.results.noun(measures[0]))
            heading = f"{model}, {protocol or 'no curve'}, {units}"
            for table in _terminal_tables(summary, model, measured, heading, arrows, console):
                console.print(table)
        for statement in conclusions(summary, model):
            console.print(Text(f"{model}: {statement}"))
        for reason, methods in refusals(summary, model).items():
            console.print(Text(f"left out: {'; '.join(methods)}: {reason}", style="dim"))
        console.print()
    nouns = " or ".join(f"{noun}s" for noun in dict.fromkeys(map(summary.results.noun, summary.measures)))
    console.print(Text(f"rank. mean letters, below it the 95 % bootstrap interval over {nouns}; {LETTERS}", style="dim"))
    if settings.measured():
        fill = f"methods worked with fill {settings.plain()['method_fill']}, seed {settings.seed}"
        console.print(Text(f"class: {explained_class(summary)}; {fill}; images: forwarded for one explanation; * control", style="dim"))
    if settings.grid_settings:
        chance = f"chance {1 / settings.cells**2:.3f}"
        console.print(Text(f"grids: the label of each head's cell is explained, hidden is zero at the layer; {chance}", style="dim"))


def print_names(console: Console) -> None:
    """Print what ``BenchmarkSettings`` takes by name: searches, methods with their presets, metrics and protocols."""
    console.print("[bold]region searches[/bold]: " + ", ".join(SEARCHES))
    console.print("[bold]methods[/bold]")
    for name, method in METHODS.items():
        presets = [preset for preset, settings in METHOD_PRESETS.items() if name in settings]
        extra = f" (presets {', '.join(presets)})" if presets else ""
        console.print(f"  {name} [dim]{method.family}[/dim]: {escape(method.summary.rstrip('.'))}{extra}")
    console.print("[bold]metrics[/bold]")
    for name, metric in METRICS.items():
        console.print(f"  {name} [dim]{metric.direction} is better[/dim]: {escape(metric.summary)}")
    console.print("[bold]protocols[/bold]")
    for name, protocol in PROTOCOLS.items():
        console.print(f"  {name}: {protocol.label()}", markup=False)


def _terminal_tables(
    summary: Summary, model: str, measures: Sequence[Measure], heading: str, arrows: Mapping[str, str], console: Console
) -> Iterator[Table]:
    """As few tables as the width of the console allows, at most ``_PER_TABLE`` measures in each."""
    wide = console.options.update(width=10_000)
    while measures:
        for count in range(min(_PER_TABLE, len(measures)), 0, -1):
            table = _terminal_table(summary, model, measures[:count], heading, arrows)
            if console.measure(table, options=wide).minimum <= console.width:
                break
        yield table
        measures = measures[count:]


def _terminal_table(summary: Summary, model: str, measures: Sequence[Measure], heading: str, arrows: Mapping[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=Text(heading, style="bold"), title_justify="left", pad_edge=False, padding=(0, 1))
    costs = {cost.method: cost for cost in summary.costs if cost.model == model}
    names = {method: method + (" *" if cost.family == "control" else "") for method, cost in costs.items()}
    table.add_column("method", overflow="fold", width=min(_METHOD_WIDTH, max(map(len, names.values()))))
    table.add_column("images", justify="right", width=max(6, *(len(f"{cost.evaluations:,.0f}") for cost in costs.values())))
    cells = [_terminal_cells(summary, model, measure) for measure in measures]
    for measure, column in zip(measures, cells, strict=True):
        heading = f"{metric_title(measure.metric)} {arrows[measure.direction]}"
        lines = [line for text in column.values() for line in text.plain.split("\n")]
        table.add_column(heading, width=max(map(len, [*lines, *heading.split()])))
    for method in summary.methods(model):
        family = costs[method].family
        style = "bold" if family == "region search" else "dim" if family == "control" else ""
        forwarded = f"{costs[method].evaluations:,.0f}"
        table.add_row(Text(names[method], style=style), forwarded, *(column.get(method, Text("-")) for column in cells))
    return table


def _terminal_cells(summary: Summary, model: str, measure: Measure) -> dict[str, Text]:
    column = summary.column(model, measure)
    write = writer(column)
    found = {}
    for e in column:
        text = Text("-")
        if has_interval(e.interval):
            text = Text(f"{e.rank:g}. ", style="dim").append(write(e.interval.estimate), style="bold" if e.rank < 2 else "not dim")
            text.append(f" {''.join(e.group) if all(len(g) == 1 for g in e.group) else ' '.join(e.group)}")
            text.append(f"\n{written(e.interval, write)}", style="dim")
        found[e.method] = text
    return found
