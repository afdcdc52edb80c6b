"""Concepts: what a network sees, as parts that many images share (CRAFT), as sparse combinations of neurons (semi-NMF), and by the images
that excite a unit.
"""

from __future__ import annotations

from attribution.concepts.craft import Concepts, craft
from attribution.concepts.exemplars import Exemplars, exemplars
from attribution.concepts.semi_nmf import SemiNMF, semi_nmf

__all__ = ["Concepts", "Exemplars", "SemiNMF", "craft", "exemplars", "semi_nmf"]
