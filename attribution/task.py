"""Task: the input of an attribution method. It holds a model input, the scores of a class, and what hidden pixels show."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from attribution.checks import check_choice
from attribution.errors import NotApplicable
from attribution.masking import MaskedInputs
from attribution.model.classifier import Classifier
from attribution.model.forwarding import even_chunks

Output = Literal["logit", "probability"]
Channels = Literal["sum", "mean", "max", "absmax", "abs_sum", "abs_max"]
_CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda a: a.sum(dim=0),
    "mean": lambda a: a.mean(dim=0),
    "max": lambda a: a.amax(dim=0),
    "absmax": lambda a: a.gather(0, a.abs().argmax(dim=0, keepdim=True))[0],
    "abs_sum": lambda a: a.abs().sum(dim=0),
    "abs_max": lambda a: a.abs().amax(dim=0),
}


class Scores(nn.Module):
    """Scores [n, C] of model inputs [n, 3, h, w], counted. At most the classifier's batch size is forwarded at once.

    Under autograd, the activations of all rows stay in memory until the backward pass. A method with many samples takes
    ``Task.gradients``, which bounds that.
    """

    def __init__(self, classifier: Classifier, output: Output) -> None:
        super().__init__()
        check_choice("output", output, ("logit", "probability"))
        self.module = classifier.module if isinstance(classifier.module, nn.Module) else nn.Identity()
        self.evaluations = 0
        self._classifier, self._output = classifier, output

    def forward(self, inputs: Tensor) -> Tensor:
        self.evaluations += len(inputs)
        logits = self._classifier.logits(inputs.float())
        return self._classifier.outputs.probabilities(logits) if self._output == "probability" else logits


@dataclass(eq=False)
class Task:
    """One image, one class, one classifier.

    Attributes:
        classifier: the model explained.
        image: float32 [3, H, W] in [0, 1].
        fill: float32 [3, H, W], what hidden pixels show.
        target: class index.
        inputs, baseline: float32 [1, 3, h, w], image and fill as model inputs.
        seed: of stochastic methods.
        notes: what a method says about its result or chose for itself, such as its layer, by name. It goes into the provenance.
        structure: facts about the network that were found by running it. Tasks of the same network and input size may share them.
    """

    classifier: Classifier
    image: Tensor
    fill: Tensor
    target: int
    inputs: Tensor
    baseline: Tensor
    seed: int = 0
    structure: dict[Any, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    _made: list[Scores] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.classifier.find_out(False)  # its passes must not run while a method counts calls

    @property
    def evaluations(self) -> int:
        """Images forwarded so far through the scores of this task."""
        return sum(scores.evaluations for scores in self._made)

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the model input."""
        return self.inputs.shape[-2], self.inputs.shape[-1]

    @property
    def module(self) -> nn.Module:
        """The module of the classifier, for methods that look inside.

        Raises:
            NotApplicable: the classifier is a black box.
        """
        if not isinstance(self.classifier.module, nn.Module):
            raise NotApplicable(
                f"{self.classifier.name} is a black box: this method needs an nn.Module with gradients; use occlusion, rise, lime, "
                "kernel_shap, hsic, sobol or a region search"
            )
        return self.classifier.module

    def run(self) -> Any:
        """Call the module on the inputs and return whatever it returns; see ``ModuleForward.run``."""
        self.module  # noqa: B018  refuses a black box
        return self.classifier.runner.run(self.inputs)

    def scores(self, output: Output) -> Scores:
        """The model as a module from inputs [n, 3, h, w] to scores [n, C], counted."""
        self._made.append(Scores(self.classifier, output))
        return self._made[-1]

    def leaf(self) -> Tensor:
        """A copy of the inputs that requires gradients."""
        self.module  # noqa: B018  refuses a black box before anything runs
        return self.inputs.detach().clone().requires_grad_()

    def score_of(self, output: Output) -> Callable[[Tensor], Tensor]:
        """The target's score without gradients: inputs [n, 3, h, w] -> [n]."""
        model = self.scores(output)

        def score(inputs: Tensor) -> Tensor:
            with torch.no_grad():
                return model(inputs)[:, self.target]

        return score

    def gradients(self, points: Tensor, output: Output) -> Tensor:
        """Gradients of the target's score at points [n, 3, h, w], of the same shape; at most a batch of them is in memory at once."""
        self.module  # noqa: B018  refuses a black box before anything runs
        model, parts = self.scores(output), list[Tensor]()
        for chunk in even_chunks(points.detach(), self.classifier.batch_size):
            with torch.enable_grad():
                leaf = chunk.clone().requires_grad_()
                parts += torch.autograd.grad(model(leaf)[:, self.target].sum(), leaf)
        return torch.cat(parts)

    @contextmanager
    def rows_together(self, rows: int) -> Iterator[None]:
        """Forward this many rows in one batch, whatever the batch size of the classifier.

        Raises:
            NotApplicable: the module takes fewer images at once.
        """
        runner = self.classifier.runner
        if rows > runner.batch_size and (runner.fixed_batch or not runner.takes(self.inputs.expand(rows, -1, -1, -1))):
            most = "one image at a time" if runner.batch_size == 1 else f"{runner.batch_size} images at once"
            raise NotApplicable(f"{self.classifier.name} takes {most}, and this method {rows}: use another method")
        with self.classifier.forwarding(max(rows, runner.batch_size)):
            yield

    def blend(self, masks: Tensor) -> Tensor:
        """Blend image and fill by soft masks [n, 1, h, w] in [0, 1], where 1 shows the image and 0 the fill -> inputs [n, 3, h, w]."""
        return self.baseline + masks * (self.inputs - self.baseline)

    def masked_chunks(self, masks: Tensor, output: Output) -> Tensor:
        """Score soft masks [n, 1, a, b], resized to the input by nearest neighbour: the target's score under each -> [n]."""
        score = self.score_of(output)
        parts = []
        for chunk in even_chunks(masks, self.classifier.batch_size):
            resized = nn.functional.interpolate(chunk, size=self.size, mode="nearest-exact")
            parts.append(score(self.blend(resized)))
        return torch.cat(parts)

    def subsets_model(self, labels: Tensor, output: Output) -> Callable[[Tensor], Tensor]:
        """The model as a function of subsets of the image's regions, float [n, R] with 0 for hidden -> scores [n, C]."""
        masked, model = MaskedInputs(self.classifier, self.image, labels, self.fill), self.scores(output)

        def score(subsets: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.cat([model(part) for part in masked.parts(subsets > 0.5)])

        return score


def over_channels(values: Tensor, channels: Channels) -> Tensor:
    """Reduce channels [C, h, w] to one value per pixel [h, w].

    "absmax" takes the value of the largest magnitude with its sign; "abs_sum" and "abs_max" take magnitudes.
    """
    check_choice("channels", channels, _CHANNELS)
    return _CHANNELS[channels](values)


def enlarged(task: Task, values: Tensor, mode: Literal["bilinear", "bicubic"] = "bilinear") -> Tensor:
    """Enlarge a coarse map [a, b] to the model input: [h, w]."""
    return nn.functional.interpolate(values[None, None].float(), size=task.size, mode=mode, align_corners=False)[0, 0]


_generators = threading.RLock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators for the block and restore them after it: Captum draws from those of torch and NumPy.

    Other threads wait: the generators belong to the process.
    """
    with _generators, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        state, own = np.random.get_state(), random.getstate()  # noqa: NPY002  Captum draws from them
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002
            random.setstate(own)
