"""Fidelity: does the score move as the map says it should? muFidelity, infidelity, and the sensitivity of the map itself.

The explanations of two methods are comparable only under the same masks: here every mask depends on the seed and on sizes, never
on the map that is judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from attribution.dropping import follow_patches, masked_inputs
from attribution.errors import UserError, describe
from attribution.explanation import Explanation
from attribution.fills import Fill, classifier_fill, is_drop
from attribution.image import ImageSource, load_image
from attribution.model.classifier import Classifier
from attribution.regions import grid as grid_regions

Output = Literal["probability", "logit"]

_HELD = 32  # perturbed inputs that captum holds at once, several copies of each
_LOG_OF_ZERO = -104.0  # logit where a module that returns probabilities returns 0: below log of the smallest float32
_ROUNDING = 1e-6  # share of the largest score below which float32 scores do not differ


def attribution_values(explanation: Explanation | Tensor) -> Tensor:
    """The signed map that an evaluator judges.

    Args:
        explanation: an explanation, or a map [H, W] of floats.

    Returns:
        float32 [H, W] on the CPU: the pixel map where the method gave one (signed), else the heatmap of a search, in [0, 1].

    Raises:
        UserError: not a map of two dimensions, or values that are not finite.
    """
    values = explanation.values if isinstance(explanation, Explanation) else explanation
    if not isinstance(values, Tensor) or values.ndim != 2 or not values.numel() or not values.is_floating_point():
        raise UserError(f"the map is {describe(values)}: expected an explanation, or a tensor of floats [H, W]")
    values = values.detach().cpu().float()
    bad = int((~values.isfinite()).sum())
    if bad:
        raise UserError(f"{bad} of the {values.numel()} values of the map are not finite: expected numbers; check the method")
    return values


def mu_fidelity(
    classifier: Classifier,
    image: ImageSource,
    explanation: Explanation | Tensor,
    target: int | str,
    *,
    samples: int = 32,
    grid: int = 7,
    drop: float = 0.2,
    fill: Fill = "model_mean",
    output: Output = "probability",
    seed: int = 0,
) -> float:
    """Rank correlation between what dropped cells cost and what the map says they are worth; higher is better.

    Bhatt et al., "Evaluating and aggregating feature-based model explanations", IJCAI 2020, equation 3, with cells of a grid in
    place of pixels, a random number of cells in place of a fixed one, and Spearman's correlation, as xplique has it.

    Args:
        classifier: the model explained.
        image: what was explained, at the resolution of the map.
        explanation: an explanation, or a map [H, W].
        target: class, index or name.
        samples: masks drawn, at least 2.
        grid: cells a side.
        drop: probability that a cell is dropped, in [0, 1].
        fill: what dropped cells show (see ``make_fill``); "model_mean" is zero after normalisation.
        output: the score whose drop counts, "probability" or "logit" of the target.
        seed: of the masks; the same for every image, method and map.

    Returns:
        In [-1, 1]. 0 where the correlation does not exist: the summed attribution or the score (up to the rounding of float32) is
        the same for every mask, as for a constant map with drop=0 or a fill that equals the image.

    Raises:
        UserError: a map and an image of other sizes, fewer pixels a side than cells, or a setting out of range.
    """
    _check_count("samples", samples, 2)
    _check_count("grid", grid, 1)
    if not 0 <= drop <= 1:
        raise UserError(f"drop is {drop}: expected a probability in [0, 1]")
    loaded, values = _image_and_map(image, explanation)
    cells = grid_regions(loaded, rows=grid, columns=grid)
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
    worth = torch.zeros(cells.count, dtype=torch.float64).scatter_add_(0, cells.labels.flatten(), values.double().flatten())
    return _spearman(drops.numpy(), (dropped * worth).sum(dim=1).numpy())


def infidelity(
    classifier: Classifier,
    image: ImageSource,
    explanation: Explanation | Tensor,
    target: int | str,
    *,
    samples: int = 64,
    square: float = 0.3,
    fill: Fill = "model_mean",
    output: Output = "probability",
    seed: int = 0,
) -> float:
    """Mean squared gap between what hidden squares cost and what the map says they are worth; lower is better.

    Yeh et al., "On the (in)fidelity and sensitivity of explanations", NeurIPS 2019, definition 2.1 with the square removal of their
    section 2.3, by ``captum.metrics.infidelity``. The perturbation is 1 inside the square, so the map stands for contributions (as
    input x gradient does), not for gradients. Captum's ``normalize`` scales the map by the factor that fits best before the gap is
    taken: the unit of the map does not matter, and neither does its sign (``mu_fidelity`` is the measure that sees the sign).

    Args:
        classifier: the model explained.
        image: what was explained, at the resolution of the map.
        explanation: an explanation, or a map [H, W]; brought to the model's input by ``to_input``, split equally over the channels.
        target: class, index or name.
        samples: squares drawn, at least 1.
        square: largest side of a square, as a share of the shorter side of the model input, in (0, 1]; sides are uniform from 1
            pixel to this, and every square lies inside the input.
        fill: what a square shows (see ``make_fill``); "model_mean" is zero after normalisation.
        output: the score whose drop counts, "probability" or "logit" of the target.
        seed: of the squares; the same for every image, method and map.

    Returns:
        Non-negative, in squared units of the score. A map of zeros gets the mean squared drop, which no other map exceeds (NaN
        should captum return NaN).

    Raises:
        UserError: a map and an image of other sizes, or a setting out of range.
    """
    from captum.metrics import infidelity as captum_infidelity

    _check_count("samples", samples, 1)
    if not 0 < square <= 1:
        raise UserError(f"square is {square}: expected a share of the input's side in (0, 1]")
    loaded, values = _image_and_map(image, explanation)
    score = _scorer(classifier, target, output)
    hidden = classifier.inputs(classifier_fill(loaded, fill, classifier))
    contributions = to_input(classifier, values).to(hidden.device)[None, None].expand_as(hidden).double() / 3
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
    return float(found.clamp(min=0))  # captum expands the square, and its rounding may leave less than nothing


def sensitivity(
    explain_function: Callable[[Tensor], Explanation | Tensor],
    image: ImageSource,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
) -> float:
    """Largest relative change of the map when the image is changed a little; lower is better.

    Yeh et al., NeurIPS 2019, definition 3.1 over the norm of the map, by ``captum.metrics.sensitivity_max``.

    Args:
        explain_function: float32 [3, H, W] in [0, 1] -> a map [H, W] or an explanation, of the image's size and always of the
            same class (fix the target: where the prediction changes, so does what is explained). It may take gradients. Its
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

    _check_count("samples", samples, 1)
    if not 0 < radius <= 1:
        raise UserError(f"radius is {radius}: expected more than 0 and at most 1, in units of an image in [0, 1]")
    loaded, generator = load_image(image).cpu(), _generator(seed)

    def maps(images: Tensor | tuple[Tensor, ...]) -> tuple[Tensor]:  # captum takes the norm of each row of what is no tuple
        batch = images[0] if isinstance(images, tuple) else images
        with torch.enable_grad():  # captum switches gradients off, and most methods need them
            return (torch.stack([_image_and_map(one, explain_function(one.clone()))[1] for one in batch]),)

    def perturb(images: Tensor) -> Tensor:
        noise = torch.rand(images.shape, generator=generator)
        return (images + radius * (2 * noise - 1)).clamp(0, 1)

    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        return float(sensitivity_max(maps, loaded[None], perturb, n_perturb_samples=samples, max_examples_per_batch=1))


def to_input(classifier: Classifier, values: Tensor) -> Tensor:
    """A map of the image as a map of the model input, resized and cropped or padded like the image.

    The same interpolation as for images, so that a pixel of the input gets its values with the weights that it gets its colour;
    densities stay, sums change with the area. What was padded is worth 0. Nothing changes where the image has the input's size.

    Args:
        classifier: gives the preprocessing; its normalisation does not apply to a map.
        values: float [H, W], the map at the image's resolution.

    Returns:
        float [h, w].
    """
    return replace(classifier.preprocessing, std=(1.0, 1.0, 1.0)).linear(values[None, None])[0, 0]


def _image_and_map(image: ImageSource, explanation: Explanation | Tensor) -> tuple[Tensor, Tensor]:
    loaded, values = load_image(image).cpu(), attribution_values(explanation)
    if loaded.shape[1:] != values.shape:
        raise UserError(
            f"the map is {values.shape[1]}x{values.shape[0]}, the image {loaded.shape[2]}x{loaded.shape[1]}: "
            "give the image at the resolution of the map, explanation.image"
        )
    return loaded, values


def _scorer(classifier: Classifier, target: int | str, output: Output) -> Callable[[Tensor], Tensor]:
    """Model inputs [n, 3, h, w] -> float64 [n], the score of the target; captum's sums of squares need the digits."""
    if output not in ("probability", "logit"):
        raise UserError(f"output={output!r}: expected 'probability' or 'logit'")
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
    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}: expected 0 to 2**63 - 1")
    return torch.Generator().manual_seed(seed)


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"{name} is {value!r}: expected a whole number of at least {least}")
