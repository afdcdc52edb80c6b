"""Noisy linear imputation: hidden pixels filled so smoothly from the shown ones that a classifier cannot see where they were.

Every hidden pixel equals the weighted mean of its eight neighbours, plus a little noise (Rong et al., "A Consistent and Efficient
Evaluation Strategy for Attribution Methods", ICML 2022, section 4). With w = 1/6 for the four neighbours at the sides, 1/12 for
the four at the corners and s_i = sum of the weights inside the image, row i times s_i reads

    s_i x_i - sum over hidden neighbours j of w_ij x_j = sum over shown neighbours j of w_ij x_j,

which is symmetric, and positive definite as soon as one pixel is shown. It is solved by conjugate gradients without a matrix.
A multigrid cycle preconditions them: Jacobi alone needs hundreds of steps where a large hole is open, the cycle about ten at any
size, and what it returns for a residual is close to the error itself, so that the tolerance is one of pixel values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.errors import UserError, describe
from attribution.model.forwarding import even_chunks

_LEAST_TOLERANCE = 1e-6  # float32 holds colours to about 1e-7
_MOST_STEPS = 500
_COARSEST_CELLS = 16
_DAMPING = 0.8  # of the Jacobi sweeps; below 1 every cycle is positive definite, as the eigenvalues of D^-1 A are at most 2


def impute(
    image: Tensor,
    shown: Tensor,
    *,
    noise: float = 0.01,
    std: Sequence[float] = (1.0, 1.0, 1.0),
    seed: int = 0,
    tolerance: float = 1e-4,
) -> Tensor:
    """An image with its hidden pixels imputed, once for each mask.

    Args:
        image: float32 [3, H, W] in [0, 1]; the work is done on its device.
        shown: bool [n, H, W], True where a pixel keeps its value.
        noise: standard deviation of the Gaussian noise on imputed pixels, in units of ``std``; 0 for none.
        std: per channel; the classifier's own, so that ``noise`` is in units of its normalised input.
        seed: of the noise. All masks of all calls with one seed and one image size share one field of noise.
        tolerance: largest error of an imputed pixel before the noise, estimated; at least 1e-6.

    Returns:
        float32 [n, 3, H, W]. Shown pixels are the image's own, bit by bit. Imputed pixels are not clamped to [0, 1]: the noise may
        leave it. A mask that shows nothing has no solution; its pixels are the image's mean colour plus the noise.

    Raises:
        UserError: an image or masks of another shape or type, an image that is not finite, noise or a tolerance out of range.
    """
    _check(image, shown, noise, std, tolerance)
    image, shown = image.detach().float(), shown.to(image.device)
    budget = 2**18 if image.device.type == "cpu" else 2**23  # values at once: what stays in a CPU's cache, what fills an accelerator
    field = _noise_field(image, noise, std, seed)
    result = image.new_empty(len(shown), *image.shape)
    parts = even_chunks(torch.arange(len(shown), device=image.device), max(1, budget // image.numel()))
    for part in filter(len, parts):
        imputed = _solve(image, shown[part], tolerance) + field
        result[part] = torch.where(shown[part][:, None], image, imputed)
    return result


@dataclass(frozen=True)
class _Grid:
    """The system on one grid, unknown where ``hidden`` is 1: float32 [n, 1, h, w] each, the diagonal 1 at cells not hidden."""

    hidden: Tensor
    diagonal: Tensor

    def __matmul__(self, values: Tensor) -> Tensor:
        """A x, for x that is 0 at cells not hidden."""
        return (self.diagonal * values).sub_(_neighbours(values)).mul_(self.hidden)

    def sweep(self, residual: Tensor) -> Tensor:
        """One damped Jacobi step from zero."""
        return (residual / self.diagonal).mul_(_DAMPING)


def _solve(image: Tensor, shown: Tensor, tolerance: float) -> Tensor:
    """The imputed values without noise, [n, 3, H, W]; only hidden pixels count."""
    known = shown[:, None].to(image)
    mean = image.mean(dim=(1, 2), keepdim=True).expand(len(shown), 3, 1, 1).clone()
    solvable = shown.flatten(1).any(dim=1)
    known = known[solvable]
    # counted from the mean of the shown pixels, few digits are spent on what all pixels share
    mean[solvable] = (known * image).sum(dim=(2, 3), keepdim=True) / known.sum(dim=(2, 3), keepdim=True)
    values = mean.expand(-1, -1, *image.shape[1:]).clone()
    if len(known):
        hidden = 1 - known
        right_side = _neighbours(known * (image - mean[solvable])) * hidden
        values[solvable] += _conjugate_gradients(_pyramid(hidden, _neighbours(known)), right_side, tolerance)
    return values


def _conjugate_gradients(grids: list[_Grid], right_side: Tensor, tolerance: float) -> Tensor:
    """Solve all masks and channels at once; each stops on its own, so that no result depends on what else is in the batch."""
    coarsest = _dense_inverse(grids[-1])
    values, residual = torch.zeros_like(right_side), right_side.clone()
    correction = _cycle(grids, coarsest, residual)
    direction = correction.clone()
    product = _dot(residual, correction)
    for _ in range(_MOST_STEPS):
        open_ = correction.abs().amax(dim=(2, 3), keepdim=True) > tolerance
        if not open_.any():
            return values
        along = grids[0] @ direction
        step = torch.where(open_, product / _dot(direction, along), 0)
        values.addcmul_(step, direction)
        residual.addcmul_(step, along, value=-1)
        correction = _cycle(grids, coarsest, residual)
        previous, product = product, _dot(residual, correction)
        direction = torch.where(open_, product / previous, 0) * direction + correction
    raise RuntimeError(f"imputation left an error above {tolerance} after {_MOST_STEPS} steps")


def _pyramid(hidden: Tensor, shown_weight: Tensor) -> list[_Grid]:
    """The system on grids of half the size each.

    A coarse cell is hidden where any of its four is; it is tied to hidden neighbours by the same stencil (a Laplacian of the
    plane keeps its weights when the scale changes) and to shown pixels by the sum of its cells' weights.
    """
    grids = []
    while True:
        grids.append(_Grid(hidden, torch.where(hidden > 0, _neighbours(hidden) + shown_weight, 1)))
        if hidden[0].numel() <= _COARSEST_CELLS:
            return grids
        shown_weight = _summed(shown_weight * hidden)
        hidden = F.max_pool2d(hidden, 2, ceil_mode=True)


def _cycle(grids: list[_Grid], coarsest: Tensor, residual: Tensor) -> Tensor:
    """One symmetric V-cycle: an estimate of A^-1 residual."""
    if len(grids) == 1:
        return (residual.flatten(2) @ coarsest).unflatten(2, residual.shape[2:])
    grid = grids[0]
    height, width = residual.shape[2:]
    values = grid.sweep(residual)
    coarse = _cycle(grids[1:], coarsest, _summed(residual - grid @ values))
    values += F.interpolate(coarse, scale_factor=2.0, mode="nearest")[..., :height, :width] * grid.hidden
    return values + grid.sweep(residual - grid @ values)


def _dense_inverse(grid: _Grid) -> Tensor:
    """A^-1 of the smallest grid, [n, cells, cells]; 0 at cells not hidden."""
    cells = grid.hidden[0].numel()
    units = torch.eye(cells, device=grid.hidden.device).unflatten(1, grid.hidden.shape[2:])
    matrix = (grid @ (units * grid.hidden)).flatten(2)
    hidden = grid.hidden.flatten(1)
    inverse = torch.linalg.inv(matrix + torch.diag_embed(1 - hidden))
    return inverse * hidden[:, None] * hidden[:, :, None]


def _neighbours(values: Tensor) -> Tensor:
    """Weighted sum of the eight neighbours, those outside counting as 0.

    The weights are [1 2 1] x [1 2 1] / 12 without the centre. Sums of slices, not a convolution: faster on a CPU, and no
    reduced precision on an accelerator.
    """
    padded = F.pad(values, (1, 1, 1, 1))
    rows = padded[..., 1:-1, :].mul(2).add_(padded[..., :-2, :]).add_(padded[..., 2:, :])
    both = rows[..., 1:-1].mul(2).add_(rows[..., :-2]).add_(rows[..., 2:])
    return both.sub_(values, alpha=4).div_(12)


def _summed(values: Tensor) -> Tensor:
    return F.avg_pool2d(values, 2, ceil_mode=True, divisor_override=1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(2, 3), keepdim=True)


def _noise_field(image: Tensor, noise: float, std: Sequence[float], seed: int) -> Tensor:
    field = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return (field * (noise * torch.tensor(std, dtype=torch.float32))[:, None, None]).to(image.device)


def _check(image: Tensor, shown: Tensor, noise: float, std: Sequence[float], tolerance: float) -> None:
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point() or not image.numel():
        raise UserError(f"the image is {describe(image)}: expected float32 [3, H, W], as load_image returns it")
    if not image.isfinite().all():
        raise UserError("the image has values that are not finite: expected [0, 1]")
    if not isinstance(shown, Tensor) or shown.dtype != torch.bool or shown.ndim != 3 or shown.shape[1:] != image.shape[1:]:
        raise UserError(f"the masks are {describe(shown)}: expected bool [n, {image.shape[1]}, {image.shape[2]}], True where shown")
    if not 0 <= noise < float("inf") or len(std) != 3 or not all(0 <= value < float("inf") for value in std):
        raise UserError(f"noise {noise} with std {tuple(std)}: expected a finite number of at least 0, and three of them")
    if not _LEAST_TOLERANCE <= tolerance < 1:
        raise UserError(f"tolerance is {tolerance}: expected {_LEAST_TOLERANCE} up to 1, an error of pixel values in [0, 1]")
