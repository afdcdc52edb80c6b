"""Scripts as modules and as commands."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest

from vision_attribution.command import run_script

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="session")
def script_named() -> Callable[[str], ModuleType]:
    """A script as a module, by its name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def called() -> Callable[..., tuple[int, str]]:
    """A script's command, run in this process: exit code and what it printed."""

    def call(script: ModuleType, *arguments: str) -> tuple[int, str]:
        printed, before = io.StringIO(), sys.argv
        sys.argv = [str(script.__file__), *arguments]
        try:
            with redirect_stdout(printed), redirect_stderr(printed), pytest.raises(SystemExit) as ended:
                run_script(script.main)
        finally:
            sys.argv = before
        return int(ended.value.code or 0), printed.getvalue()

    return call
