"""Intervals, paired tests, ranks and checks of scores."""
