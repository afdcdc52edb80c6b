"""Attribution methods behind one call: Captum's where it has them, and others."""

from attribution.baselines.attribute import METHODS, Method, attribute
from attribution.baselines.presets import METHOD_PRESETS

__all__ = ["METHODS", "METHOD_PRESETS", "Method", "attribute"]
