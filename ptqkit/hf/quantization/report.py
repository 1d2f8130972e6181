"""What a quantization run did, layer by layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ptqkit._files import JsonReport, plain
from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit._tables import WIDTH, table_width, text_table, wrap_line
from ptqkit.arrays.metrics import signal_to_error
from ptqkit.hf.models.structure import Target
from ptqkit.hf.quantization.solve import LayerResult
from ptqkit.hf.quantization.tuning import TuningReport
from ptqkit.recipe.options import ActivationQuantization

__all__ = ["LayerReport", "Report", "layer_report"]


@dataclass
class LayerReport:
    """One layer. Numbers that were not computed are NaN (``None`` in JSON).

    Attributes
    ----------
    name, status, method : str
        Status is ``"quantized"``, ``"skipped: why"`` or ``"failed: why"``.
    shape : tuple of int
        (out, in).
    objective, objective_rtn : float
        tr((W - Q) H (W - Q)^T) with H = (2/N) sum x x^T, of the result and of rounding to nearest:
        on the same grid, or, where act-order permutes the groups, on grids of consecutive inputs.
        With error propagation W is the corrected weight, which the solver was
        given, in these and in the decibels; H is of the quantized model's inputs in any case.
    improvement : float
        ``1 - objective / objective_rtn``. A layer that is worse than rounding to nearest stays as
        it is, and ``notes`` says so: layers that share an input need one order of their groups.
    weight_sqnr_db, output_sqnr_db : float
        Signal to error of the weights, and of the layer's outputs on the calibration inputs.
    bits_per_weight : float
        With scales, zero-points and group indices.
    activations : str
        How the layer's inputs are quantized, such as ``"8 token"``; empty if they are not.
    bias_share : float
        Share of the output error's power on the calibration inputs that was its mean, which bias
        correction takes away; the objective is without it.
    damping : float
        Used, as a fraction of the mean diagonal of H; ``damping_raised`` counts the steps it had
        to be raised by, and ``notes`` says why.
    tokens : int
        Calibration tokens behind H; of an expert those routed to it.
    seconds_hessian, seconds_solve, seconds_diagnostics, seconds_propagation : float
        Layers that were solved together share the time by rows. The last: accumulating G and
        correcting the weight.
    schedule : str
    shares_input_with : list of str
    rule : str
        What was done about an expert that got fewer tokens than it has inputs
        (:mod:`ptqkit.hf.quantization.expert_moments`); empty if it got enough.
    target : str
        What was quantized instead of the weight: empty for the weight itself; ``"least-squares
        0.5"`` (or another ``target`` of the recipe) if it was corrected for the errors of its
        inputs, ``"residual 0.5"`` if for those of the stream that it writes into too.
    solved_on : str
        Type of the device that made the solve, such as ``"cuda"``; ``"cpu: why"`` if the layer is
        on a device, but the host's cores made it.
    """

    __repr__ = one_line_repr

    name: str
    shape: tuple[int, int] = (0, 0)
    status: str = "quantized"
    method: str = ""
    bits: int | str | None = None
    group_size: int | None = None
    per_tensor: bool = False
    symmetric: bool = False
    objective: float = math.nan
    objective_rtn: float = math.nan
    improvement: float = math.nan
    weight_sqnr_db: float = math.nan
    output_sqnr_db: float = math.nan
    bits_per_weight: float = math.nan
    activations: str = ""
    bias_share: float = math.nan
    damping: float = math.nan
    damping_raised: int = 0
    dead_inputs: int = 0
    tokens: int = 0
    seconds_hessian: float = 0.0
    seconds_solve: float = 0.0
    seconds_diagnostics: float = 0.0
    seconds_propagation: float = 0.0
    schedule: str = ""
    shares_input_with: list[str] = field(default_factory=list)
    target: str = ""
    solved_on: str = ""
    rule: str = ""
    notes: str = ""


@dataclass
class Report(Tabular, JsonReport):
    """All layers and the run as a whole.

    Attributes
    ----------
    layers : list of LayerReport
        In order of execution, then the modules that were left alone.
    equalization : dict or None
        :meth:`EqualizationReport.to_dict`, if the float model was equalized first.
    schedule : str
        ``"one-pass"``, ``"replay"``, ``"one-pass, then replay"`` or ``"no calibration"``.
    schedule_reason : str
        Why it was not one pass; empty if it was.
    calibration : dict
        Source, samples, sequence length, tokens, start token.
    seconds : dict of str to float
        ``total``, ``setup`` (checks and probe), ``hessian``, ``solve``, ``diagnostics``,
        ``propagation`` (G and the correction, with error propagation), ``equalization`` (if the
        recipe has one), ``rounding_losses`` (if it names average bits), ``row_coupling`` (the
        passes that measure what it needs), and ``forward``: the rest, mostly the model (both
        models).
    memory : dict of str to int or None
        In bytes: ``peak`` resident (or device) memory of the process, and with calibration
        ``estimate_one_pass`` and ``estimate_replay`` (what each schedule needs in addition to the
        model), ``budget`` (None if none was given) and ``available`` (free before the run); not in
        bytes, ``blocks_on_host``, if some of a model on a GPU wait there.
    recipe : dict
    tuning : dict or None
        :meth:`TuningReport.to_dict`, if scales, gains and biases were tuned; the layers' rows are
        of the time before.
    rounding_losses : dict of str to dict of int to float
        If the recipe names average bits: what rounding each layer to nearest would cost alone at
        each number of bits, an estimate in nats per token.
    warnings : list of str
    """

    __repr__ = one_line_repr

    layers: list[LayerReport] = field(default_factory=list)
    equalization: dict[str, Any] | None = None
    schedule: str = ""
    schedule_reason: str = ""
    calibration: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] | None = None
    rounding_losses: dict[str, dict[int, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> LayerReport:
        """Return the row of a layer by name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def quantized(self) -> list[LayerReport]:
        """Rows of the layers that were quantized."""
        return [layer for layer in self.layers if layer.status == "quantized"]

    @property
    def worse_than_rtn(self) -> list[LayerReport]:
        """Rows whose objective is above that of rounding to nearest; their notes say so."""
        return [layer for layer in self.quantized if _worse(layer.objective, layer.objective_rtn)]

    @property
    def failed(self) -> list[LayerReport]:
        """Rows of the layers that were left float because of an error."""
        return [layer for layer in self.layers if layer.status.startswith("failed")]

    def note_tuning(self, facts: dict[str, Any]) -> None:
        """Add what tuning did, and its time."""
        self.tuning = facts
        spent = self.seconds.get("tuning", 0.0)
        self.seconds["tuning"] = spent + facts["seconds"]
        self.seconds["total"] = self.seconds.get("total", 0.0) + facts["seconds"]

    def totals(self) -> dict[str, Any]:
        """Return sums over the quantized layers; ``bits_per_weight`` is weighted by size."""
        rows = self.quantized
        weights = [r.shape[0] * r.shape[1] for r in rows]
        total = sum(weights)
        objective = math.fsum(r.objective for r in rows)
        objective_rtn = math.fsum(r.objective_rtn for r in rows)
        bits = math.fsum(w * r.bits_per_weight for w, r in zip(weights, rows, strict=True))
        return {
            "layers": len(rows),
            "skipped": sum(r.status.startswith("skipped") for r in self.layers),
            "failed": len(self.failed),
            "weights": total,
            "bits_per_weight": bits / total if total else math.nan,
            "objective": objective,
            "objective_rtn": objective_rtn,
            "improvement": _improvement(objective, objective_rtn),
            "damping_raised": sum(r.damping_raised > 0 for r in rows),
            "dead_inputs": sum(r.dead_inputs for r in rows),
            "seconds": self.seconds.get("total", math.nan),
        }

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dict per layer, for ``pandas.DataFrame(report.to_dicts())``."""
        return [asdict(layer) for layer in self.layers]

    def _rows(self) -> list[dict[str, Any]]:
        return self.to_dicts()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that are valid JSON (NaN becomes None)."""
        return plain({**asdict(self), "totals": self.totals()})

    def table(self, skipped: bool = False) -> str:
        """Return plain text: a line per layer (``skipped``: also those left alone) and totals."""
        rows = [r for r in self.layers if skipped or not r.status.startswith("skipped")]
        cells = zip(*map(_cells, rows), strict=True) if rows else [()] * len(_HEADER)
        columns = dict(zip(_HEADER, cells, strict=True))
        columns = {name: column for name, column in columns.items() if set(column) != {"-"}}
        equal = [name for name in _OFTEN_EQUAL if len(set(columns.get(name, ()))) == 1]
        told = [f"{name} {columns.pop(name)[0]}" for name in equal]
        left_out = []
        for name in _LESS_IMPORTANT:
            names = min(max(map(len, ("layer", *columns["layer"]))), _NAME)
            others = [(n, *column) for n, column in columns.items() if n != "layer"]
            if names + 2 + table_width(others) > WIDTH and columns.pop(name, ()):
                left_out.append(name)
        left = (0, -1) if "status" in columns else (0,)
        table = text_table(list(columns), zip(*columns.values(), strict=True), left=left)
        lines = [f"{r.name}: {r.notes}" for r in rows if r.notes]
        if told:
            lines.append(f"every layer: {', '.join(told)}")
        if left_out:
            lines.append(f"not shown: {', '.join(left_out)} (to_dicts() has everything)")
        return "\n".join([table, "", *map(wrap_line, [*lines, *self._summary()])])

    def _summary(self) -> list[str]:
        t = self.totals()
        weights = f", {t['weights']:,} weights at {t['bits_per_weight']:.3f} bits"
        lines = [
            f"{t['layers']} layer{'s' * (t['layers'] != 1)}{weights if t['layers'] else ''}; "
            f"{t['skipped']} skipped, {t['failed']} failed",
            *self._objectives(t),
            "schedule "
            + self.schedule
            + (f" ({self.schedule_reason})" if self.schedule_reason else ""),
            "seconds " + ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items()),
        ]
        if worse := self.worse_than_rtn:
            lines.append(
                f"warning: {len(worse)} layers are worse than round-to-nearest; try order "
                "group-act, static_groups or smaller groups"
            )
        alphas = {w: self.recipe.get(f"{w}_propagation", 0) for w in ("error", "residual")}
        told = ", ".join(f"{w} propagation {alpha:g}" for w, alpha in alphas.items() if alpha)
        if told:
            lines.append(f"{told}: figures are of the corrected weights, not the model's own")
        if self.tuning is not None:
            lines.append(f"{TuningReport(**self.tuning)}; figures of layers are of before")
        if self.memory.get("peak"):
            lines.append(f"peak memory {self.memory['peak'] / 2**20:,.0f} MiB")
        return lines + [f"warning: {w}" for w in self.warnings]

    @staticmethod
    def _objectives(totals: dict[str, Any]) -> list[str]:
        """Return a line on the objectives; none if they were not computed (RTN without text)."""
        objective, objective_rtn = totals["objective"], totals["objective_rtn"]
        if math.isnan(objective) or not totals["layers"]:
            return []
        if math.isnan(objective_rtn):
            return [f"objective {objective:.6g}"]
        better = _percent(totals["improvement"])
        return [
            f"objective {objective:.6g}, round-to-nearest {objective_rtn:.6g} ({better} better)"
        ]

    def __str__(self) -> str:
        return self.table()


_HEADER = (
    "layer",
    "shape",
    "bits",
    "group",
    "act",
    "objective",
    "rtn",
    "better",
    "W dB",
    "Y dB",
    "bpw",
    "damping",
    "dead",
    "tokens",
    "s",
    "status",
)

_OFTEN_EQUAL = ("shape", "bits", "group", "act", "bpw", "damping", "dead", "tokens", "status")
"""Columns that are left out, and stated once, if all rows are equal."""
_LESS_IMPORTANT = ("dead", "tokens", "rtn", "damping", "shape", "bpw", "act")
"""Columns that are left out, in this order, as long as the lines are too long."""
_NAME = 32
"""Characters of a layer's name that other columns make room for."""


def _cells(r: LayerReport) -> tuple[str, ...]:
    damping = _number(r.damping, ".3g") + (f" (+{r.damping_raised})" if r.damping_raised else "")
    return (
        r.name,
        f"{r.shape[0]}x{r.shape[1]}" if r.shape[0] else "-",
        "-" if r.bits is None else str(r.bits),
        _group(r),
        r.activations or "-",
        _number(r.objective, ".4g"),
        _number(r.objective_rtn, ".4g"),
        _percent(r.improvement),
        _number(r.weight_sqnr_db, ".1f"),
        _number(r.output_sqnr_db, ".1f"),
        _number(r.bits_per_weight, ".2f"),
        damping,
        str(r.dead_inputs),
        str(r.tokens or "-"),
        f"{r.seconds_hessian + r.seconds_propagation + r.seconds_solve:.2f}",
        r.status,
    )


def _group(r: LayerReport) -> str:
    if r.bits is None:
        return "-"
    return str(r.group_size) if r.group_size else "tensor" if r.per_tensor else "channel"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}%"


def _worse(objective: float, objective_rtn: float) -> bool:
    """Whether the first is above the second by more than rounding; not if one is NaN."""
    return objective > objective_rtn * (1 + 1e-4)


def _improvement(objective: float, objective_rtn: float) -> float:
    if math.isnan(objective_rtn) or math.isnan(objective):
        return math.nan
    if objective_rtn == 0:
        return 0.0 if objective == 0 else -math.inf
    return 1.0 - objective / objective_rtn


def _activations(spec: ActivationQuantization | None) -> str:
    if spec is None:
        return ""
    outliers = "" if spec.outlier_threshold is None else f" <{spec.outlier_threshold:g}"
    return f"{spec.bits} {spec.granularity}{outliers}"


def _bias_share(solved: LayerResult) -> float:
    """Return |eps E[x]|^2 over E|eps x|^2, which is half the objective."""
    if solved.bias_shift is None or not solved.objective > 0:
        return math.nan
    return 2.0 * float(solved.bias_shift @ solved.bias_shift) / solved.objective


def layer_report(
    target: Target,
    solved: LayerResult,
    tokens: int,
    seconds_hessian: float,
    schedule: str,
    rule: str = "",
) -> LayerReport:
    """Build the row of a quantized layer."""
    matrix, options, notes = solved.matrix, target.options, []
    if matrix.damping_raised:
        notes.append(
            f"H not positive definite at damping {options.damping:g}, raised to {matrix.damping:g}"
        )
    if _worse(solved.objective, solved.objective_rtn):
        ratio = solved.objective / solved.objective_rtn if solved.objective_rtn else math.inf
        notes.append(f"worse than rounding to nearest, {ratio:.4g} times its objective")
    if rule:
        notes.append(rule)
    elif 0 < tokens < target.view.shape[1]:
        notes.append(f"only {tokens} tokens for {target.view.shape[1]} inputs")
    return LayerReport(
        name=target.name,
        shape=target.view.shape,
        method=options.method,
        bits=options.whole_bits,
        group_size=options.group_size,
        per_tensor=options.per_tensor,
        symmetric=matrix.symmetric,
        objective=solved.objective,
        objective_rtn=solved.objective_rtn,
        improvement=_improvement(solved.objective, solved.objective_rtn),
        weight_sqnr_db=signal_to_error(solved.weight_power, solved.weight_error),
        output_sqnr_db=signal_to_error(solved.output_power, solved.objective),
        bits_per_weight=matrix.bits_per_weight,
        activations=_activations(options.activations),
        bias_share=_bias_share(solved),
        damping=matrix.damping if options.method != "rtn" else math.nan,
        damping_raised=matrix.damping_raised,
        dead_inputs=matrix.dead_inputs,
        tokens=tokens,
        seconds_hessian=seconds_hessian,
        seconds_solve=solved.seconds_solve,
        seconds_diagnostics=solved.seconds_diagnostics,
        seconds_propagation=solved.seconds_propagation,
        schedule=schedule,
        target=solved.target,
        solved_on=solved.solved_on,
        rule=rule,
        notes="; ".join(notes),
    )
