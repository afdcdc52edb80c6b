"""What a benchmark measures: methods, metrics and protocol, from Python, the command line or a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from attribution.errors import UserError
from attribution.fills import DROP, drops
from attribution.image import MAX_SIDE
from attribution.model.classifier import Classifier
from attribution.network.stages import LAYERS
from attribution.provenance import plain_settings
from attribution.regions import REGIONS
from evaluation.benchmark.methods import DEFAULT_METHODS, MethodSpec
from evaluation.metrics.protocol import PROTOCOLS, Protocol
from evaluation.metrics.registry import METRICS, Measure, expand_metrics


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured; every field may stand in a TOML file under its name.

    Attributes:
        data: recipe name, image folder, or list of paths and labels (see ``open_dataset``).
        models: names that ``load_classifier`` takes, or classifiers.
        methods: names, "name@preset", or tables (see ``MethodSpec.parse``).
        metrics: keys of ``METRICS``.
        fills, steps: each curve metric is measured for every fill under every step rule ("regions", "pixels").
        pixel_steps: number of pixel steps.
        output: "probability" or "logit" of the target.
        protocol: a key of ``PROTOCOLS`` instead of fills, steps and output.
        regions, region_options: the partition of region steps, shared by all methods and by the search; where "drop" is among the
            fills it follows the patches of models that have some (see ``follow_patches``).
        method_fill: what hides pixels while methods and searches work; by default the first fill that is neither imputed nor "drop".
        samples: so many images, the first of a seeded permutation; all by default.
        only: "all", "correct" or "wrong": which images by the model's own prediction.
        target: "predicted" or "label".
        seed: of the choice of images, the methods and the metrics.
        seeds: stochastic methods run with so many seeds; tables take the first, the others give the spread.
        layers: where the settings of grids explain: "input", "middle", "final", or names of modules.
        grids: so many grids of images, at most.
        cells: n, cells a side of a grid.
        confidence: least confidence of every model in the label of every image of a grid.
        repeat_corners: whether the last cell of a grid shows the class of the first.
        root, split: of a recipe.
        workers: so many processes judge grids side by side, on a CPU with many small maps.
        checkpoint, device, batch_size, max_side: see ``load_classifier`` and ``explain``.
    """

    data: str
    models: tuple[str | Classifier, ...] = ("zoo:cnn",)
    methods: tuple[MethodSpec, ...] = tuple(MethodSpec.parse(name) for name in DEFAULT_METHODS)
    metrics: tuple[str, ...] = tuple(name for name, metric in METRICS.items() if metric.default)
    fills: tuple[str, ...] = ("black",)
    steps: tuple[str, ...] = ("regions",)
    pixel_steps: int = 50
    output: Literal["probability", "logit"] = "probability"
    protocol: str | None = None
    regions: str = "slico"
    region_options: Mapping[str, Any] = field(default_factory=dict)
    method_fill: str | None = None
    samples: int | None = None
    only: Literal["all", "correct", "wrong"] = "all"
    target: Literal["predicted", "label"] = "predicted"
    seed: int = 0
    seeds: int = 1
    layers: tuple[str, ...] = LAYERS
    grids: int = 100
    cells: int = 2
    confidence: float = 0.99
    repeat_corners: bool = False
    workers: int = 1
    root: str | None = None
    split: str = "test"
    checkpoint: str | None = None
    device: str = "auto"
    batch_size: int | None = None
    max_side: int = MAX_SIDE

    def __post_init__(self) -> None:
        for name in ("models", "methods", "fills", "steps", "layers"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty: name at least one")
        object.__setattr__(self, "metrics", expand_metrics(self.metrics))
        labels = [spec.label for spec in self.methods]
        repeated = {label for label in labels if labels.count(label) > 1}
        if repeated:
            raise UserError(f"method {sorted(repeated)[0]!r} was named twice: give each a label of its own")
        if len(set(self.model_names)) < len(self.models):
            raise UserError(f"a model was named twice among {', '.join(self.model_names)}: give each once, under a name of its own")
        for name, allowed in (("only", ("all", "correct", "wrong")), ("target", ("predicted", "label"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            raise UserError(f"unknown protocol {self.protocol!r}: expected one of {', '.join(PROTOCOLS)}")
        if self.regions not in REGIONS:
            raise UserError(f"unknown regions {self.regions!r}: expected one of {', '.join(REGIONS)}")
        if len(set(self.layers)) < len(self.layers):
            raise UserError(f"a layer was named twice among {', '.join(self.layers)}: give each once")
        if not 0 < self.confidence <= 1:
            raise UserError(f"confidence is {self.confidence!r}: expected a probability above 0, at most 1")
        for name, least in (("samples", 1), ("seeds", 1), ("seed", 0), ("max_side", 8), ("grids", 1), ("cells", 2), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise UserError(f"{name} is {value!r}: expected a whole number of at least {least}")
        self.protocols  # noqa: B018  a wrong fill or step rule fails here

    @property
    def model_names(self) -> tuple[str, ...]:
        """What tables call the models."""
        return tuple(model.name if isinstance(model, Classifier) else model for model in self.models)

    @cached_property
    def protocols(self) -> tuple[Protocol, ...]:
        """Of the curves, in the order of the tables."""
        if self.protocol is not None:
            return (PROTOCOLS[self.protocol],)
        return tuple(Protocol(steps, self.pixel_steps, fill, self.output) for steps in self.steps for fill in self.fills)  # type: ignore[arg-type]

    @property
    def drops(self) -> bool:
        """Whether anything is explained or measured with tokens taken away."""
        own = [spec.options.get("fill") for spec in self.methods]
        return any(map(drops, [self.explained_fill, *own, *(protocol.fill for protocol in self.protocols)]))

    @property
    def explained_fill(self) -> Any:
        """What hides pixels while methods and searches work."""
        if self.method_fill is not None:
            return self.method_fill
        fixed = [protocol.fill for protocol in self.protocols if not (isinstance(protocol.fill, str) and protocol.fill in ("linear", DROP))]
        return fixed[0] if fixed else "black"

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The columns of the tables."""
        return (*(measure for measure, _ in self.measured()), *(measure for measure, _ in self.measured_on_grids()))

    def measured(self) -> tuple[tuple[Measure, Protocol], ...]:
        """The measures of single images, each with its protocol (for a metric without a curve, the one whose output it takes)."""
        found = []
        for name in self.metrics:
            metric = METRICS[name]
            if metric.grid:
                continue
            used = self.protocols if metric.curve else self.protocols[:1]
            found += [(Measure(name, protocol.label() if metric.curve else "", metric.direction), protocol) for protocol in used]
        return tuple(found)

    def measured_on_grids(self) -> tuple[tuple[Measure, str], ...]:
        """The measures of grids, each with its layer."""
        names = [name for name in self.metrics if METRICS[name].grid]
        return tuple((Measure(name, self.grid_label(layer), METRICS[name].direction), layer) for layer in self.layers for name in names)

    def grid_label(self, layer: str) -> str:
        """What tables call a layer of the grids, such as "final, 2x2"."""
        return f"{layer}, {self.cells}x{self.cells}"

    @property
    def grid_settings(self) -> tuple[str, ...]:
        """The settings of grids among the metrics."""
        return tuple(name for name in self.metrics if METRICS[name].grid)

    def plain(self) -> dict[str, Any]:
        """As JSON, without what changes no number (device, batch size) and without the place of the data."""
        left_out = ("device", "batch_size", "workers", "root", "methods", "models", "data", "checkpoint")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        methods = [{"label": m.label, "method": m.method, "preset": m.preset, "options": m.plain_options()} for m in self.methods]
        return plain_settings(
            {**values, "models": self.model_names, "data": Path(self.data).name, "methods": methods, "method_fill": self.explained_fill}
        )

    @cached_property
    def explained_fill_settings(self) -> Any:
        """The fill of the methods as JSON, an image by the digest of its pixels."""
        return Protocol(fill=self.explained_fill).settings()["fill"]

    def seeds_of(self, spec: MethodSpec) -> range:
        """The seeds that a method runs with."""
        return range(self.seed, self.seed + (self.seeds if spec.stochastic else 1))

    def run_count(self) -> int:
        """Explanations of one image under one model."""
        return sum(len(self.seeds_of(spec)) for spec in self.methods)


def read_settings(path: Path, overrides: Mapping[str, Any]) -> BenchmarkSettings:
    """Settings from a TOML file; overrides win.

    Raises:
        UserError: not TOML, an unknown field, or a value that does not fit, with the file's name.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} cannot be read as TOML ({error})") from None
    return make_settings({**table, **overrides}, str(path))


def make_settings(values: Mapping[str, Any], source: str = "the benchmark") -> BenchmarkSettings:
    """Settings from plain values: lists, and methods by name or as tables."""
    known = {f.name for f in fields(BenchmarkSettings)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f"{source} has unknown settings {', '.join(unknown)}: expected some of {', '.join(sorted(known))}")
    if "data" not in values:
        raise UserError(f"{source} names no data: give a recipe name, an image folder, or a list of paths and labels")
    made = dict(values)
    for name in ("models", "metrics", "fills", "steps", "methods", "layers"):
        if name in made:
            made[name] = tuple([made[name]] if isinstance(made[name], str) else made[name])
    if "methods" in made:
        made["methods"] = tuple(m if isinstance(m, MethodSpec) else MethodSpec.parse(m) for m in made["methods"])
    return BenchmarkSettings(**made)
