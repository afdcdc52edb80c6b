"""load_classifier: load a classifier by name or from a file, with the preprocessing of its own configuration."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from torch import nn

from attribution.checks import check_choice
from attribution.errors import UserError, describe, reason_of
from attribution.files import read_text
from attribution.model import huggingface, zero_shot, zoo
from attribution.model.checkpoints import (
    at_size,
    beside_weights,
    head_weight,
    is_torchscript,
    load_state,
    read_safetensors,
    read_state_dict,
    with_checkpoint,
)
from attribution.model.class_names import carried_names, timm_names, unique
from attribution.model.classifier import Classifier
from attribution.model.factory import code_digest, from_factory, names_factory
from attribution.model.forwarding import first_line, resolve_device
from attribution.model.matching import timm_geometry
from attribution.model.outputs import Meaning
from attribution.model.preprocessing import checked_sides
from attribution.model.prototypes import PrototypeForward
from attribution.model.saving import PROTOTYPES, Card, Recipe, read_card
from attribution.model.source import LARGEST_UNASKED, Built, Checkpoint, Wanted, resized_to

T = TypeVar("T")


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
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Classifier:
    """Load a classifier by name or from a file, with the preprocessing of its own configuration.

    Args:
        model: "zoo:imagenet", "zoo:cnn" or "zoo:vit" (installed with the package), "timm:NAME", "torchvision:NAME", "hf:ID" or a folder
            of ``save_pretrained`` (an image classifier of transformers, safetensors only), a file that ``save_classifier`` wrote, or a
            function that makes a model, "package.module:function" or "file.py:function", whose code is run. For models of images and
            texts see ``zero_shot``.
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
        options: of a model by name: arguments of timm's, torchvision's or the user's own function, or fields of the configuration of
            transformers.
        settings: further arguments of ``Classifier`` that override the model's own configuration, such as mean and std. With another
            ``size`` the model is built for it where that matters: position embeddings are resampled as the library does, and the resize
            before the crop keeps its proportion.

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
    kept = None if checkpoint is None else Checkpoint(Path(checkpoint), checkpoint_key)
    size = None if settings.get("size") is None else checked_sides(settings["size"])
    wanted = Wanted(kept, pretrained, size, options or {})
    by_name = source in SOURCES and bool(name)
    if by_name or (spec and Path(spec).is_dir()):
        built = SOURCES[source](name, wanted) if by_name else huggingface.hugging_face(spec, wanted)
        return _classifier(spec, built, wanted, resolve_device(device), class_names, batch_size, settings)
    if Path(spec).suffix == ".safetensors":
        wanted.only(spec, "size")
        return _from_saved_file(Path(spec), size, resolve_device(device), batch_size, class_names, settings)
    if names_factory(spec):
        return _from_factory(spec, wanted, resolve_device(device), class_names, batch_size, settings)
    received = repr(spec) if isinstance(model, str | Path) else describe(model)
    raise UserError(
        f"unknown model {received}: expected {', '.join(f'zoo:{n}' for n in sorted(zoo.ZOO))}, timm:NAME, torchvision:NAME, hf:ID, "
        f"a folder of save_pretrained, file.py:FUNCTION, or a .safetensors file written by save_classifier{_meant(spec)}"
    )


def _classifier(
    spec: str, built: Built, wanted: Wanted, device: torch.device, names: Any, batch_size: int | None, settings: dict[str, Any]
) -> Classifier:
    """The classifier of a model built by name. One of another size than its own is tried at once."""
    own = {"channels_last": _is_convolutional(built.module), **built.settings, "name": spec, **settings}
    if names is None and built.assumed and wanted.checkpoint is not None:
        warnings.warn(
            f"{wanted.checkpoint.path} names no classes: its {len(built.class_names or ())} are given the names of the published {spec}; "
            "give class_names (--classes) where they are others",
            stacklevel=3,
        )
    made = Classifier(
        built.module.to(device).eval(), class_names=built.class_names if names is None else names, batch_size=batch_size, **own
    )
    made.recipe = Recipe(spec, dict(wanted.options), built.config)
    if wanted.size is not None:
        made.find_out(False)
    return made


def _is_convolutional(module: nn.Module) -> bool:
    """Whether most of a module's work is convolutions, which are faster in the channels-last layout on CPUs and tensor cores.

    A vision transformer has one or a few, in its patch embedding.
    """
    kinds = [type(each) for each in module.modules()]
    return kinds.count(nn.Conv2d) > max(4, kinds.count(nn.Linear))


def _from_factory(
    spec: str, wanted: Wanted, device: torch.device, names: Any, batch_size: int | None, settings: dict[str, Any]
) -> Classifier:
    """A model that the user's own function makes. Its recipe knows the code."""
    made = _as_made(spec, wanted, device, names, batch_size, settings)
    if made.recipe is not None:
        made.recipe = replace(made.recipe, code=code_digest(spec))
    return made


def _as_made(spec: str, wanted: Wanted, device: torch.device, names: Any, batch_size: int | None, settings: dict[str, Any]) -> Classifier:
    """A model that the user's own function makes, with the weights of a checkpoint, and what a saved one says."""
    checkpoint = wanted.checkpoint
    card = read_card(checkpoint.path) if checkpoint is not None and checkpoint.path.suffix == ".safetensors" else None
    sized = wanted if card is None or wanted.size is not None else replace(wanted, size=card.settings.get("size"))
    made = from_factory(spec, sized)
    module = made.module
    if not isinstance(module, nn.Module):
        raise UserError(f"{spec} returned a Classifier of a function, which takes no checkpoint, device or batch size")
    if checkpoint is not None:
        load_state(module, read_state_dict(*checkpoint), checkpoint, spec)
    if card is not None and checkpoint is not None:
        return _carded(
            module, replace(card, recipe=Recipe(spec, dict(wanted.options))), checkpoint.path, device, batch_size, names, settings
        )
    if isinstance(made, Built):
        return _classifier(spec, made, wanted, device, names, batch_size, settings)
    if further := set(settings) - {"size", "name"}:
        raise UserError(f"{spec} returned a Classifier, which has its own {', '.join(sorted(further))}: leave them out, or return a module")
    module.to(device)
    made = made.with_forward(made.forward, name=spec, class_names=names)
    made.batch_size = made.batch_size if batch_size is None else batch_size
    made.recipe = Recipe(spec, dict(wanted.options))
    return made


def _meant(spec: str) -> str:
    """The way that works for what was given as a model: a bare name, or a file in torch's format."""
    import timm
    import torchvision

    if Path(spec).is_file():
        if is_torchscript(Path(spec)):
            return f"; a TorchScript file becomes a classifier in Python, at.Classifier(torch.jit.load({spec!r}), size=...)"
        return f"; a file of weights goes with the name of its model, as --checkpoint {spec}"
    known = {"zoo": zoo.ZOO, "timm": timm.list_models(spec), "torchvision": torchvision.models.list_models(module=torchvision.models)}
    meant = [f"{source}:{spec}" for source, names in known.items() if spec in names]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def read_class_names(path: Path) -> list[str]:
    """Read class names from a text file, one name a line. Blank lines at the end are ignored."""
    try:
        names = [name.strip() for name in read_text(path).rstrip().split("\n")]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as text ({reason_of(error)}): expected one class name a line") from None
    if names == [""]:
        raise UserError(f"{path} is empty: expected one class name a line")
    if "" in names:
        raise UserError(f"{path} line {names.index('') + 1} is empty: expected one class name a line")
    return names


def _zoo(name: str, wanted: Wanted) -> Built:
    wanted.only(f"zoo:{name}", "checkpoint", "size")
    checkpoint = wanted.checkpoint
    fresh = name in zoo.ZOO and not wanted.pretrained and checkpoint is None
    module = zoo.ZOO[name].build().eval() if fresh else zoo.load_zoo_module(name)
    if checkpoint is not None:
        load_state(module, read_state_dict(*checkpoint), checkpoint, f"zoo:{name}")
    return Built(module, dict(zoo.ZOO[name].settings), zoo.ZOO[name].class_names())


def _timm(name: str, wanted: Wanted) -> Built:
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0].split('.')[0]}*")[:5]
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise UserError(f"timm has no model {name!r}: {hint}")
    published = wanted.pretrained and wanted.checkpoint is None

    def build(classes: int | None) -> nn.Module:
        options = _with_classes(wanted.options, classes)

        def create(**size: Any) -> nn.Module:
            place = timm.models.get_pretrained_cfg_value(name, "hf_hub_id") if published else None
            with huggingface.fetching(place) if place else nullcontext():
                return timm.create_model(name, pretrained=published, **size, **options)

        if wanted.size is not None and "img_size" not in options:
            try:
                return _or_explain(lambda: create(img_size=wanted.size), f"timm:{name}", wanted)
            except TypeError:  # a convolutional network takes any size
                pass
        return _or_explain(create, f"timm:{name}", wanted)

    module = with_checkpoint(build, wanted.checkpoint, f"timm:{name}")
    size = wanted.size or wanted.options.get("img_size")
    args = {} if size is None else {"input_size": (3, *np.broadcast_to(size, 2).tolist())}
    data = timm.data.resolve_data_config(args, model=module)
    settings = {**timm_geometry(data), "mean": data["mean"], "std": data["std"]}
    names, assumed = _names(wanted.checkpoint, getattr(module, "num_classes", None), timm_names(module))
    return Built(module, settings, names, assumed=assumed)


def _with_classes(options: Mapping[str, Any], classes: int | None) -> dict[str, Any]:
    """The options of a model that has as many classes as its checkpoint, where there is one."""
    if classes is None:
        return dict(options)
    if options.get("num_classes", classes) != classes:
        raise UserError(f"num_classes is {options['num_classes']}, but the checkpoint has {classes} classes: leave the option out")
    return {**options, "num_classes": classes}


def _torchvision(name: str, wanted: Wanted) -> Built:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = [other for other in known if name.split("_")[0] in other][:5]
        hint = f"did you mean {', '.join(near)}?" if near else "see torchvision.models.list_models()"
        raise UserError(f"torchvision has no classifier {name!r}: {hint}")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    published = wanted.pretrained and wanted.checkpoint is None
    sized = wanted.size is not None and name.startswith("vit_")
    if sized and wanted.size is not None and wanted.size[0] != wanted.size[1]:
        raise UserError(f"torchvision:{name} takes square images, but the image size wanted is {wanted.size}: give one number")

    def build(classes: int | None) -> nn.Module:
        options = _with_classes(wanted.options, classes)
        chosen = weights if published and not sized else None
        if chosen is None and name in ("googlenet", "inception_v3"):
            options |= {"init_weights": True}
        if sized and wanted.size is not None:
            options |= {"image_size": wanted.size[0]}
        module = _or_explain(lambda: torchvision.models.get_model(name, weights=chosen, **options), f"torchvision:{name}", wanted)
        if published and sized:
            state = _or_explain(lambda: weights.get_state_dict(check_hash=True), f"torchvision:{name}", wanted)
            module.load_state_dict(at_size(module, state))
        return module

    module = with_checkpoint(build, wanted.checkpoint, f"torchvision:{name}")
    transform = weights.transforms()
    side, resized = int(transform.crop_size[0]), int(transform.resize_size[0])
    settings = {
        "size": (side, side),
        "mean": transform.mean,
        "std": transform.std,
        "resize": "short_side",
        "resized": (resized, resized),
        "interpolation": transform.interpolation.value,
    }
    head = head_weight(module)
    classes = None if head is None else len(module.get_parameter(head))
    names, assumed = _names(wanted.checkpoint, classes, unique(weights.meta["categories"]))
    return Built(module, settings if wanted.size is None else resized_to(settings, wanted.size), names, assumed=assumed)


def _names(checkpoint: Checkpoint | None, classes: int | None, published: tuple[str, ...] | None) -> tuple[tuple[str, ...] | None, bool]:
    """The class names of a model by name, and whether they are assumed (see ``Built``)."""
    if checkpoint is None:
        return published, False
    carried = carried_names(beside_weights(checkpoint.path), classes, str(checkpoint.path))
    fits = published is not None and len(published) == classes
    return carried or (published if fits else None), carried is None and fits


def _open_clip(name: str, _wanted: Wanted) -> Built:
    raise UserError(
        f"open_clip:{name} compares images with texts: give the texts of the classes by --zero-shot FILE, or use at.zero_shot in Python"
    )


def _from_saved_file(
    path: Path, size: tuple[int, int] | None, device: torch.device, batch_size: int | None, class_names: Any, settings: dict[str, Any]
) -> Classifier:
    card = read_card(path)
    if card is None:
        raise UserError(
            f"{path} does not say which model it belongs to: use --model timm:NAME (or torchvision:NAME) with --checkpoint {path.name}"
        )
    recipe = card.recipe
    if not re.fullmatch(r".+:\S+", recipe.model) and recipe.config is None:
        raise UserError(f"{path} has a card that save_classifier did not write: it names {recipe.model!r} as the model")
    if recipe.model.partition(":")[0] not in SOURCES and not recipe.tower and recipe.config is None:
        raise UserError(
            f"{path} was made by the factory {recipe.model}, whose code would run: if you trust it, give --model {recipe.model} "
            f"--checkpoint {path}"
        )
    height, width = checked_sides(card.settings["size"])
    if size is not None:
        card = replace(card, settings=resized_to(card.settings, size))
    elif max(height, width) > LARGEST_UNASKED:
        raise UserError(
            f"{path} asks for inputs of {height}x{width} pixels, which can take much memory: expected at most {LARGEST_UNASKED}; if you "
            f"mean it, give size=({height}, {width}), or --image-size {height}x{width}"
        )
    module = _rebuilt(recipe, card.settings.get("size"), path)
    return _carded(module, card, path, device, batch_size, class_names, settings)


def _rebuilt(recipe: Recipe, size: Any, path: Path) -> nn.Module:
    """The module of a recipe, with the weights of the file."""
    if not recipe.tower and recipe.config is None:
        source, _, name = recipe.model.partition(":")
        return SOURCES[source](name, Wanted(Checkpoint(path), True, size, recipe.options)).module
    module = zero_shot.tower_of(recipe) if recipe.tower else huggingface.from_configuration(recipe.config or {}, recipe.model)
    load_state(module, read_state_dict(path), Checkpoint(path), recipe.model)
    return module


def _carded(
    module: nn.Module, card: Card, path: Path, device: torch.device, batch_size: int | None, names: Any, settings: dict[str, Any]
) -> Classifier:
    """A module with the preprocessing, the class names and the prototypes of a card."""
    own = {"name": f"{card.recipe.model}@{path.stem}", **card.settings, **settings}
    head = card.prototypes
    try:
        made = Classifier(module.to(device).eval(), class_names=None if head else names or card.class_names, batch_size=batch_size, **own)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    made.recipe = card.recipe
    if head is None:
        return made
    state = read_safetensors(path)
    if PROTOTYPES not in state or not {"scale", "bias", "kind", "normalize", "takes_output"} <= set(head):
        raise UserError(f"{path} says that it has prototypes, but lacks them or their scale: it was not written by save_classifier")
    matrix = state[PROTOTYPES].float().to(device)
    try:
        check_choice("kind", head["kind"], get_args(Meaning))
        scale, bias = float(head["scale"]), float(head["bias"])
        forward = PrototypeForward(made.forward, matrix, scale, bool(head["normalize"]), bias, head["kind"], bool(head["takes_output"]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} has prototypes that cannot be used ({error}): it was not written by save_classifier") from None
    return made.with_forward(forward, class_names=names or card.class_names)


def _or_explain(build: Callable[[], T], name: str, wanted: Wanted) -> T:
    """What a library builds; its errors in one line, except that it does not know an argument of ours."""
    options = "".join(f", {key}={value!r}" for key, value in wanted.options.items())
    try:
        return build()
    except UserError:
        raise
    except TypeError as error:
        if "'img_size'" in str(error) and "img_size" not in wanted.options:
            raise
        raise UserError(f"{name} does not take its options{options} ({first_line(error)}): leave out what it does not know") from None
    except (AssertionError, ValueError) as error:
        if wanted.size is None and not options:
            raise
        raise UserError(f"{name} cannot be built with size {wanted.size}{options} ({first_line(error)}): expected what it takes") from None
    except Exception as error:  # network libraries raise many types
        raise UserError(
            f"the weights of {name} could not be loaded ({first_line(error)}): connect to the network once, or give --checkpoint FILE"
        ) from None


SOURCES: dict[str, Callable[[str, Wanted], Built]] = {
    "zoo": _zoo,
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": huggingface.hugging_face,
    "open_clip": _open_clip,
}
