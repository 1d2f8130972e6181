"""Quantize a model block by block from its files, and go on where a run was killed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import nn

from ptqkit._repr import one_line_repr
from ptqkit._units import show_bytes
from ptqkit._version import __version__
from ptqkit.errors import PreflightError, Problems, UnsupportedModuleError
from ptqkit.hf.checkpoint.stored_model import StoredModel
from ptqkit.hf.data.calibration import CalibrationSet, batch_shape
from ptqkit.hf.models.experts import ExpertSwap, wanted_by
from ptqkit.hf.models.recorded import RecordedBlocks
from ptqkit.hf.models.structure import Structure, Target, find_structure
from ptqkit.hf.quantization.inspection import Inspection
from ptqkit.hf.quantization.memory import memory_limit, spare_memory
from ptqkit.hf.quantization.moments import Moments
from ptqkit.hf.quantization.plan import Plan, estimate_memory, experts_at_once, plan_overlap
from ptqkit.hf.quantization.preflight import check_finite
from ptqkit.hf.quantization.replay import replay_groups
from ptqkit.hf.quantization.report import LayerReport
from ptqkit.hf.quantization.run import (
    QuantizationInterrupted,
    QuantizationRun,
    describe_data,
)
from ptqkit.hf.quantization.source import BlockSource
from ptqkit.hf.quantization.state import FinishedBlock, RunState
from ptqkit.hf.quantization.work import Step, Steps, Work
from ptqkit.nn.activations import ActivationQuantizer, install_quantizer
from ptqkit.nn.forward import calibration_mode, device_of
from ptqkit.nn.output_moments import MOST_ROWS
from ptqkit.recipe.recipe import Recipe

__all__ = [
    "StreamPlan",
    "StreamedRun",
    "attached_source",
    "check_stream",
    "describe_run",
    "float_tensors",
    "float_twin",
    "noting_values",
    "plan_stream",
    "state_bytes",
]

# Of a configuration, what says where it came from and not what the model is.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")


@dataclass(frozen=True)
class StreamPlan(Plan):
    """How a run that streams its model goes through the calibration data.

    Attributes
    ----------
    spool : bool
        The outputs of the blocks stay in files, because they do not fit into memory.
    """

    __repr__ = one_line_repr

    spool: bool = False


def check_stream(problems: Problems, recipe: Recipe) -> None:
    """Check that a recipe works block by block."""
    memory = "quantize in memory (stream=False; on the command line --no-stream)"
    obstacles = [
        (
            recipe.equalization is not None,
            "equalization scales the whole model at once, so it cannot be streamed from its files: "
            f"leave it out, or {memory}",
        ),
        (
            recipe.tune > 0,
            f"tune={recipe.tune} needs the whole model in memory: leave it out, or {memory}",
        ),
    ]
    for present, text in obstacles:
        if present:
            problems.add(text, UnsupportedModuleError)


@contextlib.contextmanager
def attached_source(
    stored: StoredModel, recipe: Recipe, blocks: tuple[str, ...] | None
) -> Iterator[tuple[BlockSource, Structure]]:
    """Let a stored model fill itself when it runs; yields what fills it, and its structure.

    Experts that are quantized are linear layers meanwhile.
    """
    swap = ExpertSwap(stored.model, wanted_by(recipe))
    with swap, swap.calibrating(recipe.calibrate_all_experts):
        structure = find_structure(stored.model, recipe, blocks)
        outside = [name for name, target in structure.targets.items() if target.block is None]
        source = BlockSource(stored, structure.blocks, outside)
        with source.attached():
            yield source, structure


@contextlib.contextmanager
def float_twin(
    stored: StoredModel, recipe: Recipe, blocks: tuple[str, ...] | None
) -> Iterator[nn.Module | None]:
    """Yield the float model as one of its own that fills itself, if a recipe needs it."""
    if not recipe.propagation:
        yield None
        return
    other = stored.again()
    with attached_source(other, recipe, blocks):
        yield other.model


@contextlib.contextmanager
def noting_values(source: BlockSource, structure: Structure, problems: Problems) -> Iterator[None]:
    """Check the values of each layer when its block is read for the first time."""
    seen: set[str] = set()

    def loaded(name: str) -> None:
        if name not in seen:
            seen.add(name)
            own = {n: t for n, t in structure.targets.items() if name in (n, t.block)}
            check_finite(problems, own)

    source.loaded = loaded
    try:
        yield
    finally:
        source.loaded = None


def plan_stream(
    source: BlockSource, inspection: Inspection, budget: int | None, propagate: bool = False
) -> StreamPlan:
    """Estimate the memory of a run that streams its model, and choose where outputs are kept.

    With ``propagate`` there is a block of the float model too, and its outputs.

    Raises
    ------
    PreflightError
        If a budget is given and not even outputs in files fit it.
    """
    structure = inspection.structure
    weights: dict[str | None, int] = {}
    for target in structure.targets.values():
        rows, columns = target.view.shape
        weights[target.block] = weights.get(target.block, 0) + rows * columns
    models = 2 if propagate else 1
    block = models * (source.block_bytes() + source.rest_bytes())
    block += max(weights.values(), default=0)
    device = device_of(source.model)
    limit, whose, free = memory_limit(device, budget)
    if inspection.calibration is None:
        largest = max(t.view.shape[0] * t.view.shape[1] for t in structure.targets.values())
        held = spooled = block + 4 * 4 * largest
    else:
        needed = estimate_memory(
            source.model,
            structure.targets,
            inspection.probe.groups,
            inspection.calibration,
            propagate,
            inspection.probe.positions,
            bool(inspection.stream.writers),
            experts=inspection.experts,
        )
        learning, learned = _gradient_bytes(source, inspection)
        held = learned + block + needed.replay - needed.codes
        spooled = max(held - needed.outputs, learned + block + learning)
        held = max(held, learned + block + learning)
    spool = held + spare_memory(device, held) > limit
    spare = spare_memory(device, spooled if spool else held)
    expected = spare + (spooled if spool else held)
    estimate: dict[str, int | None] = {
        "estimate_streamed": expected,
        "block": source.block_bytes(),
        "budget": budget,
        "available": free,
    }
    warnings = []
    if spool and expected > limit:
        size, most = show_bytes(expected, limit), show_bytes(limit, expected)
        text = (
            f"one block at a time, with outputs in files, needs about {size}, the {whose} is {most}"
        )
        if limit == budget:
            raise PreflightError([f"memory_budget: {text}; lower batch_size or sequence_length"])
        warnings.append(text)
    room = limit - expected
    at_once = experts_at_once(inspection, room)
    overlap = plan_overlap(source.model, inspection, at_once, room)
    if inspection.experts:
        estimate["experts_at_once"] = at_once
    schedule = "no calibration" if inspection.calibration is None else "replay"
    reason = "the model is streamed from its files"
    reason += ", outputs of blocks too" if spool and inspection.calibration is not None else ""
    return StreamPlan(
        schedule, reason, False, estimate, warnings, at_once, *overlap, spare, spool=spool
    )


def _gradient_bytes(source: BlockSource, inspection: Inspection) -> tuple[int, int]:
    """Return what a backward pass through the float model takes, and what it leaves for the run.

    That pass holds the inputs of all blocks, about what all layers of one block take in and give
    out twice (with gradients), and the logits with their probabilities and gradients in float32.
    """
    targets = inspection.structure.targets.values()
    coupled = [t.view.shape[0] for t in targets if t.options.row_coupling]
    shared = any(t.options.bits_budget is not None for t in targets)
    assert inspection.calibration is not None
    if not coupled and not shared:
        return 0, 0
    shapes = [(rows, max(n, 1)) for rows, n in map(batch_shape, inspection.calibration.batches)]
    # Row coupling runs one window at a time, average bits a batch.
    tokens = max(length * (rows if shared else 1) for rows, length in shapes)
    layers: dict[str | None, int] = {}
    for target in targets:
        layers[target.block] = layers.get(target.block, 0) + sum(target.view.shape)
    wide = min(min(t.view.shape) for t in targets)
    size = next(source.model.parameters()).element_size()
    vocabulary = getattr(source.model.config, "vocab_size", 0)
    inside = len(inspection.structure.blocks) * wide + 2 * max(layers.values())
    pass_bytes = tokens * (size * inside + 4 * 4 * vocabulary)
    return pass_bytes, 4 * sum(rows * min(rows, MOST_ROWS) for rows in coupled)


def state_bytes(
    source: BlockSource,
    structure: Structure,
    data: CalibrationSet | None,
    propagate: bool = False,
) -> int:
    """Return the room on the disk that the state of a run takes, at most."""
    shapes = [t.view.shape for t in structure.targets.values()]
    codes = sum(rows * columns for rows, columns in shapes)
    wide = max((max(shape) for shape in shapes), default=0)
    tokens = 0 if data is None else sum(b[k].numel() for b in data.batches for k in list(b)[:1])
    size = next(source.model.parameters()).element_size()
    # Outputs twice; scales, zero-points and objectives are a fraction of the codes.
    return codes + codes // 4 + (4 if propagate else 2) * tokens * wide * size


def describe_run(
    stored: StoredModel,
    inspection: Inspection,
    recipe: Recipe,
    **options: Any,
) -> dict[str, Any]:
    """Return everything that the results of a run depend on, as JSON holds it.

    Parameters
    ----------
    **options
        Arguments of :func:`ptqkit.quantize` that change results.
    """
    config = stored.model.config.to_dict()
    tensors = stored.tensors
    return {
        "versions": {
            "ptqkit": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": {
            "class": type(stored.model).__name__,
            "config": _as_json({k: v for k, v in config.items() if k not in _NOT_THE_MODEL}),
            "tensors": {name: tensors.checksum(name) for name in tensors.places},
        },
        "calibration": _data(inspection.calibration),
        "recipe": _as_json(recipe.to_dict()),
        "device": stored.device.type,
        "options": _as_json(options),
    }


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _data(data: CalibrationSet | None) -> dict[str, Any] | None:
    if data is None:
        return None
    digest = hashlib.sha256()
    for batch in data.batches:
        for key, value in batch.items():
            digest.update(f"{key} {value.dtype} {tuple(value.shape)};".encode())
            flat = value.cpu().contiguous().reshape(-1)
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return {
        "source": data.source,
        "samples": data.samples,
        "sequence_length": data.sequence_length,
        "batches": len(data.batches),
        "start_token": data.start_token,
        "values": digest.hexdigest(),
    }


class StreamedRun(QuantizationRun):
    """A run with one block in memory; each finished one is written to its state and dropped.

    Attributes
    ----------
    changed : dict of str to Tensor
        Parameters that are no longer those of the model's files.
    """

    plan: StreamPlan

    def attach(
        self,
        source: BlockSource,
        state: RunState,
        about: Mapping[str, Any],
        twin: nn.Module | None = None,
    ) -> None:
        """Say where blocks come from and where they go; go on with what is there already."""
        self.source, self.state, self.twin = source, state, twin
        self.changed: dict[str, torch.Tensor] = {}
        self._on_float = self.recipe.calibrate_on == "float"
        found = self.inspection
        self.blocks = found.structure.blocks if found.calibration is None else found.probe.blocks
        self._kept: set[str] = set()
        self._seen = (len(self.report.layers), len(self.report.warnings))
        state.begin(about, self._units())
        for number in range(state.finished):
            self._restore(state.read(number, check=True))

    def _units(self) -> int:
        """Return the number of blocks, and one more if layers follow that are in none."""
        work = self._work()
        after = any(p == len(self.blocks) for p in work.positions())
        return len(self.blocks) + after

    def _work(self) -> Work:
        found = self.inspection
        targets, data = found.structure.targets, found.calibration
        if data is None:
            last = sorted(targets, key=lambda name: targets[name].block is None)
            groups = [[name] for name in last]
            data = CalibrationSet([], 0, 0, 0, "", "")
        else:
            groups = [part for g in found.probe.groups for part in _by_block(targets, g)]
        return Work(
            self.model,
            targets,
            groups,
            self.blocks,
            data,
            self.propagate,
            found.stream.writers,
            found.experts,
            self.plan.experts_at_once,
            self.plan.ahead,
            spare=self.plan.spare,
        )

    def _restore(self, block: FinishedBlock) -> None:
        rows = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in block.rows]
        self.report.layers += rows
        self.report.warnings += block.warnings
        self.matrices |= block.matrices
        self.activations |= block.activations
        self._take(block.tensors)
        if not self._on_float:
            self._install(block.activations)
        for row in rows:
            self.stage.skip(self.costs[row.name])
        self._kept |= {row.name for row in rows}
        self._seen = (len(self.report.layers), len(self.report.warnings))

    def _take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Note parameters that changed; those that the class does not have become part of it."""
        self.changed |= tensors
        if not self._on_float:
            self._add(tensors)

    def _install(self, activations: Mapping[str, ActivationQuantizer]) -> None:
        for name, quantizer in activations.items():
            install_quantizer(self.inspection.structure.targets[name].module, quantizer)

    def _add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            module, _, key = name.rpartition(".")
            owner = self.model.get_submodule(module)
            if getattr(owner, key) is None:
                setattr(owner, key, nn.Parameter(tensor, requires_grad=False))

    def _all_groups(self) -> None:
        data, state = self.inspection.calibration, self.state
        self.report.schedule = self.plan.schedule
        self.report.schedule_reason = self.plan.reason
        self.source.loaded = self._refill
        work = self._work()
        work.done |= self._kept
        units = self._units()
        try:
            if data is None:
                self._each(self._without_data(work), "no calibration")
            else:
                self.report.calibration = describe_data(data)
            # After the last block nothing runs, and nothing is kept to run it.
            if data is not None and state.finished < units:
                device, finished = device_of(self.model), min(state.finished, len(self.blocks))
                outputs = state.outputs(len(data.batches), device, not self.plan.spool)
                recorded = RecordedBlocks(
                    self.model, self.blocks, work.batches, outputs, finished, self.twin
                )
                with calibration_mode(self.model), calibration_mode(self.twin or self.model):
                    self._each(replay_groups(work, recorded, self._keep), "replay")
            while state.finished < units:
                self._keep(state.finished)
        except KeyboardInterrupt as error:
            text = f"interrupted: {state.finished} of {units} blocks are done and kept in "
            raise QuantizationInterrupted(
                list(self.matrices), 0, text=f"{text}{state.root}; the same command goes on"
            ) from error

    def _without_data(self, work: Work) -> Steps:
        """Yield every layer alone, block by block, without moments."""
        positions = work.positions()
        for number in range(self.state.finished, self._units()):
            for group, position in zip(work.groups, positions, strict=True):
                if position == number:
                    target = work.targets[group[0]]
                    self.source.enter(target.block or target.name)
                    yield Step([target], Moments())
            self._keep(number)
        return None

    def _refill(self, name: str) -> None:
        """Give a layer outside of the blocks the weight it has been given already."""
        if name in self.matrices and name in self._kept and not self._on_float:
            self.inspection.structure.targets[name].view.write(self.matrices[name].dequantize())
            bias = self.changed.get(f"{name}.bias")
            if bias is not None:
                self.model.get_parameter(f"{name}.bias").data.copy_(bias)

    def _keep(self, number: int) -> None:
        """Write what has been done since the last block was kept."""
        if number < self.state.finished:
            return
        self._copies.wait()
        tensors = self._note_held()
        names = [n for n in self.matrices if n not in self._kept]
        targets = self.inspection.structure.targets
        for name in names:
            if targets[name].options.bias_correction and f"{name}.bias" not in tensors:
                tensors[f"{name}.bias"] = targets[name].module.bias.detach().cpu().clone()
        layers, warnings = self._seen
        block = FinishedBlock(
            {name: self.matrices[name] for name in names},
            {name: self.activations[name] for name in names if name in self.activations},
            tensors,
            [asdict(row) for row in self.report.layers[layers:]],
            self.report.warnings[warnings:],
        )
        self._kept |= {row.name for row in self.report.layers[layers:]}
        self.matrices |= self.state.keep(block).matrices
        self._take(tensors)
        self._seen = (len(self.report.layers), len(self.report.warnings))

    def _note_held(self) -> dict[str, torch.Tensor]:
        """Take what a block fitted to the float model's inputs has; the block stays float.

        Returns
        -------
        dict of str to Tensor
            The biases that have been corrected.
        """
        biases = {}
        for target, result, moments in self._held:
            self.matrices[target.name] = result.matrix
            if result.bias_shift is not None:
                biases[f"{target.name}.bias"] = target.view.shifted_bias(result.bias_shift).cpu()
            spec = target.options.activations
            if spec is not None:
                dtype = target.view.weight.dtype
                quantizer = ActivationQuantizer.calibrate(spec, moments.ranges, dtype)
                self.activations[target.name] = quantizer
        self._held.clear()
        return biases

    def _write_held(self) -> None:
        """Put what the float model did not have into it, now that all of it has run."""
        if self._on_float:
            self._install(self.activations)
            self._add(self.changed)


def _by_block(targets: Mapping[str, Target], group: list[str]) -> list[list[str]]:
    """Split a group whose layers are in several blocks, as those that read an encoder's output.

    One block at a time is in memory; each row's codes depend on H and that row alone.
    """
    parts: dict[str | None, list[str]] = {}
    for name in group:
        parts.setdefault(targets[name].block, []).append(name)
    return list(parts.values())


def float_tensors(source: BlockSource, changed: Mapping[str, torch.Tensor]) -> Any:
    """Return what reads the float tensors of a checkpoint by their names in memory."""
    stored, experts = source.stored, source.experts
    dtypes = {name: tensor.dtype for name, tensor in source.model.state_dict().items()}
    last: dict[str, dict[str, torch.Tensor]] = {}

    def of_expert(name: str) -> torch.Tensor:
        if name in experts.names:
            return stored.tensors.read(experts.names[name])
        whole, module, index, projection = experts.parts[name]
        if whole not in last:
            last.clear()  # those of one parameter follow each other, and it can be large
            last[whole] = stored.read([whole], dtypes)
        return module.part(last[whole][whole], index, projection).contiguous()

    def fetch(name: str) -> torch.Tensor:
        if name in changed:
            return changed[name]
        if name in experts:
            return of_expert(name)
        held = stored.names.get(name)
        mapped = None if held is None else stored.tensors.map(held)
        return stored.read([name], dtypes)[name] if mapped is None else mapped

    return fetch
