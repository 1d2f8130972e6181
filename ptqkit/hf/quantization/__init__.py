"""Quantize the linear layers of a model."""
