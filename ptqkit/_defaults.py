"""Sizes used if nothing else is asked for."""

from __future__ import annotations

__all__ = [
    "BATCH_SIZE",
    "FORWARD_BATCH_SIZE",
    "LONGEST_LINE",
    "SAMPLES",
    "SEQUENCE_LENGTH",
    "TUNE_CODES",
    "TUNE_STEPS",
]

SAMPLES = 128
"""Windows of calibration text, as many as in the GPTQ paper."""

SEQUENCE_LENGTH = 512
"""Tokens per window of calibration text, the start token included."""

BATCH_SIZE = 4
"""Windows per forward pass while activations are kept for a quantizer, and on the command line."""

FORWARD_BATCH_SIZE = 8
"""Windows per forward pass if nothing but the logits is kept: there is room for more of them."""

LONGEST_LINE = 1 << 28
"""Characters of a line of a .jsonl file: a compressed one may expand without end."""

TUNE_CODES = 0.01
"""How far a code before rounding moves in a step of learning, if codes learn."""

TUNE_STEPS = 150
"""Steps in which scales, gains and biases learn."""
