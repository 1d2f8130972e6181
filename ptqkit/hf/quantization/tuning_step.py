"""A step of tuning: gradients on some windows, then Adam; on a GPU recorded once and replayed.

Small models leave a GPU idle between the launches of their kernels. Where all windows to learn from
have one shape, a step is therefore recorded as a CUDA graph, with its inputs in buffers of their
own, and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from ptqkit.errors import NotFiniteError
from ptqkit.hf.data.calibration import padding_mask
from ptqkit.hf.quantization.float_logits import (
    FloatLogits,
    Window,
    counted_logits,
    joined_windows,
    model_call,
)
from ptqkit.nn.forward import device_of
from ptqkit.nn.tunable import divergence

__all__ = ["Leaves", "TuningStep", "TuningWindows", "held_out_loss"]

# Gradients are of the loss times this power of two: in float16 small ones would vanish. Adam's
# steps are the same to the bit if its epsilon is as many times as large.
_LOSS_SCALE = 1024.0
_EPSILON = 1e-8 * _LOSS_SCALE
# Steps that are run before one is recorded: what is made at first use is there then.
_WARM_UP = 2
# Weights of a model up to which launching kernels takes longer than they do.
_SMALL = 1 << 27


class Leaves(Protocol):
    """What learns, and the values that the model runs with."""

    @property
    def all(self) -> list[torch.Tensor]:
        """Every leaf."""
        ...

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return the model's parameters as they are run."""
        ...

    def hold(self, share: torch.Tensor) -> None:
        """Draw codes that learn to what they round to, by a share of the distance."""
        ...

    def limit(self) -> None:
        """Bring the leaves back to what they may be, in place."""
        ...


class TuningWindows:
    """Windows in batches, with the float model's logits."""

    def __init__(self, windows: Sequence[Window], logits: FloatLogits, batch_size: int) -> None:
        self.windows, self.logits, self.batch_size = windows, logits, batch_size

    def tokens(self, indices: Sequence[int]) -> int:
        """Return the number of positions that count."""
        return sum(len(self.logits.held[i]) for i in indices)

    def batches(self, indices: Sequence[int]) -> Iterator[tuple[Window, torch.Tensor]]:
        """Yield windows in batches, each with what is held of the float model's logits."""
        for window, joined in joined_windows(self.windows, indices, self.batch_size):
            yield window, torch.cat([self.logits.held[i] for i in joined])

    def divergence(self, logits: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """Return the summed divergence of a batch's logits."""
        joined = FloatLogits([held], self.logits.head)
        return divergence(logits, lambda rows: joined.rows(0, rows))

    def alike(self, indices: Sequence[int]) -> bool:
        """Return whether windows are tokens alone, of one length and without padding."""
        first = self.windows[indices[0]]["input_ids"].shape if indices else None
        return first is not None and all(
            not set(w) - {"input_ids", "attention_mask"}
            and w["input_ids"].shape == first
            and padding_mask(w) is None
            for w in (self.windows[i] for i in indices)
        )


class TuningStep:
    """Steps of Adam on the mean divergence from the float model.

    Parameters
    ----------
    model : nn.Module
    leaves : Leaves
    data : TuningWindows
    groups : list of dict
        Groups of the optimizer, with a learning rate ``lr`` each.
    betas : tuple of float
    hold : float
        By which share of the distance a step draws codes that learn to what they round to, at the
        rate at the beginning.
    """

    def __init__(
        self,
        model: nn.Module,
        leaves: Leaves,
        data: TuningWindows,
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        hold: float = 0.0,
    ) -> None:
        self._hold = hold
        self._model, self._leaves, self._data = model, leaves, data
        self._rates = [group["lr"] for group in groups]
        device = device_of(model)
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:  # rates are read from memory, as a recorded step needs it
            groups = [
                {**g, "lr": torch.tensor(g["lr"], dtype=torch.float32, device=device)}
                for g in groups
            ]
            kind: dict[str, Any] = {"fused": True, "capturable": True}
        else:
            kind = {"foreach": False}
        self._optimizer = torch.optim.Adam(groups, betas=betas, eps=_EPSILON, **kind)
        self._turn = torch.ones((), dtype=torch.float32, device=device)
        self._recorded: _Recorded | None = None

    def record(self, train: Sequence[int], count: int) -> bool:
        """Record a step on ``count`` windows of these, if that is possible and saves time.

        Returns whether it was; the leaves are as before.
        """
        size = sum(p.numel() for p in self._model.parameters())
        if not can_record(self._turn.device) or size > _SMALL or not self._data.alike(train):
            return False
        try:
            self._recorded = _Recorded(self._data, train[0], count, self._run, self._kept())
        except (RuntimeError, NotFiniteError):  # a model that waits for the GPU in its forward pass
            self._recorded = None
        return self._recorded is not None

    def __call__(self, chosen: Sequence[int], turn: float, step: int) -> float:
        """Learn from some windows with rates times ``turn``; returns the mean divergence before.

        Raises
        ------
        NotFiniteError
            If a gradient is not finite.
        """
        self._turn.fill_(turn)
        if self._recorded is not None:
            told = self._recorded(self._data, chosen)
        else:
            told = self._run(self._data.batches(chosen), self._data.tokens(chosen))
        loss, size = told.tolist()
        if not size < float("inf"):
            raise NotFiniteError(
                f"tuning: a gradient of step {step} is not finite; the model is as it was. "
                "Compute in float32 or bfloat16"
            )
        return float(loss)

    def _run(self, batches: Iterable[tuple[Window, torch.Tensor]], tokens: int) -> torch.Tensor:
        """Take a step; returns the loss and the sum of all gradients' sizes, without waiting."""
        leaves = self._leaves.all
        loss = self._gradients(leaves, batches, tokens)
        size = get_total_norm([g for g in (leaf.grad for leaf in leaves) if g is not None], 1.0)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if self._on_gpu:
                torch.mul(self._turn, rate, out=group["lr"])
            else:
                group["lr"] = rate * float(self._turn)
        self._optimizer.step()
        if self._hold:
            self._leaves.hold(self._turn * self._hold)
        self._leaves.limit()
        return torch.stack([loss, size.to(loss)])

    def _gradients(
        self,
        leaves: list[torch.Tensor],
        batches: Iterable[tuple[Window, torch.Tensor]],
        tokens: int,
    ) -> torch.Tensor:
        """Set the gradients of the mean divergence times the loss scale, and return it."""
        total = torch.zeros((), dtype=torch.float64, device=self._turn.device)
        for leaf in leaves:
            leaf.grad = None
        for window, held in batches:
            with torch.enable_grad():
                logits = model_call(self._model, window, self._leaves.parameters())
                logits = counted_logits(logits, window)
                loss = self._data.divergence(logits, held) * (_LOSS_SCALE / tokens)
                found = torch.autograd.grad(loss, leaves, allow_unused=True)
            total += loss.detach() / _LOSS_SCALE
            for leaf, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
        return total

    def _kept(self) -> Callable[[], None]:
        """Return what puts the leaves back as they are now, and the optimizer to its beginning."""
        before = [leaf.detach().clone() for leaf in self._leaves.all]

        def put_back() -> None:
            with torch.no_grad():
                for leaf, value in zip(self._leaves.all, before, strict=True):
                    leaf.grad = None
                    leaf.copy_(value)
                for state in self._optimizer.state.values():
                    for value in state.values():
                        value.zero_()

        return put_back


class _Recorded:
    """A step on inputs that are copied to one place."""

    def __init__(
        self,
        data: TuningWindows,
        like: int,
        count: int,
        run: Callable[[Iterable[tuple[Window, torch.Tensor]], int], torch.Tensor],
        put_back: Callable[[], None],
    ) -> None:
        held = data.logits.held[like]
        ids = data.windows[like]["input_ids"]
        self._ids = ids.to(held.device).repeat(count, 1)
        self._held = held.repeat(count, 1, 1)
        size = data.batch_size
        batches = [
            ({"input_ids": ids}, held.flatten(0, 1))
            for ids, held in zip(self._ids.split(size), self._held.split(size), strict=True)
        ]
        tokens = count * len(held)
        try:
            self._replay, self._told = record_graph(
                lambda: run(batches, tokens), put_back, held.device
            )
        except BaseException:
            put_back()
            raise

    def __call__(self, data: TuningWindows, chosen: Sequence[int]) -> torch.Tensor:
        ids = torch.cat([data.windows[i]["input_ids"] for i in chosen])
        self._ids.copy_(ids)
        torch.stack([data.logits.held[i] for i in chosen], out=self._held)
        self._replay()
        return self._told


def can_record(device: torch.device) -> bool:
    """Return whether a device records what it is to do."""
    return device.type == "cuda"


def record_graph(
    run: Callable[[], torch.Tensor], put_back: Callable[[], None], device: torch.device
) -> tuple[Callable[[], object], torch.Tensor]:
    """Record a function as a CUDA graph; returns what runs it again, and where its result lies.

    ``put_back`` undoes what running it to warm up did.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                run()
            put_back()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may allocate meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            told = run()
    return graph.replay, told


@torch.no_grad()
def held_out_loss(
    model: nn.Module, leaves: Leaves, data: TuningWindows, held: Sequence[int]
) -> float:
    """Return the mean divergence over the tokens of the held-out windows, in nats."""
    total, parameters = 0.0, leaves.parameters()
    for window, targets in data.batches(held):
        logits = counted_logits(model_call(model, window, parameters), window)
        total += float(data.divergence(logits, targets))
    return total / data.tokens(held)
