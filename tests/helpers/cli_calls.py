"""Calls of the command line that several tests make."""

from __future__ import annotations

from ptqkit.cli import main

__all__ = ["SMALL", "model_of", "quantize"]


SMALL = ["--samples", "4", "--sequence-length", "24", "--group-size", "32", "--quiet"]


def model_of(folder):
    return str(folder / "model")


def quantize(folder, *options, out):
    given = ["--calibration", str(folder / "train.txt"), *SMALL, "--out", str(out)]
    return main(["quantize", model_of(folder), *given, *options])
