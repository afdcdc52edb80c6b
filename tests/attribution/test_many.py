"""Several images at once: the same explanations, fuller batches, one thread for the model."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import attribution as at

OPTIONS = {"regions": "grid", "region_options": {"count": 9}}


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 32, 32, generator=generator) for _ in range(5)]


class Watched(nn.Module):
    """Counts the images of every call, the threads that it is called from, and the workers that it has."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.batches, self.threads, self.workers = inner, list[int](), set[int](), set[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        self.threads.add(threading.get_ident())
        self.workers.add(torch.get_num_threads())
        return self.inner(x)


def watched(classifier: at.Classifier) -> tuple[at.Classifier, Watched]:
    module = Watched(classifier.module)  # type: ignore[arg-type]
    way = classifier.preprocessing
    return at.Classifier(module, size=way.size, mean=way.mean, std=way.std, class_names=classifier.class_names, batch_size=256), module


@pytest.mark.parametrize(
    ("search", "together"),
    [
        ("bidirectional", 3),
        ("budget", 8),
        *(pytest.param(search, count, marks=pytest.mark.slow) for search, count in [("bidirectional", 1), ("budget", 3), ("greedy", 8)]),
    ],
)
def test_the_same_as_one_by_one(cnn: at.Classifier, images: list[Tensor], search: str, together: int) -> None:
    many = at.explain_many(images, cnn, together=together, search=search, **OPTIONS)
    assert len(many) == len(images)
    for image, found in zip(images, many, strict=True):
        alone = at.explain(image, cnn, search=search, **OPTIONS)
        assert found.target == alone.target and found.evaluations == alone.evaluations
        assert found.order.tolist() == alone.order.tolist()
        assert torch.allclose(found.insertion_scores, alone.insertion_scores, atol=1e-5)
        assert torch.allclose(found.deletion_scores, alone.deletion_scores, atol=1e-5)


def test_batches_are_fuller_and_one_thread_calls_the_model(cnn: at.Classifier, images: list[Tensor]) -> None:
    alone, single = watched(cnn)
    for image in images:
        at.explain(image, alone, **OPTIONS)
    packed, module = watched(cnn)
    at.explain_many(images, packed, together=5, **OPTIONS)
    assert sum(module.batches) - 2 == sum(single.batches) - 2  # two images of each are the probe
    assert len(module.batches) < len(single.batches) / 3
    assert module.threads == {threading.get_ident()}
    assert module.workers == {torch.get_num_threads()} == single.workers


def test_features_and_prototypes_travel_too(cnn: at.Classifier, images: list[Tensor]) -> None:
    matrix = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))[:, : cnn.features(cnn.inputs(images[0])).shape[1]]
    clip = cnn.with_prototypes(matrix, scale=5.0, normalize=True, class_names=["a", "b", "c", "d"])
    options = {**OPTIONS, "objective_options": {"consistency": "cosine"}, "weights": at.ScoreWeights(1.0, 1.0, 0.0, 0.1)}
    for found, image in zip(at.explain_many(images, clip, "b", **options), images, strict=True):
        alone = at.explain(image, clip, "b", **options)
        assert found.target_name == "b" and found.order.tolist() == alone.order.tolist()


def test_targets_of_each_image(cnn: at.Classifier, images: list[Tensor]) -> None:
    found = at.explain_many(images[:3], cnn, [0, "dog", None], **OPTIONS)
    assert [each.target for each in found[:2]] == [0, cnn.target_index("dog")]
    assert found[2].target == int(found[2].probabilities.argmax())


def test_progress_counts_images(cnn: at.Classifier, images: list[Tensor]) -> None:
    seen: list[tuple[int, int]] = []
    at.explain_many(images, cnn, together=2, progress=lambda done, total: seen.append((done, total)), **OPTIONS)
    assert seen[-1] == (5, 5) and [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_nothing_is_left_behind(cnn: at.Classifier, images: list[Tensor]) -> None:
    before, own, threads = threading.active_count(), cnn.batch_size, torch.get_num_threads()
    assert at.explain_many([], cnn) == []
    with pytest.raises(at.UserError, match="image 1: an image tensor of shape"):
        at.explain_many([images[0], torch.rand(2, 2), images[2]], cnn, batch_size=4, **OPTIONS)

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        at.explain_many(images, cnn, together=2, progress=interrupted, **OPTIONS)
    assert threading.active_count() == before and cnn.batch_size == own
    later: list[int] = []  # in a thread that starts afterwards
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [threads] and torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": [1, 2]}, "2 targets for 5 images"),
        ({"together": 0}, "together is 0"),
        ({"images": torch.rand(3, 8, 8)}, "expected a list of images"),
        ({"images": "cat.png"}, "expected a list of images"),
    ],
)
def test_bad_input(cnn: at.Classifier, images: list[Tensor], arguments: dict, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        at.explain_many(**{"images": images, "classifier": cnn, **arguments}, **OPTIONS)


def test_only_the_image_fails_that_must(cnn: at.Classifier, images: list[Tensor]) -> None:
    class Picky(nn.Module):
        """Refuses batches in which an image is all white."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = cnn.module

        def forward(self, x: Tensor) -> Tensor:
            white = (1 - cnn.preprocessing.mean[0]) / cnn.preprocessing.std[0]
            if bool((x[:, 0] > white - 1e-3).flatten(1).all(dim=1).any()):
                raise at.UserError("too bright")
            return self.inner(x)

    way = cnn.preprocessing
    picky = at.Classifier(Picky().eval(), size=way.size, mean=way.mean, std=way.std, class_names=cnn.class_names)
    with pytest.raises(at.UserError, match=r"^image 1: too bright"):
        at.explain_many([images[0], torch.ones(3, 32, 32), images[1]], picky, **OPTIONS)
    found = at.explain_many(images[:2], picky, **OPTIONS)  # and it works afterwards
    assert [each.order.tolist() for each in found] == [at.explain(image, cnn, **OPTIONS).order.tolist() for image in images[:2]]


def test_the_kind_of_an_error_is_kept(cnn: at.Classifier, images: list[Tensor]) -> None:
    box = at.Classifier(lambda x: x.mean(dim=(2, 3)), size=32, scores="logits")
    with pytest.raises(at.UserError, match=r"image 0: .* is a black box without features"):
        at.explain_many(images[:2], box, weights=at.ScoreWeights(1.0, 1.0, 0.0, 1.0), **OPTIONS)
    with pytest.raises(at.UserError, match="fill 'drop' changes the model"):
        at.explain_many(images[:2], cnn, fill="drop", **OPTIONS)

    def refusing(objective: Any) -> list[int]:
        raise at.NotApplicable("no order")

    with pytest.raises(at.NotApplicable, match="image 0: no order"):
        at.explain_many(images[:2], cnn, **{**OPTIONS, "search": refusing})
    with pytest.raises(at.UserError, match="a confidence classifier is a second model"):
        at.explain_many(images[:2], cnn, objective_options={"confidence_classifier": cnn}, **OPTIONS)


def test_files_and_numbers_of_numpy(cnn: at.Classifier, images: list[Tensor], tmp_path: Path) -> None:
    paths = []
    for at_, image in enumerate(images[:3]):
        paths.append(tmp_path / f"{at_}.png")
        Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(paths[-1])
    found = at.explain_many(paths, cnn, np.int64(3), **OPTIONS)  # type: ignore[arg-type]
    assert [each.target for each in found] == [3, 3, 3]
    found = at.explain_many(images[:3], cnn, np.array([1, 2, 0]), fill=np.array([0.5, 0.5, 0.5]), **OPTIONS)  # type: ignore[arg-type]
    assert [each.target for each in found] == [1, 2, 0]
