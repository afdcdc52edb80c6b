"""Data sets: recipes, folders and lists of images."""

from evaluation.data.dataset import ImageDataset, Sample
from evaluation.data.recipes import load_dataset, load_recipe, open_dataset

__all__ = ["ImageDataset", "Sample", "load_dataset", "load_recipe", "open_dataset"]
