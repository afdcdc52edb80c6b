"""What a module returns: read as scores, checked, and turned into logits and probabilities."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from attribution.errors import UserError, describe

Meaning = Literal["softmax", "sigmoid", "probabilities", "label_probabilities"]
SCORES = ("auto", "softmax", "sigmoid", "probabilities", "label_probabilities", "logits")  # "logits" is another name of "softmax"
SCORES_HELP = (
    "What the model returns: softmax (logits of classes of which one is right), sigmoid (logits of independent labels, or a single one), "
    "probabilities, or label_probabilities (of independent labels). Default: what a saved file says, or found from a first output."
)
OutputChoice = str | int | Callable[[Any], Any]

_SUM = 0.02  # probabilities in half precision, or rounded to few digits, sum to 1 within this
_UNCHANGED = re.compile(
    r"(Clone|Alias|(Unsafe|As)?View|Reshape\w*|(Un)?[Ss]queeze|Slice|Select|Index|ToCopy|T|Transpose|Permute|Expand|Cat|Stack|Split|Unbind)$"
)
_LINEAR = re.compile(r"(Addmm|Mm|Bmm|Baddbmm|Convolution|Linear\w*|MkldnnLinear)$")
_SQUASHING = re.compile(r"((Log)?Sigmoid\w*|Hardsigmoid|Softmax|SafeSoftmax|Tanh|Exp)$")  # what makes probabilities of logits
_CHANGED = "changed"
_MOST_NODES = 200  # of a graph that is walked


@dataclass(frozen=True)
class Outputs:
    """What the scores of a classifier mean. Nothing else turns scores into logits, or logits into probabilities.

    Attributes:
        count: number of scores that the module returns for an image.
        kind: "softmax": logits of classes of which one is right. "sigmoid": logits of labels of which each may be right.
            "probabilities" and "label_probabilities": probabilities of such classes, and of such labels.
        two_sided: whether the only score z is of the second of two classes; the logit of the first is then -z.
    """

    count: int
    kind: Meaning
    two_sided: bool = False

    @property
    def classes(self) -> int:
        """C, the number of classes or labels."""
        return 2 if self.two_sided else self.count

    @property
    def independent(self) -> bool:
        """Whether each label has a probability of its own, so that several of them, or none, may be right."""
        return self._elementwise and not self.two_sided

    @property
    def are_logits(self) -> bool:
        """Whether the module returns the logits themselves."""
        return self.kind in ("softmax", "sigmoid") and not self.two_sided

    @property
    def _elementwise(self) -> bool:
        return self.kind in ("sigmoid", "label_probabilities")

    @classmethod
    def of(cls, scores: Tensor, kind: str, made_by: frozenset[str] | None, classes: int | None, name: str) -> Outputs:
        """Determine the meaning from a first batch of scores.

        Args:
            scores: [n, count].
            kind: one of ``SCORES``. "auto" takes what a sigmoid made for probabilities of labels, rows that are not negative
                and sum to 1 for probabilities of classes, a single score for the logit of a label, and all others for
                logits of classes.
            made_by: the operations that made the scores (see ``made_by``), if known.
            classes: number of class names, if known.
            name: of the classifier, for messages.

        Raises:
            UserError: scores whose meaning must be named; the message says how.
        """
        count = scores.shape[1]
        found = cls(count, "softmax" if kind == "logits" else cast(Meaning, kind))
        if kind == "auto":
            found = cls(count, _meaning(scores, made_by, name))
        elif kind == "probabilities" and (count == 1 or not _sum_to_one(scores, _SUM)):
            found = cls(count, "label_probabilities")
        elif kind == "sigmoid" and made_by == {"Sigmoid"}:
            raise UserError(
                f"scores is 'sigmoid', for logits, but {name} ends in a sigmoid and returns probabilities: give 'label_probabilities', or "
                "nothing"
            )
        if count == 1 and not found._elementwise:
            raise UserError(
                f"{name} returns one score for an image, and the softmax of one score is always 1: give scores='sigmoid' if it is a "
                "logit, or scores='label_probabilities' if it is a probability"
            )
        return replace(found, two_sided=count == 1 and classes == 2)

    def logits(self, scores: Tensor, name: str) -> Tensor:
        """Scores [n, count] as logits [n, C]; probabilities p of classes become log p, those of labels log(p / (1 - p)).

        Raises:
            UserError: scores that are not finite, or probabilities that are none.
        """
        _check_finite(scores, name)
        if self.kind == "probabilities":
            _check_probabilities(scores, name)
            scores = scores.log()
        elif self.kind == "label_probabilities":
            _check_label_probabilities(scores, name)
            scores = scores.logit(eps=1e-7)
        return torch.cat([-scores, scores], dim=1) if self.two_sided else scores

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities of logits [n, C]: their softmax, or their sigmoid for labels. What a module returned is unchanged."""
        if self._elementwise:
            return logits.sigmoid()
        return logits.exp() if self.kind == "probabilities" else logits.softmax(dim=1)

    def predicted(self, probabilities: Tensor) -> tuple[int, ...]:
        """The classes predicted by probabilities [C]: the most probable one, or all independent labels above 0.5."""
        if self.independent:
            return tuple((probabilities > 0.5).nonzero()[:, 0].tolist())
        return (int(probabilities.argmax()),)

    def certainty(self, logits: Tensor) -> Tensor:
        """1 - H(p) / log C of logits [n, C]; for labels the mean of 1 - H(p, 1 - p) / log 2 over them: [n]."""
        found = self.probabilities(logits)
        if self.independent:
            found = torch.stack([found, 1 - found], dim=2)
        certain = 1 + (found * (found + 1e-7).log()).sum(dim=-1) / float(np.log(found.shape[-1]))
        return certain.mean(dim=1) if self.independent else certain


def read_scores(
    output: Any, count: int, device: torch.device, name: str, chosen: OutputChoice | None = None, classes: int | None = None
) -> Tensor:
    """Take the scores out of what a module returned for ``count`` images: float32 [count, C].

    Args:
        output: a tensor or array; or a tuple, list, mapping or object that holds one.
        count: number of images.
        device: where the scores are wanted.
        name: of the classifier, for messages.
        chosen: which part holds the scores: a key or attribute, an index, or a function of the output. By default "logits" where there
            is one, else the only part with a row for each image (and ``classes`` columns).
        classes: number of scores of an image, if known.

    Raises:
        UserError: the output holds no such scores, or several parts that could be them.
    """
    scores = _only_scores(output, count, classes, name) if chosen is None else _chosen_part(output, chosen, name)
    if isinstance(scores, np.ndarray):
        scores = torch.from_numpy(scores.copy())  # torch takes neither read-only nor flipped arrays
    if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[0] != count or scores.shape[1] < 1:
        received = describe(scores) if chosen is not None else _describe_output(output)
        hint = ""
        if isinstance(scores, Tensor) and scores.shape == (count,):
            hint = "; a single score for an image is a row of one, [:, None]"
        elif chosen is None and not isinstance(scores, Tensor | np.ndarray):
            hint = "; name the part with output= (a key, an index or a function)"
        raise UserError(f"{name} returned {received} for {count} images: expected scores [{count}, classes]{hint}")
    return scores.to(device, torch.float32, copy=True)  # a module may write the scores of the next images into the same tensor


def _only_scores(output: Any, count: int, classes: int | None, name: str) -> Any:
    if isinstance(output, Tensor | np.ndarray):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if not isinstance(output, Mapping) and hasattr(output, "logits"):
        return output.logits
    if not isinstance(output, Mapping | tuple | list):
        return output
    parts = dict(output.items() if isinstance(output, Mapping) else enumerate(output))
    fitting = {key: part for key, part in parts.items() if getattr(part, "ndim", 0) == 2 and len(part) == count}
    of_width = {key: part for key, part in fitting.items() if part.shape[1] == classes}
    likely = of_width if len(of_width) == 1 else fitting
    if len(likely) > 1:
        raise UserError(
            f"{name} returned {_describe_output(output)}, of which {', '.join(map(repr, likely))} could be the scores: "
            f"name them with output=, such as output={next(reversed(likely))!r}"
        )
    if not likely or (isinstance(output, Mapping) and not of_width):
        return output
    return next(iter(likely.values()))


def _chosen_part(output: Any, chosen: OutputChoice, name: str) -> Any:
    if callable(chosen):
        return chosen(output)
    try:
        if isinstance(chosen, str):
            return output[chosen] if isinstance(output, Mapping) else getattr(output, chosen)
        return (list(output.values()) if isinstance(output, Mapping) else output)[chosen]
    except (KeyError, AttributeError, IndexError, TypeError):
        raise UserError(f"{name} returned {_describe_output(output)}: it has no output {chosen!r}") from None


def _meaning(values: Tensor, operations: frozenset[str] | None, name: str) -> Meaning:
    """What scores [n, count] are, by their values and by the operations that made them, if known."""
    count, shares = values.shape[1], bool(((values >= 0) & (values <= 1)).all())
    squashed = operations is not None and any(map(_SQUASHING.match, operations)) and not any(map(_LINEAR.match, operations))
    if operations == {"Sigmoid"} and shares:
        return "label_probabilities"
    if count > 1 and shares and _sum_to_one(values, _SUM if squashed else 1e-4):
        return "probabilities"
    unknown = f"{name} returns scores from {values.min():.3g} to {values.max():.3g} for plain images, which may be "
    if count > 1 and bool(((values.norm(dim=1) - 1).abs() < 1e-3).all()):
        raise UserError(
            f"{unknown}an embedding, because every row has length 1: use with_prototypes for class embeddings, name the scores with "
            "output=, or give scores='softmax' if they are logits"
        )
    strictly = bool(((values > 0) & (values < 1)).all())
    is_linear = operations is not None and any(map(_LINEAR.match, operations))
    of_softmax = squashed and "Softmax" in (operations or ())
    if of_softmax or (squashed and shares) or (count == 1 and shares and not is_linear) or (operations is None and strictly):
        single = "scores='sigmoid'" if count == 1 else "scores='softmax' or 'sigmoid'"
        raise UserError(
            f"{unknown}probabilities or logits: give {single} if they are logits, or scores='label_probabilities' if each is the "
            "probability of a label"
        )
    return "sigmoid" if count == 1 else "softmax"


def made_by(scores: Tensor) -> frozenset[str] | None:
    """The operations that made scores, back to the last linear layers or the functions that make probabilities of logits.

    Returns:
        Their names as autograd calls them, such as "Addmm" or "Sigmoid", and "changed" where others follow them. None without gradients.
    """
    if scores.grad_fn is None:
        return None
    found: set[str] = set()
    seen, waiting = {scores.grad_fn}, [scores.grad_fn]
    while waiting and len(seen) < _MOST_NODES:
        node = waiting.pop()
        operation = re.sub(r"Backward\d*$", "", node.name())
        if _LINEAR.match(operation) or _SQUASHING.match(operation):
            found.add(operation)
            continue
        if not _UNCHANGED.match(operation) and "Accumulate" not in operation:
            found.add(_CHANGED)
        further = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= further
        waiting.extend(further)
    return frozenset(found)


def _sum_to_one(values: Tensor, within: float) -> bool:
    return bool(((values.sum(dim=1) - 1).abs() < within).all())


def _check_finite(scores: Tensor, name: str) -> None:
    bad = scores.isnan() | scores.eq(torch.inf) | scores.isneginf().all(dim=1, keepdim=True)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise UserError(
            f"{name} returned {scores[row, column].item()} for class {column} of image {row} in a batch of {len(scores)}: "
            "expected finite scores; check its weights and its preprocessing"
        )


def _check_probabilities(scores: Tensor, name: str) -> None:
    total = scores.sum(dim=1)
    bad = (scores < 0).any(dim=1) | ((total - 1).abs() >= _SUM)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        low, high = scores[row].min().item(), scores[row].max().item()
        raise UserError(
            f"{name} returned {low:.4g} to {high:.4g}, in sum {total[row].item():.4g}, as the probabilities of image {row}: expected none "
            "negative and a sum of 1; give scores='softmax' if they are logits, or 'label_probabilities' if each is of a label of its own"
        )


def _check_label_probabilities(scores: Tensor, name: str) -> None:
    if not bool(((scores >= 0) & (scores <= 1)).all()):
        low, high = scores.min().item(), scores.max().item()
        raise UserError(
            f"{name} returned {low:.4g} to {high:.4g} as probabilities of labels: expected 0 to 1; give scores='sigmoid' if they are logits"
        )


def _describe_output(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a {'dict' if type(output) is dict else type(output).__name__} with {', '.join(map(str, list(output)[:5])) or 'no keys'}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {', '.join(describe(item) for item in output[:3]) or 'nothing'}"
    return f"{type(output).__name__} with logits {describe(output.logits)}" if hasattr(output, "logits") else describe(output)
