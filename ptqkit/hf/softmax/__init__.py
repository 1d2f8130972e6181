"""Quantize the softmax of language models."""
