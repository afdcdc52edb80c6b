"""Neuron paths on a data set: what removing them does, how classes differ, and the report."""
