"""Old forms of calls keep working for one version."""

from __future__ import annotations

from typing import Any

import pytest

import attribution as at
from attribution.deprecation import image_first


@image_first
def received(image: Any, classifier: Any, target: Any = None, *, steps: int = 1) -> tuple[Any, ...]:
    """A function of an image and a classifier."""
    return image, classifier, target, steps


def test_the_new_order_goes_through_in_silence(cnn: at.Classifier) -> None:
    assert received("cat.jpg", cnn, 3, steps=2) == ("cat.jpg", cnn, 3, 2)
    assert received("cat.jpg", "zoo:cnn") == ("cat.jpg", "zoo:cnn", None, 1)
    assert received("cat.jpg", classifier=cnn) == ("cat.jpg", cnn, None, 1)


def test_the_old_order_is_told_by_the_types(cnn: at.Classifier) -> None:
    for classifier in (cnn, "zoo:vit"):
        with pytest.warns(DeprecationWarning, match=r"received\(classifier, image, \.\.\.\) is now received\(image, classifier"):
            assert received(classifier, "cat.jpg", 3) == ("cat.jpg", classifier, 3, 1)
    with pytest.warns(DeprecationWarning, match="is now received"):
        assert received(cnn, image="cat.jpg", target=3) == ("cat.jpg", cnn, 3, 1)
    with pytest.warns(DeprecationWarning, match="is now received"):
        assert received(cnn) == (None, cnn, None, 1)
    assert received.__doc__ == "A function of an image and a classifier."
