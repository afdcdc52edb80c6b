"""Several images explained at once: the candidates of all searches are forwarded together, in full batches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.checks import check_whole
from attribution.errors import UserError, describe
from attribution.explain import explain
from attribution.explanation import Explanation
from attribution.fills import DEFAULT_FILL, drops
from attribution.image import ImageSource, limit_size, load_image
from attribution.model.classifier import Classifier
from attribution.model.forwarding import Relay
from attribution.model.loading import load_classifier
from attribution.priors import prior_maps
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

    Each search runs in a thread of its own and waits whenever it needs the model. When all of them wait, the images that they ask for
    are forwarded in one batch. The late rounds of one search have few candidates, which do not fill a device; those of several do.

    Args:
        images: whatever ``load_image`` takes.
        classifier: a ``Classifier``, or a name that ``load_classifier`` takes. Its module is called from one thread only.
        targets: of each image, or one for all; the predicted classes by default.
        together: images searched side by side.
        progress: called with (images done, their total).
        options: further arguments of ``explain``; the same for all images.

    Returns:
        The explanations in the order of the images: those of ``explain`` one by one, up to the rounding of other batch sizes
        (probabilities within 1e-5 in float32; where F of two candidates is that close, the order may differ).

    Raises:
        UserError: another number of targets than images; seconds, which are those of one image; fill "drop" or a confidence classifier,
            which cannot be shared; or what ``explain`` raises for an image, with the number of that image.
    """
    if isinstance(images, str | bytes | Tensor) or not isinstance(images, Sequence):
        raise UserError(f"images are {type(images).__name__}: expected a list of images")
    check_whole("together", together, 1)
    if options.get("seconds") is not None:
        raise UserError("seconds are those of one image, and several searches wait for each other: give evaluations, or explain one by one")
    if drops(options.get("fill", DEFAULT_FILL)):
        raise UserError("fill 'drop' changes the model under each search: explain images one by one with it")
    if "confidence_classifier" in (options.get("objective_options") or {}):
        raise UserError("a confidence classifier is a second model, which several searches cannot share: explain images one by one with it")
    one_for_all = targets is None or isinstance(targets, int | str | np.integer)
    if not one_for_all and (not hasattr(targets, "__len__") or np.ndim(targets) == 0):  # type: ignore[arg-type]
        raise UserError(f"targets are {describe(targets)}: expected a class for each image, or one for all")
    wanted: list[Any] = [targets] * len(images) if one_for_all else list(targets)  # type: ignore[arg-type]
    if len(wanted) != len(images):
        raise UserError(f"{len(wanted)} targets for {len(images)} images: give one for each, or one for all")
    base = load_classifier(classifier)
    options.setdefault("batch_size", None)
    with base.forwarding(options.pop("batch_size")), base.folding():
        meeting = _Meeting(base)
        prior, seed = options.pop("prior", None), options.get("seed", 0)

        def job(at: int) -> _Prepare:
            def prepared() -> _Job:
                begin = prior if prior is None else prior_maps(prior, limit_size(load_image(images[at])), base, wanted[at], seed)
                return lambda lane: explain(images[at], lane, wanted[at], prior=begin or None, **options)

            return prepared

        return meeting.run([job(at) for at in range(len(images))], together, progress)


_Job = Callable[[Classifier], Explanation]
_Prepare = Callable[[], _Job]


class _Meeting:
    """Where searches, each in a thread of its own, have their images forwarded together by the thread that called ``run``."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        classifier.find_out(False)  # here, not in the threads
        self.changed = threading.Condition()
        self.waiting: dict[int, tuple[Tensor, bool]] = {}  # job -> the images that it wants forwarded, and whether with features
        self.answers: dict[int, tuple[Tensor, Tensor] | BaseException] = {}
        self.found: dict[int, Explanation | BaseException] = {}
        self.threads: list[threading.Thread] = []
        self.running = 0

    def run(self, jobs: Sequence[_Prepare], together: int, progress: Progress | None) -> list[Explanation]:
        """Run all jobs, at most ``together`` at a time. Each is prepared in this thread. It then runs in a thread of its own, with a
        classifier whose forward passes are made here.
        """
        own_threads = torch.get_num_threads()
        try:
            self._serve(jobs, together, progress)
        finally:
            self._dismiss(self.threads)
            torch.set_num_threads(own_threads)  # threads that start later would have one as well
        for at, outcome in sorted(self.found.items()):
            if isinstance(outcome, UserError):
                raise type(outcome)(f"image {at}: {outcome}") from outcome
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for _, outcome in sorted(self.found.items()) if isinstance(outcome, Explanation)]

    def _serve(self, jobs: Sequence[_Prepare], together: int, progress: Progress | None) -> None:
        """Start jobs and forward what they ask for, until all are done or one has failed."""
        reported = 0
        while len(self.found) < len(jobs):
            with self.changed:
                failed = any(isinstance(outcome, BaseException) for outcome in self.found.values())
                while len(self.threads) < len(jobs) and self.running < together and not failed:
                    self._start(jobs[len(self.threads)])
                self.changed.wait_for(lambda: len(self.waiting) == self.running)
                asked = dict(sorted(self.waiting.items()))
            if failed and not self.running:
                break
            if asked:
                self._answer(asked)
            if progress is not None and len(self.found) > reported:
                reported = len(self.found)
                progress(reported, len(jobs))
        if progress is not None and reported < len(jobs) == len(self.found):
            progress(len(jobs), len(jobs))

    def _start(self, prepare: _Prepare) -> None:
        at, grad = len(self.threads), torch.is_grad_enabled()
        try:
            job = prepare()
        except Exception as error:  # of this image alone, as if its search had raised it
            failure = error

            def job(_: Classifier) -> Explanation:
                raise failure

        def work() -> None:
            try:
                torch.set_num_threads(1)  # the little that this thread computes must not wake workers beside the model's
                with torch.set_grad_enabled(grad):
                    outcome: Explanation | BaseException = job(self.classifier.with_forward(_Lane(self.classifier.forward, self, at)))
            except BaseException as error:
                outcome = error
            with self.changed:
                self.found[at] = outcome
                self.running -= 1
                self.changed.notify_all()

        self.threads.append(threading.Thread(target=work, daemon=True))
        self.running += 1
        self.threads[-1].start()

    def _answer(self, asked: dict[int, tuple[Tensor, bool]]) -> None:
        """Forward what was asked for: in one batch with features, and in one without."""
        answers: dict[int, tuple[Tensor, Tensor] | BaseException] = {}
        forward = self.classifier.forward
        for want_features in (False, True):
            group = [at for at, (_, wanted) in asked.items() if wanted == want_features]
            if not group:
                continue
            counts = [len(asked[at][0]) for at in group]
            try:
                scores, features = forward(torch.cat([asked[at][0] for at in group]), want_features)
                for at, *parts in zip(group, scores.split(counts), features.split(counts), strict=True):
                    answers[at] = (parts[0], parts[1])
            except Exception:
                for at in group:  # each on its own, so that one failure does not fail the others
                    try:
                        answers[at] = forward(asked[at][0], want_features)
                    except Exception as error:
                        answers[at] = error
        with self.changed:
            for at, answer in answers.items():
                self.answers[at] = answer
                del self.waiting[at]
            self.changed.notify_all()

    def ask(self, at: int, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        """Wait in the thread of a job until its images are forwarded; what went wrong with them is raised here."""
        with self.changed:
            self.waiting[at] = (inputs, want_features)
            self.changed.notify_all()
            self.changed.wait_for(lambda: at in self.answers)
            answer = self.answers.pop(at)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _dismiss(self, threads: Sequence[threading.Thread]) -> None:
        """End the threads that still wait, as after an interrupt."""
        while any(thread.is_alive() for thread in threads):
            with self.changed:
                for at in list(self.waiting):
                    self.answers.setdefault(at, _Dismissed())
                    del self.waiting[at]
                self.changed.notify_all()
            for thread in threads:
                if thread.is_alive():
                    thread.join(0.05)


@dataclass(frozen=True, eq=False)
class _Lane(Relay):
    """The ``Forward`` of one job's classifier: it hands images to the meeting."""

    meeting: _Meeting
    job: int

    def folding(self) -> AbstractContextManager[None]:
        return nullcontext()  # the meeting forwards

    def __call__(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        return self.meeting.ask(self.job, inputs, want_features)


class _Dismissed(Exception):
    """The meeting is over."""
