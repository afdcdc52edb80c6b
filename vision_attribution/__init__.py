"""The command ``attribution``. What it is made of is imported when it starts, so that an interrupt is always answered by one line."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from types import FrameType

INTERRUPTED = 130  # exit code


def main() -> None:
    """Entry point. Errors that a user can correct print one line and exit with code 2; an interrupt exits with code 130."""
    if threading.current_thread() is threading.main_thread():  # only there can signals be handled
        signal.signal(signal.SIGINT, _stop)
    command = importlib.import_module("vision_attribution.command")
    sys.exit(command.run(command.app))


def _stop(signum: int, frame: FrameType | None) -> None:
    """End the process while it imports: nothing was begun that could be lost."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
