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


def grad_cam(activation: Tensor, gradient: Tensor) -> np.ndarray:
    """Channel weights are mean gradients; the weighted sum, cut at zero. [C, h, w] twice -> [h, w], as below."""
    a, g = activation.double().numpy(), gradient.double().numpy()
    result = np.zeros(a.shape[1:])
    for c in range(len(a)):
        total = sum(g[c, y, x] for y in range(a.shape[1]) for x in range(a.shape[2]))
        result += total / (a.shape[1] * a.shape[2]) * a[c]
    return np.maximum(result, 0)


def grad_cam_plus_plus(activation: Tensor, gradient: Tensor, spatial_mean: bool = False, weight_mean: bool = False) -> np.ndarray:
    """alpha = g^2 / (2 g^2 + g^3 S), zero where g is; w = sum of alpha relu(g)."""
    a, g = activation.double().numpy(), gradient.double().numpy()
    result = np.zeros(a.shape[1:])
    for c in range(len(a)):
        spatial = a[c].mean() if spatial_mean else a[c].sum()
        weight = 0.0
        for value in g[c].flatten():
            if value > 0:
                weight += value**2 / (2 * value**2 + value**3 * spatial) * value
        result += (weight / g[c].size if weight_mean else weight) * a[c]
    return np.maximum(result, 0)


def layer_cam(activation: Tensor, gradient: Tensor) -> np.ndarray:
    a, g = activation.double().numpy(), gradient.double().numpy()
    result = np.zeros(a.shape[1:])
    for y in range(a.shape[1]):
        for x in range(a.shape[2]):
            result[y, x] = sum(max(g[c, y, x], 0) * a[c, y, x] for c in range(len(a)))
    return np.maximum(result, 0)


def score_cam(activation: Tensor, score: Callable[[Tensor], float], inputs: Tensor, baseline: Tensor) -> np.ndarray:
    """A forward pass for each channel: its map at the size of the input, scaled to [0, 1], blends inputs [1, 3, H, W] and baseline."""
    result = np.zeros(activation.shape[1:])
    for channel in activation:
        large = torch.nn.functional.interpolate(channel[None, None], size=inputs.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
        low, high = float(large.min()), float(large.max())
        if high > low:
            mask = (large - low) / (high - low)
            result += score(mask * inputs + (1 - mask) * baseline) * channel.double().numpy()
    return np.maximum(result, 0)


def ablation_cam(activation: Tensor, score_without: Callable[[int | None], float]) -> np.ndarray:
    """``score_without(c)`` is the score when channel c is zero, of the untouched network for None."""
    full = score_without(None)
    result = np.zeros(activation.shape[1:])
    for c in range(len(activation)):
        result += (full - score_without(c)) / full * activation[c].double().numpy()
    return np.maximum(result, 0)


def hsic_indices(masks: Tensor, scores: Tensor) -> np.ndarray:
    """trace(K H L H) / n for each feature, every kernel entry in a double loop."""
    n, d = masks.shape
    m, y = masks.double().numpy(), scores.double().numpy()
    width = float(np.median(y))
    centre = np.eye(n) - np.ones((n, n)) / n
    output = np.zeros((n, n))
    for a in range(n):
        for b in range(n):
            output[a, b] = math.exp(-((y[a] - y[b]) ** 2) / (2 * width**2))
    result = np.zeros(d)
    for i in range(d):
        kernel = np.zeros((n, n))
        for a in range(n):
            for b in range(n):
                kernel[a, b] = 1 + (0.5 - (m[a, i] - m[b, i]) ** 2)
        result[i] = float(np.trace(kernel @ centre @ output @ centre)) / n
    return result


def jansen_indices(first: list[float], swapped: list[list[float]]) -> list[float]:
    """Total-order indices from y_A and the y_Ci of each feature (Jansen, 1999); sample variance of y_A."""
    n = len(first)
    mean = sum(first) / n
    variance = sum((value - mean) ** 2 for value in first) / (n - 1)
    return [sum((a - b) ** 2 for a, b in zip(first, row, strict=True)) / (2 * n * variance) for row in swapped]
