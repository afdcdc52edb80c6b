"""Fidelity: whether the score moves as the map says. muFidelity, infidelity, and the sensitivity of the map itself.

Two explanations are comparable only under the same masks: every mask depends on the seed and on sizes, never on the map that is
judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.checks import check_choice, check_number, check_seed, check_whole, is_number
from attribution.deprecation import image_first
from attribution.dropping import follow_patches, masked_inputs
from attribution.errors import UserError
from attribution.fills import DEFAULT_FILL, Fill, classifier_fill, is_drop
from attribution.image import ImageSource, load_image
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.regions import Regions
from attribution.regions import grid as grid_regions
from attribution.task import Output
from evaluation.metrics.judged import Judged, Partition, judged_on

_HELD = 32  # perturbed inputs that captum holds at once, several copies of each
_LOG_OF_ZERO = -104.0  # logit where a module that returns probabilities returns 0: below log of the smallest float32
_ROUNDING = 1e-6  # share of the largest score below which float32 scores do not differ


@image_first
def mu_fidelity(
    image: ImageSource,
    classifier: Classifier | str,
    explanation: Judged,
    target: int | str,
    *,
    regions: Partition | None = None,
    samples: int = 32,
    grid: int = 7,
    drop: float = 0.2,
    fill: Fill = DEFAULT_FILL,
    output: Output = "probability",
    seed: int = 0,
) -> float:
    """Rank correlation between the score lost when random cells are hidden and the attribution of these cells; higher is better.

    Bhatt et al., "Evaluating and aggregating feature-based model explanations", IJCAI 2020, equation 3. As in xplique, the cells of a
    grid replace pixels, their number is random rather than fixed, and the correlation is Spearman's. The grid lies on the part of the
    image that the model sees: what its crop leaves out has no attribution.

    Args:
        image: what was explained, at the resolution of the map.
        classifier: the model explained, or a name that ``load_classifier`` takes.
        explanation: an ``Explanation``, a map [H, W], or an order of ``regions`` (see ``judged``).
        target: class, index or name.
        regions: of an order; not read otherwise.
        samples: masks drawn, at least 2.
        grid: cells a side.
        drop: probability that a cell is dropped, in [0, 1].
        fill: what dropped cells show, or "drop" (see ``make_fill``); "model_mean" is the published one, zero after normalisation.
        output: the score whose drop counts, "probability" or "logit" of the target.
        seed: of the masks; the same for every image, method and map.

    Returns:
        In [-1, 1]. 0 where there is no correlation: the summed attribution is the same for every mask, or the score is (up to the
        rounding of float32), for example with drop=0 or a fill that equals the image.

    Raises:
        UserError: see ``judged``; an image of another size than the map, fewer pixels a side than cells, or a setting out of range.
        NotApplicable: fill "drop" with a model that is no vision transformer.
    """
    classifier = load_classifier(classifier)
    check_whole("samples", samples, 2)
    check_whole("grid", grid, 1)
    check_number("drop", drop, 0, 1)
    loaded, claim = judged_on(image, explanation, regions)
    top, left, bottom, right = classifier.preprocessing.seen(*loaded.shape[1:])
    inside = grid_regions(loaded[:, top:bottom, left:right], rows=grid, columns=grid)
    beyond = (left, loaded.shape[2] - right, top, loaded.shape[1] - bottom)
    cells = Regions(F.pad(inside.labels[None, None].double(), beyond, mode="replicate")[0, 0].long())
    if is_drop(fill):
        cells = follow_patches(classifier, cells)
    hiding, masked = masked_inputs(classifier, loaded, cells.labels, fill)
    score = _scorer(hiding, target, output)
    dropped = torch.rand(samples, cells.count, generator=_generator(seed)) < drop

    shown = torch.cat([torch.ones(1, cells.count, dtype=torch.bool), ~dropped])
    scores = torch.cat([score(inputs) for inputs in masked.parts(shown)]).cpu()
    drops = scores[:1] - scores[1:]
    if drops.max() - drops.min() <= _ROUNDING * scores.abs().max():  # ranks of rounding errors would look like a correlation
        return 0.0
    seen, heat = (each[top:bottom, left:right].flatten() for each in (cells.labels, claim.heat.double()))
    worth = torch.zeros(cells.count, dtype=torch.float64).scatter_add_(0, seen, heat)
    return _spearman(drops.numpy(), (dropped * worth).sum(dim=1).numpy())


@image_first
def infidelity(
    image: ImageSource,
    classifier: Classifier | str,
    explanation: Judged,
    target: int | str,
    *,
    regions: Partition | None = None,
    samples: int = 64,
    square: float = 0.3,
    fill: Fill = DEFAULT_FILL,
    output: Output = "probability",
    seed: int = 0,
) -> float:
    """Mean squared difference between the score lost when a square is hidden and the attribution of the square; lower is better.

    Yeh et al., "On the (in)fidelity and sensitivity of explanations", NeurIPS 2019, definition 2.1 with the square removal of their
    section 2.3, by ``captum.metrics.infidelity``. The perturbation is 1 inside the square, so the map stands for contributions (as
    input x gradient does), not for gradients. Captum's ``normalize`` first scales the map by the factor that fits best. Therefore
    neither the unit of the map matters nor its sign (``mu_fidelity`` sees the sign).

    Args:
        image: what was explained, at the resolution of the map.
        classifier: the model explained, or a name that ``load_classifier`` takes.
        explanation: an ``Explanation``, a map [H, W], or an order of ``regions`` (see ``judged``); its map is brought to the model's
            input by ``to_input`` and split equally over the channels.
        target: class, index or name.
        regions: of an order; not read otherwise.
        samples: squares drawn, at least 1.
        square: largest side of a square, as a share of the shorter side of the model input, in (0, 1]; sides are uniform from 1
            pixel to this, and every square lies inside the input.
        fill: what a square shows (see ``make_fill``); "model_mean" is the published one, zero after normalisation.
        output: the score whose drop counts, "probability" or "logit" of the target.
        seed: of the squares; the same for every image, method and map.

    Returns:
        Non-negative, in squared units of the score. A map of zeros gets the mean squared drop, which no other map exceeds (NaN if
        captum returns NaN).

    Raises:
        UserError: see ``judged``; an image of another size than the map, or a setting out of range.
    """
    from captum.metrics import infidelity as captum_infidelity

    classifier = load_classifier(classifier)
    check_whole("samples", samples, 1)
    if not is_number(square) or not 0 < square <= 1:
        raise UserError(f"square is {square!r}: expected a share of the input's side in (0, 1]")
    loaded, claim = judged_on(image, explanation, regions)
    score = _scorer(classifier, target, output)
    hidden = classifier.inputs(classifier_fill(loaded, fill, classifier))
    contributions = to_input(classifier, claim.heat).to(hidden.device)[None, None].expand_as(hidden).double() / 3
    generator = _generator(seed)

    def hide_squares(inputs: Tensor) -> tuple[Tensor, Tensor]:
        inside = _squares(len(inputs), (inputs.shape[-2], inputs.shape[-1]), square, generator).to(inputs.device)[:, None]
        return inside.expand_as(inputs).to(inputs), torch.where(inside, hidden, inputs)

    found = captum_infidelity(
        score,
        hide_squares,
        classifier.inputs(loaded),
        contributions,
        n_perturb_samples=samples,
        max_examples_per_batch=min(samples, _HELD),
        normalize=True,
    )
    return float(found.clamp(min=0))  # captum expands the square, so that rounding may give a negative value


def sensitivity(
    explain_function: Callable[[Tensor], Judged],
    image: ImageSource,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
) -> float:
    """Largest relative change of the map when the image is changed a little; lower is better.

    Yeh et al., NeurIPS 2019, definition 3.1 over the norm of the map, by ``captum.metrics.sensitivity_max``.

    Args:
        explain_function: float32 [3, H, W] in [0, 1] -> a map [H, W] or an ``Explanation``, of the image's size. It must always
            explain the same class, so fix the target: a perturbed image may have another prediction. It may take gradients. Its
            draws from torch's global generator follow the seed and leave that generator as it was.
        image: whatever ``load_image`` takes.
        radius: each value of the image moves by at most this (uniform), and stays in [0, 1].
        samples: perturbed images, at least 1.
        seed: of the perturbations.

    Returns:
        max over the samples of ||map(perturbed) - map(image)|| / ||map(image)||; not divided where the map of the image is 0.

    Raises:
        UserError: maps that are not finite or not of the image's size, or a setting out of range.
    """
    from captum.metrics import sensitivity_max

    check_whole("samples", samples, 1)
    if not is_number(radius) or not 0 < radius <= 1:
        raise UserError(f"radius is {radius!r}: expected more than 0 and at most 1, in units of an image in [0, 1]")
    loaded, generator = load_image(image).cpu(), _generator(seed)

    def maps(images: Tensor | tuple[Tensor, ...]) -> tuple[Tensor]:  # unless it gets a tuple, captum takes the norm of each row
        batch = images[0] if isinstance(images, tuple) else images
        with torch.enable_grad():  # captum switches gradients off, and most methods need them
            return (torch.stack([judged_on(one, explain_function(one.clone()))[1].heat for one in batch]),)

    def perturb(images: Tensor) -> Tensor:
        noise = torch.rand(images.shape, generator=generator)
        return (images + radius * (2 * noise - 1)).clamp(0, 1)

    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        return float(sensitivity_max(maps, loaded[None], perturb, n_perturb_samples=samples, max_examples_per_batch=1))


def to_input(classifier: Classifier, values: Tensor) -> Tensor:
    """Bring a map of the image to the model's input: it is resized and cropped or padded as the image is.

    A map is interpolated as an image is, so that its values get the same weights as the colours of the pixels. Values are densities:
    their sum changes with the area. Padding gets 0. A map of the input's size is returned unchanged.

    Args:
        classifier: gives the preprocessing; its normalisation does not apply to a map.
        values: float [H, W], the map at the image's resolution.

    Returns:
        float [h, w].
    """
    return replace(classifier.preprocessing, std=(1.0, 1.0, 1.0)).linear(values[None, None])[0, 0]


def _scorer(classifier: Classifier, target: int | str, output: Output) -> Callable[[Tensor], Tensor]:
    """Model inputs [n, 3, h, w] -> float64 [n], the score of the target; captum's sums of squares need the digits."""
    check_choice("output", output, ("probability", "logit"))
    index = classifier.target_index(target)
    forward = classifier.probabilities if output == "probability" else classifier.logits
    return lambda inputs: forward(inputs)[:, index].double().nan_to_num(neginf=_LOG_OF_ZERO)


def _squares(count: int, size: tuple[int, int], largest: float, generator: torch.Generator) -> Tensor:
    """Random squares inside [h, w], side uniform from 1 to the largest share of the shorter side: bool [count, h, w].

    Drawn one after the other, so that the squares do not depend on how many are asked for at once.
    """
    height, width = size
    most = max(1, round(largest * min(size)))
    inside = torch.zeros(count, height, width, dtype=torch.bool)
    for mask, draw in zip(inside, torch.rand(count, 3, generator=generator, dtype=torch.float64).tolist(), strict=True):
        side = 1 + int(draw[0] * most)
        top, left = int(draw[1] * (height - side + 1)), int(draw[2] * (width - side + 1))
        mask[top : top + side, left : left + side] = True
    return inside


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of the ranks, ties at their mean rank: [n], [n] -> [-1, 1]; 0 where one of them is constant."""
    from scipy.stats import rankdata

    a, b = (rankdata(values) - (len(values) + 1) / 2 for values in (a, b))
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(np.clip(a @ b / norm, -1, 1)) if norm > 0 else 0.0


def _generator(seed: int) -> torch.Generator:
    check_seed(seed)
    return torch.Generator().manual_seed(seed)
