"""Metrics of explanations under one protocol."""
