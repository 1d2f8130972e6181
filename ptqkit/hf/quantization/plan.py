"""Which schedule a run takes, why, and how much memory it needs."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

import ptqkit._core as _core
from ptqkit._units import show_bytes
from ptqkit.errors import PreflightError, UnsupportedModuleError
from ptqkit.hf.data.calibration import CalibrationSet, batch_shape
from ptqkit.hf.models.structure import Target
from ptqkit.hf.quantization.block_places import movable_bytes
from ptqkit.hf.quantization.expert_moments import is_expert, solved_together
from ptqkit.hf.quantization.float_twin import twin_bytes
from ptqkit.hf.quantization.inspection import Inspection
from ptqkit.hf.quantization.memory import available_memory, memory_limit, spare_memory
from ptqkit.hf.quantization.waiting import waiting_bytes
from ptqkit.nn.forward import device_of

__all__ = [
    "SCHEDULES",
    "MemoryEstimate",
    "Plan",
    "experts_at_once",
    "plan_overlap",
    "plan_schedule",
]

SCHEDULES = ("auto", "one-pass", "replay")

# Allocators keep more than is alive: one pass measured 1.16 to 1.29 times the plain sum of shapes.
_SLACK = 1.3
# The same where what waits is measured.
_MEASURED_SLACK = 1.05
# Blocks that stay on the device: the one whose turn it is, its neighbours.
_FEWEST_BLOCKS = 3


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that each schedule needs in addition to the model.

    Attributes
    ----------
    one_pass, replay : int
        Without what :func:`~ptqkit.hf.quantization.memory.spare_memory` adds.
    outputs, codes : int
        Of those of replay, what the outputs of the blocks take, and the codes.
    """

    one_pass: int
    replay: int
    outputs: int = 0
    codes: int = 0


@dataclass(frozen=True)
class Plan:
    """How a run goes through the calibration data.

    Attributes
    ----------
    schedule : {"one-pass", "replay", "no calibration"}
    reason : str
        Why it is not one pass; empty if it is, and without calibration.
    strict : bool
        One pass was asked for: nothing else may take over.
    estimate : dict of str to int or None
        Bytes that decided: ``estimate_one_pass``, ``estimate_replay``, ``budget`` and
        ``available``, and the number of ``blocks_on_host`` if some are; empty without calibration.
    warnings : list of str
    experts_at_once : int
        Experts whose moments replay accumulates in one forward pass: as many as there is room for.
    solved_at_once : int
        Groups that threads solve at once, where they are independent; 0: none but by the caller.
    ahead : bool
        Meanwhile the device accumulates moments of experts that are independent of these.
    spare : int
        Bytes by which the process may grow before free pages are given back; part of the estimate.
    on_host : int
        Blocks that are not on the device at any time, which makes room there.
    """

    schedule: str = "no calibration"
    reason: str = ""
    strict: bool = False
    estimate: dict[str, int | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    experts_at_once: int = 1
    solved_at_once: int = 0
    ahead: bool = False
    spare: int = 0
    on_host: int = 0

    @property
    def expected(self) -> int:
        """Bytes that one pass is expected to need without the spare ones; 0 of other schedules."""
        if self.schedule != "one-pass":
            return 0
        return (self.estimate.get("estimate_one_pass") or 0) - self.spare


def plan_schedule(
    model: nn.Module,
    inspection: Inspection,
    schedule: str,
    budget: int | None,
    propagate: bool = False,
) -> Plan:
    """Choose the schedule of a run, before anything in the model changes.

    Parameters
    ----------
    model : nn.Module
    inspection : Inspection
    schedule : {"auto", "one-pass", "replay"}
        What was asked for.
    budget : int or None
        Bytes; None for the free memory.
    propagate : bool
        The float model runs along.

    Raises
    ------
    PreflightError, UnsupportedModuleError
        If what was asked for is not possible.
    """
    if inspection.calibration is None:
        return Plan()
    targets, groups = inspection.structure.targets, inspection.probe.groups
    device, data = device_of(model), inspection.calibration
    waiting = None
    if device.type == "cuda":
        first = [group[0] for group in groups]
        waiting = waiting_bytes(model, first, data.batches[0], inspection.probe.positions)
    needed = estimate_memory(
        model,
        targets,
        groups,
        data,
        propagate,
        inspection.probe.positions,
        bool(inspection.stream.writers),
        inspection.experts,
        waiting,
    )
    limit, whose, free = memory_limit(device, budget)
    one_pass = needed.one_pass
    replay = needed.replay + (twin_bytes(targets, groups) if propagate else 0)
    spares = [spare_memory(device, size) for size in (one_pass, replay)]
    one_pass, replay = one_pass + spares[0], replay + spares[1]
    estimate: dict[str, int | None] = {
        "estimate_one_pass": one_pass,
        "estimate_replay": replay,
        "budget": budget,
        "available": free,
    }
    strict = schedule == "one-pass"
    reason = _obstacle(inspection, schedule)
    on_host, room = _on_host(model, inspection, (replay if reason else one_pass) - limit)
    if not reason and one_pass > limit + room:
        on_host, room = _on_host(model, inspection, replay - limit)
    if on_host:
        estimate["blocks_on_host"] = on_host
    if not reason and one_pass > limit + room:
        twice = " (for two models' activations)" if propagate else ""
        size, most = show_bytes(one_pass, limit), show_bytes(limit, one_pass)
        reason = f"one pass needs about {size}{twice}, the {whose} is {most}"
    if not reason:
        # Should replay have to take over.
        at_once = experts_at_once(inspection, limit + room - one_pass)
        overlap = plan_overlap(model, inspection, at_once, limit + room - one_pass)
        return Plan("one-pass", "", strict, estimate, [], at_once, *overlap, spares[0], on_host)
    if strict:
        raise UnsupportedModuleError(f"schedule='one-pass' is not possible: {reason}")
    warnings = []
    if replay > limit + room:
        there = limit + room
        size, most = show_bytes(replay, there), show_bytes(there, replay)
        text = f"replay needs about {size}, there is {most}"
        if limit == budget:
            raise PreflightError([f"memory_budget: {text}; lower samples or batch_size"])
        warnings.append(text)
    at_once = experts_at_once(inspection, limit + room - replay)
    if inspection.experts:
        estimate["experts_at_once"] = at_once
    overlap = plan_overlap(model, inspection, at_once, limit + room - replay)
    return Plan("replay", reason, strict, estimate, warnings, at_once, *overlap, spares[1], on_host)


def _on_host(model: nn.Module, inspection: Inspection, missing: int) -> tuple[int, int]:
    """Return how many blocks must wait on the host for so many bytes, and the bytes they free.

    As many as may, if those are too few.
    """
    if missing <= 0 or device_of(model).type == "cpu":
        return 0, 0
    blocks = inspection.probe.blocks
    each = movable_bytes(model, blocks)
    if not each:
        return 0, 0
    most = min(len(blocks) - _FEWEST_BLOCKS, available_memory(torch.device("cpu")) // (2 * each))
    count = max(0, min(most, -(-missing // each)))
    return count, count * each


def experts_at_once(inspection: Inspection, room: int) -> int:
    """Return how many experts' moments there is room for in addition to what replay needs."""
    shapes = [module.shape for module in inspection.experts.values()]
    if not shapes:
        return 1
    most = max(s.experts for s in shapes)
    return int(max(1, min(most, 1 + room // _expert_moments(inspection))))


def _expert_moments(inspection: Inspection) -> int:
    """Return the bytes of an expert's sum and, if it is being filled up, of the pool; float32."""
    shapes = [module.shape for module in inspection.experts.values()]
    return max(2 * 4 * max(s.hidden, s.inner) ** 2 for s in shapes)


def plan_overlap(
    model: nn.Module, inspection: Inspection, at_once: int, room: int
) -> tuple[int, bool]:
    """Return how many independent groups threads solve at once, and whether a device goes ahead.

    Parameters
    ----------
    at_once : int
        Experts whose moments are there at once.
    room : int
        Bytes on the model's device in addition to what the schedule needs with one expert.
    """
    device = device_of(model)
    if at_once < 2 or not inspection.experts:
        # Calibrated on a float model, a device need not wait for the host either.
        return int(device.type == "cuda"), False
    # What the solver takes for a group: see estimate_memory.
    sizes = [(s.hidden, 2 * s.inner) for s in (m.shape for m in inspection.experts.values())]
    sizes += [(outputs // 2, inputs) for inputs, outputs in sizes]
    workspace = max(4 * inputs * (4 * inputs + 4 * outputs) for inputs, outputs in sizes)
    if device.type == "cpu":
        room -= (at_once - 1) * _expert_moments(inspection)
    else:
        room = available_memory(torch.device("cpu"))
    count = int(min(_core.config()[2], at_once, 1 + max(0, room) // workspace))
    return (count if count > 1 or device.type == "cuda" else 0), device.type == "cuda"


def _obstacle(inspection: Inspection, schedule: str) -> str:
    """Return what rules one pass out, other than memory; empty if nothing does."""
    unprobed, inside_mode = inspection.unprobed, inspection.probe.inside_mode
    if schedule == "replay":
        return "asked for"
    if inside_mode is not None:
        return f"{inside_mode} runs inside a thread-local mode (such as autocast) set by the model"
    if unprobed:
        return f"a short probe did not reach {len(unprobed)} layers ({min(unprobed)}, ...)"
    if not _has_greenlet():
        return "the package 'greenlet' is not installed"
    return ""


def _has_greenlet() -> bool:
    try:
        import greenlet  # noqa: F401
    except ImportError:
        return False
    return True


def estimate_memory(
    model: nn.Module,
    targets: Mapping[str, Target],
    groups: Sequence[Sequence[str]],
    calibration: CalibrationSet,
    propagate: bool = False,
    positions: int = 1,
    streams: bool = False,
    experts: Container[str] = (),
    waiting: Mapping[str, float] | None = None,
) -> MemoryEstimate:
    """Estimate the memory that each schedule needs in addition to the model, from shapes.

    While all batches wait at a layer, each holds the embeddings that the model began with, the
    residual stream, the block's normalized input, the outputs of the layers before it in the block,
    and the layer's input; one-pass holds that for all tokens, and as much again for the batch that
    is running; replay for one batch, with a block's outputs for all tokens: twice on the host,
    whose heap keeps the places of old ones, once per stack of blocks on a device.
    With error propagation (``propagate``) the float model has the same, but for the batch that is
    running: only one model's is. Its weights are not in the estimate
    (:func:`~ptqkit.hf.quantization.float_twin.twin_bytes`). If the residual streams are followed
    (``streams``), each model holds one more of them. In the end all codes are there, a byte each,
    on the host.
    ``positions`` are those of a sample in the probe, for inputs that show none themselves;
    ``experts`` the names of the mixtures, whose experts are taken to see all tokens. ``waiting``,
    bytes per token, is what waits at the first layers of groups, where that has been measured.
    """
    size = next(model.parameters()).element_size()
    hidden: dict[str | None, int] = {}
    before: dict[str | None, int] = {}
    on_host, live, work, wide = device_of(model).type == "cpu", 0, 0, 0
    # Per group: what the solver takes.
    solves: dict[str, int] = {}
    for group in groups:
        target = targets[group[0]]
        inputs = target.view.shape[1]
        parts = solved_together(group, {n: targets[n].view.shape for n in group}, experts)
        outputs = max(sum(targets[n].view.shape[0] for n in part) for part in parts)
        stream = hidden.setdefault(target.block, inputs)
        live = max(live, (3 + streams) * stream + before.get(target.block, 0) + inputs)
        # One expert after the other runs.
        one = [n for n in group if is_expert(n, experts)]
        alive = [n for n in one if n.rsplit(".", 1)[0] == one[0].rsplit(".", 1)[0]] or group
        before[target.block] = sum(targets[n].view.shape[0] for n in alive)
        wide = max(wide, stream)
        # H, its factor and the solver's copies; the weight as float32, its result and error.
        # Error propagation adds G and a factor in float64; the original, corrected weights in both.
        # A device factorizes in float64, and has the sums and copies of the solve too.
        squares, weights = (8, 9) if propagate else (4, 4)
        if not on_host:
            squares, weights = (10, 11) if propagate else (7, 8)
        solves[group[0]] = 4 * inputs * (squares * inputs + weights * outputs)
        work = max(work, solves[group[0]])
    shapes = [(rows, max(n, positions)) for rows, n in map(batch_shape, calibration.batches)]
    tokens = [rows * length for rows, length in shapes]
    masks = _mask_bytes(model, calibration, shapes, size)
    largest = max(tokens)
    models = 2 if propagate else 1
    one_pass = (sum(tokens) * size * live + sum(masks)) * models
    one_pass += largest * size * live
    stacks = len({block.rpartition(".")[0] for block in before if block is not None})
    outputs = sum(tokens) * size * wide * models * (max(2, stacks) if on_host else max(1, stacks))
    replay = outputs + (models + 1) * largest * size * live + max(masks) * models
    codes = 0
    if on_host:
        codes = sum(rows * inputs for rows, inputs in (t.view.shape for t in targets.values()))
    work += codes
    whole = int(_SLACK * one_pass) + work
    if waiting:
        held, extra = _MEASURED_SLACK * sum(tokens) * models, streams * wide * size
        most = max(solves[name] + held * (each + extra) for name, each in waiting.items())
        whole = int(most + _SLACK * largest * size * live) + sum(masks) * models
    return MemoryEstimate(whole, int(_SLACK * replay) + work, int(_SLACK * outputs), codes)


def _mask_bytes(
    model: nn.Module, calibration: CalibrationSet, shapes: list[tuple[int, int]], size: int
) -> list[int]:
    """Return the bytes of the (batch, 1, sequence, sequence) masks that waiting batches hold."""
    eager = getattr(getattr(model, "config", None), "_attn_implementation", None) == "eager"
    result = []
    for (rows, length), mask in zip(shapes, calibration.masks(), strict=True):
        result.append(rows * length * length * size if eager or mask is not None else 0)
    return result
