"""Quantize the softmax of any attention: estimate, correct, compare, store."""
