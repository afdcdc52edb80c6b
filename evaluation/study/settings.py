"""Settings of studies, from plain values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from attribution.baselines.smoothing import Smoothing
from attribution.errors import UserError
from attribution.objective import ScoreWeights
from attribution.provenance import plain_settings
from attribution.regions import Regions


def check_fields(settings: type, values: Mapping[str, Any]) -> None:
    """Whether plain values are fields of the settings of a job on labelled data.

    Raises:
        UserError: an unknown field, or no data.
    """
    known = {f.name for f in fields(settings)}
    if unknown := sorted(set(values) - known):
        raise UserError(f"unknown settings {', '.join(unknown)}: expected some of {', '.join(sorted(known))}")
    if "data" not in values:
        raise UserError("no data: give a recipe name, a folder with one subfolder a class, or a list of paths and labels")


def plain_option(value: Any) -> Any:
    if isinstance(value, ScoreWeights | Smoothing):
        return dict(vars(value))
    if isinstance(value, Regions):
        value = value.labels
    if isinstance(value, torch.Tensor | np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
    return plain_settings({"value": value})["value"]
