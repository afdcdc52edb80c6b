"""What is explained comes first, then the classifier; the old order works for one version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attribution as at
import evaluation as ev

EVALUATORS: dict[str, Callable[..., float]] = {
    "perturbation_curves": lambda *first, regions: (
        (
            ev.perturbation_curves(
                *first, at.Explanation(PHOTO, 0, ("a",), torch.ones(1), pixel_map=MAP), 3, ev.Protocol(), regions=regions
            )
        ).insertion_auc
    ),
    "random_order_curves": lambda *first, regions: float(ev.random_order_curves(*first, regions, 3, ev.Protocol(), count=1)[0]),
    "road": lambda *first, regions: ev.road(*first, at.Explanation(PHOTO, 0, ("a",), torch.ones(1), pixel_map=MAP), 3).score,
    "mu_fidelity": lambda *first, regions: ev.mu_fidelity(*first, MAP, 3),
    "infidelity": lambda *first, regions: ev.infidelity(*first, MAP, 3),
}
PHOTO = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
MAP = PHOTO.mean(dim=0)


@pytest.mark.parametrize("name", EVALUATORS)
def test_the_old_order_gives_the_same_number_and_a_warning(name: str, cnn: at.Classifier) -> None:
    regions: Any = at.make_regions(PHOTO, "grid", count=4)
    expected = EVALUATORS[name](PHOTO, cnn, regions=regions)
    with pytest.warns(DeprecationWarning, match=rf"{name}\(classifier, image, ...\) is now {name}\(image, classifier, ...\)"):
        old = EVALUATORS[name](cnn, PHOTO, regions=regions)
    assert old == expected


@pytest.mark.parametrize("name", EVALUATORS)
def test_a_classifier_may_be_named(name: str, cnn: at.Classifier) -> None:
    regions: Any = at.make_regions(PHOTO, "grid", count=4)
    assert EVALUATORS[name](PHOTO, "zoo:cnn", regions=regions) == EVALUATORS[name](PHOTO, cnn, regions=regions)
