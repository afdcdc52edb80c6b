"""Data sets: recipes, folders and lists of images."""
