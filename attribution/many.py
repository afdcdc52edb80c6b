"""Several images explained at once: the candidates of all searches meet in full batches."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.errors import UserError
from attribution.explain import explain
from attribution.explanation import Explanation
from attribution.fills import drops
from attribution.image import ImageSource
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.search.contract import Progress


def explain_many(
    images: Sequence[ImageSource],
    classifier: Classifier | str,
    targets: Sequence[int | str | None] | int | str | None = None,
    *,
    together: int = 8,
    progress: Progress | None = None,
    **options: Any,
) -> list[Explanation]:
    """``explain`` for many images, several at a time.

    Each search runs in a thread of its own and waits wherever it needs the model; when all of them wait, what they ask for is
    forwarded in one go. Late rounds of a search have few candidates and leave a device half empty: together they fill it.

    Args:
        images: whatever ``load_image`` takes.
        classifier: a ``Classifier``, or a name that ``load_classifier`` takes. Its module is called from one thread only.
        targets: of each image, or one for all; the predicted classes by default.
        together: images searched side by side.
        progress: called with (images done, all of them).
        options: further arguments of ``explain``; the same for all images.

    Returns:
        The explanations in the order of the images: those of ``explain`` one by one, up to the rounding of other batch sizes
        (probabilities within 1e-5 in float32; where F of two candidates is that close, the order may differ).

    Raises:
        UserError: another number of targets than images, fill "drop" or a confidence classifier, which cannot be shared, or what
            ``explain`` raises for an image, with its place.
    """
    if isinstance(images, str | bytes | Tensor) or not isinstance(images, Sequence):
        raise UserError(f"images are {type(images).__name__}: expected a list of images")
    if isinstance(together, bool) or not isinstance(together, int) or together < 1:
        raise UserError(f"together is {together!r}: expected a whole number of images, at least 1")
    if drops(options.get("fill", "black")):
        raise UserError("fill 'drop' changes the model under each search: explain images one by one with it")
    if "confidence_classifier" in (options.get("objective_options") or {}):
        raise UserError("a confidence classifier is a second model, which several searches cannot share: explain images one by one with it")
    one_for_all = targets is None or isinstance(targets, int | str | np.integer)
    wanted: list[Any] = [targets] * len(images) if one_for_all else list(targets)  # type: ignore[arg-type]
    if len(wanted) != len(images):
        raise UserError(f"{len(wanted)} targets for {len(images)} images: give one for each, or one for all")
    base = load_classifier(classifier)
    options.setdefault("batch_size", None)
    with base.forwarding(options.pop("batch_size")):
        meeting = _Meeting(base)

        def job(at: int) -> Callable[[Classifier], Explanation]:
            return lambda lane: explain(images[at], lane, wanted[at], **options)

        return meeting.run([job(at) for at in range(len(images))], together, progress)


class _Meeting:
    """Where searches meet to have their images forwarded together."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        classifier.find_out(False)  # here, not in the threads
        self.changed = threading.Condition()
        self.waiting: dict[int, tuple[Tensor, bool]] = {}
        self.answers: dict[int, tuple[Tensor, Tensor] | BaseException] = {}
        self.running = 0

    def run(self, jobs: Sequence[Callable[[Classifier], Explanation]], together: int, progress: Progress | None) -> list[Explanation]:
        """All jobs, at most so many at a time, each with a classifier whose forward passes come here."""
        found: dict[int, Explanation | BaseException] = {}
        threads: list[threading.Thread] = []
        started, reported = 0, 0
        grad = torch.is_grad_enabled()
        own_threads = torch.get_num_threads()

        def work(at: int) -> None:
            try:
                torch.set_num_threads(1)  # the little that this thread computes must not wake workers beside the model's
                lane = copy.copy(self.classifier)
                lane._forward = lambda inputs, want_features: self._ask(at, inputs, want_features)  # type: ignore[method-assign]
                with torch.set_grad_enabled(grad):
                    outcome: Explanation | BaseException = jobs[at](lane)
            except BaseException as error:
                outcome = error
            with self.changed:
                found[at] = outcome
                self.running -= 1
                self.changed.notify_all()

        try:
            while len(found) < len(jobs):
                with self.changed:
                    failed = any(isinstance(outcome, BaseException) for outcome in found.values())
                    while started < len(jobs) and self.running < together and not failed:
                        threads.append(threading.Thread(target=work, args=(started,), daemon=True))
                        self.running += 1
                        started += 1
                        threads[-1].start()
                    self.changed.wait_for(lambda: len(self.waiting) == self.running)
                    asked = dict(sorted(self.waiting.items()))
                if failed and not self.running:
                    break
                if asked:
                    self._answer(asked)
                if progress is not None and len(found) > reported:
                    reported = len(found)
                    progress(reported, len(jobs))
            if progress is not None and reported < len(jobs) == len(found):
                progress(len(jobs), len(jobs))
        finally:
            self._dismiss(threads)
            torch.set_num_threads(own_threads)  # threads that start later would have one as well
        for at in range(len(jobs)):
            outcome = found.get(at)
            if isinstance(outcome, UserError):
                raise type(outcome)(f"image {at}: {outcome}") from outcome
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for _, outcome in sorted(found.items()) if isinstance(outcome, Explanation)]

    def _answer(self, asked: dict[int, tuple[Tensor, bool]]) -> None:
        """Forward what was asked for; those who need features apart from those who do not."""
        answers: dict[int, tuple[Tensor, Tensor] | BaseException] = {}
        for want_features in (False, True):
            group = [at for at, (_, wanted) in asked.items() if wanted == want_features]
            if not group:
                continue
            counts = [len(asked[at][0]) for at in group]
            try:
                rows, features = self.classifier._forward(torch.cat([asked[at][0] for at in group]), want_features)
                for at, *parts in zip(group, rows.split(counts), features.split(counts), strict=True):
                    answers[at] = (parts[0], parts[1])
            except Exception:
                for at in group:  # each on its own, so that only those fail that must
                    try:
                        answers[at] = self.classifier._forward(asked[at][0], want_features)
                    except Exception as error:
                        answers[at] = error
        with self.changed:
            for at, answer in answers.items():
                self.answers[at] = answer
                del self.waiting[at]
            self.changed.notify_all()

    def _ask(self, at: int, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        with self.changed:
            self.waiting[at] = (inputs, want_features)
            self.changed.notify_all()
            self.changed.wait_for(lambda: at in self.answers)
            answer = self.answers.pop(at)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _dismiss(self, threads: Sequence[threading.Thread]) -> None:
        """Let threads end that still wait, as after an interrupt."""
        while any(thread.is_alive() for thread in threads):
            with self.changed:
                for at in list(self.waiting):
                    self.answers.setdefault(at, _Dismissed())
                    del self.waiting[at]
                self.changed.notify_all()
            for thread in threads:
                if thread.is_alive():
                    thread.join(0.05)


class _Dismissed(Exception):
    """The meeting is over."""
