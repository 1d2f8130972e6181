"""Tune a quantized model: scales, gains, biases and codes learn from the float model's logits."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ptqkit._defaults import BATCH_SIZE, TUNE_STEPS
from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.errors import CalibrationError
from ptqkit.hf.models.dtypes import as_dtype
from ptqkit.hf.progress import Progress, ProgressStage
from ptqkit.hf.quantization.float_logits import FloatLogits, Window
from ptqkit.hf.quantization.tuning_step import TuningStep, TuningWindows, held_out_loss
from ptqkit.nn.forward import calibration_mode, device_of
from ptqkit.nn.linear import LinearView
from ptqkit.nn.on_grid import dequantize
from ptqkit.nn.quantized_mark import mark_quantized
from ptqkit.nn.tunable import TunableMatrix, round_to, tunable_forwards
from ptqkit.recipe.options import check_int

__all__ = [
    "LearnedValues",
    "TuningInterrupted",
    "TuningOptions",
    "TuningReport",
    "learn",
    "learned_vectors",
    "write_learned",
]

# No scale is tuned below this share of what the solver gave it.
_SMALLEST_SCALE = 1 / 8


class TuningInterrupted(KeyboardInterrupt):
    """Ctrl-C while a model was tuned: it is as it was before, quantized and not tuned."""


@dataclass(frozen=True)
class TuningOptions:
    """How a model is tuned.

    Attributes
    ----------
    steps : int
        Steps of Adam; the rates fall to zero along a cosine.
    windows : int, optional
        Windows per step; by default 8, and 16 if codes learn.
    batch_size : int
        Windows per forward and backward pass; gradients are added up.
    scale_rate : float
        Learning rate of a layer's scales, as a fraction of their mean.
    rate : float
        Learning rate of gains and biases.
    code_rate : float
        Learning rate of codes before rounding, in codes; 0: codes stay.
    code_hold : float
        How strongly codes hold on to what they are: with every step of rate r a latent code is
        drawn to the whole number next to it by ``code_hold * r`` of the distance, like the damping
        of oscillations of Nagel et al. 2022 (arXiv:2203.08617). So a code changes only where its
        gradient has a direction, of more than half of ``code_hold`` of its usual size; with 0,
        codes without one walk to and fro between two values while the rate is high.
    own_text : int
        Windows that the float model writes itself (:func:`ptqkit.hf.own_text`) and that are learned
        from besides the calibration windows.
    held_out : int
        One of so many windows is not learned from and decides which step is kept.
    checks : int
        How often the held-out loss is measured.
    patience : int, optional
        Checks in a row without a lower held-out loss after which tuning stops; by default 5, and
        without end if codes learn: they may be worse until the rates have fallen.
    seed : int
        Of the order of the windows.
    """

    __repr__ = one_line_repr

    steps: int = TUNE_STEPS
    windows: int | None = None
    batch_size: int = BATCH_SIZE
    scale_rate: float = 4e-3
    rate: float = 3e-4
    code_rate: float = 0.0
    code_hold: float = 0.3
    own_text: int = 0
    held_out: int = 8
    checks: int = 15
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for tuning without windows, checks or an end, or a negative hold."""
        for name, least in (("windows", 1), ("patience", 1)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least)
        for name, least in (("own_text", 0), ("held_out", 2), ("checks", 1)):
            check_int(name, getattr(self, name), least)
        if not 0 <= self.code_hold < math.inf:
            raise ValueError(f"code_hold must be a number of at least 0, not {self.code_hold!r}")


@dataclass(frozen=True)
class TuningReport(Tabular):
    """What tuning did.

    Attributes
    ----------
    steps : int
        Steps that were run.
    kept : int
        Step whose values the model has; 0: it is as the solver left it.
    loss_before, loss_after : float
        Mean over the tokens of the held-out windows of KL(float || quantized) in nats.
    windows, held_out : int
        Windows that were learned from, those of the model's own text among them, and that decided.
    learned : int
        Number of scales, gains and biases, and codes if they learn.
    codes_changed : int
        Codes that are not what the solver made them.
    recorded : bool
        Steps were replays of one that a GPU recorded.
    checks : list of (int, float)
        Steps at which the held-out loss was measured, and what it was.
    seconds : float
        With the float model's logits.
    memory : dict of str to int
        In bytes: ``estimate``, ``step``, ``window`` and ``text`` of it, and what was ``available``.
    """

    __repr__ = one_line_repr

    steps: int
    kept: int
    loss_before: float
    loss_after: float
    windows: int
    held_out: int
    learned: int
    checks: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)
    codes_changed: int = 0
    recorded: bool = False

    def _rows(self) -> list[dict[str, Any]]:
        return [{"step": step, "loss": loss} for step, loss in self.checks]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"tuned {self.steps} steps, kept step {self.kept}: divergence from the float model on "
            f"{self.held_out} held-out windows {self.loss_before:.4g} -> {self.loss_after:.4g} "
            f"nats per token, {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class LearnedValues:
    """Values of one step, as they are stored.

    Attributes
    ----------
    scales : dict of str to Tensor of float32, shape (out, groups) or (1, 1)
        By layer.
    vectors : dict of str to Tensor
        By parameter, in the parameter's dtype.
    codes : dict of str to Tensor of uint8, shape (out, in)
        By layer; empty if codes stay.
    """

    __repr__ = one_line_repr

    scales: dict[str, torch.Tensor]
    vectors: dict[str, torch.Tensor]
    codes: dict[str, torch.Tensor] = field(default_factory=dict)


def learned_vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the norm gains and biases: every floating-point parameter of one axis, by name."""
    named = model.named_parameters()
    return {n: p for n, p in named if p.dim() == 1 and p.is_floating_point() and p.numel()}


class _Leaves:
    """What learns, and the values that the model runs with: rounded to what files will hold."""

    def __init__(
        self,
        model: nn.Module,
        matrices: Mapping[str, QuantizedMatrix],
        stored: torch.dtype,
        learn_codes: bool,
    ) -> None:
        device = device_of(model)
        self.matrices = {n: TunableMatrix(m, device, learn_codes) for n, m in matrices.items()}
        self._scale_types = {n: as_dtype(m.scale_dtype) for n, m in matrices.items()}
        vectors = learned_vectors(model)
        self._types = {n: (min(stored, p.dtype, key=_width), p.dtype) for n, p in vectors.items()}
        self.vectors = {
            n: p.detach().to(torch.float32, copy=True).requires_grad_() for n, p in vectors.items()
        }
        self._others = {n: p.detach() for n, p in model.named_parameters() if n not in self.vectors}
        self._floors = {n: self._floor(n) for n in matrices}

    def _floor(self, name: str) -> torch.Tensor:
        scales = self.matrices[name].scales.detach()
        tiny = torch.finfo(self._scale_types[name]).tiny
        return torch.minimum(scales, (scales * _SMALLEST_SCALE).clamp(min=tiny))

    @property
    def all(self) -> list[torch.Tensor]:
        """Every leaf, scales first."""
        return [
            *(m.scales for m in self.matrices.values()),
            *self.vectors.values(),
            *self.latents.values(),
        ]

    @property
    def latents(self) -> dict[str, torch.Tensor]:
        """Codes before rounding, by layer; empty if codes stay."""
        return {n: m.latents for n, m in self.matrices.items() if m.latents is not None}

    @property
    def count(self) -> int:
        """Number of values that learn."""
        return sum(leaf.numel() for leaf in self.all)

    def groups(self, options: TuningOptions) -> list[dict[str, Any]]:
        """Return the groups of an optimizer with their learning rates."""
        found: list[dict[str, Any]] = [
            {"params": [m.scales], "lr": options.scale_rate * float(m.scales.detach().mean())}
            for m in self.matrices.values()
        ]
        if self.vectors:
            found.append({"params": list(self.vectors.values()), "lr": options.rate})
        if self.latents:
            found.append({"params": list(self.latents.values()), "lr": options.code_rate})
        return found

    def scales(self, name: str) -> torch.Tensor:
        """Return a layer's scales as they are stored."""
        return round_to(self.matrices[name].scales, self._scale_types[name], torch.float32)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return all of the model's parameters, gains and biases as they are stored."""
        vectors = {n: round_to(v, *self._types[n]) for n, v in self.vectors.items()}
        return {**self._others, **vectors}

    @torch.no_grad()
    def hold(self, share: torch.Tensor) -> None:
        """Draw latents to the codes that they round to, by a share of the distance."""
        for latents in self.latents.values():
            latents.sub_((latents - latents.round()) * share)

    @torch.no_grad()
    def limit(self) -> None:
        """Keep every scale positive, and codes within their grid."""
        for name, matrix in self.matrices.items():
            matrix.limit()
            torch.maximum(matrix.scales, self._floors[name], out=matrix.scales)

    @torch.no_grad()
    def values(self) -> LearnedValues:
        """Return copies of the values as they are stored."""
        return LearnedValues(
            {n: self.scales(n).clone() for n in self.matrices},
            {n: round_to(v, *self._types[n]).clone() for n, v in self.vectors.items()},
            {n: self.matrices[n].codes().to("cpu", torch.uint8) for n in self.latents},
        )


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize


def split_held_out(count: int, share: int) -> tuple[list[int], list[int]]:
    """Return the windows to learn from and those held out, at equal distances.

    Raises
    ------
    CalibrationError
        If there are fewer than two.
    """
    if count < 2:
        raise CalibrationError(
            "tuning needs at least 2 calibration windows, one of them held out; give more samples"
        )
    held = max(1, count // share)
    chosen = {(2 * i + 1) * count // (2 * held) for i in range(held)}
    return [i for i in range(count) if i not in chosen], sorted(chosen)


def learn(
    model: nn.Module,
    matrices: Mapping[str, QuantizedMatrix],
    windows: Sequence[Window],
    logits: FloatLogits,
    options: TuningOptions,
    stored: torch.dtype,
    progress: Progress | None = None,
    own: int = 0,
) -> tuple[LearnedValues | None, TuningReport]:
    """Learn scales, gains, biases and codes; the model itself stays as it is.

    Parameters
    ----------
    model : nn.Module
        With the weights of ``matrices``.
    matrices : mapping of str to QuantizedMatrix
    windows : sequence of dict
    logits : FloatLogits
        Of the same windows.
    options : TuningOptions
    stored : torch.dtype
        In which gains and biases will be stored.
    progress : callable, optional
    own : int
        How many of the windows, the last ones, are the model's own text: none of them is held out.

    Returns
    -------
    LearnedValues or None
        Of the step with the least held-out loss; None if that is step 0.
    TuningReport
    """
    start = time.perf_counter()
    given = len(windows) - own
    train, held = split_held_out(given, options.held_out)
    train += range(given, len(windows))
    data = TuningWindows(windows, logits, options.batch_size)
    leaves = _Leaves(model, matrices, stored, options.code_rate > 0)
    modules = {name: model.get_submodule(name) for name in matrices}
    stage = ProgressStage(progress, "tuning", options.steps, start=start)
    # Codes change in jumps: older squares of gradients tell less of them.
    betas = (0.9, 0.99) if options.code_rate > 0 else (0.9, 0.999)
    hold = min(1.0, options.code_hold * options.code_rate)
    take_step = TuningStep(model, leaves, data, leaves.groups(options), betas, hold)
    order = _endless(train, options.seed)
    windows_per_step = options.windows or (16 if options.code_rate else 8)
    patience = options.patience or (math.inf if options.code_rate else 5)
    interval = max(1, round(options.steps / options.checks))
    with (
        calibration_mode(model),
        tunable_forwards(modules, leaves.matrices, leaves.scales),
    ):
        checks = [(0, held_out_loss(model, leaves, data, held))]
        recorded = take_step.record(train, windows_per_step)
        best, kept, step = None, 0, 0
        for step in range(1, options.steps + 1):
            turn = 0.5 * (1.0 + math.cos(math.pi * (step - 1) / options.steps))
            chosen = [next(order) for _ in range(windows_per_step)]
            loss = take_step(chosen, turn, step)
            told = f"step {step}"
            if step % interval == 0 or step == options.steps:
                checks.append((step, held_out_loss(model, leaves, data, held)))
                told += f", held out {checks[-1][1]:.4g}"
                if checks[-1][1] < dict(checks)[kept]:
                    best, kept = leaves.values(), step
            stage.step(told, loss)
            waited = sum(s > kept for s, _ in checks)
            if waited >= patience:
                break
    losses = dict(checks)
    report = TuningReport(
        step, kept, losses[0], losses[kept], len(train), len(held), leaves.count, checks,
        time.perf_counter() - start, codes_changed=_changed(matrices, best),
        recorded=recorded,
    )  # fmt: skip
    return best, report


def _changed(matrices: Mapping[str, QuantizedMatrix], learned: LearnedValues | None) -> int:
    codes = {} if learned is None else learned.codes
    return sum(int((matrices[n].codes != c.numpy()).sum()) for n, c in codes.items())


def _endless(indices: Sequence[int], seed: int) -> Iterator[int]:
    """Yield indices in random order, all of them before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for place in torch.randperm(len(indices), generator=generator).tolist():
            yield indices[place]


def write_learned(
    model: nn.Module, matrices: dict[str, QuantizedMatrix], learned: LearnedValues
) -> None:
    """Write learned values into the model and its matrices, all or nothing.

    A matrix with new scales has no ``row_objectives``: those were of the scales before.
    """
    new = {
        n: _learned(matrices[n], scales, learned.codes.get(n))
        for n, scales in learned.scales.items()
    }
    old = {n: matrices[n] for n in new}
    vectors = learned_vectors(model)
    before = {n: vectors[n].detach().clone() for n in learned.vectors}
    try:
        _put(model, matrices, new, learned.vectors)
    except BaseException:
        _put(model, matrices, old, before)
        raise


def _put(
    model: nn.Module,
    matrices: dict[str, QuantizedMatrix],
    new: Mapping[str, QuantizedMatrix],
    vectors: Mapping[str, torch.Tensor],
) -> None:
    for name, matrix in new.items():
        module = model.get_submodule(name)
        LinearView(module).write(dequantize(matrix))
        mark_quantized(module)
        matrices[name] = matrix
    parameters = learned_vectors(model)
    for name, value in vectors.items():
        parameters[name].detach().copy_(value)


def _learned(
    matrix: QuantizedMatrix, scales: torch.Tensor, codes: torch.Tensor | None
) -> QuantizedMatrix:
    values = scales.to("cpu").expand(matrix.scales.shape).contiguous().numpy()
    kept = matrix.codes if codes is None else codes.numpy()
    return replace(matrix, scales=values, codes=kept, row_objectives=None, rtn_objectives=None)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn Ctrl-C into :class:`TuningInterrupted`."""
    try:
        yield
    except KeyboardInterrupt as error:
        if isinstance(error, TuningInterrupted):
            raise
        raise TuningInterrupted(
            "interrupted: the model is quantized and as it was before tuning"
        ) from error
