"""Open data sets of images: from a recipe, a folder or a list of files."""
