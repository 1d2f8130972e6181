"""Batches of a model's inputs: a short one, and the padding mask of what a layer reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ptqkit.errors import CalibrationError
from ptqkit.hf.data.calibration import batch_shape, padding_mask
from ptqkit.nn.experts import routed_rows

__all__ = ["has_features_beside_tokens", "has_row_per_token", "match_mask", "short_batch"]

#: Tokens of the forward passes that only look at a model.
PROBE_TOKENS = 16
_TOKENS = ("input_ids", "decoder_input_ids")


def short_batch(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the first tokens of the first row, as if none of them were padding.

    Samples without token ids are not shortened, only the first is taken. Token ids together with
    anything that is not (batch, ...) integers, such as the pixels of images whose places the ids
    name, cannot be shortened consistently: such a batch stays whole.
    """
    rows = batch_shape(batch)[0]
    if not all(value.dim() and len(value) == rows for value in batch.values()):
        return dict(batch)
    if "input_ids" not in batch:
        return {key: value[:1] for key, value in batch.items()}
    if any(value.dim() != 2 or _is_feature(key, value) for key, value in batch.items()):
        return dict(batch)
    length = batch["input_ids"].shape[1]
    short = {}
    for key, value in batch.items():
        value = value[:1]
        if value.shape[1] == length:
            value = value[:, :PROBE_TOKENS]
        short[key] = torch.ones_like(value) if key == "attention_mask" else value
    return short


def _is_feature(key: str, value: torch.Tensor) -> bool:
    return value.is_floating_point() and not key.endswith("mask")


def has_features_beside_tokens(batch: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a batch has token ids and features, such as the pixels of images."""
    beside = (item for item in batch.items() if item[0] not in _TOKENS)
    return "input_ids" in batch and any(_is_feature(*item) for item in beside)


def has_row_per_token(value: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> bool:
    """Return whether an input of a layer has a row for each token id, or is some of these rows."""
    if routed_rows(value) is not None:
        return True
    shapes = [tuple(batch[k].shape) for k in _TOKENS if k in batch]
    return tuple(value.shape[:-1]) in [s for n, m in shapes for s in ((n, m), (n * m,))]


def match_mask(
    value: torch.Tensor, batch: Mapping[str, torch.Tensor], mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Find the padding mask that belongs to an input of a layer, by its leading shape.

    Of an expert's input, the rows that were routed to it say which tokens they are. Where a batch
    has features beside its tokens, such as pixels, an input that no mask fits is made of them or
    pooled: none of its rows is padding.

    Raises
    ------
    CalibrationError
        If positions are padded and not exactly one mask of the batch fits the input's shape.
    """
    masks = {"input_ids": mask, "decoder_input_ids": padding_mask(batch, "decoder_attention_mask")}
    if all(m is None for m in masks.values()):
        return None
    routed = routed_rows(value)
    leading = tuple(value.shape[:-1]) if routed is None else (routed.tokens,)
    fitting = []
    for key, found in masks.items():
        like = batch.get(key, found)
        shape = None if like is None else tuple(like.shape)
        if shape is not None and leading in (shape, (shape[0] * shape[1],)):
            fitting.append(found)
    if len(fitting) == 1:
        if fitting[0] is None:
            return None
        rows = fitting[0].reshape(leading)
        return rows if routed is None else rows.to(routed.rows.device)[routed.rows]
    if not fitting and routed is None and has_features_beside_tokens(batch):
        return None
    raise CalibrationError(
        f"an input of shape {tuple(value.shape)} fits {len(fitting)} attention masks of the batch, "
        "so padding cannot be left out; calibrate without padding, or skip the layer"
    )
