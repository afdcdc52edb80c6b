"""A method as the benchmark runs it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from attribution.baselines import METHOD_PRESETS
from attribution.baselines.attribute import METHODS, attribute
from attribution.baselines.options import FORMER, check_options, current_names
from attribution.checks import check_types, did_you_mean
from attribution.errors import UserError, describe
from attribution.explain import explain
from attribution.fills import DEFAULT_FILL, parse_fill, several_fills
from attribution.model.classifier import Classifier
from attribution.objective import ScoreWeights
from attribution.presets import PRESETS
from attribution.search import SEARCHES
from evaluation.study.settings import plain_option

DEFAULT_METHODS = (
    "bidirectional",
    "saliency",
    "input_x_gradient",
    "integrated_gradients",
    "smooth_grad",
    "grad_cam",
    "grad_cam_plus_plus",
    "layer_cam",
    "occlusion",
    "kernel_shap",
    "lime",
    "rise",
    "hsic",
    "transformer_attribution",
    "grad_eclip",
    "random",
    "center_prior",
    "edge_filter",
)

_ON_GRIDS = {"show", "smoothing"}  # what a search takes on grids beside its own options
_GIVEN = {"image", "classifier", "target", "search", "progress"}  # arguments of explain that a study gives itself


@dataclass(frozen=True)
class MethodSpec:
    """A method as the benchmark runs it.

    Attributes:
        label: what tables call it; unique within a benchmark.
        method: key of ``METHODS``, or of ``SEARCHES`` for a region search.
        preset: key of ``METHOD_PRESETS`` (or ``PRESETS`` for a search), or None.
        options: of the method (or of ``explain``).
    """

    label: str
    method: str
    preset: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = (*SEARCHES, *METHODS)
        if self.method not in names:
            raise UserError(f"unknown method {self.method!r}: expected one of {', '.join(names)}{did_you_mean(self.method, names)}")
        known = PRESETS if self.method in SEARCHES else METHOD_PRESETS
        if self.preset is not None and (not isinstance(self.preset, str) or self.preset not in known):
            raise UserError(
                f"unknown preset {self.preset!r:.80} of {self.method}: expected one of {', '.join(known)}{did_you_mean(self.preset, known)}"
            )
        for part in several_fills(self.options.get("fill", DEFAULT_FILL)):
            parse_fill(part)
        if self.is_search:
            taken = {*inspect.signature(explain).parameters, *SEARCHES[self.method].options, *_ON_GRIDS} - _GIVEN
            if unknown := [name for name in self.options if name not in taken]:
                raise UserError(f"{self.label}: explain takes no {unknown[0]} here: expected some of {', '.join(sorted(taken))}")
            check_types(self.label, explain, {name: value for name, value in self.options.items() if name != "fill"})
        else:
            taken = {*inspect.signature(attribute).parameters, *METHODS[self.method].options, *FORMER.get(self.method, {})}
            if unknown := [name for name in self.options if name not in taken]:
                check_options(self.method, METHODS[self.method].function, dict.fromkeys(unknown))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # it comes when the method runs
                present = current_names(self.method, self.options)
            own = {name: value for name, value in present.items() if name in METHODS[self.method].options}
            check_options(self.method, METHODS[self.method].function, own)

    def check_layer(self, classifier: Classifier) -> None:
        """Refuse a layer that a model does not have, before any image is explained.

        Raises:
            UserError: no module of that name.
        """
        layer, module = self.options.get("layer"), classifier.module
        if isinstance(layer, str) and isinstance(module, nn.Module):
            names = [name for name, _ in module.named_modules()]
            if layer not in names:
                raise UserError(f"{self.label}: {classifier.name} has no layer {layer!r}: its last layers are {', '.join(names[-4:])}")

    @property
    def is_search(self) -> bool:
        """Whether it is a region search of ours rather than a method of ``METHODS``."""
        return self.method in SEARCHES

    @property
    def family(self) -> str:
        """Such as "gradient"; "region search" for a search."""
        return "region search" if self.is_search else METHODS[self.method].family

    @property
    def stochastic(self) -> bool:
        """Whether its result depends on the seed."""
        return (SEARCHES if self.is_search else METHODS)[self.method].stochastic

    @property
    def cuts(self) -> bool:
        """Whether it works on the regions that all methods share: it cuts the image, and neither options nor preset say how."""
        if self.is_search:
            return "regions" not in self.options
        preset = METHOD_PRESETS[self.preset].get(self.method, {}) if self.preset else {}
        return "regions" in METHODS[self.method].options and "regions" not in {**preset, **self.options}

    def plain_options(self) -> dict[str, Any]:
        """The options as JSON, arrays by their digest."""
        return {name: plain_option(value) for name, value in sorted(self.options.items())}

    @classmethod
    def parse(cls, value: MethodSpec | str | Mapping[str, Any]) -> MethodSpec:
        """Read a method from a name ("rise"), a name with a preset ("rise@lima"), or a table with method, label, preset and options.

        Raises:
            UserError: an unknown method, preset or key, or something else.
        """
        if isinstance(value, MethodSpec):
            return value
        if isinstance(value, str):
            method, _, preset = value.partition("@")
            return cls(value, method, preset or None)
        table = dict(value) if isinstance(value, Mapping) else {}
        if set(table) - {"method", "label", "preset", "options"} or not isinstance(table.get("method"), str):
            raise UserError(f"a method is {value!r}: expected a name, or a table with method, label, preset and options")
        label, options = table.get("label", table["method"]), table.get("options", {})
        if not isinstance(label, str):
            raise UserError(f"the label of {table['method']} is {describe(label)}: expected text")
        if not isinstance(options, Mapping):
            raise UserError(f"the options of {table['method']} are {describe(options)}: expected names with values")
        options = dict(options)
        if isinstance(options.get("weights"), dict):
            named = {f.name: options["weights"].get(f.name, 0.0) for f in fields(ScoreWeights)}
            if set(options["weights"]) - set(named):
                raise UserError(f"weights {options['weights']!r}: expected some of {', '.join(named)}")
            options["weights"] = ScoreWeights(**named)
        return cls(label, table["method"], table.get("preset"), options)
