"""Grid localisation: does an attribution find the one cell of a grid of images that the class is in?"""
