"""Null controls: maps that know nothing of the classifier. A metric on which they score well says nothing about a method."""

from __future__ import annotations

import torch
from skimage import filters
from torch import Tensor

from attribution.baselines.method import Method
from attribution.checks import is_number
from attribution.errors import UserError
from attribution.task import Task


def random(task: Task) -> Tensor:
    """Independent uniform values, one for each pixel of the image."""
    return torch.rand(task.image.shape[1:], generator=torch.Generator().manual_seed(task.seed))


def constant(task: Task) -> Tensor:
    """The same value everywhere: its scores show how a metric breaks ties."""
    return torch.ones(task.image.shape[1:])


def center_prior(task: Task, *, width: float = 0.25) -> Tensor:
    """A Gaussian at the centre of the image: photographers put their subject there.

    Args:
        task: what is explained.
        width: standard deviation, as a share of each side.
    """
    if not is_number(width) or width <= 0:
        raise UserError(f"width is {width!r}: expected a positive share of the image's sides")
    axes = [torch.linspace(-0.5, 0.5, side) if side > 1 else torch.zeros(1) for side in task.image.shape[1:]]
    vertical, horizontal = (torch.exp(-axis.square() / (2 * width**2)) for axis in axes)
    return vertical[:, None] * horizontal


def edge_filter(task: Task) -> Tensor:
    """The Sobel gradient magnitude of the gray image (Adebayo et al., NeurIPS 2018, compare their edge detector)."""
    gray = task.image.cpu().mean(dim=0).double().numpy()
    return torch.from_numpy(filters.sobel(gray)).float()


METHODS: dict[str, Method] = {
    "random": Method(random, "control", "image", stochastic=True),
    "constant": Method(constant, "control", "image"),
    "center_prior": Method(center_prior, "control", "image"),
    "edge_filter": Method(edge_filter, "control", "image"),
}
