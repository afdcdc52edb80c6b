"""Scores of regions by gradient ascent on soft prefixes of their order (white box)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from attribution.search.sets import Sets

# All three were chosen on development images (see budget.py).
PREFIXES_IN_A_STEP = 4  # soft prefixes, each with its complement, whose mean F a gradient step raises
SOFTNESS = 0.3  # width of the border between shown and hidden regions; the scores run from -2 to 2 at first
STEP_SIZE = 0.6  # learning rate of Adam


def soften(sets: Sets, seed: int = 0) -> Iterator[list[int]]:
    """Find scores of regions such that F rises along the soft prefixes of their order, by gradient ascent (Adam).

    The soft prefix that ends at score t shows region r by sigmoid((score of r - t) / softness). Each step draws a few prefixes,
    one from each of as many equal parts of the order. The first gradient is taken where all regions are shown alike; the ranks
    of this gradient over the area are the first scores.

    Yields:
        The order after each step, without end.

    Raises:
        Spent: the budget is not enough for the next step.
    """
    generator = np.random.default_rng(seed)
    area = torch.tensor(sets.area, dtype=torch.float32)
    scores = torch.zeros(sets.size, requires_grad=True)
    optimiser = torch.optim.Adam([scores], lr=STEP_SIZE)
    started = False
    while True:
        drawn = torch.from_numpy(generator.random(PREFIXES_IN_A_STEP)).float()
        places = (torch.arange(PREFIXES_IN_A_STEP) + drawn) / PREFIXES_IN_A_STEP
        with torch.enable_grad():
            if started:
                ends = scores.detach().sort(descending=True).values[(places * sets.size).long()]
                gates = torch.sigmoid((scores - ends[:, None]) / SOFTNESS)
            else:
                gates = places[:, None] + scores
            slope = sets.slope(scores, gates)
        if started:
            scores.grad = -slope
            optimiser.step()
        else:
            started = True
            with torch.no_grad():
                scores[(slope / area).argsort(descending=True, stable=True)] = torch.linspace(2, -2, sets.size)
        yield scores.detach().argsort(descending=True, stable=True).tolist()
