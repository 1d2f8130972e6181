"""Find out what makes a model hard to quantize."""
