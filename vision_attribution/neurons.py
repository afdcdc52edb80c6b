"""The command ``attribution neurons``: the neuron path behind a prediction, or what paths do on a whole data set."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attribution import __version__
from attribution.errors import NotApplicable, UserError
from attribution.files import slug, whole_file
from attribution.image import demo_image_path, load_image
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
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
from vision_attribution.inputs import distinct_stems, find_images, model_with_names, read_class_names
from vision_attribution.progress import Bar

_AMONG = 500  # images looked at for exemplars
_SIGNIFICANT = 0.05


def neurons(
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files and folders of images. None, and no --data: the demo, a photo of a cat.", show_default=False),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A vision transformer: zoo:vit, timm:NAME, torchvision:NAME or a saved .safetensors file.")
    ] = "zoo:vit",
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="Class name or index; with --data: label or predicted.", show_default=False),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="For IMAGES: reference, the published search; exact, which reranks by the true joint score; removal, the neurons "
            "without which the class is least probable."
        ),
    ] = "reference",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the Riemann sums.")] = 20,
    output: Annotated[str, typer.Option(help="What is differentiated: probability or logit.")] = "probability",
    among: Annotated[
        str | None,
        typer.Option(
            help="For IMAGES: a data set (recipe with --root, folder, list) in which to look for the images that excite the path's "
            "neurons most.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="Instead of IMAGES, a labelled data set (as for benchmark): paths of all images against baselines, classes, pruning.",
            show_default=False,
        ),
    ] = None,
    root: Annotated[str | None, typer.Option(help="Where the data of a recipe lie.", show_default=False)] = None,
    split: Annotated[str, typer.Option(help="Split of a recipe.")] = "test",
    samples: Annotated[int, typer.Option("--samples", "-n", min=4, help="With --data: so many images, drawn by the seed.")] = 500,
    paths: Annotated[
        str | None,
        typer.Option(
            help="With --data: comma-separated neuron_path, neuron_path_removal, neuron_path_exact, influence_pattern, "
            "layer_integrated_gradients, activation, random; the first is compared with the others. Default: all but the exact one.",
            show_default=False,
        ),
    ] = None,
    kept: Annotated[
        str | None, typer.Option(help="With --data: comma-separated K of the pruning. Default: 1,5,20.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="With --data: of samples, halves and random paths.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights for a timm or torchvision model.", show_default=False)] = None,
    classes: Annotated[Path | None, typer.Option(help="Text file with one class name a line.", show_default=False)] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for figures, tables and the report.")] = Path("out/neurons"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Most images forwarded at once.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="For IMAGES: find again what --out already holds.")] = False,
) -> None:
    """Show which neurons of a vision transformer act together in a prediction, and what it becomes without them.

    For IMAGES: the path, one neuron a layer, as a figure (.png) and numbers (.json), with the probability when its neurons are
    removed or doubled, beside those of baseline paths. With --data: the same over a data set with intervals, how classes
    differ, what neurons mean, and a report; run again it continues where it stopped.

    Examples:

    - `attribution neurons`

    - `attribution neurons photo.jpg --model timm:vit_base_patch16_224 --among photos/`

    - `attribution neurons --data cifar10 --root data/cifar10 --samples 500`
    """
    if data is not None:
        if images or among is not None:
            raise UserError("images and --among do not go with --data: give images, or a data set")
        given: dict[str, Any] = {
            "data": data,
            "root": root,
            "split": split,
            "model": model_with_names(model, classes, device=device, checkpoint=checkpoint, batch_size=batch_size),
            "samples": samples,
            "seed": seed,
            "target": target or "label",
            "steps": steps,
            "output": output,
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "device": device,
            "batch_size": batch_size,
        }
        if paths is not None:
            given["paths"] = [part.strip() for part in paths.split(",") if part.strip()]
        if kept is not None:
            given["kept"] = _whole_numbers(kept, "--kept")
        _on_data(given, out)
        return
    names = None if classes is None else read_class_names(classes)
    classifier = load_classifier(model, device=device, checkpoint=checkpoint, class_names=names, batch_size=batch_size)
    found = [demo_image_path()] if not images else list(find_images(images, out))
    options = {"target": target, "mode": mode, "steps": steps, "output": output}
    job = _Job(classifier, find_neurons(classifier), options, out, overwrite, _Among.open(among, root, split, classifier))
    errors = []
    for number, (path, stem) in enumerate(zip(found, distinct_stems(found), strict=True), start=1):
        try:
            job.run(path, stem, f"[{number}/{len(found)}] " if len(found) > 1 else "")
        except KeyboardInterrupt:
            typer.echo("interrupted: finished images are kept, the same command continues with the others", err=True)
            raise typer.Exit(130) from None
        except UserError as error:
            errors.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            if len(found) > 1:
                typer.echo(f"error: {errors[-1]}", err=True)
    if errors:
        raise UserError(errors[0] if len(found) == 1 else f"{len(errors)} of {len(found)} images could not be followed (see above)")


def _on_data(given: dict[str, Any], out: Path) -> None:
    from evaluation.neurons.measure import run_neurons
    from evaluation.neurons.report import print_neuron_summary, write_neuron_report
    from evaluation.neurons.settings import NeuronSettings
    from evaluation.neurons.summary import summarise_neurons

    settings = NeuronSettings.make(given)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    try:
        with Bar(unit="path") as progress:
            results = run_neurons(settings, out, progress)
        summary = summarise_neurons(results)
        files = write_neuron_report(summary, out)
    except KeyboardInterrupt:
        typer.echo("interrupted: what was found is kept, the same command continues", err=True)
        raise typer.Exit(130) from None
    print_neuron_summary(summary, console)
    typer.echo(f"report: {files.html}")
    if results.failures:
        sample, reason = results.failures[0]
        raise UserError(
            f"{len(results.failures)} images failed, such as {sample}: {reason} (all are listed in {files.html}; the others count)"
        )


@dataclass(frozen=True, eq=False)
class _Among:
    """Images in which exemplars are looked for."""

    name: str
    pictures: list[torch.Tensor]
    inputs: torch.Tensor

    @classmethod
    def open(cls, source: str | None, root: str | None, split: str, classifier: Classifier) -> _Among | None:
        if source is None:
            return None
        from evaluation.data.recipes import open_dataset

        dataset = open_dataset(source, root=root, split=split)
        pictures = [dataset[index].image for index in dataset.choose(_AMONG)]
        return cls(f"{source} {split} {len(pictures)}", pictures, torch.cat([classifier.inputs(picture) for picture in pictures]))


@dataclass(frozen=True, eq=False)
class _Job:
    classifier: Classifier
    layers: NeuronLayers
    options: dict[str, Any]
    out: Path
    overwrite: bool
    among: _Among | None

    def run(self, path: Path, stem: str, prefix: str) -> None:
        """Find, or keep what the same settings wrote before; the figure is written last."""
        base = self.out / f"{stem}-{slug(Path(self.classifier.name).name)}-path"
        figure, numbers = base.with_name(base.name + ".png"), base.with_name(base.name + ".json")
        key = self._key(path)
        if not self.overwrite and figure.exists() and _key_of(numbers) == key:
            typer.echo(f"{prefix}{path.name}: kept, figure: {figure}")
            return
        image = load_image(path)
        found = neuron_path(self.classifier, image, layers=self.layers.names, **self.options)
        decoded = self._decoded(found)
        table = self._edits(image, found)
        figure.unlink(missing_ok=True)
        with whole_file(numbers) as temporary:
            text = {"file": path.name, "key": key, **found.plain(), "speaks_for": _plain_decoded(decoded), "edits": table}
            temporary.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
        shown = []
        if self.among is not None:
            units = [(layer, int(unit)) for layer, unit in enumerate(found.neurons)]
            shown = exemplars(self.classifier, [self.among.inputs], units, 3, layers=self.layers)
        pictures = [] if self.among is None else self.among.pictures
        with whole_file(figure) as temporary:
            plot_path(found, image, decoded, shown, pictures, width=self.layers.width).savefig(temporary, format="png")
        _print(path, found, decoded, table)
        typer.echo(f"figure: {figure}")

    def _decoded(self, found: NeuronPath) -> list[Decoded]:
        try:
            decoder = NeuronDecoder(self.classifier, layers=self.layers)
        except NotApplicable as error:
            typer.echo(f"note: {error}")
            return []
        return decoder.top_classes([(layer, int(unit)) for layer, unit in enumerate(found.neurons)])

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
            table = {}
            for path in (found, *others):
                row = {"joint score": path.score, "clean": float(self.classifier.probabilities(inputs)[0, found.target])}
                for edit in ("remove", "enhance"):
                    edited = edited_probabilities(self.classifier, inputs, path.neurons[None], edit, layers=self.layers)
                    row[edit] = float(edited[0, found.target])
                table["neuron_path" if path is found else path.method] = row
        return table

    def _key(self, path: Path) -> str:
        """What the result depends on: the file's bytes, the model and every option."""
        try:
            digest = hashlib.sha256(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        among = None if self.among is None else (self.among.name, float(self.among.inputs.double().sum()))
        digest.update(
            f"{self.classifier.identity} {self.layers.names} {sorted(self.options.items(), key=str)} {among} {__version__}".encode()
        )
        return digest.hexdigest()


def _key_of(numbers: Path) -> str | None:
    try:
        kept = json.loads(numbers.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept.get("key") if isinstance(kept, dict) else None


def _plain_decoded(decoded: list[Decoded]) -> list[list[dict[str, Any]]]:
    return [[{"class": e.name, "effect": e.effect, "p": e.p} for e in neuron.top] for neuron in decoded]


def _print(path: Path, found: NeuronPath, decoded: list[Decoded], edits: dict[str, dict[str, float]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    what = f"{path.name}: {found.target_name}, p = {edits['neuron_path']['clean']:.3f}"
    title = escape(f"{what}; {found.method} path, joint score {found.score:.4f}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title=title, title_justify="left")
    for heading in ("layer", "neuron", "activation", "share"):
        table.add_column(heading, justify="right")
    table.add_column("speaks for")
    shares = found.shares.numpy()
    for layer, unit in enumerate(found.neurons.tolist()):
        speaks = ", ".join(effect.name for effect in decoded[layer].top if effect.p < _SIGNIFICANT) if decoded else ""
        share = f"{shares[layer]:.0%}" if np.isfinite(shares[layer]) else ""
        table.add_row(str(layer + 1), str(unit), f"{float(found.activations[layer]):.3f}", share, escape(speaks))
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("path")
    for heading in ("p, clean", "removed", "doubled", "joint score"):
        table.add_column(heading, justify="right")
    for name, row in edits.items():
        cells = (f"{row[key]:.3f}" for key in ("clean", "remove", "enhance", "joint score"))
        table.add_row(name.replace("_", " "), *cells)
    console.print(table)
    console.print(
        "share: of the joint score. speaks for: classes that the neuron's direct effect favours beyond chance (random directions, "
        "Benjamini and Hochberg, 5 %).",
        style="dim",
        markup=False,
    )


def _whole_numbers(text: str, option: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(f"{option} is {text!r}: expected whole numbers, such as 1,5,20")
    return [int(part) for part in parts]
