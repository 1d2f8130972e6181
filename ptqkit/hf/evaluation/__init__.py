"""Measure language models on text."""
