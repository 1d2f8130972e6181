"""A model of which some tensors are quantized at a time, and what that does to its logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ptqkit._repr import one_line_repr
from ptqkit.arrays.metrics import SQNR
from ptqkit.arrays.softmax import softmax_grid
from ptqkit.arrays.solvers import rtn
from ptqkit.errors import CalibrationError, UnsupportedModuleError
from ptqkit.hf.data.calibration import CalibrationSet
from ptqkit.hf.models.attention import (
    attention_hooks,
    find_attention,
    installed_attention,
    measure_ranges,
)
from ptqkit.hf.models.dtypes import dtype_of
from ptqkit.hf.models.structure import find_blocks
from ptqkit.nn.activations import (
    ActivationQuantizer,
    install_quantizer,
    installed_quantizer,
    remove_quantizers,
)
from ptqkit.nn.attention_quantizer import (
    ATTENTION_KINDS,
    AttentionQuantizer,
    AttentionRanges,
)
from ptqkit.nn.forward import calibration_mode, forward, hooks, model_inputs
from ptqkit.nn.linear import LinearView, is_linear
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer
from ptqkit.nn.softmax.study import refuse_installed
from ptqkit.nn.statistics import range_accumulator
from ptqkit.recipe.options import ActivationQuantization

__all__ = ["Bench", "Case"]


@dataclass
class Case:
    """Tensors that are quantized together: (kind, module name)."""

    __repr__ = one_line_repr

    kind: str
    layer: str
    members: list[tuple[str, str]] = field(default_factory=list)


class Bench:
    """A model with the ranges of its tensors and its float logits."""

    def __init__(
        self, model: nn.Module, data: CalibrationSet, kinds: Sequence[str], bits: int
    ) -> None:
        self.model, self.data, self.kinds, self.bits = model, data, kinds, bits
        self.linears: dict[str, LinearView] = {}
        self.inputs: dict[str, ActivationQuantizer] = {}
        self.attention: dict[str, AttentionRanges] = {}
        self.blocks = [name for names in find_blocks(model).values() for name in names]
        if any(kind in ATTENTION_KINDS for kind in kinds):
            refuse_installed(installed_attention(model))
            find_attention(model)
            self.attention = measure_ranges(model, data)
        if "weights" in kinds or "inputs" in kinds:
            self._find_linears()
        if "inputs" in kinds:
            self.inputs = self._input_quantizers()
        self.reference = [self._logits(i) for i in range(len(data.batches))]

    def _find_linears(self) -> None:
        for name, module in self.model.named_modules():
            if is_linear(module) and self._block(name) != name:
                self.linears[name] = LinearView(module)
        if not self.linears:
            raise UnsupportedModuleError(
                f"{type(self.model).__name__} has no float linear layers in its blocks; leave "
                "weights and inputs out of kinds"
            )
        taken = [n for n, v in self.linears.items() if installed_quantizer(v.module) is not None]
        if taken:
            raise ValueError(
                f"the inputs of {taken[0]} are quantized already: call "
                "ptqkit.nn.remove_quantizers(model) first"
            )

    def _block(self, name: str) -> str:
        """Return the block that holds a module; its own name outside of blocks."""
        return next((b for b in self.blocks if name.startswith(f"{b}.")), name)

    def _input_quantizers(self) -> dict[str, ActivationQuantizer]:
        device = next(self.model.parameters()).device
        found = {n: range_accumulator(v.shape[1], device) for n, v in self.linears.items()}
        rows: list[torch.Tensor | None] = [None]

        def record(name: str, x: torch.Tensor) -> None:
            mask = rows[0]
            found[name].update(x, None if mask is None else mask.reshape(x.shape[:-1]))

        modules = {name: view.module for name, view in self.linears.items()}
        with hooks(modules, record), calibration_mode(self.model):
            for batch, mask in zip(self.data.batches, self.data.masks(), strict=True):
                rows[0] = mask
                forward(self.model, batch)
        spec, dtype = ActivationQuantization(self.bits, "tensor"), dtype_of(self.model)
        ranges = {n: r.finish() for n, r in found.items()}
        idle = [n for n, r in ranges.items() if not r.tokens]
        if idle:
            raise CalibrationError(f"no calibration token reached {idle[0]}; give more data")
        return {n: ActivationQuantizer.calibrate(spec, r, dtype) for n, r in ranges.items()}

    def cases(self, by: str) -> list[Case]:
        """All tensors of the kinds, put together as ``by`` says."""
        members = []
        for kind in self.kinds:
            names = self.attention if kind in ATTENTION_KINDS else self.linears
            members += [(kind, name) for name in names]
        found: dict[tuple[str, str], Case] = {}
        for kind, name in members:
            key = {
                "kind": (kind, "all"),
                "layer": ("all", self._block(name)),
                "module": (kind, name),
            }[by]
            found.setdefault(key, Case(*key)).members.append((kind, name))
        return list(found.values())

    @contextlib.contextmanager
    def quantized(self, case: Case) -> Iterator[None]:
        """Quantize the tensors of a case; everything is put back bit for bit."""
        dtype = dtype_of(self.model)
        attention: dict[str, dict[str, Any]] = {}
        for kind, name in case.members:
            if kind == "softmax":
                quantizer: Any = SoftmaxQuantizer(softmax_grid(self.bits))
            elif kind in ATTENTION_KINDS:
                quantizer = self.attention[name].quantizer(kind, self.bits, dtype)
            else:
                continue
            attention.setdefault(name, {})[kind] = quantizer
        with contextlib.ExitStack() as stack:
            if attention:
                quantizers = {n: AttentionQuantizer(q) for n, q in attention.items()}
                stack.enter_context(attention_hooks(self.model, quantizers))
            for kind, name in case.members:
                if kind == "weights":
                    stack.enter_context(self._rounded(name))
                elif kind == "inputs":
                    module = self.linears[name].module
                    install_quantizer(module, self.inputs[name])
                    stack.callback(remove_quantizers, module)
            yield

    @contextlib.contextmanager
    def _rounded(self, name: str) -> Iterator[None]:
        view = self.linears[name]
        kept = view.weight.clone()
        try:
            view.write(rtn(view.read(), bits=self.bits, group_size=None, name=name).dequantize())
            yield
        finally:
            view.weight.copy_(kept)

    def _logits(self, index: int) -> torch.Tensor:
        """Return the logits of a batch on the host, in float32, 0 at padded positions."""
        batch, rows = self.data.batches[index], self.data.masks()[index]
        with calibration_mode(self.model):
            output = self.model(**model_inputs(self.model, batch))
        logits = getattr(output, "logits", None)
        if logits is None:
            raise UnsupportedModuleError(
                f"{type(self.model).__name__} returns no logits to compare; take the class with "
                "its head, such as AutoModelForCausalLM"
            )
        logits = logits.float().cpu()
        if rows is None or logits.dim() != 3 or logits.shape[:2] != rows.shape:
            return logits
        return logits * rows[..., None].cpu()

    def compare(self) -> SQNR:
        """Signal-to-noise ratio of the logits now, a sample being a sequence."""
        sqnr = SQNR("sample")
        for index, reference in enumerate(self.reference):
            sqnr.update(reference.numpy(), self._logits(index).numpy())
        return sqnr
