"""Metrics of explanations under one protocol."""

from evaluation.metrics.protocol import PROTOCOLS, Protocol
from evaluation.metrics.registry import METRICS, Metric

__all__ = ["METRICS", "PROTOCOLS", "Metric", "Protocol"]
