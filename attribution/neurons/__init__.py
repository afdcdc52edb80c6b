"""What flows through a vision transformer: paths of neurons, what happens without them, and what they mean."""

from __future__ import annotations

from attribution.neurons.classes import Similarity, class_paths, class_similarity, halves, path_frequency
from attribution.neurons.decode import ClassEffect, Decoded, Exemplar, NeuronDecoder, exemplars
from attribution.neurons.edits import EDITS, edited_probabilities, edited_probability, mean_activations, pruned_probabilities
from attribution.neurons.figures import plot_path
from attribution.neurons.finder import PathFinder
from attribution.neurons.layers import NeuronLayers, find_neurons
from attribution.neurons.path import NeuronPath
from attribution.neurons.paths import activation_path, influence_pattern_path, layer_gradient_path, neuron_path

__all__ = [
    "EDITS",
    "ClassEffect",
    "Decoded",
    "Exemplar",
    "NeuronDecoder",
    "NeuronLayers",
    "NeuronPath",
    "PathFinder",
    "Similarity",
    "activation_path",
    "class_paths",
    "class_similarity",
    "edited_probabilities",
    "edited_probability",
    "exemplars",
    "find_neurons",
    "halves",
    "influence_pattern_path",
    "layer_gradient_path",
    "mean_activations",
    "neuron_path",
    "path_frequency",
    "plot_path",
    "pruned_probabilities",
]
