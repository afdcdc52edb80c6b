"""The command ``attribution explain``: which regions a decision rests on, for images and folders, resumable."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from attribution import __version__
from attribution.checks import check_choice
from attribution.errors import UserError
from attribution.explain import explain as explain_image
from attribution.explain import search_meant
from attribution.explanation import Explanation
from attribution.figures.explanation import plot_explanations
from attribution.files import check_folder, read_file, slug
from attribution.fills import DEFAULT_FILL, FILLS
from attribution.image import demo_image_paths
from attribution.model.classifier import Classifier
from attribution.model.forwarding import PRECISIONS
from attribution.model.zoo import DEFAULT_MODEL
from attribution.objective import ScoreWeights
from attribution.presets import PRESETS
from attribution.regions import REGIONS, slico_library
from attribution.search import SEARCHES
from attribution.tuning import tune
from evaluation.study.page import write_text
from evaluation.study.settings import MODEL_HELP, ModelSettings
from evaluation.study.tables import terminal_table
from vision_attribution.inputs import Stopped, digest_of_file, each_image, find_images, own_folder, save_figure, say
from vision_attribution.progress import Bar
from vision_attribution.studies import console

_KEYS = "Explanations"  # the field of a figure that holds the keys of what it shows
SHARES = (0.5, 0.8, 0.95)
BUDGET_FILL = "mean"  # orders found under it hold best under other fills: docs/results/budget.md
_option = partial(typer.Option, show_default=False)  # of an option whose help says what happens without it


def explain(
    images: Annotated[
        list[Path] | None, typer.Argument(help="Image files and folders of images. None: the demo, two photos.", show_default=False)
    ] = None,
    model: Annotated[
        list[str] | None,
        _option(
            "--model",
            "-m",
            help=f"{MODEL_HELP} Repeat it to compare models. Default: {DEFAULT_MODEL}.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        _option(
            "--target", "-t", help="Class to explain: its name, a part that no other name has, or its index. Default: the predicted class."
        ),
    ] = None,
    regions: Annotated[str | None, _option("--regions", "-r", help=f"How the image is cut: {', '.join(REGIONS)}. Default: slico.")] = None,
    region_count: Annotated[int | None, _option(min=2, help="About how many regions. Default: the published 49 or 50.")] = None,
    heatmap: Annotated[Path | None, _option(help="Saved explanation (.npz) whose heatmap is the prior of saliency_patches.")] = None,
    search: Annotated[
        str | None,
        _option("--search", "-s", help=f"{', '.join(SEARCHES)}. Default: {PRESETS['default'].search}."),
    ] = None,
    pending: Annotated[
        int | None, _option(min=1, help="p of the bidirectional search. Default: 8. Without --search it chooses this search.")
    ] = None,
    evaluations: Annotated[
        int | None, _option(min=1, help="Images that search budget may forward. Default: 8 for each region, 32 on small inputs.")
    ] = None,
    seconds: Annotated[
        float | None,
        _option(min=0, help="Time for each explanation in place of a number of images: search budget finds the best order within it."),
    ] = None,
    prior: Annotated[
        str | None, _option(help="Attribution method whose map search budget begins with, such as grad_cam; or auto, by the model.")
    ] = None,
    weights: Annotated[
        str | None, _option(help="Weights by name, such as 'consistency=20,collaboration=5,confidence=0.01'; others are 0.")
    ] = None,
    preset: Annotated[
        str | None, _option(help=f"Weights, regions and search by name, such as published, those of LiMA: {', '.join(PRESETS)}.")
    ] = None,
    fill: Annotated[
        str | None,
        _option(
            "--fill",
            "-f",
            help=f"What hides a region: {', '.join(FILLS)}, model_mean, '#rrggbb', an image file, several "
            "named ones such as black+blur+mean, or drop (tokens of a vision transformer). "
            f"Default: {BUDGET_FILL} for search budget, the default; {DEFAULT_FILL}, as published, for the others.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for PNG, NPZ and JSON files.")] = Path("out"),
    precision: Annotated[
        str, typer.Option(help=f"Precision of the model: {', '.join(PRECISIONS)}, or auto, the fastest here by trial.")
    ] = "float32",
    max_side: Annotated[int, typer.Option(min=8, help="Longer images are shrunk to this side.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of stochastic searches.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Explain again what --out already holds.")] = False,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Show which regions of an image a classifier's decision rests on.

    For each image and model it writes a figure (.png; several models share one), the explanation (.npz, for
    attribution.Explanation.load) and its numbers (.json), and prints a table. With --target the names end in the class. Run
    again with the same settings it keeps what is already there. Exit code 2 and one line for each image that could not be explained.

    Examples:

    - `attribution explain`

    - `attribution explain photo.jpg --model timm:vit_base_patch16_224 --out out`

    - `attribution explain photos/ --model torchvision:resnet50 --regions seeds --fill blur`
    """
    options: dict[str, Any] = {
        "regions": regions,
        "search": search,
        "pending": pending,
        "weights": None if weights is None else parse_weights(weights),
        "preset": preset,
        "target": target,
        "seed": seed,
        "max_side": max_side,
        "region_options": {} if region_count is None else {"count": region_count},
        **{name: value for name, value in (("evaluations", evaluations), ("seconds", seconds), ("prior", prior)) if value is not None},
    }
    if heatmap is not None:
        options["region_options"]["heatmap"] = Explanation.load(heatmap).heatmap
    for name, value, known in (("regions", regions, REGIONS), ("search", search, SEARCHES), ("preset", preset, PRESETS)):
        if value is not None:
            check_choice(name, value, known)
    if fill is None:
        fill = BUDGET_FILL if search_meant(search, pending, preset) == "budget" else DEFAULT_FILL
    options["fill"] = fill
    check_choice("precision", precision, (*PRECISIONS, "auto"))
    found = list(find_images(images, out)) if images else demo_image_paths()
    check_folder(out)
    settings = ModelSettings(**given)
    classifiers = [settings.load(spec) for spec in model or [DEFAULT_MODEL]]
    repeated = [name for name, times in Counter(c.name for c in classifiers).items() if times > 1]
    if repeated:
        raise UserError(f"--model {repeated[0]} was given twice: give each model once, saved files by different names")
    job = Job(classifiers, options, out, overwrite, precision, _in_precision(classifiers, precision))
    rows: list[tuple[Path, Path, list[Explanation]]] = []

    def explain_one(path: Path, stem: str, prefix: str) -> None:
        named = stem if target is None else f"{stem}-{slug(target).lower()}"  # so that two classes of one photo lie side by side
        rows.append((path, job.figure(named), job.run(path, named, prefix)))

    try:
        with own_folder(out):
            failed = each_image(found, explain_one, "explained")
    except KeyboardInterrupt:
        raise Stopped("interrupted: finished images are kept, the same command continues with the others") from None
    if rows:
        print_table([(path.name, explanations) for path, _, explanations in rows])
        for _, figure, _ in rows:
            say(f"figure: {figure}")
    if failed is not None:
        raise failed


def _in_precision(classifiers: Sequence[Classifier], precision: str) -> Callable[[Classifier, Path], None]:
    """Set the precision now, or return a function that finds the fastest one on the first image that a classifier explains."""
    waiting = set(classifiers) if precision == "auto" else set()
    for classifier in classifiers:
        if precision != "auto":
            classifier.precision = precision

    def prepare(classifier: Classifier, path: Path) -> None:
        if classifier in waiting:
            ways = tune(path, classifier)
            waiting.remove(classifier)
            say(f"{classifier.name}: {next(way for way in ways if way.chosen)}", err=True)

    return prepare


@dataclass(frozen=True)
class Job:
    """What all images share: the models, the options of ``explain``, and the output folder."""

    classifiers: list[Classifier]
    options: dict[str, Any]
    out: Path
    overwrite: bool
    precision: str
    prepare: Callable[[Classifier, Path], None]

    def figure(self, named: str) -> Path:
        """The figure of an image: beside the other files of its only model, or of all models together."""
        return self._base(named, self.classifiers[0], ".png") if len(self.classifiers) == 1 else self.out / f"{named}.png"

    def _base(self, named: str, classifier: Classifier, suffix: str) -> Path:
        return self.out / f"{named}-{slug(Path(classifier.name).name)}{suffix}"

    def run(self, path: Path, named: str, prefix: str = "") -> list[Explanation]:
        """Explain, or load what the same settings wrote before; the figure is written last, when all models are done."""
        explanations, keys = [], [self._key(path, classifier) for classifier in self.classifiers]
        for classifier, key in zip(self.classifiers, keys, strict=True):
            arrays, record = (self._base(named, classifier, suffix) for suffix in (".npz", ".json"))
            kept = None if self.overwrite else _kept(record, arrays, key)
            if kept is None:
                self.prepare(classifier, path)
                with Bar(f"{prefix}{path.name} {classifier.name}", self._unit) as progress:
                    kept = explain_image(path, classifier, progress=progress, **self.options)
                kept.provenance.update(file=path.name, key=key)
                kept.save(arrays)
                self.figure(named).unlink(missing_ok=True)  # else a run killed below would leave the figure of other settings
                write_text(record, json.dumps(summary(kept), indent=2) + "\n")
            explanations.append(kept)
        if _shown_in(self.figure(named)) != keys:
            save_figure(plot_explanations(explanations), self.figure(named), {_KEYS: " ".join(keys)})
        return explanations

    @property
    def _unit(self) -> str:
        """What the search counts: images where it has a budget, else regions placed."""
        name = search_meant(self.options["search"], self.options["pending"], self.options["preset"])
        return "image" if SEARCHES[name].budgeted else "region"

    def _key(self, path: Path, classifier: Classifier) -> str:
        """What the result depends on: the file's bytes, the model and every option."""
        model = classifier.identity
        if self.precision == "auto":  # the precision found is known only after the first image
            model = replace(model, settings=("auto", *(each for each in model.settings if each not in PRECISIONS)))
        further: list[str | bytes] = [f"{model} {__version__}", *([] if slico_library() == "OpenCV" else [slico_library()])]
        for name, value in sorted(self.options.items()):
            if name == "region_options":
                further.append(np.ascontiguousarray(value.get("heatmap", 0)).tobytes())
                value = {key: item for key, item in value.items() if key != "heatmap"}
            further.append(f"{name}={value}")
        if os.path.isfile(self.options["fill"]):
            further.append(read_file(self.options["fill"]))
        return digest_of_file(path, *further)


def summary(explanation: Explanation) -> dict[str, Any]:
    """The numbers of an explanation as plain JSON."""
    assert explanation.regions is not None and explanation.order is not None
    assert explanation.insertion_scores is not None and explanation.deletion_scores is not None
    names, predicted = explanation.class_names, explanation.predicted
    labels: dict[str, Any] = {"predicted_labels": [names[each] for each in predicted]} if explanation.provenance.get("labels") else {}
    if explanation.note:
        labels["note"] = explanation.note
    return {
        "target": explanation.target_name,
        "target_index": explanation.target,
        "confidence": explanation.confidence,
        "predicted": names[int(explanation.probabilities.argmax())],
        **labels,
        "regions": {"requested": explanation.regions.requested, "actual": explanation.regions.count},
        "regions_needed": {f"{share:.0%}": explanation.regions_needed(share * explanation.confidence) for share in SHARES},
        "insertion_auc": explanation.insertion_auc,
        "deletion_auc": explanation.deletion_auc,
        "protocol": {
            "axis": "exact share of the pixels that the model sees",
            "steps": "one region",
            "order": "most important first",
            "fill": explanation.provenance["settings"]["fill"],
            "insertion": "higher is better",
            "deletion": "lower is better",
        },
        "evaluations": explanation.evaluations,
        "order": explanation.order.tolist(),
        "area": explanation.area.tolist(),
        "insertion_scores": explanation.insertion_scores.tolist(),
        "deletion_scores": explanation.deletion_scores.tolist(),
        "provenance": explanation.provenance,
    }


def print_table(rows: Sequence[tuple[str, Sequence[Explanation]]]) -> None:
    """Print a line for each image and model, and the notes that a reader needs to judge them."""
    shares = [f"{share:.0%}" for share in SHARES]
    names, numbers = ("image", "model", "class"), ("p", "regions", *shares, "ins.", "del.", "images", "sec.")
    cells, notes = [], []
    for file, explanations in rows:
        for explanation in explanations:
            assert explanation.regions is not None
            needed = [explanation.regions_needed(share * explanation.confidence) for share in SHARES]
            model = str(explanation.provenance["model"])
            cells.append(
                [
                    *(file, model, explanation.target_name, f"{explanation.confidence:.3f}"),
                    f"{explanation.regions.count}/{explanation.regions.requested}",
                    *("-" if explanation.is_hardly_seen else "never" if count is None else str(count) for count in needed),
                    *(f"{explanation.insertion_auc:.3f}", f"{explanation.deletion_auc:.3f}", str(explanation.evaluations)),
                    f"{explanation.provenance['seconds']:.1f}",
                ]
            )
            if unseen := explanation.provenance["settings"]["regions"].get("unseen"):
                notes.append(
                    f"note: {model} crops the photo, and never sees {unseen} of {explanation.regions.count} regions: shares leave them "
                    f"out, and their place in the order means nothing ({file})"
                )
            if explanation.note:
                notes.append(f"note: {explanation.note} ({file})")
            if note := explanation.provenance["settings"]["regions"].get("note"):
                notes.append(f"note: {note} ({file})")
            if explanation.fill_is_informative and not explanation.is_hardly_seen:
                notes.append(
                    f"note: to {model} the fill alone is {explanation.target_name} with p = {explanation.fill_confidence:.2f}, "
                    f"so few regions are needed ({file}); try another --fill"
                )
    table = terminal_table(None, [*names, *numbers], cells, names, numbers)
    table.collapse_padding, table.pad_edge = True, False
    screen = console()
    screen.print(table)
    screen.print(
        "p: probability of the class. regions: made/requested. "
        f"{', '.join(shares)}: regions that alone reach that share of p, most important first. "
        "ins., del.: area under the insertion (higher is better) and deletion curve (lower is better) over the share of the "
        "image. images: forwarded by the search.",
        style="dim",
        markup=False,
    )
    for note in notes:
        say(note)


def parse_weights(text: str) -> ScoreWeights:
    """'consistency=20,collaboration=5' -> weights, the others 0.

    Raises:
        UserError: an unknown score or something that is not a number.
    """
    known = [field.name for field in fields(ScoreWeights)]
    values, given = dict.fromkeys(known, 0.0), set[str]()
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name not in known:
            raise UserError(
                f"--weights {text!r} has an unknown score {name!r}: expected {', '.join(known)}, as in 'consistency=20,collaboration=5'"
            )
        if name in given:
            raise UserError(f"--weights {text!r} gives {name} twice: give it once")
        given.add(name)
        try:
            values[name] = float(number)
        except ValueError:
            raise UserError(f"--weights {text!r}: {name} is {number!r}, expected a number") from None
    return ScoreWeights(**values)


def _shown_in(figure: Path) -> list[str]:
    """The keys of the explanations that a figure shows; none where it is missing or damaged."""
    try:
        with Image.open(figure) as picture:
            return str(picture.info.get(_KEYS, "")).split()
    except (OSError, ValueError, SyntaxError):
        return []


def _kept(record: Path, arrays: Path, key: str) -> Explanation | None:
    """The explanation that an earlier run with the same key wrote completely."""
    try:
        if json.loads(record.read_text(encoding="utf-8"))["provenance"]["key"] != key:
            return None
        explanation = Explanation.load(arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return explanation if explanation.provenance.get("key") == key else None
