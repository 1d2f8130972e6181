"""Checkpoints: one file per format, the writer and the reader."""
