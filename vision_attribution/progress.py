"""Progress of a long job on a terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Bar:
    """A progress bar with rate and remaining time, on a terminal; gone when done.

    Calling it with (done, total) or (done, total, what is done now) moves it.
    """

    def __init__(self, title: str = "", unit: str = "it") -> None:
        self._title, self._unit = title, unit

    def __enter__(self) -> Bar:
        self._bar = tqdm(desc=self._title, total=1, unit=self._unit, leave=False, disable=None, file=sys.stderr)
        return self

    def __call__(self, done: int, total: int, what: str = "") -> None:
        self._bar.total = total
        if what:
            self._bar.set_description_str(what[:60], refresh=False)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        self._bar.close()
