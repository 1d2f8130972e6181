"""What the layers of a group are quantized with, accumulated batch by batch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ptqkit.arrays.drift import Drift, moved_outputs
from ptqkit.arrays.hessian import Hessian
from ptqkit.errors import (
    LAYER_FAILURES,
    CalibrationError,
    UnsupportedModuleError,
    prefix_error,
)
from ptqkit.hf.data.calibration import batch_shape
from ptqkit.hf.models.inputs import match_mask
from ptqkit.hf.quantization.expert_moments import fill_up, rule_text
from ptqkit.nn.experts import RoutedRows, routed_rows
from ptqkit.nn.linear import LinearView
from ptqkit.nn.statistics import (
    DeviceMean,
    TorchHessian,
    accumulator,
    drift_accumulator,
    range_accumulator,
)

__all__ = ["MomentAccumulator", "Moments", "check_same_tokens"]


@dataclass(frozen=True)
class Moments:
    """What a group's layers are quantized with.

    Attributes
    ----------
    hessian : Hessian or None
        H = (2/N) sum x x^T of the inputs; None without calibration.
    drift : Drift, DeviceMean or None
        G - H = (2/N) sum (x - x~) x~^T, if the float model runs along; None where D has it.
    residuals : dict of str to Drift or DeviceMean
        D = (2/N) sum (r - r~) x~^T of layers that write into a stream r. Without G - H it is of the
        streams behind the layer, r + W x and r~ + W x~: D + W (G - H).
    ranges : ChannelRanges or None
        Of the inputs, if a layer's activation grid or bias correction needs them.
    seconds, seconds_drift : float
        Spent on H, and on G and D.
    routed : int or None
        Tokens routed to the expert that the layers belong to.
    rule : str
        What was done about too few of them; empty if there were enough.
    """

    hessian: Any = None
    drift: Drift | DeviceMean | None = None
    residuals: Mapping[str, Drift | DeviceMean] = field(default_factory=dict)
    ranges: Any = None
    seconds: float = 0.0
    seconds_drift: float = 0.0
    routed: int | None = None
    rule: str = ""

    @property
    def propagates(self) -> bool:
        """Whether the float model ran along."""
        return self.drift is not None or bool(self.residuals)

    @property
    def tokens(self) -> int:
        """Calibration tokens behind H; of an expert those routed to it."""
        if self.routed is not None:
            return self.routed
        return 0 if self.hessian is None else int(self.hessian.tokens)


class MomentAccumulator:
    """H (and G, D and ranges) of one group, gathered batch by batch.

    The first error is kept for :meth:`finish`: all batches must go on to the next layer first. An
    exception that is no failure of the layer goes through, and there are no moments any more.

    Parameters
    ----------
    name : str
        Layer whose inputs are added, for messages.
    needs_ranges : bool
    writer : str, optional
        Layer of the group whose output is added to a stream.
    narrow : LinearView, optional
        The writer, still in float, if it is the group's only layer, has fewer outputs than inputs,
        and is to have the least-squares target, which knows G by W (G - H) alone: then D is of the
        streams behind it, which is less work than G. For float32 on the host.
    wide : bool
        Of inputs on a GPU: every batch has sums of its own, added up in float64, and
        :meth:`finish` returns sums (:class:`~ptqkit.nn.statistics.DeviceSum`) instead of means.
    """

    def __init__(
        self,
        name: str,
        needs_ranges: bool,
        writer: str | None = None,
        narrow: LinearView | None = None,
        wide: bool = False,
    ) -> None:
        self.name, self.needs_ranges, self.writer = name, needs_ranges, writer
        self._narrow = narrow
        self._wide = wide
        self.error: Exception | None = None
        self._hessian: Any = None
        self._ranges: Any = None
        self._drift: Any = None
        self._residual: Any = None
        self._routed: RoutedRows | None = None
        self._pool: Any = None
        self._seconds = self._seconds_drift = 0.0

    @property
    def empty(self) -> bool:
        """Whether no input has come, not even one that failed."""
        return self._hessian is None and self.error is None

    def add(
        self,
        value: torch.Tensor,
        batch: Mapping[str, torch.Tensor],
        mask: torch.Tensor | None,
        floats: torch.Tensor | None = None,
        streams: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Add one batch's input of the layer.

        Parameters
        ----------
        value : Tensor, shape (..., in)
        batch : mapping of str to Tensor
            What the model was called with.
        mask : Tensor of bool, shape (batch, sequence), or None
            False where ``input_ids`` are padding; None if nothing is.
        floats : Tensor, shape (..., in), optional
            The same input in the float model.
        streams : tuple of Tensor, optional
            What the writer's output is about to be added to, in the float and in this model.
        """
        if self.error is not None:
            return
        start = middle = time.perf_counter()
        try:
            channels, device = value.shape[-1], value.device
            self._routed = routed_rows(value)
            if self._routed is not None and not self._routed.in_order:
                floats = None  # In the float model other tokens come to an expert.
            if self._hessian is None:
                self._hessian = accumulator(channels, device, self._wide)
            rows = match_mask(value, batch, mask)
            self._hessian.update(value, rows)
            if self.needs_ranges:
                if self._ranges is None:
                    self._ranges = range_accumulator(channels, device)
                self._ranges.update(value, rows)
            middle = time.perf_counter()
            if floats is not None:
                check_same_tokens(self.name, floats, value, batch)
                behind = self._behind(floats, value, streams)
                if behind is None:
                    if self._drift is None:
                        self._drift = drift_accumulator(channels, channels, device, self._wide)
                    self._drift.update(floats, value, mask=rows)
                else:
                    streams = behind
                if streams is not None and self.writer is not None:
                    self._add_streams(*streams, value, rows)
                self._seconds_drift += time.perf_counter() - middle
        except LAYER_FAILURES as error:
            self.error = prefix_error(error, self.name)
        except BaseException:
            # H may have the batch, and what is added after it not.
            self.error = CalibrationError(f"{self.name}: adding a batch was interrupted")
            raise
        self._seconds += middle - start

    def fail(self, error: Exception) -> None:
        """Have :meth:`finish` return an error, if there is none before it."""
        self.error = self.error or error

    @property
    def routed(self) -> int | None:
        """Tokens that have come, if they were routed to the expert of the layer alone."""
        if self._routed is None or self._routed.everything or self._hessian is None:
            return None
        return int(self._hessian.tokens)

    @property
    def lacks_tokens(self) -> bool:
        """Whether fewer tokens than inputs were routed to the layer, and no others are known."""
        if self.error is not None or self.routed is None or self._pool is not None:
            return False
        return self.routed < self._hessian.in_features

    def add_pool(
        self,
        value: torch.Tensor,
        batch: Mapping[str, torch.Tensor],
        mask: torch.Tensor | None,
        pool: Any = None,
    ) -> Any:
        """Add what one batch's other tokens would be as inputs of the layer; return the sum.

        Parameters
        ----------
        value, batch, mask
            As for :meth:`add`.
        pool : optional
            What was returned for the batches before.
        """
        routed = routed_rows(value)
        if self.error is not None or routed is None or routed.pool is None:
            return pool
        start = time.perf_counter()
        try:
            if pool is None:
                pool = accumulator(routed.pool.shape[-1], value.device)
            pool.update(routed.pool, match_mask(routed.of_pool(), batch, mask))
        except LAYER_FAILURES as error:
            self.error = prefix_error(error, self.name)
        self._seconds += time.perf_counter() - start
        return pool

    def use_pool(self, pool: Any) -> None:
        """Take the sum that :meth:`add_pool` has returned, here or for another layer."""
        self._pool = pool

    def _behind(
        self,
        floats: torch.Tensor,
        value: torch.Tensor,
        streams: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the streams behind the writer, both less W x~, if D is to be of those."""
        if self._narrow is None or streams is None or self.writer is None:
            return None
        weight = self._narrow.matrix
        wide = {v.dtype for v in (floats, value, weight)} == {torch.float32}
        if value.device.type != "cpu" or not wide:
            return None
        before, quantized = streams
        moved = moved_outputs(before, self._narrow.read(), floats, value)
        return torch.from_numpy(moved).view(before.shape), quantized

    def _add_streams(
        self,
        floats: torch.Tensor,
        quantized: torch.Tensor,
        value: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        width, channels = quantized.shape[-1], value.shape[-1]
        if self._residual is None:
            self._residual = drift_accumulator(width, channels, value.device, self._wide)
        streams = (stream.reshape(-1, width) for stream in (floats, quantized))
        flat = None if rows is None else rows.reshape(-1)
        self._residual.update(*streams, value.reshape(-1, channels), flat)

    def finish(self) -> Moments | Exception:
        """Return H (and G, D and ranges), or the error that prevents it."""
        if self.error is not None:
            return self.error
        try:
            return self._moments()
        except LAYER_FAILURES as error:
            return error

    def _finished(self, sums: Any) -> Any:
        return sums.doubled() if self._wide else sums.finish()

    def _finished_hessian(self) -> Any:
        """Return H where it is; those of experts, of which there may be many, on the host."""
        if self._wide or self._routed is not None or not isinstance(self._hessian, TorchHessian):
            return self._finished(self._hessian)
        return self._hessian.finish_there()

    def _moments(self) -> Moments:
        start = time.perf_counter()
        routed, rule = self.routed, ""
        lacking = routed is not None and routed < self._hessian.in_features
        hessian = None
        if not lacking or routed:
            hessian = self._finished_hessian()
        if lacking and self._pool is not None and self._pool.tokens:
            assert routed is not None
            own = Hessian(self._hessian.in_features) if hessian is None else hessian
            hessian = fill_up(own, self._pool.finish())
            rule = rule_text(routed, own.in_features)
        elif hessian is None:
            raise CalibrationError(
                "no token of the calibration data was routed to this expert: give more data, "
                "calibrate_all_experts=True, or leave it float with an override 'skip'"
            )
        ranges = None if self._ranges is None else self._ranges.finish()
        middle = time.perf_counter()
        seconds = self._seconds + middle - start
        if (self._drift is None and self._residual is None) or not hessian.tokens:
            return Moments(hessian, ranges=ranges, seconds=seconds, routed=routed, rule=rule)
        drift, residuals = None, {}
        if self._drift is not None:
            drift = self._finished(self._drift)
        if self._residual is not None and self.writer is not None:
            residuals[self.writer] = self._finished(self._residual)
        spent = self._seconds_drift + time.perf_counter() - middle
        return Moments(hessian, drift, residuals, ranges, seconds, spent)


def check_same_tokens(
    name: str, floats: torch.Tensor, quantized: torch.Tensor, batch: Mapping[str, torch.Tensor]
) -> None:
    """Raise UnsupportedModuleError unless row t of both inputs belongs to the same token.

    That holds if every token of the batch, or one value per sample, comes in order; an expert for
    which each path chooses other tokens has other leading shapes.
    """
    leading = tuple(quantized.shape[:-1])
    keys = [k for k in ("input_ids", "decoder_input_ids") if k in batch]
    shapes = [tuple(batch[k].shape) for k in keys] or [batch_shape(batch)]
    in_order = any(leading[:1] == s[:1] or leading == (s[0] * s[1],) for s in shapes)
    if floats.shape != quantized.shape or not in_order:
        raise UnsupportedModuleError(
            f"{name}: error_propagation needs every token's input in both models, but the inputs "
            f"have shapes {tuple(floats.shape)} and {tuple(quantized.shape)}; leave this layer out "
            "with an override 'skip', or quantize with error_propagation=0"
        )
