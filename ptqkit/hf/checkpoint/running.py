"""Let the quantized layers of a loaded model run packed, or dequantized."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit.errors import check_choice
from ptqkit.hf.models.one_token import fuse_blocks, unfuse_blocks
from ptqkit.nn.packed_linear import COMPUTE, PackedLinear
from ptqkit.nn.panels import has_panels
from ptqkit.nn.qlinear import QLinear

__all__ = ["ComputeReport", "check_compute", "set_compute"]


@dataclass(frozen=True)
class ComputeReport(Tabular):
    """Say how the quantized layers of a model are computed.

    Attributes
    ----------
    asked : str
        The ``compute`` of :func:`ptqkit.load`.
    layers : dict of str to str
        What is done, by module name.
    fused_blocks : int
        Decoder blocks that take a single token in two calls of the core.
    """

    __repr__ = one_line_repr

    asked: str
    layers: dict[str, str] = field(default_factory=dict)
    fused_blocks: int = 0

    def _rows(self) -> list[dict[str, Any]]:
        return [{"layer": name, "computed": what} for name, what in self.layers.items()]

    def __str__(self) -> str:
        counts = Counter(self.layers.values())
        found = "; ".join(f"{count} x {what}" for what, count in counts.most_common())
        blocks = self.fused_blocks
        fused = f"; {blocks} block{'s' * (blocks != 1)} fused for single tokens" if blocks else ""
        return f"compute={self.asked!r}: {found or 'no quantized layers'}{fused}"


def check_compute(compute: str) -> None:
    """Raise ValueError, with the word that was probably meant, unless this is a choice."""
    check_choice("compute", compute, COMPUTE)


def set_compute(model: nn.Module, compute: str = "auto", *, fused: bool = True) -> ComputeReport:
    """Choose how the quantized layers of a loaded model compute; packs them if they are not yet.

    Layers are packed one after the other, so memory holds one more at a time. What cannot be
    packed (codes of 5 to 7 bits, a model that is not on the CPU) stays dequantized: the report
    says so, and a warning if "packed" or "int8" was asked for.

    Parameters
    ----------
    model : nn.Module
        As :func:`ptqkit.load` returns it; changed in place.
    compute : {"auto", "packed", "int8", "dequantize"}
        See :class:`ptqkit.nn.PackedLinear`.
    fused : bool
        Let decoder blocks whose layers are all packed take a single token in two calls of the core
        (:func:`ptqkit.hf.models.one_token.fuse_blocks`).

    Returns
    -------
    ComputeReport
        Also kept as ``model.ptqkit_compute``.
    """
    check_compute(compute)
    done = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, QLinear):
            continue
        obstacle = "" if compute == "dequantize" else _obstacle(module)
        if isinstance(module, PackedLinear):
            module.compute = "auto" if obstacle else compute
        elif compute != "dequantize" and not obstacle:
            module = PackedLinear.of(module, compute)
            model.set_submodule(name, module)
        packed = isinstance(module, PackedLinear) and not obstacle
        done[name] = module.describe() if packed else f"dequantized{obstacle}"
    unfuse_blocks(model)
    blocks = fuse_blocks(model) if fused and compute != "dequantize" else 0
    report = ComputeReport(compute, done, blocks)
    model.ptqkit_compute = report
    left = [name for name, what in done.items() if what.startswith("dequantized (")]
    if left and compute in ("packed", "int8"):
        warnings.warn(f"{left[0]} and {len(left) - 1} more: {done[left[0]]}", stacklevel=2)
    return report


def _obstacle(module: QLinear) -> str:
    device: Any = module.scales.device
    if device.type != "cpu":
        return f" (on {device}, packed layers run on the CPU)"
    return "" if has_panels(module.bits) else f" ({module.bits} bits have no packed layout)"
