"""Match the inputs of a layer with the batch that they come from."""

from __future__ import annotations

import torch

from ptqkit.errors import CalibrationError
from ptqkit.hf.data.calibration import padding_mask

__all__ = ["match_mask"]


def match_mask(
    value: torch.Tensor, batch: dict[str, torch.Tensor], mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Find the padding mask that belongs to an input of a layer, by its leading shape.

    Raises
    ------
    CalibrationError
        If positions are padded and not exactly one mask of the batch fits the input's shape.
    """
    masks = {"input_ids": mask, "decoder_input_ids": padding_mask(batch, "decoder_attention_mask")}
    if all(m is None for m in masks.values()):
        return None
    leading = tuple(value.shape[:-1])
    fitting = []
    for key, found in masks.items():
        shape = tuple(batch[key].shape) if key in batch else None
        if shape is not None and leading in (shape, (shape[0] * shape[1],)):
            fitting.append(found)
    if len(fitting) == 1:
        return None if fitting[0] is None else fitting[0].reshape(leading)
    raise CalibrationError(
        f"an input of shape {tuple(value.shape)} fits {len(fitting)} attention masks of the batch, "
        "so padding cannot be left out; calibrate without padding"
    )
