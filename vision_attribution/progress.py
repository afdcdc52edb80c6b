"""Progress of a long job: a bar on a terminal, and lines from time to time elsewhere, such as in a log file."""

from __future__ import annotations

import sys
import threading
import time

from tqdm import tqdm

_EVERY = 30.0  # seconds between two lines


class Bar:
    """Shows how far a job is, with its rate and the time that remains.

    On a terminal it is a bar that is gone when done. Elsewhere it is a line every half minute, also while one item takes longer.
    Calling it with (done, total) or (done, total, what is done now) moves it.
    """

    def __init__(self, title: str = "", unit: str = "it") -> None:
        self._title, self._unit = title, unit
        self._bar: tqdm[None] | None = None
        self._over = threading.Event()
        self._state = (0, 0, "")
        self._counted: tuple[float, int] | None = None  # when the first call came, and how many were done before it

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            self._bar = tqdm(desc=self._title, total=1, unit=self._unit, leave=False, file=sys.stderr)
        else:
            threading.Thread(target=self._write_lines, daemon=True).start()
        return self

    def __call__(self, done: int, total: int, what: str = "") -> None:
        if self._bar is None:
            self._counted = self._counted or (time.monotonic(), done)
            self._state = (done, total, what)
            return
        self._bar.total = total
        if what:
            self._bar.set_description_str(what[:60], refresh=False)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._bar is not None:
            self._bar.close()

    def _write_lines(self) -> None:
        while not self._over.wait(_EVERY):
            print(self._line(time.monotonic()), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        """Where the job is: done, total, rate and remaining time, and what is done now."""
        done, total, what = self._state
        counted = f"{done} of {total} {self._unit}{'es' if self._unit.endswith('ch') else 's'}"
        parts = [f"{self._title}: {counted}" if self._title else counted]
        since, before = self._counted or (now, done)
        if done > before and now > since:
            rate = (done - before) / (now - since)
            parts += [f"{rate:.3g} a second" if rate >= 1 else f"{1 / rate:.3g} s each", f"{_duration((total - done) / rate)} left"]
        return ", ".join(parts) + (f": {what}" if what else "")


def _duration(seconds: float) -> str:
    """In words, such as "45 s", "12 min" or "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
