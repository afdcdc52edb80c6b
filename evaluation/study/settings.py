"""Settings of studies: every field has a type, a default, a range and a help text, and is an option of the study's command.

A setting is written once, as a field made by ``setting``. From the fields come the checks of values, the reader of TOML files, the
options of the command (in ``vision_attribution``), and the command line that repeats a run.
"""

from __future__ import annotations

import hashlib
import inspect
import shlex
import tomllib
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from attribution.baselines.smoothing import Smoothing
from attribution.checks import LARGEST_SEED, check_choice, check_number, check_whole
from attribution.errors import UserError, describe, reason_of
from attribution.files import read_text
from attribution.image import IMAGE_SUFFIXES
from attribution.model.classifier import Classifier
from attribution.model.forwarding import PRECISIONS
from attribution.model.loading import load_classifier, read_class_names
from attribution.model.outputs import SCORES, SCORES_HELP
from attribution.model.source import parsed_options, parsed_size
from attribution.model.zero_shot import TEMPLATE, zero_shot
from attribution.model.zoo import DEFAULT_MODEL
from attribution.objective import ScoreWeights
from attribution.provenance import plain_settings
from attribution.regions import REGIONS, Regions
from evaluation.data.dataset import ImageDataset
from evaluation.data.lists import LIST_SUFFIXES
from evaluation.data.recipes import load_recipe, open_dataset, recipe_names

T = TypeVar("T", bound="StudySettings")
_LARGEST_FILE = 2**24  # bytes of a file of settings
_LARGEST = 10**9  # of a number without another bound: no count of images, regions or steps comes near
Choices = Iterable[str] | Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Setting:
    """Everything about a field of settings except its type and default.

    Attributes:
        help: of the option; it says what the setting does, in one or two sentences.
        option: its name on the command line; made from the field's name when None, "" for none.
        short: a letter for it, such as "-n".
        least, most: range of its numbers, both included.
        choices: names that it takes.
        numbers: whether any number depends on it; what changes none is left out of stored settings.
        keys: of a mapping, options for some of its keys: key -> (type, help).
    """

    help: str
    option: str | None = None
    short: str | None = None
    least: float | None = None
    most: float | None = None
    choices: Choices | None = None
    numbers: bool = True
    keys: Mapping[str, tuple[type, str]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The allowed names, if there is a list of them."""
        found = self.choices() if callable(self.choices) else self.choices
        return [] if found is None else list(found)


def setting(default: Any = MISSING, *, help: str, factory: Any = MISSING, **more: Any) -> Any:
    """Make a field of settings; the arguments are those of ``Setting``. A field without a default is required."""
    return field(default=default, default_factory=factory, metadata={"setting": Setting(help, **more)})


MODEL_HELP = (
    "zoo:imagenet, zoo:cnn, zoo:vit, timm:NAME, torchvision:NAME, hf:ID, a folder of save_pretrained, a saved .safetensors file, or "
    "FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION that makes a model (its code is run). "
    "With --zero-shot hf:ID, such a folder, or open_clip:NAME/TAG."
)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a model is made from its name: the same options in every command that takes one."""

    checkpoint: str | None = setting(None, numbers=False, help="Weights for a timm, torchvision or open_clip model, or one of a function.")
    checkpoint_key: str | None = setting(None, numbers=False, help="Where the weights are in a checkpoint that holds several.")
    classes: str | None = setting(None, numbers=False, help="Text file with one class name a line.")
    scores: str | None = setting(None, choices=SCORES, numbers=False, help=SCORES_HELP)
    image_size: int | str | None = setting(
        None,
        numbers=False,
        help="Side of the model input in pixels, or HEIGHTxWIDTH; position embeddings are resampled. Default: the model's own.",
    )
    model_options: tuple[str, ...] = setting(
        (),
        option="--model-option",
        numbers=False,
        help="KEY=VALUE for the library or function that makes the model, such as dynamic_img_size=true; repeat it for several.",
    )
    zero_shot: str | None = setting(
        None, numbers=False, help="Text file with one class a line, for a model of images and texts such as CLIP."
    )
    template: str | None = setting(
        None,
        numbers=False,
        help="With --zero-shot: a text with {} in the place of the class, or a file with one a line, which are averaged. "
        f"Default: {TEMPLATE}.",
    )
    device: str = setting("auto", numbers=False, help="auto, cpu, cuda, cuda:N or mps.")
    batch_size: int | None = setting(None, least=1, numbers=False, help="Most images forwarded at once. It changes no number.")

    def __post_init__(self) -> None:
        for name, kind in hints_of(type(self)).items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind, settings_of(type(self))[name]))

    def load(self, model: str | Classifier) -> Classifier:
        """The classifier of a name under these settings; a classifier is returned as it is.

        Raises:
            UserError: a model that cannot be made so, or settings that contradict each other.
        """
        if isinstance(model, Classifier):
            return model
        size = None if self.image_size is None else parsed_size(self.image_size)
        options = parsed_options(self.model_options)
        if self.zero_shot is not None:
            if self.classes is not None or self.scores is not None or self.checkpoint_key is not None:
                raise UserError("classes, scores and checkpoint_key do not go with zero_shot (--zero-shot), whose texts are the classes")
            templates = TEMPLATE if self.template is None else self.template
            return zero_shot(
                model, read_class_names(Path(self.zero_shot)), device=self.device, checkpoint=self.checkpoint, size=size, options=options,
                template=read_class_names(Path(templates)) if Path(templates).is_file() else templates, batch_size=self.batch_size,
            )  # fmt: skip
        if self.template is not None:
            raise UserError("template (--template) goes with zero_shot (--zero-shot FILE), which gives the classes")
        names = None if self.classes is None else read_class_names(Path(self.classes))
        given: dict[str, Any] = {"checkpoint": self.checkpoint, "checkpoint_key": self.checkpoint_key, "class_names": names}
        given |= {} if size is None else {"size": size}
        return load_classifier(model, device=self.device, batch_size=self.batch_size, scores=self.scores, options=options, **given)


@dataclass(frozen=True, kw_only=True)
class StudySettings(ModelSettings):
    """The settings that all studies share: data, how models are made, samples and seed."""

    data: str = setting(
        short="-d",
        help="Labelled images: a recipe name (with --root), a folder with one subfolder a class, or a CSV or text list of path and label "
        "(also mask or x0, y0, x1, y1, and group).",
    )
    root: str | None = setting(None, numbers=False, help="Where the data of a recipe lie.")
    split: str = setting("test", help="Split of a recipe.")
    samples: int | None = setting(None, short="-n", least=1, help="Number of images, drawn by the seed.")
    seed: int = setting(0, least=0, most=LARGEST_SEED, help="Seed of the choice of images and of stochastic methods.")
    workers: int = setting(
        1, least=1, most=1024, numbers=False, help="Number of processes that measure side by side. It changes no number."
    )
    engine: Literal["processes", "ray"] = setting(
        "processes",
        numbers=False,
        help="What the workers are: processes of this machine, or ray: actors of Ray, on this machine or on a cluster.",
    )
    ray_address: str | None = setting(
        None, numbers=False, help="With --engine ray: address of a cluster that runs, such as 10.0.0.1:6379. Default: one on this machine."
    )
    cpus_per_worker: int = setting(
        1, least=1, most=1024, numbers=False, help="With --engine ray: processor cores of each worker. A cluster with GPUs gives each one."
    )
    precision: str = setting(
        PRECISIONS[0],
        choices=PRECISIONS,
        help="float32, or bfloat16 or float16 for passes without gradients: faster on many machines, and no longer exact. Results say "
        "which it was.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ray_address is not None and self.engine != "ray":
            raise UserError(f"ray_address is {self.ray_address!r}, but the engine is {self.engine}: give engine ray, or leave it out")

    def load(self, model: str | Classifier) -> Classifier:
        """The classifier of a name under these settings; a classifier is returned as it is.

        Raises:
            UserError: see ``ModelSettings.load``; a precision that the device lacks.
        """
        made = super().load(model)
        if not isinstance(model, Classifier):
            made.precision = self.precision
        return made

    def plain(self) -> dict[str, Any]:
        """The settings that numbers depend on, as JSON. The data set appears by its name, without its path."""
        told = {name: getattr(self, name) for name, about in settings_of(type(self)).items() if about.numbers}
        return plain_settings({name: plain_option(value) for name, value in told.items()}) | {"data": Path(self.data).name}

    @classmethod
    def make(cls: type[T], values: Mapping[str, Any], source: str = "the study") -> T:
        """Make settings from plain values: lists, text, numbers.

        Args:
            values: by field.
            source: where they come from, for messages.

        Raises:
            UserError: an unknown field, no data, or a value that does not fit.
        """
        known = settings_of(cls)
        if unknown := sorted(set(values) - set(known)):
            raise UserError(f"{source} has unknown settings {', '.join(unknown)}: expected some of {', '.join(sorted(known))}")
        needed = [each.name for each in fields(cls) if each.default is MISSING and each.default_factory is MISSING]
        if missing := [name for name in needed if name not in values]:
            wanted = f"{missing[0]} ({option_name(missing[0], known[missing[0]])})"
            raise UserError(f"{source} names no {wanted}: give a recipe name, an image folder, or a list of paths and labels")
        return cls(**{**cls._model_of_data(values), **values})

    @classmethod
    def _model_of_data(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The model of the recipe, where the data are a recipe's, no model was given, and the default is one of other classes."""
        usual = {each.name: each.default for each in fields(cls) if each.default in (DEFAULT_MODEL, (DEFAULT_MODEL,))}
        if values.get("root") is None or values.get("data") not in recipe_names() or set(usual) <= set(values):
            return {}
        if not (model := load_recipe(values["data"]).model):
            return {}
        warnings.warn(f"no model was given: {model} is taken, which knows the classes of {values['data']}", stacklevel=4)
        return {name: (model,) if isinstance(default, tuple) else model for name, default in usual.items()}

    @classmethod
    def read(cls: type[T], path: Path, overrides: Mapping[str, Any]) -> T:
        """Read settings from a TOML file. Overrides replace values of the file.

        Raises:
            UserError: not TOML or an unknown field, with the file's name; or a value that does not fit.
        """
        return cls.make({**read_values(path), **overrides}, str(path))

    def command_line(self, command: str, without: Collection[str] = (), **further: str) -> str:
        """The command line that repeats these settings. Options in ``unsaid`` are left out, or get the name of their object.

        Args:
            command: name of the command.
            without: fields that are left out.
            further: options that are added, by name.
        """
        given: list[tuple[str, Any]] = []
        kinds = hints_of(type(self))
        for each in fields(self):
            about, value = settings_of(type(self))[each.name], _named(getattr(self, each.name))
            if each.name in without or value is None:
                continue
            given += [(option_name(each.name, about, key), value[key]) for key in about.keys if key in value]
            usual = each.default if each.default_factory is MISSING else each.default_factory()
            if about.option == "" or about.keys or not _can_be_said(value, kinds[each.name], about) or value == usual:
                continue
            given.append((option_name(each.name, about), ",".join(map(str, value)) if isinstance(value, tuple) else value))
        words = ["attribution", command]
        for option, value in [*given, *((f"--{name}", text) for name, text in further.items())]:
            if value is True:
                words.append(option)
            else:
                text = str(value)
                words += [f"{option}={text}"] if text.startswith("-") else [option, text]
        return shlex.join(words)

    def unsaid(self) -> list[str]:
        """The options that a command line cannot repeat in full, because they were given as Python objects."""
        kinds = hints_of(type(self))
        options = [(name, about) for name, about in settings_of(type(self)).items() if about.option != "" or about.keys]
        return [name for name, about in options if not _can_be_said(getattr(self, name), kinds[name], about)]


def named_model(settings: StudySettings, model: str | Classifier) -> Classifier:
    """The classifier that the settings name or hold."""
    return settings.load(model)


def named_data(settings: StudySettings, class_names: Sequence[str]) -> ImageDataset:
    """The data set of the settings. Its labels are indices into the given class names, those of a classifier."""
    return open_dataset(settings.data, root=settings.root, split=settings.split, class_names=class_names)


def read_values(path: Path) -> dict[str, Any]:
    """The values of a TOML file.

    Raises:
        UserError: the file cannot be read as TOML.
    """
    try:
        return tomllib.loads(read_text(path, most=_LARGEST_FILE))
    except (OSError, ValueError, RecursionError) as error:
        images = path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES | LIST_SUFFIXES
        raise UserError(
            f"{path} cannot be read as TOML ({reason_of(error)})" + (f"; images are named by --data {path}" if images else "")
        ) from None


def settings_of(cls: type) -> dict[str, Setting]:
    """The ``Setting`` of each field."""
    return {each.name: each.metadata.get("setting", Setting("", option="")) for each in fields(cls)}


def hints_of(cls: Any) -> dict[str, Any]:
    """The type of each field of settings."""
    hints = typing.get_type_hints(cls)
    return {each.name: hints[each.name] for each in fields(cls)}


def option_name(name: str, about: Setting, key: str | None = None) -> str:
    """The option of a field, such as "--batch-size", or of one key of a mapping: "--region-count" of region_options."""
    if key is not None:
        name = f"{name.removesuffix('_options')}_{key}"
    elif about.option is not None:
        return about.option
    return f"--{name.replace('_', '-')}"


def plain_option(value: Any) -> Any:
    """The value of a setting as JSON can hold it; arrays by the digest of their values."""
    if isinstance(value, ScoreWeights | Smoothing):
        return dict(vars(value))
    if isinstance(value, Regions):
        value = value.labels
    if isinstance(value, Classifier):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): plain_option(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [plain_option(each) for each in value]
    if isinstance(value, torch.Tensor | np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
    return plain_settings({"value": value})["value"]


def check_region_options(regions: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a region method does not take, before it is called for the first image.

    Args:
        regions: key of ``REGIONS``.
        options: of the method; ``count`` is at least 2: one region has no order.

    Raises:
        UserError: unknown options, or another count.
    """
    signature = inspect.signature(REGIONS[regions])
    try:
        signature.bind_partial(None, **options)
    except TypeError as error:
        taken = ", ".join(list(signature.parameters)[1:])
        raise UserError(f"region_options do not fit ({error}): {regions} takes {taken or 'none'}") from None
    if options.get("count") is not None:
        check_whole("region_options count", options["count"], 2)


def _checked(name: str, value: Any, kind: Any, about: Setting) -> Any:
    """Check a value against the type of its field, and convert lists to tuples.

    Raises:
        UserError: another type, out of range, or none of the choices.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType) and type(None) in inner:
        if value is None:
            return None
        others = [each for each in inner if each is not type(None)]
        return _checked(name, value, others[0] if len(others) == 1 else typing.Union[tuple(others)], about)  # noqa: UP007
    if origin in (typing.Union, types.UnionType):
        return _one_of(name, value, inner)
    if origin is Literal:
        check_choice(name, value, inner)
    elif origin is tuple:
        if not isinstance(value, tuple | list | str):
            raise UserError(f"{name} is {describe(value)}: expected a list")
        return tuple(_checked(name, each, inner[0], about) for each in ([value] if isinstance(value, str) else value))
    elif kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{name} is {describe(value)}: expected true or false")
    elif kind is int:
        check_whole(name, value, int(about.least or 0), None if about.most is None else int(about.most))
        if about.most is None and value > _LARGEST:
            raise UserError(f"{name} is {value}: expected at most {_LARGEST}")
    elif kind is float:
        check_number(name, value, -np.inf if about.least is None else about.least, np.inf if about.most is None else about.most)
    elif kind is str:
        if isinstance(value, Path):
            value = str(value)
        if not isinstance(value, str):
            raise UserError(f"{name} is {describe(value)}: expected text")
        if about.choices is not None:
            check_choice(name, value, about.names())
    elif isinstance(origin, type) and issubclass(origin, Mapping) and not isinstance(value, Mapping):
        raise UserError(f"{name} is {describe(value)}: expected names with values, such as count=49")
    return value


def _one_of(name: str, value: Any, kinds: Sequence[Any]) -> Any:
    """Refuse a value of none of these types. Any is what only the functions of the study can check, such as a fill."""
    value = str(value) if isinstance(value, Path) and str in kinds else value
    classes = tuple(each for each in kinds if isinstance(each, type))
    if len(classes) == len(kinds) and (isinstance(value, bool) or not isinstance(value, classes)):
        words = {str: "text", int: "a whole number"}
        raise UserError(f"{name} is {describe(value)}: expected {' or '.join(words.get(each, f'a {each.__name__}') for each in classes)}")
    return value


def _named(value: Any) -> Any:
    """The value with classifiers replaced by their names."""
    if isinstance(value, tuple):
        return tuple(_named(each) for each in value)
    return value.name if isinstance(value, Classifier) else value


def _can_be_said(value: Any, kind: Any, about: Setting) -> bool:
    """Whether an option can have this value."""
    if isinstance(value, Mapping):
        return set(value) <= set(about.keys)
    inner = [each for each in typing.get_args(kind) if each is not type(None)]
    is_list = tuple in (typing.get_origin(kind), typing.get_origin(inner[0]) if len(inner) == 1 else None)
    values = value if is_list and isinstance(value, tuple) else [value]
    return all(each is None or isinstance(each, str | int | float) for each in values)
