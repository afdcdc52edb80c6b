"""Finds the fastest way to forward a classifier on this machine: precision, memory layout, compiled or not."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor, nn

from attribution.checks import check_choice, check_number, check_whole
from attribution.deprecation import image_first
from attribution.errors import UserError, describe
from attribution.fills import make_fill
from attribution.image import ImageSource, limit_size, load_image
from attribution.model.classifier import Classifier
from attribution.model.forwarding import PRECISIONS

_HOPELESS = 3.0  # a way that is this many times slower than plain float32 in its second call is not timed
_TRIED = 16  # images on a CPU, which a few keep busy
_WORTH = 0.95  # a way must take at most this share of plain float32's time


@dataclass(frozen=True)
class Tuning:
    """One way to forward a classifier, measured.

    Attributes:
        precision, channels_last, compiled: see ``Classifier``.
        rate: images a second.
        deviation: largest difference of any probability from plain float32's.
        chosen: whether the classifier forwards this way from now on.
    """

    precision: str
    channels_last: bool
    compiled: bool
    rate: float
    deviation: float
    chosen: bool = False

    def __str__(self) -> str:
        parts = [self.precision, *(["channels last"] if self.channels_last else []), *(["compiled"] if self.compiled else [])]
        return f"{', '.join(parts)}: {self.rate:.0f} images/s, probabilities within {self.deviation:.1g}"


@dataclass
class _Way:
    precision: str
    channels_last: bool
    compiled: bool
    batch_size: int
    probabilities: Tensor | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def middle(self) -> float:
        return statistics.median(self.seconds)

    def deviation(self, plain: _Way) -> float:
        assert self.probabilities is not None and plain.probabilities is not None
        return float((self.probabilities - plain.probabilities).abs().max())

    def set_on(self, classifier: Classifier) -> None:
        classifier.precision, classifier.channels_last, classifier.compiled = self.precision, self.channels_last, self.compiled
        classifier.batch_size = self.batch_size

    def forward(self, classifier: Classifier, inputs: Tensor) -> float:
        """Forward the inputs this way; seconds that it takes. The batch size that was found to fit into memory is kept."""
        self.set_on(classifier)
        spent, self.probabilities = _seconds(classifier, inputs)
        self.batch_size = classifier.batch_size
        return spent


@image_first
def tune(
    image: ImageSource | None,
    classifier: Classifier,
    *,
    precisions: Sequence[str] = PRECISIONS,
    compiled: bool = False,
    tolerance: float = 0.02,
    repeats: int = 5,
) -> tuple[Tuning, ...]:
    """Measure which way of forwarding the classifier is fastest on this machine, and set the classifier to it.

    Plain float32 stays unless another way saves 5 % of its time and changes no probability by more than the tolerance. The fastest way
    depends on the machine and changes numbers a little, so the precision is stored with every explanation. Gradients are always
    computed in float32.

    Args:
        image: whatever ``load_image`` takes, such as one of those to be explained: it is forwarded at several steps from its blur to
            itself. None forwards noise, which tells the speed but little about the differences of probabilities.
        classifier: changed in place.
        precisions: those to try.
        compiled: whether to try ``torch.compile`` as well, which takes a while and needs a compiler on CPUs.
        tolerance: largest difference of any probability, 0 to 1.
        repeats: timed forward passes of each way, in turns.

    Returns:
        Every way that works here, the fastest first. A precision that is much slower than float32 is not tried in other layouts.

    Raises:
        UserError: no ``Classifier`` (a name has nothing to set), unknown precisions, no repeats, or an image that cannot be read.
    """
    if not isinstance(classifier, Classifier):
        raise UserError(f"classifier is {describe(classifier)}: expected a Classifier, as load_classifier returns it, to be set")
    for name in precisions:
        check_choice("precision", name, PRECISIONS)
    check_whole("repeats", repeats, 1)
    check_number("tolerance", tolerance, 0, 1)
    inputs = _inputs(classifier, image)
    names = dict.fromkeys(("float32", *precisions))
    own_module = isinstance(classifier.module, nn.Module) and classifier.forward is classifier.runner
    layouts, compiling = (False, True) if own_module else (False,), (False, True) if own_module and compiled else (False,)
    ways = [_Way(*way) for way in itertools.product(names, layouts, compiling, (classifier.batch_size,))]
    before = _Way(classifier.precision, classifier.channels_last, classifier.compiled, classifier.batch_size)
    try:
        running = _first_calls(classifier, inputs, ways)
        for _ in range(repeats):
            for way in running:
                way.seconds.append(way.forward(classifier, inputs))
    except BaseException:
        before.set_on(classifier)
        raise
    plain = ways[0]
    able = sorted((way for way in ways if way.seconds), key=lambda way: way.middle)
    chosen = next((way for way in able if way.middle <= _WORTH * plain.middle and way.deviation(plain) <= tolerance), plain)
    chosen.set_on(classifier)
    return tuple(
        Tuning(way.precision, way.channels_last, way.compiled, len(inputs) / way.middle, way.deviation(plain), chosen=way is chosen)
        for way in able
    )


def _inputs(classifier: Classifier, image: ImageSource | None) -> Tensor:
    """A batch of model inputs to time; a small one on a CPU."""
    count = min(classifier.batch_size, _TRIED) if classifier.device.type == "cpu" else classifier.batch_size
    if image is None:
        noise = torch.rand(count, 3, *classifier.preprocessing.size, generator=torch.Generator().manual_seed(0))
        return classifier.preprocessing(noise.to(classifier.device))
    loaded = limit_size(load_image(image))
    blurred = make_fill(loaded, "blur")
    return torch.cat([classifier.inputs(torch.lerp(blurred, loaded, share)) for share in torch.linspace(0, 1, count).tolist()])


def _first_calls(classifier: Classifier, inputs: Tensor, ways: Sequence[_Way]) -> list[_Way]:
    """Forward each way before it is timed, so that loading and compiling do not count; returns those that are worth timing."""
    plain, worth, hopeless = 0.0, list[_Way](), set[str]()
    for way in ways:
        if way.precision in hopeless:
            continue
        try:
            spent = way.forward(classifier, inputs)
            if way is ways[0] or way.compiled or spent > _HOPELESS * plain:  # the first call may have loaded or compiled what it needs
                spent = way.forward(classifier, inputs)
        except Exception:  # no compiler, an operation that lacks this precision, an overflow: this way does not work here
            if way is ways[0]:
                raise
            continue
        if way is ways[0]:
            plain = spent
        if spent <= _HOPELESS * plain:
            worth.append(way)
        else:
            way.seconds.append(spent)
            if not way.channels_last and not way.compiled:
                hopeless.add(way.precision)
    return worth


@torch.no_grad()
def _seconds(classifier: Classifier, inputs: Tensor) -> tuple[float, Tensor]:
    start = perf_counter()
    found = classifier.probabilities(inputs).cpu()  # on the CPU, so that an accelerator has finished
    return perf_counter() - start, found
