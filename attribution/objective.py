"""The submodular objective F(S) of SMDL (Chen et al., ICLR 2024, section 3.2) and LiMA: a sum of four scores of a subset S."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.checks import check_choice, is_number
from attribution.errors import UserError, describe
from attribution.masking import RegionInputs
from attribution.model.classifier import Classifier

_MOST_WEIGHT = 1e9  # larger ones leave nothing of the other scores in float32
IMAGES_PER_GRADIENT = 3  # an image with a gradient counts as three images: a backward pass costs about two forward passes


@dataclass(frozen=True)
class ScoreWeights:
    """Weights of the four scores, by name, because the published code orders them in three different ways.

    The defaults are LiMA's for single-modal classifiers.
    """

    consistency: float = 20.0
    collaboration: float = 5.0
    confidence: float = 0.01
    effectiveness: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not is_number(value := getattr(self, field.name)) or abs(value) > _MOST_WEIGHT:
                raise UserError(f"weight {field.name} is {value!r}: expected a number from -{_MOST_WEIGHT:g} to {_MOST_WEIGHT:g}")
        if not any(getattr(self, field.name) for field in fields(self)):
            raise UserError("all four weights are 0: give at least one score a weight")


PUBLISHED = ScoreWeights(consistency=20.0, collaboration=5.0, confidence=0.01, effectiveness=0.0)  # LiMA, models of one modality
BALANCED = ScoreWeights(consistency=1.0, collaboration=1.0, confidence=0.0, effectiveness=0.0)  # mean F = Insertion - Deletion + 1


@dataclass(frozen=True)
class Scores:
    """The scores of n subsets, each float32 [n]. A score of weight 0 is not computed, and is 0 here.

    Attributes:
        consistency: probability of the target for the shown regions (or 1 minus the angle to the semantic feature).
        collaboration: 1 - probability of the target for the hidden regions.
        confidence: 1 - H(p) / log C (for independent labels its mean over them), or 1 - the evidential uncertainty.
        effectiveness: sum over the shown regions of the distance to the nearest other shown region, in feature space.
    """

    consistency: Tensor
    collaboration: Tensor
    confidence: Tensor
    effectiveness: Tensor


class SubmodularObjective:
    """F(S) = the weighted sum of the scores of S. A ``DividedObjective`` and a ``ScoredObjective`` for the searches.

    Args:
        classifier: the model explained.
        masked: gives the model input of any subset of the image's regions.
        target: class index.
        weights: weights of the scores; a score of weight 0 forwards no image.
        consistency: "probability", as in the published code, or "cosine", as in the paper:
            1 - arccos(cos(f(x_S), f)) / pi with the semantic feature f.
        semantic_feature: f, float [D]; the feature of the whole image by default.
        confidence: "entropy", 1 + sum_c p_c log(p_c + 1e-7) / log C (independent labels: the mean over the labels of the same for
            p and 1 - p), or "evidential", which is for classes of which one is right, 1 - C / sum_c (e_c + 1) with evidence
            e = exp(clip(evidence_scale * output, -10, 10)) (Sensoy et al., NeurIPS 2018).
        evidence_scale: a number; 5 for faces and 1 for CUB in the published settings.
        confidence_classifier: a second classifier, for the confidence alone; it must take the same model inputs.

    Attributes:
        size: R, the number of regions.
        evaluations: images forwarded so far. It only counts; no result depends on it.
        area, centres: float64 [R] and [R, 2]: the share of the image in each region, and its mean row and column.
        highest: the highest value of each of ``parts``; infinite where it is not known.
        needed: whether F depends on each of ``parts``.
        cost: images that ``parts`` forwards for a row.

    Raises:
        UserError: an unknown form of a score, a second classifier with other inputs, or a semantic feature of another shape.
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
        check_choice("consistency", consistency, ("probability", "cosine"))
        check_choice("confidence", confidence, ("entropy", "evidential"))
        if confidence_classifier is not None and confidence_classifier.preprocessing != classifier.preprocessing:
            raise UserError(
                f"{confidence_classifier.name} prepares images in another way than {classifier.name}: "
                "give a confidence classifier with the same size, mean, std and resize"
            )
        judge = confidence_classifier or classifier
        if confidence == "evidential" and judge.outputs.independent:
            raise UserError(
                f"confidence 'evidential' is for classes of which one is right, and {judge.name} has independent labels: expected 'entropy'"
            )
        self.size = masked.size
        self.evaluations = 0
        self.weights = weights or ScoreWeights()
        self.area, self.centres = masked.area, masked.centres
        of_shown = self.weights.consistency, self.weights.confidence
        bound = math.inf if self.weights.effectiveness else sum(max(0.0, weight) for weight in of_shown)
        self.highest = (bound, max(0.0, self.weights.collaboration))
        self.needed = (any(of_shown) or bool(self.weights.effectiveness), bool(self.weights.collaboration))
        self.cost = 1 + bool(confidence_classifier is not None and self.weights.confidence)
        self._classifier, self._masked, self._target = classifier, masked, target
        self._consistency, self._confidence = consistency, confidence
        self._evidence_scale = evidence_scale
        self._confidence_classifier = confidence_classifier
        self._known: dict[bytes, float] = {}  # the target's probability in each image forwarded, by the regions that can be seen in it
        self._seen = self.area.gt(0).numpy()
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
        """The part of F that forwards no image, the weighted effectiveness: bool [n, R] -> float32 [n]."""
        return self.weights.effectiveness * self._effectiveness(subsets)

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What an image adds to F of the subset that it shows, and to F of the complement, from one forward pass.

        F(S) = first part(S) + second part(complement of S), so that one image serves two subsets.

        Args:
            rows: bool [n, R], the regions that each image shows; or float [n, R] in [0, 1], how much it shows of each. Gradients
                flow through float rows unless the effectiveness has a weight; an image with gradients counts as three.

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
        return shown, weights.collaboration * (1 - self._classifier.outputs.probabilities(logits)[:, self._target])

    def scores(self, subsets: Tensor) -> Scores:
        """The four scores of each subset: bool [n, R] -> ``Scores``. Shown and hidden regions are forwarded in one batch."""
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
            collaboration=1 - self._classifier.outputs.probabilities(logits[shown:])[:, self._target] if weights.collaboration else zeros,
            confidence=self._confidence_of(self._confidence_outputs(logits[:shown], subsets)) if weights.confidence else zeros,
            effectiveness=self._effectiveness(subsets) if weights.effectiveness else zeros,
        )

    def target_probabilities(self, rows: Tensor) -> Tensor:
        """The target's probability where each row of regions is shown: bool [n, R] -> float32 [n] on the CPU.

        An image that was forwarded for F is not forwarded again. Nothing is counted.
        """
        keys = self._keys(rows)
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._known}
        if new:
            inputs = self._masked.parts(torch.stack(list(new.values())).to(self._classifier.device))
            self._remember(list(new), torch.cat([self._classifier.logits(part) for part in inputs]))
        return torch.tensor([self._known[key] for key in keys])

    def _keys(self, rows: Tensor) -> list[bytes]:
        """What tells the images of rows bool [n, R] apart: two that differ only where the model's crop hides it are the same."""
        return [row.tobytes() for row in np.packbits(rows.cpu().numpy() & self._seen, axis=1)]

    def _remember(self, keys: Sequence[bytes], logits: Tensor) -> None:
        found = self._classifier.outputs.probabilities(logits)[:, self._target]
        self._known.update(zip(keys, found.detach().float().cpu().tolist(), strict=True))

    def _forward(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [n, C] of the subsets and, where the consistency needs them, features [n, D]. Every image is counted."""
        logits, features = self._forwarded(rows)
        if rows.dtype == torch.bool:
            self._remember(self._keys(rows), logits)
        return logits, features

    def _forwarded(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
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
            return self._classifier.outputs.probabilities(logits)[:, self._target]
        return 1 - _angle(features, self._feature[None])[:, 0]

    def _confidence_outputs(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Outputs that the confidence is computed from: the logits given, or those of the second classifier for the same rows."""
        if self._confidence_classifier is None:
            return logits
        parts = [self._confidence_classifier.logits(inputs) for inputs in self._masked.parts(rows)]
        self._count(rows)
        return torch.cat(parts).to(logits.device)

    def _count(self, rows: Tensor) -> None:
        self.evaluations += len(rows) * (IMAGES_PER_GRADIENT if rows.requires_grad else 1)

    def _confidence_of(self, outputs: Tensor) -> Tensor:
        if self._confidence == "evidential":
            evidence = (self._evidence_scale * outputs).clamp(-10, 10).exp()
            return 1 - outputs.shape[1] / (evidence + 1).sum(dim=1)
        return (self._confidence_classifier or self._classifier).outputs.certainty(outputs)

    def _effectiveness(self, subsets: Tensor) -> Tensor:
        """e(S) = sum over i in S of the least d_ij over the other j in S; 0 where S has fewer than two regions."""
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
    """The mean of several objectives over the same regions, such as one for each fill, so that the order does not rest on one fill.

    Args:
        objectives: at least one, over the same regions.

    Attributes:
        size, area, centres, evaluations, highest, needed, cost: as in ``SubmodularObjective``. The images of all are counted.

    Raises:
        UserError: no objective, or objectives over different numbers of regions.
    """

    def __init__(self, objectives: Sequence[SubmodularObjective]) -> None:
        sizes = {objective.size for objective in objectives}
        if len(sizes) != 1:
            raise UserError(f"objectives over {', '.join(map(str, sorted(sizes))) or 'no'} regions: expected one or more over the same")
        self._objectives = tuple(objectives)
        first = objectives[0]
        self.size, self.area, self.centres = first.size, first.area, first.centres
        shown, hidden = zip(*(each.highest for each in objectives), strict=True)
        self.highest = (sum(shown) / len(objectives), sum(hidden) / len(objectives))
        self.needed = (any(each.needed[0] for each in objectives), any(each.needed[1] for each in objectives))
        self.cost = sum(each.cost for each in objectives)

    def target_probabilities(self, rows: Tensor) -> Tensor:
        """The target's probability in each image, as a mean over the objectives; see ``SubmodularObjective.target_probabilities``."""
        return torch.stack([each.target_probabilities(rows) for each in self._objectives]).mean(dim=0)

    @property
    def evaluations(self) -> int:
        """Images forwarded so far."""
        return sum(each.evaluations for each in self._objectives)

    def __call__(self, subsets: Tensor) -> Tensor:
        """F of each subset: bool [n, R] -> float32 [n]."""
        return torch.stack([each(subsets) for each in self._objectives]).mean(dim=0)

    def set_score(self, subsets: Tensor) -> Tensor:
        """Mean of the parts of F that forward no image: bool [n, R] -> float32 [n]."""
        return torch.stack([each.set_score(subsets) for each in self._objectives]).mean(dim=0)

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Means of the two parts of all objectives (see ``SubmodularObjective.parts``): [n, R] -> float32 [n] each."""
        shown, hidden = zip(*(each.parts(rows) for each in self._objectives), strict=True)
        return torch.stack(shown).mean(dim=0), torch.stack(hidden).mean(dim=0)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Angles between rows, divided by pi: [n, D], [m, D] -> [n, m] in [0, 1]."""
    cosine = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    return cosine.clamp(-1, 1).arccos() / math.pi
