"""Look inside a module while it runs; every hook is gone when the block ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Run the block with every submodule in evaluation mode, then give each its own mode back."""
    training = [m for m in module.modules() if m.training]
    for submodule in training:
        submodule.training = False
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


@contextmanager
def record_inputs(modules: Iterable[nn.Module]) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Collect (module, first positional input) at every call of the given modules, in the order of the calls."""
    calls: list[tuple[nn.Module, Tensor]] = []

    def remember(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor):
            calls.append((module, args[0]))

    handles = [module.register_forward_pre_hook(remember) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
