"""The submodular objective F(S) of SMDL (Chen et al., ICLR 2024, section 3.2) and LiMA: four scores of a subset of regions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.errors import UserError, describe
from attribution.masking import RegionInputs
from attribution.model.classifier import Classifier

WITH_GRADIENT = 3  # images that one counts as, forward and back


@dataclass(frozen=True)
class ScoreWeights:
    """Weights of the four scores, by name (the published code orders them in three different ways).

    The default is LiMA's for single-modal classifiers.
    """

    consistency: float = 20.0
    collaboration: float = 5.0
    confidence: float = 0.01
    effectiveness: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"weight {field.name} is {value!r}: expected a finite number")
        if not any(getattr(self, field.name) for field in fields(self)):
            raise UserError("all four weights are 0: give at least one score a weight")


@dataclass(frozen=True)
class Scores:
    """The scores of n subsets, each float32 [n]; 0 where the weight is 0 and the score was not computed.

    Attributes:
        consistency: probability of the target for the shown regions (or 1 minus the angle to the semantic feature).
        collaboration: 1 - probability of the target for the hidden regions.
        confidence: 1 - H(p) / log C, or 1 - the evidential uncertainty.
        effectiveness: sum over the shown regions of the distance to the nearest other one.
    """

    consistency: Tensor
    collaboration: Tensor
    confidence: Tensor
    effectiveness: Tensor


class SubmodularObjective:
    """F(S) = sum of the weighted scores of S.

    Args:
        classifier: the model explained.
        masked: inputs of any subset of the image's regions.
        target: class index.
        weights: weights of the scores; a score of weight 0 costs nothing.
        consistency: "probability" (as the published code does), or "cosine", the paper's form
            1 - arccos(cos(f(x_S), f)) / pi with the semantic feature f.
        semantic_feature: [D]; the feature of the whole image when not given.
        confidence: "entropy", 1 + sum_c p_c log(p_c + 1e-7) / log C, or "evidential", 1 - C / sum_c (e_c + 1) with evidence
            e = exp(clip(evidence_scale * output, -10, 10)) (Sensoy et al., NeurIPS 2018).
        evidence_scale: 5 for faces, 1 for CUB in the published settings.
        confidence_classifier: a second classifier that the confidence is taken from; it must take the same model inputs.

    Attributes:
        size: R, the number of regions.
        evaluations: images forwarded so far. It only counts; no result depends on it.
        area, centres: float64 [R] and [R, 2], share of the image that each region covers, and its mean row and column.
        highest: the highest that either of ``parts`` can be; infinite where that is not known.
        needed: whether F depends on either of ``parts``.
        cost: images that ``parts`` forwards for a row.
    """

    def __init__(
        self,
        classifier: Classifier,
        masked: RegionInputs,
        target: int,
        weights: ScoreWeights | None = None,
        *,
        consistency: Literal["probability", "cosine"] = "probability",
        semantic_feature: Tensor | None = None,
        confidence: Literal["entropy", "evidential"] = "entropy",
        evidence_scale: float = 1.0,
        confidence_classifier: Classifier | None = None,
    ) -> None:
        if consistency not in ("probability", "cosine"):
            raise UserError(f"consistency={consistency!r}: expected 'probability' or 'cosine'")
        if confidence not in ("entropy", "evidential"):
            raise UserError(f"confidence={confidence!r}: expected 'entropy' or 'evidential'")
        if confidence_classifier is not None and confidence_classifier.preprocessing != classifier.preprocessing:
            raise UserError(
                f"{confidence_classifier.name} prepares images in another way than {classifier.name}: "
                "give a confidence classifier with the same size, mean, std and resize"
            )
        self.size = masked.size
        self.evaluations = 0
        self.weights = weights or ScoreWeights()
        self.area, self.centres = masked.area, masked.centres
        shown = self.weights.consistency, self.weights.confidence
        self.highest = (sum(max(0.0, weight) for weight in shown), max(0.0, self.weights.collaboration))
        if self.weights.effectiveness:
            self.highest = (math.inf, self.highest[1])
        self.needed = (any(shown) or bool(self.weights.effectiveness), bool(self.weights.collaboration))
        self.cost = 1 + bool(confidence_classifier is not None and self.weights.confidence)
        self._classifier, self._masked, self._target = classifier, masked, target
        self._consistency, self._confidence = consistency, confidence
        self._evidence_scale = evidence_scale
        self._confidence_classifier = confidence_classifier
        self._feature: Tensor | None = None
        if self.weights.consistency and consistency == "cosine":
            self._feature = self._semantic_feature(semantic_feature)
        self._distances = self._element_distances() if self.weights.effectiveness else None

    def __call__(self, subsets: Tensor) -> Tensor:
        """F of each subset: bool [n, R] -> float32 [n]."""
        scores = self.scores(subsets)
        weights = self.weights
        return (
            weights.consistency * scores.consistency
            + weights.collaboration * scores.collaboration
            + weights.confidence * scores.confidence
            + weights.effectiveness * scores.effectiveness
        )

    def set_score(self, subsets: Tensor) -> Tensor:
        """The part of F that depends on the set alone and forwards no image, the weighted effectiveness: bool [n, R] -> [n]."""
        return self.weights.effectiveness * self._effectiveness(subsets)

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What one image adds to F as the image of shown regions, and as that of hidden ones, from one forward pass.

        F(S) is the first part of S plus the second of its complement, so an image serves two subsets.

        Args:
            rows: bool [n, R], regions that the image shows; or float in [0, 1], how much it shows of each, through which gradients
                flow (not with a weight on the effectiveness). An image with gradients counts as three.

        Returns:
            float32 [n] each.
        """
        rows = rows.to(self._classifier.device)
        weights = self.weights
        logits, features = self._forward(rows)
        shown = self._consistency_of(logits, features) * weights.consistency
        if weights.confidence:
            shown = shown + weights.confidence * self._confidence_of(self._confidence_outputs(logits, rows))
        if weights.effectiveness:
            shown = shown + self.set_score(rows)
        return shown, weights.collaboration * (1 - logits.softmax(dim=1)[:, self._target])

    def scores(self, subsets: Tensor) -> Scores:
        """The four scores of each subset, shown and hidden regions forwarded in one batch: bool [n, R] -> ``Scores``."""
        subsets = subsets.to(self._classifier.device)
        weights, count = self.weights, len(subsets)
        zeros = torch.zeros(count, device=subsets.device)
        own_confidence = bool(weights.confidence) and self._confidence_classifier is None
        shown = count if weights.consistency or own_confidence else 0
        hidden = count if weights.collaboration else 0
        rows = torch.cat([subsets[:shown], ~subsets[:hidden]])
        logits, features = self._forward(rows)
        return Scores(
            consistency=self._consistency_of(logits, features)[:shown] if weights.consistency else zeros,
            collaboration=1 - logits.softmax(dim=1)[shown:, self._target] if weights.collaboration else zeros,
            confidence=self._confidence_of(self._confidence_outputs(logits[:shown], subsets)) if weights.confidence else zeros,
            effectiveness=self._effectiveness(subsets) if weights.effectiveness else zeros,
        )

    def _forward(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [n, C] and, where the consistency needs them, features [n, D] of the given subsets, all counted."""
        self._count(rows)
        if self._feature is None:
            parts = [self._classifier.logits(inputs) for inputs in self._masked.parts(rows)]
            return torch.cat(parts) if parts else torch.zeros(0, self._classifier.num_classes, device=rows.device), None
        both = [self._classifier.logits_and_features(inputs) for inputs in self._masked.parts(rows)]
        if both and both[0][1].shape[1] != len(self._feature):
            raise UserError(
                f"the semantic feature has {len(self._feature)} values, features of {self._classifier.name} have {both[0][1].shape[1]}"
            )
        logits = [part[0] for part in both] or [torch.zeros(0, self._classifier.num_classes, device=rows.device)]
        features = [part[1] for part in both] or [torch.zeros(0, len(self._feature), device=rows.device)]
        return torch.cat(logits), torch.cat(features)

    def _consistency_of(self, logits: Tensor, features: Tensor | None) -> Tensor:
        if self._feature is None or features is None:
            return logits.softmax(dim=1)[:, self._target]
        return 1 - _angle(features, self._feature[None])[:, 0]

    def _confidence_outputs(self, logits: Tensor, rows: Tensor) -> Tensor:
        """What the confidence is taken from: the logits, or those of the second classifier for the same rows."""
        if self._confidence_classifier is None:
            return logits
        parts = [self._confidence_classifier.logits(inputs) for inputs in self._masked.parts(rows)]
        self._count(rows)
        return torch.cat(parts).to(logits.device)

    def _count(self, rows: Tensor) -> None:
        self.evaluations += len(rows) * (WITH_GRADIENT if rows.requires_grad else 1)

    def _confidence_of(self, outputs: Tensor) -> Tensor:
        classes = outputs.shape[1]
        if self._confidence == "evidential":
            evidence = (self._evidence_scale * outputs).clamp(-10, 10).exp()
            return 1 - classes / (evidence + 1).sum(dim=1)
        if classes < 2:
            return torch.ones_like(outputs[:, 0])
        probabilities = outputs.softmax(dim=1)
        return 1 + (probabilities * (probabilities + 1e-7).log()).sum(dim=1) / math.log(classes)

    def _effectiveness(self, subsets: Tensor) -> Tensor:
        """e(S) = sum over i in S of the least d_ij over the other j in S; 0 for sets of fewer than two."""
        if self._distances is None:
            return torch.zeros(len(subsets), device=self._classifier.device)
        subsets = subsets.to(self._distances.device)
        chunks = subsets.split(max(1, 2**24 // self.size**2))
        return torch.cat([self._effectiveness_of_chunk(chunk) for chunk in chunks])

    def _effectiveness_of_chunk(self, subsets: Tensor) -> Tensor:
        assert self._distances is not None
        nearest = torch.where(subsets[:, None, :], self._distances, torch.inf).amin(dim=2)
        counted = torch.where(subsets, nearest, 0).sum(dim=1)
        return torch.where(subsets.sum(dim=1) > 1, counted, 0)

    def _element_distances(self) -> Tensor:
        """d_ij = arccos(cos(f_i, f_j)) / pi between the features of the single regions, infinite on the diagonal: [R, R]."""
        singles = torch.eye(self.size, dtype=torch.bool, device=self._classifier.device)
        features = torch.cat([self._classifier.features(inputs) for inputs in self._masked.parts(singles)])
        self.evaluations += self.size
        return _angle(features, features).fill_diagonal_(torch.inf)

    def _semantic_feature(self, given: Tensor | None) -> Tensor:
        if given is not None:
            feature = torch.as_tensor(given, dtype=torch.float32, device=self._classifier.device)
            if feature.ndim != 1:
                raise UserError(f"the semantic feature is {describe(feature)}: expected [D], as features() returns a row of")
            return feature
        everything = torch.ones(1, self.size, dtype=torch.bool, device=self._classifier.device)
        self.evaluations += 1
        return self._classifier.features(self._masked(everything))[0]


class MeanObjective:
    """The mean of several objectives over the same regions, such as one for each fill: an order that does not rest on one fill.

    Args:
        objectives: at least one, on the same regions.

    Attributes:
        size, area, centres, evaluations, highest, needed, cost: as of ``SubmodularObjective``; images of all are counted.
    """

    def __init__(self, objectives: Sequence[SubmodularObjective]) -> None:
        sizes = {objective.size for objective in objectives}
        if len(sizes) != 1:
            raise UserError(f"objectives over {', '.join(map(str, sorted(sizes))) or 'no'} regions: expected one or more over the same")
        self._objectives = tuple(objectives)
        first = objectives[0]
        self.size, self.area, self.centres = first.size, first.area, first.centres
        self.highest = tuple(sum(each.highest[half] for each in objectives) / len(objectives) for half in (0, 1))
        self.needed = tuple(any(each.needed[half] for each in objectives) for half in (0, 1))
        self.cost = sum(each.cost for each in objectives)

    @property
    def evaluations(self) -> int:
        """Images forwarded so far."""
        return sum(each.evaluations for each in self._objectives)

    def __call__(self, subsets: Tensor) -> Tensor:
        """F of each subset: bool [n, R] -> float32 [n]."""
        return torch.stack([each(subsets) for each in self._objectives]).mean(dim=0)

    def set_score(self, subsets: Tensor) -> Tensor:
        """Mean of the parts of F that forward no image: bool [n, R] -> [n]."""
        return torch.stack([each.set_score(subsets) for each in self._objectives]).mean(dim=0)

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Means of what one image adds to F as the shown and as the hidden one: bool [n, R] -> float32 [n] each."""
        shown, hidden = zip(*(each.parts(rows) for each in self._objectives), strict=True)
        return torch.stack(shown).mean(dim=0), torch.stack(hidden).mean(dim=0)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Angles between rows, divided by pi: [n, D], [m, D] -> [n, m] in [0, 1]."""
    cosine = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    return cosine.clamp(-1, 1).arccos() / math.pi
