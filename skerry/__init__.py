"""Skerry: inference on GPU boxes at the edge that stands when the link is gone."""

__version__ = "0.1.0"
