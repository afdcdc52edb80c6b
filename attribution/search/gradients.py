"""Scores of regions by gradient ascent on soft prefixes of their order (white box)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from attribution.search.sets import Sets

LEVELS = 4  # prefixes, each with its complement, that a step of ``soften`` looks at
_SOFTNESS = 0.3  # of their borders; the scores of regions run from -2 to 2 at first
_RATE = 0.6  # of Adam


def soften(sets: Sets, seed: int = 0) -> Iterator[list[int]]:
    """Scores of regions, such that F rises along the soft prefixes of their order: gradient steps (Adam) through gates.

    A prefix that ends with score t shows region r by sigmoid((s_r - t) / softness), a few prefixes a step. The first step is taken
    where all regions are equally shown; the ranks of its gradient over the area are the first scores.

    Yields:
        The order after each step, as long as the budget lasts.
    """
    generator = np.random.default_rng(seed)
    area = torch.tensor(sets.area, dtype=torch.float32)
    scores = torch.zeros(sets.size, requires_grad=True)
    optimiser = torch.optim.Adam([scores], lr=_RATE)
    started = False
    while True:
        places = (torch.arange(LEVELS) + torch.from_numpy(generator.random(LEVELS)).float()) / LEVELS
        with torch.enable_grad():
            if started:
                ends = scores.detach().sort(descending=True).values[(places * sets.size).long()]
                gates = torch.sigmoid((scores - ends[:, None]) / _SOFTNESS)
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
