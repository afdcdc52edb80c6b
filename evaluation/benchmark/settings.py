"""What a benchmark measures: methods, metrics and protocol, from Python, the command line or a TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from attribution.checks import LARGEST_SEED
from attribution.errors import UserError
from attribution.fills import DEFAULT_FILL, DROP, LINEAR, drops, is_named, parse_fill, several_fills
from attribution.image import MAX_SIDE
from attribution.model.classifier import Classifier
from attribution.model.zoo import DEFAULT_MODEL
from attribution.network.stages import LAYERS
from attribution.regions import REGIONS
from evaluation.benchmark.methods import DEFAULT_METHODS, MethodSpec
from evaluation.metrics.protocol import PROTOCOLS, Protocol
from evaluation.metrics.registry import METRICS, Measure, expand_metrics, measures_of
from evaluation.study.settings import StudySettings, check_region_options, plain_option, setting


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(StudySettings):
    """Settings of ``run_benchmark``; every field is an option of ``attribution benchmark`` and may stand in a TOML file."""

    data: str = setting(
        "photos",
        short="-d",
        help="A recipe name (with --root), a folder of images (one folder a class, or flat without labels), or a CSV or text list of "
        "path and label (also mask or x0, y0, x1, y1, and group). photos are eight that installed packages bring along.",
    )
    models: tuple[str | Classifier, ...] = setting(
        (DEFAULT_MODEL,), option="--model", short="-m", help="As for explain; repeat it, or separate names by commas, to compare models."
    )
    methods: tuple[MethodSpec, ...] = setting(
        tuple(map(MethodSpec.parse, DEFAULT_METHODS)),
        help="Comma-separated: region searches (bidirectional, greedy and others) and attribution methods (grad_cam, rise, rise@lima with "
        "a preset, and others). --list shows them. In a TOML file also tables with method, label, preset and options.",
    )
    metrics: tuple[str, ...] = setting(
        tuple(name for name, metric in METRICS.items() if metric.default),
        help="Comma-separated; --list shows them. Those of the default need no mask.",
    )
    fills: tuple[str, ...] = setting(
        (DEFAULT_FILL,),
        option="--fill",
        short="-f",
        help="Comma-separated fills of the curves: black, mean, blur, linear (imputed), model_mean, drop (tokens of a vision transformer), "
        "'#rrggbb', an image file. Each curve metric is measured for every fill under every step rule; several fills give the "
        "sensitivity panel.",
    )
    steps: tuple[str, ...] = setting(("regions",), choices=("regions", "pixels"), help="regions, pixels, or both.")
    pixel_steps: int = setting(50, least=1, most=100_000, help="Number of pixel steps.")
    output: Literal["probability", "logit"] = setting("probability", help="probability or logit of the class explained.")
    protocol: str | None = setting(
        None, choices=lambda: PROTOCOLS, help=f"A published protocol instead of fills, steps and output: {', '.join(PROTOCOLS)}."
    )
    regions: str = setting("slico", short="-r", choices=lambda: REGIONS, help="How images are cut, for all methods and for region steps.")
    region_options: Mapping[str, Any] = setting(
        factory=dict, keys={"count": (int, "About how many regions.")}, help="Further options of the cut, such as rows and columns."
    )
    method_fill: str | None = setting(
        None, help="What hides pixels while methods and searches work. By default the first fill other than linear and drop."
    )
    only: Literal["all", "correct", "wrong"] = setting("all", help="all, correct or wrong: images by the model's own prediction.")
    target: Literal["predicted", "label"] = setting(
        "predicted", short="-t", help="Which class is explained: predicted or label (the predicted one where an image has no label)."
    )
    seeds: int = setting(
        1,
        least=1,
        most=10_000,
        help="Runs of each stochastic method. Tables show the first seed; the others give the spread between seeds.",
    )
    layers: tuple[str, ...] = setting(LAYERS, help="Of gridpg, difull, dipart: comma-separated input, middle, final, or modules.")
    grids: int = setting(100, least=1, help="Number of grids of images for gridpg, difull and dipart.")
    cells: int = setting(2, least=2, help="Images along each side of a grid.")
    confidence: float = setting(0.99, least=0, most=1, help="Least confidence of every model in the label of an image of a grid, above 0.")
    repeat_corners: bool = setting(False, help="The last cell of a grid shows the class of the first.")
    max_side: int = setting(MAX_SIDE, least=8, help="Larger images are shrunk until their longer side has this many pixels.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_region_options(self.regions, self.region_options)
        object.__setattr__(self, "methods", tuple(map(MethodSpec.parse, self.methods)))
        object.__setattr__(self, "metrics", expand_metrics(self.metrics))
        for name in ("models", "methods", "fills", "steps", "layers"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty: name at least one")
        for what, names, mend in (
            ("method", [spec.label for spec in self.methods], "give each a label of its own"),
            ("model", self.model_names, "give each once, under a name of its own"),
            ("layer", self.layers, "give each once"),
            ("fill", self.fills, "give each once"),
            ("step rule", self.steps, "give each once"),
        ):
            if repeated := [name for name in names if list(names).count(name) > 1]:
                raise UserError(f"the {what} {repeated[0]!r} was named twice among {', '.join(names)}: {mend}")
        if self.seed + self.seeds - 1 > LARGEST_SEED:
            raise UserError(f"seeds is {self.seeds}: with seed {self.seed} expected at most {LARGEST_SEED - self.seed + 1}")
        for part in () if self.method_fill is None else several_fills(self.method_fill):
            if is_named(parse_fill(part), (LINEAR,)):
                raise UserError(f"method_fill is {LINEAR!r}: it fills curves only, methods need a colour, an image or another named fill")
        if not self.confidence:
            raise UserError("confidence is 0: expected a probability above 0, at most 1")
        own = {each.name: each.default for each in fields(self) if each.name in ("fills", "steps", "pixel_steps", "output")}
        given = [name for name, default in own.items() if getattr(self, name) != default]
        if self.protocol is not None and given:
            raise UserError(f"protocol {self.protocol} has its own {', '.join(own)}: leave out {' and '.join(given)}, or the protocol")
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
        """Whether any explanation or measurement drops tokens."""
        own = [spec.options.get("fill") for spec in self.methods]
        return any(map(drops, [self.explained_fill, *own, *(protocol.fill for protocol in self.protocols)]))

    @property
    def explained_fill(self) -> Any:
        """What hides pixels while methods and searches work."""
        if self.method_fill is not None:
            return self.method_fill
        fixed = [protocol.fill for protocol in self.protocols if not is_named(protocol.fill, (LINEAR, DROP))]
        return fixed[0] if fixed else DEFAULT_FILL

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The columns of the tables."""
        return (*(measure for measure, _ in self.measured()), *(measure for measure, _ in self.measured_on_grids()))

    def measured(self) -> tuple[tuple[Measure, Protocol], ...]:
        """The measures of single images, each with its protocol (for a metric without a curve, the one whose output and fill it takes)."""
        return tuple(pair for name in self.metrics if not METRICS[name].grid for pair in measures_of(name, self.protocols))

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
        """The settings that numbers depend on, as JSON; the methods as tables, the data set by its name, without its path."""
        methods = [{"label": m.label, "method": m.method, "preset": m.preset, "options": m.plain_options()} for m in self.methods]
        return super().plain() | {"methods": methods, "method_fill": plain_option(self.explained_fill)}

    @cached_property
    def explained_fill_settings(self) -> Any:
        """The fill of the methods as JSON, an image by the digest of its pixels."""
        return Protocol(fill=self.explained_fill).settings()["fill"]

    def seeds_of(self, spec: MethodSpec) -> range:
        """The seeds that a method runs with."""
        return range(self.seed, self.seed + (self.seeds if spec.stochastic else 1))

    def run_count(self) -> int:
        """Number of explanations of one image under one model."""
        return sum(len(self.seeds_of(spec)) for spec in self.methods)


make_settings = BenchmarkSettings.make
read_settings = BenchmarkSettings.read
