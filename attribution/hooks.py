"""Look inside a module while it runs, or change what it computes. Everything is undone when the block ends."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from itertools import chain, count
from types import MethodType
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

P = ParamSpec("P")
T = TypeVar("T")
_rebuilt: ContextVar[bool] = ContextVar("rebuilt", default=False)


def is_rebuilt() -> bool:
    """Whether a module is replaced by another now. Code that was compiled before would not call the replacement."""
    return _rebuilt.get()


@contextmanager
def _rebuilding() -> Iterator[None]:
    before = _rebuilt.set(True)
    try:
        yield
    finally:
        _rebuilt.reset(before)


def hooks_of(module: nn.Module) -> frozenset[int]:
    """Identities of the forward hooks on a module and on its submodules; no two hooks of a process have the same."""
    return frozenset(chain.from_iterable((*each._forward_hooks, *each._forward_pre_hooks) for each in module.modules()))


def _in_full(values: Tensor) -> Tensor:
    """Values of any precision as float32, in which all that is recorded is used."""
    return values.float() if values.is_floating_point() else values


def hookable(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that take hooks: TorchScript runs its own out of sight."""
    return [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]


_Lock = tuple[int, threading.RLock]  # in the order in which they are taken, so that no two threads wait for each other
_locks: WeakKeyDictionary[nn.Module, tuple[_Lock, ...]] = WeakKeyDictionary()
_registering, _numbers = threading.Lock(), count()


@contextmanager
def exclusive(*modules: nn.Module) -> Iterator[None]:
    """Run the block while no other thread runs these modules through this library, or changes them. Blocks of one thread may nest.

    Hooks, modes and gradients belong to a module, not to a call. A lock is therefore shared by all modules below the one with which
    it was made, and by whatever else holds one of these.
    """
    with ExitStack() as held:
        for _, lock in sorted(set(chain.from_iterable(map(_locks_of, modules)))):
            held.enter_context(lock)
        yield


def _locks_of(module: nn.Module) -> tuple[_Lock, ...]:
    with _registering:
        if module not in _locks:
            family = list(module.modules())
            found = tuple(sorted({lock for each in family for lock in _locks.get(each, ())})) or ((next(_numbers), threading.RLock()),)
            for each in family:
                _locks.setdefault(each, found)
        return _locks[module]


def _exclusively(block: Callable[Concatenate[nn.Module, P], Iterator[T]]) -> Callable[Concatenate[nn.Module, P], AbstractContextManager[T]]:
    """Make a context manager that holds the module, its first argument, for itself."""
    opened = contextmanager(block)

    @contextmanager
    def held(module: nn.Module, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        with exclusive(module), opened(module, *args, **kwargs) as value:
            yield value

    return wraps(block)(held)


_switching = threading.Lock()
_switched: dict[tuple[int, str], int] = {}  # identity and switch of what is off at the moment -> how many blocks need it off


@contextmanager
def _switched_off(things: Iterable[Any], switch: str) -> Iterator[None]:
    """Run the block with a switch of several objects off. Those that were on come back on when no block of any thread needs them off."""
    with _switching:
        off = [each for each in things if (id(each), switch) in _switched or getattr(each, switch, False)]  # frozen TorchScript has no mode
        for each in off:
            _switched[id(each), switch] = _switched.get((id(each), switch), 0) + 1
            setattr(each, switch, False)
    try:
        yield
    finally:
        with _switching:
            for each in off:
                _switched[id(each), switch] -= 1
                if not _switched[id(each), switch]:
                    del _switched[id(each), switch]
                    setattr(each, switch, True)


@_exclusively
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Run the block with every submodule in evaluation mode, then give each its own mode back."""
    every = list(module.modules())
    with _switched_off(every, "training"), _switched_off(every, "grad_checkpointing"):  # timm's recomputes blocks past hooks
        yield


@_exclusively
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Run the block without code that ``torch.compile`` made for a module or for those below: it passes by hooks that were set later."""
    own, inner = "_compiled_call_impl", "_orig_mod"
    every = hookable(module.modules())
    compiled = [(each, vars(each).pop(own)) for each in every if vars(each).get(own) is not None]
    wrapped = {each: code.__call__ for each in every if (code := each._modules.get(inner)) is not None}
    wrapped |= {each: original for each in every if (original := _before_compiling(each)) is not None}
    try:
        with replaced_forwards(wrapped):
            yield
    finally:
        for each, code in compiled:
            vars(each)[own] = code


def _before_compiling(module: nn.Module) -> Callable[..., Any] | None:
    """The forward function that ``torch.compile`` was given for a module, on it or on its class; None where there is none."""
    original = getattr(module.forward, "_torchdynamo_orig_callable", None)
    if original is None or hasattr(original, "__self__") or "forward" in vars(module):
        return original
    return MethodType(original, module)


@contextmanager
def removed_after(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Run the block, then remove the hooks, whatever happened."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _hooked(modules: Iterable[nn.Module], register: str, hook: Callable[..., Any]) -> Iterator[None]:
    modules = hookable(modules)
    with exclusive(*modules), removed_after([getattr(module, register)(hook) for module in modules]):
        yield


@contextmanager
def counted_calls(modules: Iterable[nn.Module]) -> Iterator[Counter[nn.Module]]:
    """Count how often each of the given modules is called."""
    counts: Counter[nn.Module] = Counter()
    with _hooked(modules, "register_forward_pre_hook", lambda m, _args: counts.update([m])):
        yield counts


@contextmanager
def record_inputs(modules: Iterable[nn.Module]) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Collect (module, first positional input) at every call of the given modules, in the order of the calls, in float32.

    The modules get a copy, through which gradients flow: one that works in place does not change what was recorded.
    """
    calls: list[tuple[nn.Module, Tensor]] = []

    def remember(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args or not isinstance(args[0], torch.Tensor):
            return None
        calls.append((module, _in_full(args[0])))
        return (calls[-1][1].to(args[0].dtype, copy=True), *args[1:])

    with _hooked(modules, "register_forward_pre_hook", remember):
        yield calls


@contextmanager
def record_outputs(modules: Iterable[nn.Module]) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Collect (module, output) at every call of the given modules, in the order in which the calls end, in float32.

    The modules that follow get a copy, through which gradients flow: one that works in place does not change what was recorded.
    """
    calls: list[tuple[nn.Module, Tensor]] = []

    def remember(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor):
            return None
        calls.append((module, _in_full(output)))
        return calls[-1][1].to(output.dtype, copy=True)

    with _hooked(modules, "register_forward_hook", remember):
        yield calls


@contextmanager
def edited_outputs(module: nn.Module, edit: Callable[[Tensor], Tensor], every: int = 1) -> Iterator[None]:
    """Replace what a module returns by ``edit`` of it, in every n-th call: in the last of a pass that calls it n times."""
    calls = 0

    def replace(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return edit(output) if calls % every == 0 else output

    with _hooked([module], "register_forward_hook", replace):
        yield


@contextmanager
def edited_inputs(edits: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replace the first positional input of each module by ``edits[module]`` of it, at every call."""

    def replace(edit: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _module, args: (edit(args[0]), *args[1:])

    with exclusive(*edits), removed_after([module.register_forward_pre_hook(replace(edit)) for module, edit in edits.items()]):
        yield


@_exclusively
def frozen_parameters(module: nn.Module) -> Iterator[None]:
    """Run the block without gradients of parameters, which saves memory, then make those that required gradients require them again."""
    with _switched_off(module.parameters(), "requires_grad"):
        yield


@_exclusively
def stand_ins(module: nn.Module, values: Mapping[str, Sequence[Any]]) -> Iterator[None]:
    """Run the block with submodules, by name, replaced by stand-ins that return given values in their first calls.

    Later calls reach the module itself. The modules are looked up when the block starts: if a method has put others in their place,
    those are replaced, and come back afterwards. A module that is registered in several places is replaced in all of them. Hooks on a
    module do not fire while its stand-in answers.
    """
    originals = {name: module.get_submodule(name) for name in values}
    places: dict[nn.Module | None, list[tuple[dict[str, nn.Module | None], str]]] = {}
    for parent in module.modules():
        for key, child in parent._modules.items():
            places.setdefault(child, []).append((parent._modules, key))
    before: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
    try:
        for name, returned in values.items():
            standing = _StandIn(originals[name], returned)
            for children, key in places[originals[name]]:
                before.append((children, key, originals[name]))
                children[key] = standing
        with _rebuilding():
            yield
    finally:
        for children, key, original in reversed(before):
            children[key] = original


@contextmanager
def stopped_after(module: nn.Module) -> Iterator[list[Tensor]]:
    """Run the block until a module has returned, and collect its output. What would follow is not computed."""
    found: list[Tensor] = []

    def stop(_module: nn.Module, _args: Any, output: Tensor) -> None:
        found.append(output)
        raise _Stopped

    with suppress(_Stopped), _hooked([module], "register_forward_hook", stop):
        yield found


@contextmanager
def replaced_forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Run the block with other forward functions on some modules; hooks on them still work."""
    with exclusive(*replacements):
        before = {module: vars(module).get("forward") for module in replacements}
        for module, forward in replacements.items():
            vars(module)["forward"] = forward
        try:
            with _rebuilding():
                yield
        finally:
            for module, own in before.items():
                if own is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = own


@_exclusively
def one_module_a_call(module: nn.Module, kinds: tuple[type[nn.Module], ...], probe: Callable[[], Any]) -> Iterator[None]:
    """Run the block with modules of the given parameter-free kinds replaced by copies, each called once a pass and not in place.

    Methods that keep state on a module (DeepLift, LRP) are wrong where one is called several times, as torchvision's residual
    blocks call their ReLU. The first call of a pass goes to the first copy, the second to the second. ``probe`` runs one pass, in
    which the calls are counted.
    """
    places = [(parent, name, child) for parent in module.modules() for name, child in parent._modules.items() if isinstance(child, kinds)]
    with counted_calls({child for _, _, child in places}) as counts:
        probe()
    copies = {child: _PerCall(child, max(1, counts[child])) for _, _, child in places}

    def restart(_module: nn.Module, _args: Any) -> None:
        for each in copies.values():
            each.calls = 0

    handle = module.register_forward_pre_hook(restart)
    try:
        for parent, name, child in places:
            parent._modules[name] = copies[child]
        with _rebuilding():
            yield
    finally:
        handle.remove()
        for parent, name, child in places:
            parent._modules[name] = child


class _Stopped(Exception):
    """The module that ``stopped_after`` waits for has returned."""


class _StandIn(nn.Module):
    """Returns given values in the first calls of a module, then calls it. Its attributes are those of the module."""

    def __init__(self, original: nn.Module, values: Sequence[Any]) -> None:
        super().__init__()
        self.original, self.values, self.calls = original, values, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.values[self.calls - 1] if self.calls <= len(self.values) else self.original(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


class _PerCall(nn.Module):
    """Copies of one module, each called once a pass."""

    def __init__(self, original: nn.Module, count: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(original) for _ in range(count))
        for each in self.copies:
            if hasattr(each, "inplace"):
                each.inplace = False  # type: ignore[assignment]
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.copies[self.calls - 1](x)
