"""load_classifier: load a classifier by name or from a file, with the preprocessing of its own configuration."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attribution.errors import UserError, describe
from attribution.files import whole_file
from attribution.model import zoo
from attribution.model.class_names import carried_names, timm_names, unique
from attribution.model.classifier import Classifier
from attribution.model.forwarding import first_line, resolve_device

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
_METADATA_KEY = "vision-attribution"
_SAVED_SETTINGS = ("size", "mean", "std", "resize", "resized", "interpolation", "channels", "head", "scores", "output")
_LARGEST_INPUT = 4096  # pixels a side that a file may ask for


def load_classifier(
    model: str | Path | nn.Module | Classifier,
    *,
    device: str | torch.device = "auto",
    checkpoint: str | Path | None = None,
    checkpoint_key: str | None = None,
    pretrained: bool = True,
    class_names: Sequence[str] | None = None,
    batch_size: int | None = None,
    scores: str | None = None,
    **settings: Any,
) -> Classifier:
    """Load a classifier by name or from a file, with the preprocessing of its own configuration.

    Args:
        model: "zoo:imagenet", "zoo:cnn" or "zoo:vit" (installed with the package), "timm:NAME", "torchvision:NAME", or a file that
            ``save_classifier`` wrote.
            An ``nn.Module`` is wrapped in a ``Classifier`` with ``settings``; a ``Classifier`` is returned unchanged.
        device: "auto" (CUDA, else Apple's GPU, else the CPU) or any torch device.
        checkpoint: file of weights for a timm or torchvision model, in safetensors or in torch's format. A torch file holds a state
            dict, or a dict with one under a usual key such as "state_dict" or "model". Tensors and plain values are read from it; code
            is never run. The number of classes is read from the checkpoint.
        checkpoint_key: where the state dict is in the file, such as "state_dict_ema" or "ema.module". Needed where it holds several.
        pretrained: without a checkpoint, load the library's published weights (a download at the first use); False gives
            random weights.
        class_names: names for the classes. By default those that the checkpoint carries (such as "class_names", "class_to_idx" or
            "id2label" beside the weights), else those of the library's published weights, where they are as many. A checkpoint without
            names is assumed to have these classes too, with a warning.
        batch_size: most images forwarded at once.
        scores: what the module returns, see ``Classifier``; what a saved file says, or "auto", by default.
        settings: further arguments of ``Classifier`` that override the model's own configuration, such as size, mean and std.

    Raises:
        UserError: an unknown model, weights that cannot be loaded, or a checkpoint that does not fit the model; the message says where.
    """
    if checkpoint is None and checkpoint_key is not None:
        raise UserError(f"checkpoint_key {checkpoint_key!r} was given without a checkpoint: give checkpoint=FILE")
    if checkpoint is not None and (isinstance(model, Classifier | nn.Module) or Path(str(model)).suffix == ".safetensors"):
        raise UserError(f"a checkpoint goes with timm:NAME, torchvision:NAME or zoo:NAME: {describe(model)} has its own weights")
    if isinstance(model, Classifier):
        return model
    if scores is not None:
        settings["scores"] = scores
    if isinstance(model, nn.Module):
        if "size" not in settings:
            raise UserError("a bare nn.Module has no input size: give size=, mean=, std= and class_names=")
        return Classifier(model.to(resolve_device(device)), class_names=class_names, batch_size=batch_size, **settings)
    spec = str(model)
    source, _, name = spec.partition(":")
    if source in SOURCES and name:
        where = resolve_device(device)
        built = SOURCES[source](name, None if checkpoint is None else Checkpoint(Path(checkpoint), checkpoint_key), pretrained)
        names = built.class_names if class_names is None else class_names
        if class_names is None and built.assumed:
            warnings.warn(
                f"{checkpoint} names no classes: its {len(built.class_names or ())} are given the names of the published {spec}; "
                "give class_names (--classes) where they are others",
                stacklevel=2,
            )
        own = {**built.settings, "name": spec, **settings}
        return Classifier(built.module.to(where).eval(), class_names=names, batch_size=batch_size, **own)
    if Path(spec).suffix == ".safetensors":
        return _from_saved_file(Path(spec), resolve_device(device), batch_size, class_names, settings)
    received = repr(spec) if isinstance(model, str | Path) else describe(model)
    raise UserError(
        f"unknown model {received}: expected {', '.join(f'zoo:{n}' for n in sorted(zoo.ZOO))}, timm:NAME, torchvision:NAME, "
        f"or a .safetensors file written by save_classifier{_meant(spec)}"
    )


def _meant(spec: str) -> str:
    """The way that works for what was given as a model: a bare name, or a file in torch's format."""
    import timm
    import torchvision

    if Path(spec).is_file():
        if _is_torchscript(Path(spec)):
            return f"; a TorchScript file becomes a classifier in Python, at.Classifier(torch.jit.load({spec!r}), size=...)"
        return f"; a file of weights goes with the name of its model, as --checkpoint {spec}"
    known = {"zoo": zoo.ZOO, "timm": timm.list_models(spec), "torchvision": torchvision.models.list_models(module=torchvision.models)}
    meant = [f"{source}:{spec}" for source, names in known.items() if spec in names]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_class_names(path: Path) -> list[str]:
    """Read class names from a text file, one name a line. Blank lines at the end are ignored."""
    try:
        names = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}): expected one class name a line") from None
    if not names:
        raise UserError(f"{path} is empty: expected one class name a line")
    return [name.strip() for name in names]


def save_classifier(classifier: Classifier, path: str | Path) -> None:
    """Write a zoo, timm or torchvision classifier as one safetensors file that ``load_classifier`` reads back.

    Raises:
        UserError: the architecture has no name by which it could be built again.
    """
    source = classifier.name.partition(":")[0]
    runner = classifier.runner
    if source not in SOURCES or classifier.forward is not runner or not isinstance(runner.module, nn.Module) or callable(runner.output):
        raise UserError(f"{classifier.name} was not made by load_classifier, so a file could not say how to build it: save its state dict")
    way = classifier.preprocessing
    card = {
        "model": classifier.name.partition("@")[0],
        "class_names": classifier.class_names,
        "settings": {
            "size": way.size,
            "mean": way.mean,
            "std": way.std,
            "resize": way.resize,
            "resized": way.resized,
            "interpolation": way.interpolation,
            "channels": way.channels,
            "head": runner.head,
            "scores": runner.scores,
            "output": runner.output,
        },
    }
    # shared tensors are written once per name: safetensors refuses aliases
    state = {key: value.detach().cpu().clone().contiguous() for key, value in runner.module.state_dict().items()}
    with whole_file(path) as temporary:
        save_file(state, temporary, metadata={_METADATA_KEY: json.dumps(card)})


class Checkpoint(NamedTuple):
    """A file of weights, and the key of the state dict in it; None for the usual ones."""

    path: Path
    key: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.key is None else f"{self.path} [{self.key}]"


class _Built(NamedTuple):
    """A model by name: the module, its own preprocessing as settings of ``Classifier``, and the class names if known.

    Names are assumed where a checkpoint without names has as many classes as the published weights.
    """

    module: nn.Module
    settings: dict[str, Any]
    class_names: tuple[str, ...] | None
    assumed: bool = False


def _zoo(name: str, checkpoint: Checkpoint | None, pretrained: bool) -> _Built:
    fresh = name in zoo.ZOO and not pretrained and checkpoint is None
    module = zoo.ZOO[name].build().eval() if fresh else zoo.load_zoo_module(name)
    if checkpoint is not None:
        _load_state(module, read_state_dict(*checkpoint), checkpoint, f"zoo:{name}")
    return _Built(module, dict(zoo.ZOO[name].settings), zoo.ZOO[name].class_names())


def _timm(name: str, checkpoint: Checkpoint | None, pretrained: bool) -> _Built:
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0].split('.')[0]}*")[:5]
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise UserError(f"timm has no model {name!r}: {hint}")

    def build(classes: int | None) -> nn.Module:
        options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
        published = pretrained and checkpoint is None
        return _or_explain_download(lambda: timm.create_model(name, pretrained=published, **options), f"timm:{name}")

    module = _with_checkpoint(build, checkpoint, f"timm:{name}")
    config = timm.data.resolve_data_config(model=module)
    side = config["input_size"][1:]
    settings = {
        "size": tuple(side),
        "mean": config["mean"],
        "std": config["std"],
        "resize": {"squash": "squash", "border": "long_side"}.get(config["crop_mode"], "short_side"),
        "resized": tuple(math.floor(s / config["crop_pct"]) for s in side),
        "interpolation": config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic", "nearest") else "bicubic",
    }
    return _Built(module, settings, *_names(checkpoint, getattr(module, "num_classes", None), timm_names(module)))


def _torchvision(name: str, checkpoint: Checkpoint | None, pretrained: bool) -> _Built:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = [other for other in known if name.split("_")[0] in other][:5]
        hint = f"did you mean {', '.join(near)}?" if near else "see torchvision.models.list_models()"
        raise UserError(f"torchvision has no classifier {name!r}: {hint}")
    weights = torchvision.models.get_model_weights(name).DEFAULT

    def build(classes: int | None) -> nn.Module:
        options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
        chosen = weights if pretrained and checkpoint is None else None
        if chosen is None and name in ("googlenet", "inception_v3"):
            options |= {"init_weights": True}
        return _or_explain_download(lambda: torchvision.models.get_model(name, weights=chosen, **options), f"torchvision:{name}")

    module = _with_checkpoint(build, checkpoint, f"torchvision:{name}")
    transform = weights.transforms()
    settings = {
        "size": int(transform.crop_size[0]),
        "mean": transform.mean,
        "std": transform.std,
        "resize": "short_side",
        "resized": (int(transform.resize_size[0]), int(transform.resize_size[0])),
        "interpolation": transform.interpolation.value,
    }
    head = _head_weight(module)
    classes = None if head is None else len(module.get_parameter(head))
    return _Built(module, settings, *_names(checkpoint, classes, unique(weights.meta["categories"])))


def _names(checkpoint: Checkpoint | None, classes: int | None, published: tuple[str, ...] | None) -> tuple[tuple[str, ...] | None, bool]:
    """The class names of a model by name, and whether they are assumed (see ``_Built``)."""
    if checkpoint is None:
        return published, False
    carried = carried_names(_beside_weights(checkpoint.path), classes, str(checkpoint.path))
    fits = published is not None and len(published) == classes
    return carried or (published if fits else None), carried is None and fits


def _beside_weights(path: Path) -> Any:
    """All that a checkpoint holds: the mapping of a torch file, or the metadata of a safetensors file."""
    if path.suffix != ".safetensors":
        return _read_torch(path)
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _from_saved_file(path: Path, device: torch.device, batch_size: int | None, class_names: Any, settings: dict[str, Any]) -> Classifier:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {}).get(_METADATA_KEY, "null"))
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from None
    if not isinstance(card, dict) or not isinstance(card.get("model"), str) or not isinstance(card.get("settings"), dict):
        raise UserError(
            f"{path} does not say which model it belongs to: use --model timm:NAME (or torchvision:NAME) with --checkpoint {path.name}"
        )
    own: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in card["settings"].items()}
    names = class_names or card.get("class_names")
    model = card["model"].partition("@")[0]
    usable = set(own) <= set(_SAVED_SETTINGS) and isinstance(card.get("class_names"), list)
    if not usable or max(np.atleast_1d(own.get("size", 1)).tolist(), default=0) > _LARGEST_INPUT:
        raise UserError(f"{path} has a card that save_classifier did not write: expected the settings {', '.join(_SAVED_SETTINGS)}")
    own = {**own, "name": f"{model}@{path.stem}", **settings}
    return load_classifier(model, device=device, checkpoint=path, class_names=names, batch_size=batch_size, **own)


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
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    found = _state_dicts(loaded)
    if key is not None:
        if key not in found:
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


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from None


def _read_torch(path: Path) -> Any:
    if _is_torchscript(path):
        raise UserError(
            f"{path} is TorchScript, a program with its weights: give at.Classifier(torch.jit.load(...), size=...) in Python, or save "
            "the model's state_dict() with torch.save"
        )
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged or unsafe files
        foreign = re.search(r"(?:GLOBAL|class) (\S+?) (?:was not an allowed|which)", str(error))
        inner = re.search(r"WeightsUnpickler error: (.+)", str(error))
        reason = f"it holds an object of {foreign[1]}, whose code would run" if foreign else first_line(inner[1] if inner else error)
        raise UserError(
            f"{path} cannot be read as weights only ({reason}): save model.state_dict() with torch.save, or use safetensors"
        ) from None


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


def _with_checkpoint(build: Callable[[int | None], nn.Module], checkpoint: Checkpoint | None, name: str) -> nn.Module:
    """Build the module with the number of classes of the checkpoint's final layer, and load the weights."""
    if checkpoint is None:
        return build(None)
    state = read_state_dict(*checkpoint)
    module = build(None)
    expected = module.state_dict()
    state = _without_prefix(state, expected)
    heads = [key for key in expected if key in state and key.endswith("weight") and key == _head_weight(module)]
    if heads and state[heads[0]].shape[0] != expected[heads[0]].shape[0]:
        module = build(int(state[heads[0]].shape[0]))
    _load_state(module, state, checkpoint, name)
    return module


def _head_weight(module: nn.Module) -> str | None:
    """Name of the weight with a row per class: that of the last linear layer, or else of the last convolution."""
    kinds = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    kinds = kinds or [name for name, m in module.named_modules() if isinstance(m, nn.Conv2d)]
    return f"{kinds[-1]}.weight" if kinds else None


def _without_prefix(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip the prefixes of wrappers (DataParallel, Lightning, torch.compile) from the names, as long as no fewer names fit.

    Where the names below one prefix are all that the model expects, those beside it, such as the weights of a loss, are left out.
    """
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


def _load_state(module: nn.Module, state: dict[str, Tensor], path: Checkpoint, name: str) -> None:
    expected = module.state_dict()
    state = _without_prefix(state, expected)
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


def _or_explain_download(build: Callable[[], nn.Module], name: str) -> nn.Module:
    try:
        return build()
    except UserError:
        raise
    except (TypeError, AssertionError):
        raise
    except Exception as error:  # network libraries raise many types
        raise UserError(
            f"the weights of {name} could not be loaded ({first_line(error)}): connect to the network once, or give --checkpoint FILE"
        ) from None


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (" ..." if len(keys) > 3 else "")


SOURCES: dict[str, Callable[[str, Checkpoint | None, bool], _Built]] = {
    "zoo": _zoo,
    "timm": _timm,
    "torchvision": _torchvision,
}
