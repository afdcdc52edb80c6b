"""Digests and settings as plain JSON."""

from __future__ import annotations

import torch

from attribution.provenance import digest_of, pixels_digest


def test_a_digest_of_pixels_depends_on_every_value_the_shape_and_the_type() -> None:
    image = torch.linspace(0, 1, 48).reshape(3, 4, 4)
    changed = image.clone()
    changed[2, 3, 3] += 1e-6
    others = [changed, image.reshape(3, 2, 8), image.double(), image.flip(2)]
    digests = {pixels_digest(each) for each in (image, *others)}
    assert len(digests) == 5
    assert pixels_digest(image.clone()) == pixels_digest(image.flip(2).flip(2)) == pixels_digest(image)


def test_a_digest_of_values_does_not_depend_on_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [2, 3]}) == digest_of({"b": [2, 3], "a": 1}) != digest_of({"a": 1, "b": [3, 2]})
