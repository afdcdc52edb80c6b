"""Wrong arguments of functions, as a table: each is answered by a ``UserError`` of one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attribution as at

IMAGE = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
FAST: dict[str, Any] = {"regions": "grid", "region_options": {"count": 4}, "search": "budget"}
CALLS: dict[str, tuple[Callable[[at.Classifier], Any], str]] = {
    "a number as prior": (lambda cnn: at.explain(IMAGE, cnn, **FAST, prior=5), "a prior is int: expected auto, a method"),
    "an unknown method as prior": (lambda cnn: at.explain(IMAGE, cnn, **FAST, prior="x"), "unknown method 'x'"),
    "one array as targets": (
        lambda cnn: at.explain_many([IMAGE], cnn, targets=np.array(3), **FAST),
        r"targets are int64",
    ),
    "too many targets": (lambda cnn: at.explain_many([IMAGE], cnn, targets=[1, 2], **FAST), "2 targets for 1 images"),
    "an image of NaN": (lambda cnn: at.explain(torch.full((3, 8, 8), torch.nan), cnn, **FAST), "float values from nan to nan"),
    "an image of complex numbers": (lambda cnn: at.explain(torch.zeros(3, 8, 8, dtype=torch.complex64), cnn, **FAST), "complex64"),
    "no image": (lambda cnn: at.explain(None, cnn, **FAST), "cannot read an image from NoneType"),
    "a class that is none": (lambda cnn: at.explain(IMAGE, cnn, target=2.5, **FAST), "2.5|float"),
    "a negative class": (lambda cnn: at.explain(IMAGE, cnn, target=-1, **FAST), "-1"),
    "an unknown search": (lambda cnn: at.explain(IMAGE, cnn, search="x"), "search is 'x': expected one of"),
    "seconds that are none": (lambda cnn: at.explain(IMAGE, cnn, **FAST, seconds="5"), "seconds is '5'"),
    "a label map of another size": (lambda cnn: at.explain(IMAGE, cnn, regions=torch.zeros(8, 8, dtype=torch.long)), "regions|label"),
    "an unknown method": (lambda cnn: at.attribute(IMAGE, cnn, method="x"), "unknown method 'x'"),
    "an unknown option": (lambda cnn: at.attribute(IMAGE, cnn, method="saliency", colour=1), "colour"),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_line(cnn: at.Classifier, name: str) -> None:
    call, line = CALLS[name]
    with pytest.raises(at.UserError, match=line) as caught:
        call(cnn)
    assert "\n" not in str(caught.value)
