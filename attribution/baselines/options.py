"""Options of the methods: their old names, and a check of what is given."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from attribution.checks import check_types
from attribution.errors import UserError


def option_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """The keyword-only parameters of a method."""
    return tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY)


_SAMPLES = {"samples": "n_samples"}
FORMER: dict[str, dict[str, str]] = {  # names until version 0.1, before those of Captum
    "saliency": {"absolute": "abs"},
    "integrated_gradients": {"steps": "n_steps"},
    "smooth_grad": {"samples": "nt_samples", "noise": "stdevs", "kind": "nt_type", "absolute": "abs"},
    "gradient_shap": {**_SAMPLES, "noise": "stdevs"},
    "guided_backprop": {"absolute": "abs"},
    "deconvolution": {"absolute": "abs"},
    "guided_grad_cam": {"absolute": "abs"},
    "occlusion": {"window": "sliding_window_shapes", "stride": "strides"},
    "shapley_value_sampling": _SAMPLES,
    "kernel_shap": _SAMPLES,
    "lime": {**_SAMPLES, "model": "interpretable_model", "distance": "distance_mode"},
}
_FORMER_TYPES = {"smooth_grad": "smoothgrad", "smooth_grad_squared": "smoothgrad_sq", "var_grad": "vargrad"}  # values of nt_type


def current_names(method: str, options: Mapping[str, Any], stacklevel: int = 3) -> dict[str, Any]:
    """Options of a method under their present names; former ones work for one version, with a DeprecationWarning.

    Raises:
        UserError: an option under both names.
    """
    former, found = FORMER.get(method, {}), {}
    for given, value in options.items():
        name = former.get(given, given)
        if name in found or (name != given and name in options):
            raise UserError(f"{method} was given {given} and {name}, the former and the present name of one option: give {name}")
        if name != given:
            warnings.warn(f"option {given} of {method} is now {name}", DeprecationWarning, stacklevel=stacklevel)
            if name == "nt_type" and isinstance(value, str):
                value = _FORMER_TYPES.get(value, value)
        found[name] = value
    return found


def check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Check that a method takes these options, and the type of each value; the method itself checks ranges.

    Raises:
        UserError: an unknown option, or a value of another type than the signature says.
    """
    known = option_names(function)
    unknown = [option for option in options if option not in known]
    if unknown:
        raise UserError(f"{name} takes no option {', '.join(unknown)}: expected {', '.join(known) or 'none'}")
    check_types(name, function, options)
