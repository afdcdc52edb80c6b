"""Explain, judge and debug image classifiers by submodular region selection.

>>> import attribution as at
>>> classifier = at.load_classifier("zoo:imagenet")
>>> explanation = at.explain(at.demo_image_path(), classifier)
>>> explanation.target_name
'tiger cat'
"""

from __future__ import annotations

from attribution.baselines import METHOD_PRESETS
from attribution.baselines.attribute import METHODS, attribute
from attribution.concepts import Concepts, Exemplars, SemiNMF, craft, exemplars, semi_nmf
from attribution.doctor import Examination, Finding, examine
from attribution.dropping import follow_patches
from attribution.errors import NotApplicable, NotMisclassified, UserError
from attribution.explain import explain, polish
from attribution.explanation import Explanation
from attribution.failure import FailureExplanation, explain_failure
from attribution.fills import FILLS, make_fill
from attribution.image import demo_image_path, load_image
from attribution.many import explain_many
from attribution.masking import MaskedInputs
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.model.saving import save_classifier
from attribution.model.zero_shot import zero_shot
from attribution.neurons import NeuronPath, activation_path, edited_probability, influence_pattern_path, neuron_path
from attribution.objective import MeanObjective, Scores, ScoreWeights, SubmodularObjective
from attribution.presets import PRESETS, Preset
from attribution.regions import REGIONS, Regions, from_masks, make_regions
from attribution.search import SEARCHES
from attribution.tuning import Tuning, tune

__version__ = "0.1.0"

__all__ = [
    "FILLS",
    "METHODS",
    "METHOD_PRESETS",
    "PRESETS",
    "REGIONS",
    "SEARCHES",
    "Classifier",
    "Concepts",
    "Examination",
    "Exemplars",
    "Explanation",
    "FailureExplanation",
    "Finding",
    "MaskedInputs",
    "MeanObjective",
    "NeuronPath",
    "NotApplicable",
    "NotMisclassified",
    "Preset",
    "Regions",
    "ScoreWeights",
    "Scores",
    "SemiNMF",
    "SubmodularObjective",
    "Tuning",
    "UserError",
    "activation_path",
    "attribute",
    "craft",
    "demo_image_path",
    "edited_probability",
    "examine",
    "exemplars",
    "explain",
    "explain_failure",
    "explain_many",
    "follow_patches",
    "from_masks",
    "influence_pattern_path",
    "load_classifier",
    "load_image",
    "make_fill",
    "make_regions",
    "neuron_path",
    "polish",
    "save_classifier",
    "semi_nmf",
    "tune",
    "zero_shot",
]
