"""See in one short forward pass which layers of a model run, in which order and on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ptqkit.nn.forward import calibration_mode, forward, hooks, tensor_key, thread_state

__all__ = ["Probe", "probe"]


_PROBE_TOKENS = 16


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
    straddling : str or None
        A layer that runs inside a thread-local mode the caller had not entered.
    blocks : list of str
        Blocks in order of execution.
    """

    groups: list[list[str]] = field(default_factory=list)
    repeated: dict[str, int] = field(default_factory=dict)
    uncalled: list[str] = field(default_factory=list)
    straddling: str | None = None
    blocks: list[str] = field(default_factory=list)


def probe(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batch: Mapping[str, torch.Tensor],
    blocks: Mapping[str, nn.Module],
    share: bool = True,
) -> Probe:
    """Run a few tokens through the model and see which layers run when, and on what."""
    result = Probe()
    baseline: tuple[Any, ...] = ()
    inputs: dict[tuple[Any, ...], list[str]] = {}
    # The inputs are kept until the end, so that no address is used twice.
    alive: list[torch.Tensor] = []
    counts = dict.fromkeys(modules, 0)

    def see(name: str, value: torch.Tensor) -> None:
        counts[name] += 1
        if counts[name] > 1:
            return
        if result.straddling is None and thread_state() != baseline:
            result.straddling = name
        alive.append(value)
        key = tensor_key(value) if share else (name,)
        if key not in inputs:
            inputs[key] = []
            result.groups.append(inputs[key])
        inputs[key].append(name)

    def see_block(name: str, value: torch.Tensor) -> None:
        if name not in result.blocks:
            result.blocks.append(name)

    with calibration_mode(model), hooks(modules, see), hooks(blocks, see_block):
        baseline = thread_state()
        forward(model, _short(batch))
    result.repeated = {k: n for k, n in counts.items() if n > 1}
    result.uncalled = [k for k, n in counts.items() if n == 0]
    return result


def _short(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """First tokens of the first row; every position counts."""
    length = batch["input_ids"].shape[1]
    short = {}
    for key, value in batch.items():
        value = value[:1]
        if value.dim() >= 2 and value.shape[1] == length:
            value = value[:, :_PROBE_TOKENS]
        short[key] = torch.ones_like(value) if key == "attention_mask" else value
    return short
