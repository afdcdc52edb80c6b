"""``attribution neurons IMAGES``: the neuron path behind the prediction of single images. With --data it is a study."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attribution import __version__
from attribution.errors import NotApplicable, UserError
from attribution.files import check_folder, slug
from attribution.image import demo_image_path, load_image
from attribution.model.classifier import Classifier
from attribution.neurons import (
    Decoded,
    NeuronDecoder,
    NeuronLayers,
    NeuronPath,
    PathFinder,
    edited_probabilities,
    exemplars,
    find_neurons,
    neuron_path,
    plot_path,
)
from evaluation.data.recipes import open_dataset
from evaluation.neurons.settings import NeuronSettings
from evaluation.neurons.summary import speaks_for
from evaluation.study.page import write_text
from evaluation.study.settings import named_model
from evaluation.study.tables import terminal_table
from vision_attribution.inputs import digest_of_file, each_image, find_images, own_folder, save_figure, say
from vision_attribution.studies import Given, console, extra

_AMONG = 500  # images in which exemplars are looked for
EXTRAS = (
    extra("images", list[Path], "Image files and folders of images. None, and no --data: the demo, a photo of a cat."),
    extra(
        "mode",
        str,
        "For IMAGES: reference, the published search; exact, which reranks by the true joint score; removal, the neurons without "
        "which the class is least probable. Default: reference.",
        "--mode",
        default="reference",
    ),
    extra(
        "among",
        str,
        "For IMAGES: a data set (recipe with --root, folder, list) in which to look for the images that excite the path's neurons most.",
        "--among",
    ),
    extra("overwrite", bool, "For IMAGES: find again what --out already holds.", "--overwrite", default=False),
)


def follow_images(given: Given, extras: Given, out: Path) -> bool:
    """Find the neuron paths of single images, unless a data set was given. Returns whether it did.

    Raises:
        UserError: images beside a data set, a model or an option that does not fit, or images that could not be followed.
    """
    images = extras["images"]
    if "data" in given:
        if images or extras["among"] is not None:
            raise UserError("images and --among do not go with --data: give images, or a data set")
        return False
    settings = NeuronSettings.make({**given, "data": "", "target": "label"})  # the target of an image is a class, which is no setting
    classifier = named_model(settings, settings.model)
    check_folder(out)
    found = list(find_images(images, out)) if images else [demo_image_path()]
    options = {"target": given.get("target"), "mode": extras["mode"], "steps": settings.steps, "output": settings.output}
    layers = find_neurons(classifier)
    among = None if extras["among"] is None else _Among.open(extras["among"], settings.root, settings.split, classifier)
    job = _Job(classifier, layers, options, out, extras["overwrite"], among)
    with own_folder(out):
        failed = each_image(found, job.run, "followed")
    if failed is not None:
        raise failed
    return True


@dataclass(frozen=True, eq=False)
class _Among:
    """Images in which exemplars are looked for."""

    name: str
    pictures: list[torch.Tensor]
    inputs: torch.Tensor

    @classmethod
    def open(cls, source: str, root: str | None, split: str, classifier: Classifier) -> _Among:
        dataset = open_dataset(source, root=root, split=split)
        pictures = [dataset[index].image for index in dataset.choose(_AMONG)]
        return cls(f"{source} {split} {len(pictures)}", pictures, torch.cat([classifier.inputs(picture) for picture in pictures]))


@dataclass(frozen=True, eq=False)
class _Job:
    """The part of the work that all images share: the model, the options of ``neuron_path``, and the output folder."""

    classifier: Classifier
    layers: NeuronLayers
    options: dict[str, Any]
    out: Path
    overwrite: bool
    among: _Among | None

    def run(self, path: Path, stem: str, prefix: str) -> None:
        """Follow an image, or keep what the same settings wrote before. The figure is written last: where it is, the result is whole."""
        base = self.out / f"{stem}-{slug(Path(self.classifier.name).name)}-path"
        figure, numbers = base.with_name(base.name + ".png"), base.with_name(base.name + ".json")
        key = self._key(path)
        if not self.overwrite and figure.exists() and _key_of(numbers) == key:
            say(f"{prefix}{path.name}: kept, figure: {figure}")
            return
        image = load_image(path)
        found = neuron_path(image, self.classifier, layers=self.layers.names, **self.options)
        units = [(layer, int(unit)) for layer, unit in enumerate(found.neurons)]
        decoded = self._decoded(units)
        edits = self._edits(image, found)
        figure.unlink(missing_ok=True)
        effects = [[{"class": e.name, "effect": e.effect, "p": e.p} for e in neuron.top] for neuron in decoded]
        plain = {"file": path.name, "key": key, **found.plain(), "speaks_for": effects, "edits": edits}
        write_text(numbers, json.dumps(plain, indent=2) + "\n")
        shown = [] if self.among is None else exemplars(self.classifier, [self.among.inputs], units, 3, layers=self.layers)
        pictures = [] if self.among is None else self.among.pictures
        save_figure(plot_path(found, image, decoded, shown, pictures, width=self.layers.width), figure)
        _print(path, found, decoded, edits)
        say(f"figure: {figure}")

    def _decoded(self, units: list[tuple[int, int]]) -> list[Decoded]:
        try:
            return NeuronDecoder(self.classifier, layers=self.layers).top_classes(units)
        except NotApplicable as error:
            say(f"note: {error}")
            return []

    def _edits(self, image: torch.Tensor, found: NeuronPath) -> dict[str, dict[str, float]]:
        """The target's probability when the neurons of this path and of baseline paths are removed or doubled."""
        with torch.inference_mode(False), torch.enable_grad():
            inputs = self.classifier.inputs(image)
            settings = {"steps": self.options["steps"], "output": self.options["output"], "layers": self.layers}
            finder = PathFinder(self.classifier, inputs, [found.target], **settings)
            others = [
                *finder.influence_pattern(),
                *finder.layer_integrated_gradients(),
                *finder.activation(),
                *finder.random(found.neurons[None], [0]),
            ]
            clean = float(self.classifier.probabilities(inputs)[0, found.target])
            table = {}
            for name, path in [("neuron_path", found), *((other.method, other) for other in others)]:
                table[name] = {"joint score": path.score, "clean": clean}
                for edit in ("remove", "enhance"):
                    edited = edited_probabilities(self.classifier, inputs, path.neurons[None], edit, layers=self.layers)
                    table[name][edit] = float(edited[0, found.target])
        return table

    def _key(self, path: Path) -> str:
        """Digest of what the result depends on: the file's bytes, the model and every option."""
        among = None if self.among is None else (self.among.name, float(self.among.inputs.double().sum()))
        options = sorted(self.options.items(), key=str)
        return digest_of_file(path, f"{self.classifier.identity} {self.layers.names} {options} {among} {__version__}")


def _key_of(numbers: Path) -> str | None:
    try:
        kept = json.loads(numbers.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept.get("key") if isinstance(kept, dict) else None


def _print(path: Path, found: NeuronPath, decoded: list[Decoded], edits: dict[str, dict[str, float]]) -> None:
    what = f"{path.name}: {found.target_name}, p = {edits['neuron_path']['clean']:.3f}"
    shares = [f"{share:.0%}" if np.isfinite(share) else "" for share in found.shares.tolist()]
    speaks = [", ".join(speaks_for(neuron)) for neuron in decoded] or [""] * len(shares)
    columns = zip(found.neurons.tolist(), found.activations.tolist(), shares, speaks, strict=True)
    neurons = terminal_table(
        f"{what}; {found.kind}, joint score {found.score:.4f}",
        ("layer", "neuron", "activation", "share", "speaks for"),
        [[str(layer), str(unit), f"{activation:.3f}", *texts] for layer, (unit, activation, *texts) in enumerate(columns, start=1)],
        ("speaks for",),
    )
    keys = {"p, clean": "clean", "removed": "remove", "doubled": "enhance", "joint score": "joint score"}
    rows = [[name.replace("_", " "), *(f"{row[key]:.3f}" for key in keys.values())] for name, row in edits.items()]
    changes = terminal_table(None, ("path", *keys), rows, ("path",))
    note = (
        "share: of the joint score. speaks for: classes that the neuron's direct effect favours beyond chance (random directions, "
        "Benjamini and Hochberg, 5 %)."
    )
    screen = console()
    screen.print(neurons)
    screen.print(changes)
    screen.print(note, style="dim", markup=False)
