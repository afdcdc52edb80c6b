"""Settings by name: those of ``explain`` where nothing is given, and the weights, regions and search of published numbers.

The weights are those of the launch scripts. Where script and paper disagree, each has a preset of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attribution.objective import BALANCED, PUBLISHED, ScoreWeights


@dataclass(frozen=True)
class Preset:
    """One published setting.

    Attributes:
        weights: weights of the four scores.
        regions: key of ``REGIONS``; None where the user gives masks.
        search: key of ``SEARCHES``.
        pending: p of the bidirectional search: a number, or a share of the regions such as "15%", rounded up.
        region_options: arguments of the region method. Published region sizes are for 224x224 pixels; here they are a count (80 for
            a size of 25), which fits any image.
        search_options: further arguments of the search.
        objective_options: further arguments of ``SubmodularObjective``.
        source: where it was published.
    """

    weights: ScoreWeights
    regions: str | None
    search: str
    source: str
    pending: int | str = 8
    region_options: Mapping[str, Any] = field(default_factory=dict)
    search_options: Mapping[str, Any] = field(default_factory=dict)
    objective_options: Mapping[str, Any] = field(default_factory=dict)


def _weights(confidence: float, effectiveness: float, consistency: float, collaboration: float) -> ScoreWeights:
    """In the order of the published tables."""
    return ScoreWeights(confidence=confidence, effectiveness=effectiveness, consistency=consistency, collaboration=collaboration)


_SMDL = "SMDL-Attribution, ICLR 2024"
_LIMA = "LiMA, 2025"
_FACES = {"side": 28, "cells_per_region": 8}
_CUB = {"side": 10, "cells_per_region": 4}
_EVIDENTIAL_FACES = {"confidence": "evidential", "evidence_scale": 5.0}
_EVIDENTIAL_CUB = {"confidence": "evidential", "evidence_scale": 1.0}

PRESETS: dict[str, Preset] = {
    "default": Preset(BALANCED, "slico", "budget", "none: the search by budget, whose objective is Insertion - Deletion"),
    "published": Preset(PUBLISHED, "slico", "bidirectional", f"{_LIMA}, weights for models of one modality, with p = 8"),
    "smdl-celeba": Preset(
        _weights(1, 1, 1, 1), "saliency_patches", "greedy", f"{_SMDL}, Celeb-A",
        region_options=_FACES, search_options={"count": 97}, objective_options=_EVIDENTIAL_FACES,
    ),
    "smdl-vggface2": Preset(
        _weights(1, 200, 10, 1), "saliency_patches", "greedy", f"{_SMDL}, VGGFace2",
        region_options=_FACES, search_options={"count": 97}, objective_options=_EVIDENTIAL_FACES,
    ),
    "smdl-cub": Preset(
        _weights(1, 1, 1, 1), "saliency_patches", "greedy", f"{_SMDL}, CUB, correctly classified",
        region_options=_CUB, search_options={"count": 24}, objective_options=_EVIDENTIAL_CUB,
    ),
    "smdl-cub-wrong": Preset(
        _weights(1, 1, 1, 1), "saliency_patches", "greedy", f"{_SMDL}, CUB, misclassified",
        region_options=_CUB, search_options={"count": 24}, objective_options=_EVIDENTIAL_CUB,
    ),
    "smdl-cub-wrong-sam": Preset(
        _weights(1, 1, 10, 1), None, "greedy", f"{_SMDL}, CUB, misclassified, SAM masks", objective_options=_EVIDENTIAL_CUB
    ),
    "smdl-clip-vit-l": Preset(_weights(0, 0.05, 1, 1), "slico", "greedy", f"{_SMDL}, CLIP ViT-L"),
    "smdl-imagebind": Preset(_weights(0, 0.05, 1, 1), "slico", "greedy", f"{_SMDL}, ImageBind"),
    "smdl-languagebind": Preset(_weights(0, 0.05, 1, 1), "slico", "greedy", f"{_SMDL}, LanguageBind"),
    "smdl-quiltnet": Preset(_weights(0, 0.05, 10, 1), "slico", "greedy", f"{_SMDL}, lung, QuiltNet"),
    "lima-clip-vit-l": Preset(_weights(0, 0.05, 20, 1), "seeds", "bidirectional", f"{_LIMA}, CLIP ViT-L"),
    "lima-clip-vit-l-sam": Preset(
        _weights(0, 0.05, 1, 1), None, "bidirectional", f"{_LIMA}, CLIP ViT-L, SAM masks", pending="15%"
    ),
    "lima-clip-rn101": Preset(_weights(0.01, 0.05, 20, 5), "seeds", "bidirectional", f"{_LIMA}, CLIP RN101"),
    "lima-imagebind": Preset(_weights(0, 0.05, 10, 1), "slico", "bidirectional", f"{_LIMA}, ImageBind"),
    "lima-imagebind-ablation": Preset(
        _weights(0.01, 0.05, 20, 5), "slico", "bidirectional", f"{_LIMA}, ImageBind, ablations",
        pending=12, region_options={"count": 80},
    ),
    "lima-languagebind": Preset(_weights(0, 0.05, 20, 5), "seeds", "bidirectional", f"{_LIMA}, LanguageBind"),
    "lima-single-modal-slico": Preset(
        _weights(0.01, 0.0, 20, 5), "slico", "bidirectional", f"{_LIMA}, ViT-L, RN101, Swin-L, Mamba", pending=12
    ),
    "lima-single-modal-seeds": Preset(
        _weights(0.01, 0.0, 20, 5), "seeds", "bidirectional", f"{_LIMA}, ViT-L, RN101, Swin-L, Mamba", pending=12
    ),
    "lima-wrong": Preset(_weights(0, 0.05, 10, 1), "slico", "bidirectional", f"{_LIMA}, misclassified images"),
    "lima-quiltnet": Preset(_weights(0, 0.05, 1, 1), "slico", "bidirectional", f"{_LIMA}, lung, QuiltNet"),
    "lima-script": Preset(_weights(0.01, 0.05, 20, 5), "slico", "bidirectional", f"{_LIMA}, weights of the launch scripts"),
    "lima-paper": Preset(
        _weights(0.05, 0.01, 20, 5), "slico", "bidirectional",
        f"{_LIMA}, weights stated by the ablation (confidence and effectiveness swapped against the scripts)",
    ),
}  # fmt: skip
