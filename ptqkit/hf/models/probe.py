"""Find in one short forward pass which layers of a model run, in which order and on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ptqkit.errors import CalibrationError, prefix_error
from ptqkit.hf.data.calibration import batch_shape, padding_mask
from ptqkit.hf.models.inputs import (
    has_features_beside_tokens,
    has_row_per_token,
    match_mask,
    short_batch,
)
from ptqkit.nn.forward import calibration_mode, forward, hooks, tensor_key, thread_state

__all__ = ["Probe", "probe_model"]


@dataclass
class Probe:
    """What one short forward pass shows.

    Attributes
    ----------
    groups : list of list of str
        Layers in order of execution, those fed by the same tensor together.
    repeated : dict of str to int
        Layers called more than once, with the count.
    uncalled : list of str
        Layers not called at all.
    inside_mode : str or None
        First layer that runs inside a thread-local mode which the caller had not entered.
    blocks : list of str
        Blocks in order of execution.
    positions : int
        Most rows that a layer was given per sample: of images and sounds nothing else tells it.
    expands : bool
        Whether the batch has token ids with features beside them, and no layer reads a row for
        each id: the model puts positions of its own between those of the tokens.
    """

    groups: list[list[str]] = field(default_factory=list)
    repeated: dict[str, int] = field(default_factory=dict)
    uncalled: list[str] = field(default_factory=list)
    inside_mode: str | None = None
    blocks: list[str] = field(default_factory=list)
    positions: int = 1
    expands: bool = False


def probe_model(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batch: Mapping[str, torch.Tensor],
    blocks: Mapping[str, nn.Module],
    share: bool = True,
) -> Probe:
    """Run a few tokens through the model and record which layers run when, and on what."""
    result = Probe()
    baseline: tuple[Any, ...] = ()
    inputs: dict[tuple[Any, ...], list[str]] = {}
    # The inputs are kept until the end, so that no address is used twice.
    alive: list[torch.Tensor] = []
    counts = dict.fromkeys(modules, 0)
    short = short_batch(batch)
    samples, mask = batch_shape(short)[0], padding_mask(short)
    by_token: list[str] = []

    def record(name: str, value: torch.Tensor) -> None:
        counts[name] += 1
        if counts[name] > 1:
            return
        if result.inside_mode is None and thread_state() != baseline:
            result.inside_mode = name
        try:
            match_mask(value, short, mask)
        except CalibrationError as error:
            raise prefix_error(error, name) from None
        if has_row_per_token(value, short):
            by_token.append(name)
        rows = value.numel() // value.shape[-1]
        result.positions = max(result.positions, -(-rows // samples))
        alive.append(value)
        key = tensor_key(value) if share else (name,)
        if key not in inputs:
            inputs[key] = []
            result.groups.append(inputs[key])
        inputs[key].append(name)

    def record_block(name: str, value: torch.Tensor) -> None:
        if name not in result.blocks:
            result.blocks.append(name)

    with calibration_mode(model), hooks(modules, record), hooks(blocks, record_block):
        baseline = thread_state()
        forward(model, short)
    result.repeated = {k: n for k, n in counts.items() if n > 1}
    result.uncalled = [k for k, n in counts.items() if n == 0]
    result.expands = has_features_beside_tokens(short) and not by_token
    return result
