"""Checkpoints: files of weights, read without running code, and how their weights find their place in a module."""

from __future__ import annotations

import argparse
import pathlib
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from attribution.errors import UserError, describe
from attribution.model.forwarding import first_line
from attribution.model.saving import PROTOTYPES
from attribution.model.source import Checkpoint

_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_model")
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params", *_AVERAGES)
_PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.", "net.", "network.", "encoder.", "ema.", "ema_model.")
_NUMPY = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}  # how it pickles numbers and arrays
_HARMLESS: list[Any] = [  # plain values that the checkpoints of training programs hold beside tensors
    argparse.Namespace,
    pathlib.PosixPath,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdSU"),
    *((function, f"numpy.{core}.multiarray.{name}") for name, function in _NUMPY.items() for core in ("core", "_core")),
]


def read_state_dict(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Read weights by name from a safetensors file, or from a torch file of tensors and plain values. Pickled code is refused.

    Args:
        path: the file.
        key: where the state dict is, such as "state_dict_ema" or "ema.module"; None finds the only one.

    Raises:
        UserError: a file that is missing or damaged, or holds something else or several state dicts.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    loaded = read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    found = _state_dicts(loaded)
    for state in found.values():
        state.pop(PROTOTYPES, None)
    if key is not None:
        if key not in found:
            prefixed = _below(found, key)
            if prefixed:
                return prefixed
            raise UserError(f"{path} has no state dict {key!r}: expected one of {', '.join(filter(None, found)) or 'none, without a key'}")
        return found[key]
    if not found:
        keys = f"; it has {', '.join(map(str, list(loaded)[:5]))}" if isinstance(loaded, Mapping) and loaded else ""
        raise UserError(f"{path} holds {describe(loaded)}: expected a state dict, names to tensors{keys}")
    if len(found) > 1:
        same = [{name: tuple(value.shape) for name, value in state.items()} for state in found.values()]
        raise UserError(
            f"{path} holds several state dicts, {', '.join(found)}{' of the same shapes' if same.count(same[0]) == len(same) else ''}: "
            f"say which by checkpoint_key (--checkpoint-key), such as {next(iter(found))!r}"
        )
    return next(iter(found.values()))


def _below(found: Mapping[str, dict[str, Tensor]], key: str) -> dict[str, Tensor]:
    """The weights whose names begin with a key, without it: several sets of weights may lie in one state dict, under prefixes."""
    for name, state in found.items():
        prefix = key.removeprefix(f"{name}.") + "."
        below = {each.removeprefix(prefix): value for each, value in state.items() if each.startswith(prefix)}
        if below:
            return below
    return {}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name.

    Raises:
        UserError: a file that is missing or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from None


def _read_torch(path: Path, mapped: bool = False) -> Any:
    """All that a torch file holds; mapped: with tensors that stay on the disk until they are used, where the format allows it."""
    if is_torchscript(path):
        raise UserError(
            f"{path} is TorchScript, a program with its weights: give at.Classifier(torch.jit.load(...), size=...) in Python, or save "
            "the model's state_dict() with torch.save"
        )
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the version of a pickle
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many types for damaged or unsafe files
        foreign = re.search(r"(?:GLOBAL|class) (\S+?) (?:was not an allowed|which)", str(error))
        inner = re.search(r"WeightsUnpickler error: (.+)", str(error))
        if foreign:
            reason = f"it holds an object of {foreign[1]}, whose code would run"
        elif inner is None and "weights_only" in str(error):  # torch advises to run the code of the file
            reason = "it is damaged, or no file of torch.save"
        else:
            reason = first_line(inner[1] if inner else error)
        raise UserError(
            f"{path} cannot be read as weights only ({reason}): save model.state_dict() with torch.save, or use safetensors"
        ) from None


def is_torchscript(path: Path) -> bool:
    """Whether a file holds a TorchScript program."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _state_dicts(loaded: Any) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a file by their keys; one that is the file itself, with "" as its key, or is under a usual key of another."""
    if not isinstance(loaded, Mapping):
        return {}
    found = {}
    others = [name for name, value in loaded.items() if name not in _WRAPPERS and _has_weights(value)]
    for name in (*_WRAPPERS, *others):
        for inner, state in _state_dicts(loaded.get(name)).items():
            found[f"{name}.{inner}" if inner else name] = state
    if found:
        return found
    own = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    return {"": own} if own else {}


def _has_weights(value: Any) -> bool:
    """Whether a value is a mapping of weights by name, under whatever key: several sets of weights must not be mixed up."""
    named = [str(name) for name, each in value.items() if isinstance(each, Tensor)] if isinstance(value, Mapping) else []
    return any(name.endswith(("weight", "bias")) for name in named)


def with_checkpoint(build: Callable[[int | None], nn.Module], checkpoint: Checkpoint | None, name: str) -> nn.Module:
    """Build the module with the number of classes of the checkpoint's final layer, and load the weights."""
    if checkpoint is None:
        return build(None)
    state = read_state_dict(*checkpoint)
    module = build(None)
    expected = module.state_dict()
    state = _without_prefix(state, expected, checkpoint)
    heads = [key for key in expected if key in state and key.endswith("weight") and key == head_weight(module)]
    if missing := _missing_head(module, state):
        module = build(int(state[missing].shape[0]))
    elif heads and state[heads[0]].shape[0] != expected[heads[0]].shape[0]:
        module = build(int(state[heads[0]].shape[0]))
    load_state(module, at_size(module, state), checkpoint, name)
    return module


def _missing_head(module: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """The weight of a final layer that a headless timm backbone lacks and a checkpoint of it has."""
    config = getattr(module, "pretrained_cfg", None)
    head = config.get("classifier") if isinstance(config, Mapping) else None
    names = [f"{name}.weight" for name in ((head,) if isinstance(head, str) else head or ())]
    headless = getattr(module, "num_classes", None) == 0
    return next((name for name in names if headless and name in state and name not in module.state_dict()), None)


def at_size(module: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the position embeddings of a vision transformer resampled for its image size, as timm and torchvision do."""
    expected = module.state_dict()
    if (name := "pos_embed") in state and name in expected and hasattr(module, "patch_embed") and hasattr(module, "num_prefix_tokens"):
        given, own = state[name], expected[name]
        prefix = 0 if getattr(module, "no_embed_class", False) else int(module.num_prefix_tokens)
        if given.shape != own.shape and given.ndim == own.ndim == 3 and given.shape[-1] == own.shape[-1]:
            from timm.layers import resample_abs_pos_embed

            grid = list(module.patch_embed.grid_size)
            return {**state, name: resample_abs_pos_embed(given, new_size=grid, num_prefix_tokens=prefix)}
    if (name := "encoder.pos_embedding") in state and name in expected and state[name].shape != expected[name].shape:
        from torchvision.models.vision_transformer import interpolate_embeddings

        return dict(interpolate_embeddings(module.image_size, module.patch_size, dict(state)))
    return state


def head_weight(module: nn.Module) -> str | None:
    """Name of the weight with a row per class: that of the last linear layer, or else of the last convolution."""
    kinds = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    kinds = kinds or [name for name, m in module.named_modules() if isinstance(m, nn.Conv2d)]
    return f"{kinds[-1]}.weight" if kinds else None


def _without_prefix(state: dict[str, Tensor], expected: dict[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Strip the prefixes of wrappers (DataParallel, Lightning, torch.compile) from the names, as long as no fewer names fit.

    Where the names below one prefix are all that the model expects, those beside it, such as the weights of a loss, are left out.

    Raises:
        UserError: several prefixes below which is all that the model expects, such as weights and their running averages.
    """
    sets = _complete_sets(state, expected)
    if len(sets) > 1 and checkpoint.key == "" and "" in sets:
        return {name: state[name] for name in expected if name in state}
    if len(sets) > 1:
        named = ", ".join(repr(prefix.removesuffix(".")) for prefix in sets)
        raise UserError(
            f"{checkpoint} holds several sets of weights in one state dict, under the prefixes {named}: say which by checkpoint_key "
            f"(--checkpoint-key), such as {sets[-1].removesuffix('.')!r}"
        )
    while not state.keys() <= expected.keys():
        below = {p: {k.removeprefix(p): v for k, v in state.items() if k.startswith(p)} for p in _PREFIXES}
        whole = [o for o in below.values() if all(k in o or k.endswith("num_batches_tracked") for k in expected)]
        if len(whole) == 1:
            return whole[0]
        same = [
            o for o in below.values() if len(o) == len(state) and len(o.keys() & expected.keys()) >= len(state.keys() & expected.keys())
        ]
        if not same:
            break
        state = same[0]
    return state


def _complete_sets(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The prefixes below which a state dict has all weights that a model expects; "" where it has them without a prefix."""
    needed = [name for name in expected if not name.endswith("num_batches_tracked")]
    if not needed:
        return []
    ends = [name.removesuffix(needed[0]) for name in state if name.endswith(needed[0])]
    return [prefix for prefix in ends if (not prefix or prefix.endswith(".")) and all(prefix + name in state for name in needed)]


def load_state(module: nn.Module, state: dict[str, Tensor], path: Checkpoint, name: str) -> None:
    """Load weights into a module, with the prefixes of wrappers stripped from their names.

    Raises:
        UserError: weights that are missing, left over or of another shape; the message names some.
    """
    expected = module.state_dict()
    state = _without_prefix(state, expected, path)
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    reshaped = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} weights are missing ({_first(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} are unknown ({_first(unexpected)})")
    if reshaped:
        key = reshaped[0]
        problems.append(
            f"{len(reshaped)} have another shape ({key}: {list(state[key].shape)} in the file, {list(expected[key].shape)} in the model)"
        )
    if problems:
        raise UserError(f"{path} does not fit {name}: {'; '.join(problems)}; is it a checkpoint of this architecture?")
    module.load_state_dict(state, strict=False)
    module.eval()


def beside_weights(path: Path) -> Any:
    """All that a checkpoint holds: the mapping of a torch file, or the metadata of a safetensors file."""
    if path.suffix != ".safetensors":
        return _read_torch(path, mapped=True)
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (" ..." if len(keys) > 3 else "")
