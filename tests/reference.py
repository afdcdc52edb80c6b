"""Second derivations: slow loops, written from the specification, that the fast code must equal."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

SetFunction = Callable[[frozenset[int]], float]


def masked_image(image: Tensor, labels: Tensor, fill: Tensor, subset: set[int]) -> Tensor:
    """The image where a region of the subset is, the fill elsewhere, pixel by pixel."""
    result = fill.clone()
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            if int(labels[y, x]) in subset:
                result[:, y, x] = image[:, y, x]
    return result


def greedy(f: SetFunction, size: int, count: int | None = None) -> list[int]:
    order: list[int] = []
    while len(order) < (size if count is None else count):
        best, best_value = -1, -math.inf
        for a in range(size):
            if a not in order and f(frozenset([*order, a])) > best_value:
                best, best_value = a, f(frozenset([*order, a]))
        order.append(best)
    return order


def bidirectional(f: SetFunction, size: int, pending: int, free: SetFunction = lambda s: 0.0) -> tuple[list[int], int]:
    """LiMA's search v2 and the number of subsets scored; ``free`` is the part of f that is taken for S- in r_a."""
    front: list[int] = []
    back: list[int] = []
    scored = 0
    pending = min(max(pending, 2), size)
    while len(front) + len(back) < size:
        remaining = [a for a in range(size) if a not in front and a not in back]
        if len(remaining) == 1:
            front.append(remaining[0])
            break
        q = {a: f(frozenset([*front, a])) for a in remaining}
        scored += len(remaining)
        best = min(remaining, key=lambda a: (-q[a], a))
        if len(remaining) > pending:
            r = {a: q[a] - free(frozenset([*front, a])) + free(frozenset([*back, a])) for a in remaining}
            lowest = sorted(remaining, key=lambda a: (r[a], a))[:pending]
            lowest = [a for a in lowest if a != best]
            t = {b: f(frozenset([*back, b])) for b in lowest}
            scored += len(lowest)
            back.append(min(lowest, key=lambda b: (t[b], b)))
        front.append(best)
    return front + back[::-1], scored


def bidirectional_v1(f: SetFunction, size: int, free: SetFunction = lambda s: 0.0) -> list[int]:
    front: list[int] = []
    back: list[int] = []
    while len(front) + len(back) < size:
        remaining = [a for a in range(size) if a not in front and a not in back]
        q = {a: f(frozenset([*front, a])) for a in remaining}
        best = min(remaining, key=lambda a: (-q[a], a))
        if len(remaining) > 1:
            r = {a: q[a] - free(frozenset([*front, a])) + free(frozenset([*back, a])) for a in remaining if a != best}
            back.append(min(r, key=lambda a: (r[a], a)))
        front.append(best)
    return front + back[::-1]


def stochastic_greedy(f: SetFunction, size: int, count: int, epsilon: float, seed: int) -> list[int]:
    sample = max(1, math.ceil(size / count * math.log(1 / epsilon)))
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count:
        remaining = [a for a in range(size) if a not in order]
        picked = torch.randperm(len(remaining), generator=generator)[:sample].tolist()
        tried = sorted(remaining[i] for i in picked)
        order.append(min(tried, key=lambda a: (-f(frozenset([*order, a])), a)))
    return order


def effectiveness(features: Tensor, subset: set[int]) -> float:
    """Sum over i in S of the least angle / pi to another j in S."""
    if len(subset) < 2:
        return 0.0
    total = 0.0
    for i in subset:
        nearest = math.inf
        for j in subset:
            if i != j:
                a, b = features[i].double().numpy(), features[j].double().numpy()
                cosine = float(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1))
                nearest = min(nearest, math.acos(cosine) / math.pi)
        total += nearest
    return total


def entropy_confidence(logits: Tensor) -> float:
    p = np.exp(logits.double().numpy() - float(logits.max()))
    p /= p.sum()
    return 1 - float(-(p * np.log(p + 1e-7)).sum()) / math.log(len(p))


def evidential_confidence(logits: Tensor, scale: float) -> float:
    alpha = [math.exp(min(max(scale * float(o), -10), 10)) + 1 for o in logits]
    return 1 - len(alpha) / sum(alpha)


def trapezoid(x: list[float], y: list[float]) -> float:
    return sum((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(len(x) - 1))


def gain_map(labels: Tensor, order: list[int], insertion: list[float], deletion: list[float]) -> Tensor:
    """SMDL's values of an order: cons_k + coll_k differences, running minus, shifted and scaled."""
    previous = insertion[0] + (1 - deletion[0])
    running, values = 0.0, {}
    for k, region in enumerate(order, start=1):
        current = insertion[k] + (1 - deletion[k])
        running -= abs(current - previous)
        values[region] = running
        previous = current
    low = min(values.values())
    high = max(values.values()) - low
    result = torch.zeros(labels.shape)
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            result[y, x] = (values[int(labels[y, x])] - low) / high if high > 0 else 0.0
    return result
