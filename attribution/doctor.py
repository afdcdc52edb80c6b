"""What a person should know of a classifier before trusting any explanation of it: found by running it on a few photos."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attribution.baselines.attribute import METHODS, attribute
from attribution.errors import NotApplicable, UserError, describe
from attribution.fills import MODEL_MEAN, classifier_fill
from attribution.image import ImageSource, demo_image_path, limit_size, load_image
from attribution.model.classifier import Classifier
from attribution.model.forwarding import first_line
from attribution.model.preprocessing import Preprocessing
from attribution.network.maps import find_feature_layer
from attribution.network.reading import read_tokens
from attribution.provenance import versions
from attribution.task import Task

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_FILLS = ("black", "gray", "white", "mean", "blur", MODEL_MEAN)
_LEAST_PHOTOS = 4  # with fewer, nothing is said about other ways of preprocessing
# Nats by which another way of preprocessing must tell more about photos. With 8 photos and five trained classifiers, no way told 0.15 more
# than the right one on photos of the classifier's own kind, and 0.22 more on others.
_TELLS_MORE = 0.3
_SHARP = 0.05  # by which the largest probability of an image differs between images of a classifier that knows something
_SATURATED = 1e-4  # distance of the top probability from 1
_IGNORED = 1e-6  # share of the logits' size, or of the largest difference between images, which a live class exceeds
_FAILED = "failed"  # name of the finding of a part that failed
_FILLED = 3  # photos whose fills are drawn: a mean colour and a blur differ little from photo to photo
_KINDS = {
    "softmax": "logits of classes",
    "sigmoid": "logits of labels",
    "probabilities": "probabilities of classes",
    "label_probabilities": "probabilities of labels",
}
_BATCHES = (1, 4, 16)  # images forwarded at once, for the speed
_SECONDS_A_SPEED = 1.5
_ALIKE = {"score_cam": "grad_cam", "ablation_cam": "grad_cam"}  # apply where the other does, but forward an image for each channel
_FEW = {"n_steps": 2, "n_samples": 2, "nt_samples": 2, "samples": 2}  # options with which a method is tried


@dataclass(frozen=True)
class Finding:
    """One fact about a classifier.

    Attributes:
        part: what it is about: "model", "outputs", "preprocessing", "photos", "fills", "inside", "methods" or "speed".
        what: the fact's name within its part.
        value: the fact, in words.
        warning: whether a person should look into it before trusting an explanation.
    """

    part: str
    what: str
    value: str
    warning: bool = False


@dataclass(frozen=True)
class Examination:
    """What ``examine`` found.

    Attributes:
        model: name of the classifier.
        findings: in the order of the parts.
        seconds: that it took.
    """

    model: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.warning)

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        found = [dict(vars(finding)) for finding in self.findings]
        return {"model": self.model, "findings": found, "seconds": round(self.seconds, 3), "versions": versions()}

    def __str__(self) -> str:
        lines = [f"{'! ' if f.warning else '  '}{f.part}: {f.what}: {f.value}" for f in self.findings]
        return "\n".join([f"{self.model}: {len(self.warnings)} warnings", *lines])


def examine(images: Sequence[ImageSource] | None, classifier: Classifier, *, found: Callable[[Finding], None] | None = None) -> Examination:
    """Find out what a person should know of a classifier before trusting an explanation of it.

    The classifier is run on the photos, on other ways of preprocessing them, on fills alone, and by each attribution method. Nothing of
    it is changed. A part that fails becomes a warning with its message, and the others go on.

    Args:
        images: photos of the kind that the classifier is for, as ``load_image`` takes them; at least 4 where other ways of preprocessing
            should be judged. None takes the demo photo.
        classifier: a ``Classifier``.
        found: called with each finding as soon as its part is done.

    Raises:
        UserError: no ``Classifier``, or an image that cannot be read.
    """
    if not isinstance(classifier, Classifier):
        raise UserError(f"classifier is {describe(classifier)}: expected a Classifier, as load_classifier returns it")
    started = time.perf_counter()
    given = _listed(images)
    loaded = {_name_of(image, number): limit_size(load_image(image).cpu()) for number, image in enumerate(given, start=1)}
    parts: dict[str, Callable[[list[Tensor], Classifier], list[Finding]]] = {
        "model": _model,
        "outputs": _outputs,
        "preprocessing": _preprocessing,
        "photos": partial(_photos, names=list(loaded)),
        "fills": _fills,
        "inside": _inside,
        "methods": _methods,
        "speed": _speed,
    }
    findings: list[Finding] = []
    for part, find in parts.items():
        new = _of_part(part, partial(find, list(loaded.values()), classifier))
        findings += new
        if found is not None:
            for each in new:
                found(each)
        if part == "outputs" and any(each.what == _FAILED for each in new):  # without scores nothing else can be found
            break
    return Examination(classifier.name, tuple(findings), time.perf_counter() - started)


def _listed(images: Any) -> list[ImageSource]:
    """The photos of a list or a batch [n, 3, H, W]; one photo as a list of one; the demo photo for None."""
    if images is None:
        return [demo_image_path()]
    if isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        return list(images)
    return list(images) if isinstance(images, list | tuple) else [images]


def _of_part(part: str, find: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of a part, with what was warned of meanwhile, or the error with which it failed."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always", UserWarning)
        try:
            new = find()
        except UserError as error:
            return [Finding(part, _FAILED, str(error), warning=True)]
        except Exception as error:  # a module may raise anything, on a black image for example
            return [Finding(part, _FAILED, f"{type(error).__name__}: {first_line(error)}", warning=True)]
    heard = [str(each.message) for each in caught if each.category is UserWarning and part in ("outputs", "photos")]
    return new + [Finding(part, "note", first_line(text), warning=True) for text in dict.fromkeys(heard)]


def _model(_: Sequence[Tensor], classifier: Classifier) -> list[Finding]:
    module, runner = classifier.module, classifier.runner
    found = [Finding("model", "device", f"{classifier.device}, {str(runner.dtype).removeprefix('torch.')}")]
    if not isinstance(module, nn.Module):
        return [*found, Finding("model", "kind", "a function: it is explained as a black box")]
    count = sum(parameter.numel() for parameter in module.parameters())
    found.append(Finding("model", "parameters", f"{count:,}"))
    layers = {name: each for name, each in module.named_modules() if not list(each.children())}
    training = [name or "the module itself" for name, each in layers.items() if each.training]
    if training:
        what = f"{len(training)} of {len(layers)} layers, such as {training[0]}; here they are evaluated, elsewhere call eval() first"
        found.append(Finding("model", "in training mode", what, warning=True))
    if runner.opaque:
        found.append(Finding("model", "layers", f"cannot be looked at, {runner.opaque}"))
    return found


def _outputs(images: Sequence[Tensor], classifier: Classifier) -> list[Finding]:
    meaning, varied = classifier.outputs, _varied(images, classifier)
    logits = varied[: len(images)]
    names = classifier.class_names
    kind = _KINDS[meaning.kind] + (", the second of two classes" if meaning.two_sided else "")
    found = [Finding("outputs", "scores", f"{meaning.count}, read as {kind}")]
    nameless = names == tuple(f"class {index}" for index in range(len(names)))
    found.append(Finding("outputs", "class names", "none: give class_names or --classes" if nameless else _some(names), warning=nameless))
    if fixed := classifier.runner.fixed_batch:
        found.append(Finding("outputs", "images in a batch", f"always {fixed}"))
    if not meaning.independent and not meaning.two_sided and len(names) > 2 and _squashed_twice(varied):
        text = "probabilities are the softmax of probabilities, so that none can be high: give what comes before the last softmax"
        found.append(Finding("outputs", "softmax twice", text, warning=True))
    dead = _dead(varied)
    if dead:
        text = "no score depends on the image" if dead == len(names) else f"{dead} of {len(names)} have the same score for every image"
        found.append(Finding("outputs", "dead classes", text, warning=True))
    top = classifier.outputs.probabilities(varied).amax(dim=1)
    if not meaning.independent and bool((top > 1 - _SATURATED).all()):
        text = f"the top probability is above {1 - _SATURATED} for every image, also for noise and plain ones"
        found.append(Finding("outputs", "saturated", text, warning=True))
    found.append(Finding("outputs", "logits of the photos", f"{float(logits.min()):.3g} to {float(logits.max()):.3g}"))
    return found


def _dead(logits: Tensor) -> int:
    """How many classes have the same score for every image, by logits [n, C]; all where none differs beyond rounding."""
    finite = logits[:, logits.isfinite().all(dim=0)]
    between = finite.amax(dim=0) - finite.amin(dim=0) if finite.numel() else finite.new_zeros(1)
    most = float(between.max())
    if finite.numel() == 0 or most <= _IGNORED * float(finite.abs().median()):
        return logits.shape[1]
    return logits.shape[1] - int((between > _IGNORED * most).sum())


def _squashed_twice(logits: Tensor) -> bool:
    """Whether the softmax is taken of probabilities q [n, C]: of what the module returned, or inside it.

    Inside it, some q are near 0, and the largest q of an image depends on the image.
    """
    logarithms = logits.log_softmax(dim=1)
    q = logarithms + (1 - logarithms.sum(dim=1, keepdim=True)) / logits.shape[1]
    least, most = q.amin(dim=1), q.amax(dim=1)
    returned = torch.allclose(q, logits, atol=1e-4)
    sharp = bool((least < 1e-2).all()) and float(most.max() - most.min()) > _SHARP
    return bool((least > -1e-3).all()) and (returned or sharp)


def _varied(images: Sequence[Tensor], classifier: Classifier) -> Tensor:
    """Logits of the photos, of noise, and of plain images: [n, C]."""
    noise = torch.rand(images[0].shape, generator=torch.Generator().manual_seed(0))
    plain = [torch.full_like(images[0], value) for value in (0.0, 0.5, 1.0)]
    return classifier.logits(torch.cat([classifier.inputs(image) for image in (*images, noise, *plain)]))


def _preprocessing(images: Sequence[Tensor], classifier: Classifier) -> list[Finding]:
    way = classifier.preprocessing
    size = f"{way.size[0]}x{way.size[1]}"
    resize = f"{way.resize.replace('_', ' ')}, {way.interpolation}" + (f", to {way.resized[0]}x{way.resized[1]}" if way.resized else "")
    found = [
        Finding("preprocessing", "input", f"{size}, {way.channels or 'RGB'}, resize: {resize}"),
        Finding("preprocessing", "normalisation", f"mean {_numbers(way.mean)}, std {_numbers(way.std)}"),
    ]
    if way.channels not in ("RGB", "BGR") or classifier.outputs.independent:
        return found
    if len(images) < _LEAST_PHOTOS:
        return [*found, Finding("preprocessing", "other ways", f"not judged: give at least {_LEAST_PHOTOS} photos that differ")]
    shown = _shown(images, classifier, way)
    own = _told(shown)
    for name, other in _other_ways(way).items():
        otherwise = _shown(images, classifier, other)
        told, same = _told(otherwise), (shown[:, 0].argmax(dim=1) == otherwise[:, 0].argmax(dim=1)).double().mean()
        text = f"photos tell {told:.2f} nats about the class, {own:.2f} as it is; {same:.0%} of the predictions stay"
        found.append(Finding("preprocessing", name, text, warning=told > own + _TELLS_MORE))
    return found


def _other_ways(way: Preprocessing) -> dict[str, Preprocessing]:
    """Ways that people mean, or take by mistake, by name; without those that equal the given one."""
    scaled = [tuple(value / 255 for value in values) for values in (way.mean, way.std)]
    larger = [tuple(value * 255 for value in values) for values in (way.mean, way.std)]
    ways = {
        "red and blue swapped": replace(way, channels="RGB" if way.channels == "BGR" else "BGR"),
        "values from 0 to 255": replace(way, mean=scaled[0], std=scaled[1]),
        "values from 0 to 1/255": replace(way, mean=larger[0], std=larger[1]),
        "values from 0 to 1, not normalised": replace(way, mean=(0.0,) * 3, std=(1.0,) * 3),
        "ImageNet's mean and std": replace(way, mean=_IMAGENET[0], std=_IMAGENET[1]),
        "mean and std of 0.5": replace(way, mean=_HALF[0], std=_HALF[1]),
    }
    return {name: other for name, other in ways.items() if other != way}


def _shown(images: Sequence[Tensor], classifier: Classifier, way: Preprocessing) -> Tensor:
    """Probabilities of each photo and of its mirror image, [n, 2, C]."""
    pairs = [way(torch.stack([image, image.flip(-1)]).to(classifier.device)) for image in images]
    return classifier.probabilities(torch.cat(pairs)).double().unflatten(0, (-1, 2)).cpu()


def _told(shown: Tensor) -> float:
    """Nats that photos tell about the class: the entropy of the mean over photos less the mean entropy of a photo.

    A photo counts as the mean with its mirror image. Wrong preprocessing makes a classifier unsure, lets it give all photos one class, or
    lets it give mirror images different ones: all of them lower this number.

    Args:
        shown: [n, 2, C], probabilities of photos and of their mirror images.
    """
    shares = shown.mean(dim=1)
    return float(_entropy(shares.mean(dim=0)) - _entropy(shares).mean())


def _entropy(shares: Tensor) -> Tensor:
    return -(shares * shares.clamp(min=1e-300).log()).sum(dim=-1)


def _photos(images: Sequence[Tensor], classifier: Classifier, names: Sequence[str]) -> list[Finding]:
    found = []
    for name, image in zip(names, images, strict=True):
        probabilities = classifier.probabilities(classifier.inputs(image))[0].cpu()
        found.append(Finding("photos", name, _top(probabilities, classifier)))
    return found


def _name_of(image: ImageSource, number: int) -> str:
    return f"{number} {Path(image).name}" if isinstance(image, str | Path) else f"photo {number}"


def _fills(images: Sequence[Tensor], classifier: Classifier) -> list[Finding]:
    """What the classifier sees in what hides regions: a fill that is a class of its own speaks for this class wherever it is shown.

    Its probability is then nearer to 1 than to chance.
    """
    found, chance = [], 0.5 if classifier.outputs.independent else 1 / classifier.num_classes
    for name in _FILLS:
        filled = [classifier_fill(image, name, classifier) for image in images[:_FILLED]]
        probabilities = classifier.probabilities(torch.cat([classifier.inputs(each) for each in filled])).mean(dim=0).cpu()
        own = float(probabilities.max()) > (1 + chance) / 2
        found.append(Finding("fills", name, _top(probabilities, classifier) + (", a class of its own" if own else ""), warning=own))
    return found


def _task(image: Tensor, classifier: Classifier) -> Task:
    inputs = classifier.inputs(image)
    target = int(classifier.logits(inputs)[0].argmax())
    return Task(classifier, image, torch.zeros_like(image), target, inputs, torch.zeros_like(inputs))


def _inside(images: Sequence[Tensor], classifier: Classifier) -> list[Finding]:
    if not isinstance(classifier.module, nn.Module) or classifier.runner.opaque:
        return []
    task, found = _task(images[0], classifier), []
    names = {module: name for name, module in classifier.module.named_modules()}
    try:
        width = classifier.features(task.inputs).shape[1]
        found.append(Finding("inside", "head", f"{', '.join(names[head] for head in classifier.heads)}, of {width} features"))
    except UserError as error:
        found.append(Finding("inside", "head", str(error)))
    try:
        layer = find_feature_layer(task)
        what = "tokens" if layer.kind == "tokens" else "a map"
        found.append(Finding("inside", "layer of class activation maps", f"{layer.name}, {what} of {layer.grid[0]}x{layer.grid[1]}"))
    except UserError as error:
        found.append(Finding("inside", "layer of class activation maps", str(error)))
    try:
        reading = read_tokens(task, "attention", as_product=False)
        which = "patches" if reading.reads_patches else "class tokens"
        text = f"{reading.tokens} in {reading.blocks} blocks, {reading.prefix} before the patches; the head reads {which}"
        found.append(Finding("inside", "tokens", text))
    except NotApplicable:
        pass  # most networks have none; the methods below give the reason
    return found


def _methods(images: Sequence[Tensor], classifier: Classifier) -> list[Finding]:
    """Which methods apply. Perturbation methods apply to every classifier; the others are tried with few samples."""
    apply, refused, found = [], dict[str, list[str]](), []
    for name, method in METHODS.items():
        options: dict[str, Any] = {option: few for option, few in _FEW.items() if option in method.options}
        try:
            if not method.black_box and name not in _ALIKE:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    attribute(images[0], classifier, name, **options)
                found += [Finding("methods", name, str(each.message), True) for each in caught if "everywhere" in str(each.message)]
            if name not in _ALIKE or _ALIKE[name] in apply:
                apply.append(name)
        except UserError as error:
            reason = str(error).removeprefix(f"{name} does not apply to {classifier.name}: ").partition(";")[0]
            refused.setdefault(reason, []).append(name)
    reasons = [Finding("methods", "do not apply", f"{', '.join(names)}: {reason}") for reason, names in refused.items()]
    return [Finding("methods", "apply", ", ".join(apply)), *reasons, *found]


def _speed(images: Sequence[Tensor], classifier: Classifier) -> list[Finding]:
    found, best = [], 0.0
    for precision in ("float32", "bfloat16"):
        rates = {}
        for count in _BATCHES:
            try:
                rates[count] = _rate(classifier, classifier.inputs(images[0]).expand(count, -1, -1, -1), precision)
            except (UserError, RuntimeError):  # it does not take so many at once, or not in this precision
                break
        if rates:
            text = ", ".join(f"{rate:,.{0 if rate >= 10 else 1}f} in batches of {count}" for count, rate in rates.items())
            found.append(Finding("speed", f"images a second, {precision}", text))
            best = max(best, *rates.values()) if precision == "float32" else best
    if best:
        found.append(Finding("speed", "a search of 400 images", f"about {400 / best:.2g} s in float32"))
    return found


def _rate(classifier: Classifier, inputs: Tensor, precision: str) -> float:
    """Images a second: the fastest of a few passes."""
    with classifier.runner.temporarily(batch_size=len(inputs), precision=precision):
        classifier.logits(inputs)
        fastest, until = math.inf, time.perf_counter() + _SECONDS_A_SPEED
        while fastest == math.inf or time.perf_counter() < until:
            started = time.perf_counter()
            classifier.logits(inputs).cpu()
            fastest = min(fastest, time.perf_counter() - started)
    return len(inputs) / fastest


def _top(probabilities: Tensor, classifier: Classifier) -> str:
    most = probabilities.topk(min(3, len(probabilities)))
    names = [classifier.class_names[index] for index in most.indices.tolist()]
    return ", ".join(f"{name} {share:.2f}" for name, share in zip(names, most.values.tolist(), strict=True))


def _some(names: Sequence[str]) -> str:
    return f"{len(names)}: {', '.join(names[:3])}" + (" and so on" if len(names) > 3 else "")


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
