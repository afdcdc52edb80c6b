"""Classifiers of the Hugging Face hub, and of folders that ``save_pretrained`` wrote: safetensors only, and no code of theirs is run."""

from __future__ import annotations

import inspect
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from attribution.errors import UserError
from attribution.model.class_names import unique
from attribution.model.forwarding import first_line
from attribution.model.matching import matching_settings, timm_geometry
from attribution.model.source import Built, Wanted, optional_package, resized_to

T = TypeVar("T")
_INTERPOLATIONS = {0: "nearest", 1: "bicubic", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers; torch has no Lanczos, see matching
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model")
_LEFT = ("*/*", "*.fp16*")  # folders of other formats, and second copies of the weights


def hugging_face(place: str, wanted: Wanted) -> Built:
    """An image classifier of the hub, its cache or a folder, in float32.

    Args:
        place: id on the hub, or a folder.
        wanted: options override fields of the configuration.

    Raises:
        UserError: transformers is not installed; the place cannot be reached; its weights are pickled or have no head; or its
            preprocessing cannot be expressed.
    """
    name, T = named(place), transformers(named(place))
    wanted.only(name, "size", "options")
    folder = folder_of(place)
    config = configuration(folder, name, wanted.options)
    if type(config) not in T.AutoModelForImageClassification._model_mapping:
        raise UserError(f"{name} is a model of type {config.model_type}, which has no image classifier in transformers: expected one")
    if config.problem_type == "regression":
        raise UserError(f"{name} is a regression: expected a classifier")
    module = weights_of(T.AutoModelForImageClassification, folder, name, config, wanted.pretrained)
    settings = preprocessing_of(folder, name)
    if config.problem_type == "multi_label_classification":
        settings["scores"] = "sigmoid"
    return Built(module, sized(settings, module, wanted.size, name), names_of(config), plain_configuration(module))


def from_configuration(config: Mapping[str, Any], name: str, kind: str = "AutoModelForImageClassification") -> nn.Module:
    """A model of an automatic class with random weights, of a configuration that ``plain_configuration`` returned.

    Raises:
        UserError: transformers is not installed, or the configuration is not one of such a model.
    """
    T = transformers(name)
    given = {key: value for key, value in config.items() if key not in ("auto_map", "model_type", "transformers_version")}
    return _or_explain(name, lambda: getattr(T, kind).from_config(T.AutoConfig.for_model(config.get("model_type"), **given)).eval())


def plain_configuration(module: nn.Module) -> dict[str, Any]:
    """The configuration of a module of transformers as JSON can hold it, without what the file system or the hub has to do with it."""
    plain = json.loads(module.config.to_json_string(use_diff=True))  # type: ignore[operator, union-attr]
    return {key: value for key, value in plain.items() if key != "_name_or_path"}


def transformers(name: str) -> Any:
    """The package transformers, or one line that says which extra to install."""
    return optional_package("transformers", "huggingface", name)


def named(place: str) -> str:
    """What messages call a model: its folder, or hf:ID."""
    return place if Path(place).is_dir() else f"hf:{place}"


def folder_of(place: str) -> Path:
    """The folder of a model: the one given, or a copy of its files on the hub. Neither code nor pickled weights are downloaded.

    Raises:
        UserError: the hub does not know the model, or it can neither be reached nor is the model in the cache; a folder that
            save_pretrained did not write, or with pickled weights only.
    """
    folder = Path(place) if Path(place).is_dir() else _downloaded(place)
    if not (folder / "config.json").is_file():
        raise UserError(f"{named(place)} has no config.json: expected what save_pretrained of transformers writes")
    files = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in files if name.endswith(_PICKLED)]
    if not any(name.endswith(".safetensors") for name in files):
        found = f"pickled weights only ({pickled[0]}), which can run code" if pickled else "no weights in safetensors"
        convert = f"AutoModelForImageClassification.from_pretrained({place!r}, use_safetensors=False).save_pretrained(FOLDER)"
        raise UserError(f"{named(place)} has {found}: if you trust it, convert it once by {convert}")
    return folder


def _downloaded(place: str) -> Path:
    """The folder of the cache that holds a model of the hub; its files are fetched where the hub can be reached."""
    hub = optional_package("huggingface_hub", "huggingface", named(place))
    try:
        with _quiet(), fetching(place):
            return Path(hub.snapshot_download(place, allow_patterns=list(_FETCHED), ignore_patterns=list(_LEFT)))
    except UserError:
        raise
    except Exception as error:  # network and files raise many types
        raise UserError(
            f"{named(place)} could not be loaded, because the hub cannot be reached and the cache does not hold it "
            f"({type(error).__name__}): connect to the network once, or give a folder that save_pretrained wrote"
        ) from None


@contextmanager
def fetching(place: str) -> Iterator[None]:
    """Download files of a model of the hub, without warnings. Where the hub cannot be reached, the cache alone is used, at once.

    Raises:
        UserError: the hub does not know the model, or does not give it to everyone.
    """
    import huggingface_hub as hub

    name, offline, disabled = named(place), hub.constants.HF_HUB_OFFLINE, logging.root.manager.disable
    try:
        hub.HfApi().model_info(place, timeout=10)
    except hub.errors.HFValidationError as error:
        raise UserError(f"{name} is no id of the hub ({first_line(error)}): expected hf:OWNER/NAME, or a folder") from None
    except hub.errors.HfHubHTTPError as error:
        raise UserError(f"the hub does not give {name} ({first_line(error)}): check the id, or give a folder") from None
    except Exception:  # without a network, many types
        hub.constants.HF_HUB_OFFLINE = True
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        hub.constants.HF_HUB_OFFLINE = offline
        logging.disable(disabled)


def configuration(folder: Path, name: str, options: Mapping[str, Any]) -> Any:
    """The configuration of a model, with some fields replaced.

    Raises:
        UserError: it cannot be read, asks for code of its own, or has no such field.
    """
    T = transformers(name)
    config = _or_explain(name, lambda: T.AutoConfig.from_pretrained(folder, trust_remote_code=False))
    known = config.to_dict()
    if unknown := [key for key in options if key not in known and key != "num_labels"]:
        raise UserError(f"{name} has no option {unknown[0]!r}: expected fields of its configuration, such as {', '.join(list(known)[:8])}")
    for key, value in options.items():
        setattr(config, key, value)
    return config


def weights_of(kind: Any, folder: Path, name: str, config: Any, pretrained: bool = True) -> Any:
    """A model of an automatic class of transformers, in float32 and evaluation mode, from safetensors alone.

    Raises:
        UserError: there are no such weights, or some are missing from them.
    """
    if not pretrained:
        return _or_explain(name, lambda: kind.from_config(config)).eval()
    given = {"config": config, "use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
    given |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # told below
    module, found = _or_explain(name, lambda: kind.from_pretrained(folder, **given))
    for key, in_file, in_model in sorted(found["mismatched_keys"]):
        raise UserError(
            f"{name} has weights of another shape than its configuration says ({key}: {list(in_file)} in the file, {list(in_model)} in the "
            "model): leave out options that change shapes; another image size is given by size= (--image-size)"
        )
    if missing := sorted(found["missing_keys"]):
        hint = "; to classify by texts, use at.zero_shot (--zero-shot)" if hasattr(config, "text_config") else ""
        raise UserError(
            f"{name} lacks {len(missing)} weights of {type(module).__name__} ({', '.join(missing[:3])}): expected a trained classifier, "
            f"not a backbone{hint}"
        )
    if unused := sorted(found["unexpected_keys"]):
        warnings.warn(
            f"{name} holds {len(unused)} weights that {type(module).__name__} does not use ({unused[0]} and so on): is its configuration "
            "right?",
            stacklevel=2,
        )
    return module.eval()


def tokenizer_of(folder: Path, name: str) -> Any:
    """The tokenizer of a model of images and texts.

    Raises:
        UserError: there is none.
    """
    T = transformers(name)
    return _or_explain(name, lambda: T.AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def preprocessing_of(folder: Path, name: str) -> dict[str, Any]:
    """Settings of ``Classifier`` that repeat the image processor of a model.

    Raises:
        UserError: there is no image processor, or it does what cannot be expressed.
    """
    T = transformers(name)
    try:
        with _quiet():
            processor = T.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # files and configurations raise many types
        reason = first_line(error) if (folder / "preprocessor_config.json").is_file() else "no preprocessor_config.json"
        raise UserError(
            f"{name} does not say how it prepares images ({reason}): add the file, or give at.Classifier(module, size=..., mean=..., "
            "std=...) in Python"
        ) from None
    return processor_settings(processor, name)


def processor_settings(processor: Any, name: str) -> dict[str, Any]:
    """Settings of ``Classifier`` under which its preprocessing equals an image processor of transformers.

    Raises:
        UserError: the processor does what cannot be expressed.
    """

    def pipeline(image: Image.Image) -> Tensor:
        with _quiet():
            return torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])

    config = getattr(processor, "data_config", None)
    try:
        geometry = _geometry(processor, name) if config is None else timm_geometry(config)
    except UserError:
        raise
    except Exception as error:  # of fields that are not what they should be
        raise UserError(f"{name} does not say how it prepares images ({first_line(error)}): mend its preprocessor_config.json") from None
    return matching_settings(pipeline, geometry, name)


def sized(settings: dict[str, Any], module: nn.Module, size: tuple[int, int] | None, name: str) -> dict[str, Any]:
    """The settings for another input size. Position embeddings are interpolated as transformers does.

    Raises:
        UserError: the model works at its own size only.
    """
    if size is None or size == settings["size"]:
        return settings
    settings = resized_to(settings, size)
    if "interpolate_pos_encoding" in inspect.signature(module.forward).parameters:
        settings["forward_kwargs"] = {"interpolate_pos_encoding": True}
    return settings


def names_of(config: Any) -> tuple[str, ...] | None:
    """The class names of a configuration; None where it has only the placeholders LABEL_0, LABEL_1 and so on."""
    names = [str(config.id2label.get(index, index)) for index in range(config.num_labels)]
    return None if all(re.fullmatch(r"LABEL_\d+|\d+", name) for name in names) else unique(names)


def _geometry(processor: Any, name: str) -> dict[str, Any]:
    """How an image processor resizes and crops."""
    kind = re.sub(r"ImageProcessor(Pil|Fast)?$", "", type(processor).__name__)
    size, cropped = _sides(processor, "size"), _sides(processor, "crop_size")
    shortest = size.get("shortest_edge")
    if not getattr(processor, "do_resize", False) or set(size) not in ({"shortest_edge"}, {"height", "width"}):
        how = f"to {size}" if getattr(processor, "do_resize", False) else "not at all"
        raise UserError(
            f"the image processor of {name} ({type(processor).__name__}) resizes {how}: expected a height and width, or a shortest_edge"
        )
    resample = getattr(processor, "resample", None)
    geometry: dict[str, Any] = {"rounding": "transformers", "padding": "black"}
    geometry["interpolation"] = _INTERPOLATIONS.get(2 if resample is None else int(resample), "bilinear")
    if kind == "ConvNext" and shortest is not None:
        if shortest >= 384:  # at that size it warps
            return {**geometry, "size": (shortest, shortest), "resize": "squash"}
        side = int(shortest / processor.crop_pct)
        return {**geometry, "size": (shortest, shortest), "resize": "short_side", "resized": (side, side)}
    resize, resized = "squash", (size.get("height", 0), size.get("width", 0))
    if kind == "PoolFormer" and processor.crop_pct:
        resized = (int((shortest or resized[0]) / processor.crop_pct), int((shortest or resized[1]) / processor.crop_pct))
        resize = "short_side" if resized[0] == resized[1] else "squash"
    elif shortest is not None:
        side = int(256 / 224 * shortest) if kind == "Levit" else shortest
        resize, resized = "short_side", (side, side)
    if getattr(processor, "do_center_crop", False):
        return {**geometry, "size": (cropped["height"], cropped["width"]), "resize": resize, "resized": resized}
    if resize == "short_side":
        raise UserError(
            f"the image processor of {name} ({type(processor).__name__}) keeps the proportions of a photo and does not crop it, so that "
            "inputs differ in size: expected one with do_center_crop, or with a height and width"
        )
    return {**geometry, "size": resized, "resize": resize}


def _sides(processor: Any, name: str) -> dict[str, int]:
    given = getattr(processor, name, None)
    if given is None:
        return {}
    if isinstance(given, int):
        return {"height": given, "width": given}
    return {key: value for key, value in dict(given).items() if value is not None}


def _or_explain(name: str, load: Callable[[], T]) -> T:
    try:
        with _quiet():
            return load()
    except UserError:
        raise
    except Exception as error:  # network, hub, files and configurations raise many types
        text = "it brings code of its own, which is not run" if "trust_remote_code" in str(error) else first_line(error)
        raise UserError(f"{name} could not be loaded ({text}): expected what save_pretrained of transformers writes") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing bars and tables: what matters is raised."""
    from huggingface_hub.utils import logging as hub_log
    from transformers.utils import logging as log

    levels, bars = (log.get_verbosity(), hub_log.get_verbosity()), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    hub_log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(levels[0])
        hub_log.set_verbosity(levels[1])
        if bars:
            log.enable_progress_bar()
