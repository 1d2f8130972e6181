"""Levers as NumPy and PyTorch prototypes, outside of the package."""
