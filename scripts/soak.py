"""Long use in one process: memory, open files and threads after thousands of explanations, and after thousands of records.

python scripts/soak.py                     2,000 explanations and 10,000 records, about 10 minutes on 2 cores
python scripts/soak.py --explanations 200 --records 1000
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import attribution as at
from evaluation.study.records import open_log, read_log
from evaluation.study.tables import terminal_table
from vision_attribution.command import run_script

_ROWS = 10  # of each table
_SIDE = 32


def main(
    explanations: Annotated[int, typer.Option(min=_ROWS, help="Explanations by zoo:cnn, of images that differ.")] = 2000,
    records: Annotated[int, typer.Option(min=_ROWS, help="Records in one folder.")] = 10_000,
    model: Annotated[str, typer.Option(help="What is explained.")] = "zoo:cnn",
) -> None:
    """Print what a process holds after a share of the explanations and records each."""
    classifier = at.load_classifier(model)
    generator = torch.Generator().manual_seed(0)

    def explain() -> None:
        image = torch.rand(3, _SIDE, _SIDE, generator=generator)
        at.explain(image, classifier, regions="grid", region_options={"count": 9}, evaluations=30)
        at.attribute(image, classifier, "grad_cam")

    rows = list(_watched(explanations, explain))
    with tempfile.TemporaryDirectory() as folder:
        path, started = Path(folder) / "records.jsonl", time.perf_counter()
        with open_log(path) as log:
            numbers = iter(range(records))

            def record() -> None:
                number = next(numbers)
                log.append(f"key {number}", {"sample": f"{number}.png", "value": number / records})

            rows += _watched(records, record, "records")
        written, started = time.perf_counter() - started, time.perf_counter()
        assert len(read_log(path)) == records
        size = path.stat().st_size / 2**20
    headings = ("what", "done", "MiB", "since the first tenth", "files", "threads", "tensors")
    Console(width=None if sys.stdout.isatty() else 120).print(terminal_table(None, headings, rows, headings[:1]))
    print(f"{records:,} records: {size:.1f} MiB, written in {written:.1f} s, read in {time.perf_counter() - started:.2f} s")


def _watched(count: int, do: Callable[[], None], what: str = "explanations") -> Iterator[list[str]]:
    """Do something many times, with a row of what the process holds after each tenth."""
    first = 0.0
    for part in range(1, _ROWS + 1):
        for _ in range(count * (part - 1) // _ROWS, count * part // _ROWS):
            do()
        gc.collect()
        memory = _resident()
        first = first or memory
        tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
        files = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
        yield [
            what,
            f"{count * part // _ROWS:,}",
            f"{memory:.1f}",
            f"{memory - first:+.1f}",
            str(files),
            str(threading.active_count()),
            str(tensors),
        ]
        print(f"{what}: {count * part // _ROWS:,} of {count:,}", file=sys.stderr, flush=True)


def _resident() -> float:
    """Memory of this process that is in use, MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    run_script(main)
