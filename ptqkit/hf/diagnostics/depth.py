"""Sensitivity for a diagnosis: each kind, each block, and all blocks up to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ptqkit.errors import UnsupportedModuleError
from ptqkit.hf.data.calibration import CalibrationSet
from ptqkit.hf.diagnostics.bench import Bench, Case
from ptqkit.hf.diagnostics.report import SensitivityReport, SensitivityRow
from ptqkit.hf.diagnostics.sensitivity import KINDS
from ptqkit.hf.models.attention import find_attention
from ptqkit.hf.progress import Progress, ProgressStage
from ptqkit.hf.softmax.driver import describe

__all__ = ["measure_sensitivity"]

_LINEAR_KINDS = ("weights", "inputs")


def measure_sensitivity(
    model: nn.Module,
    data: CalibrationSet,
    wanted: Sequence[str],
    bits: int,
    report: Any,
    progress: Progress | None,
) -> None:
    """Fill ``report.sensitivity``; what cannot be measured goes to ``report.notes``.

    Grids are those of :func:`ptqkit.hf.sensitivity`. "depth" quantizes all tensors of the first
    blocks together, one more at a time: how errors grow through the model.
    """
    kinds: Sequence[str] = KINDS if _can_be_hooked(model) else _LINEAR_KINDS
    try:
        bench = Bench(model, data, kinds, bits)
    except UnsupportedModuleError as error:
        report.notes.append(f"sensitivity was not measured: {error}")
        return
    cases = {by: _cases(bench, by) for by in wanted}
    stage = ProgressStage(progress, "sensitivity", sum(map(len, cases.values())))
    for by, todo in cases.items():
        found = SensitivityReport(bits=bits, by=by, calibration=describe(data))
        for case in todo:
            with bench.quantized(case):
                sqnr = bench.compare()
            row = SensitivityRow(case.kind, case.layer, len(case.members))
            row.sqnr_db, row.infinite = float(sqnr.decibel), int(sqnr.infinite)
            found.rows.append(row)
            stage.step(row.name)
        if by != "depth":
            found.rows.sort(key=lambda row: row.sqnr_db)
        report.sensitivity[by] = found


def _can_be_hooked(model: nn.Module) -> bool:
    try:
        return bool(find_attention(model))
    except UnsupportedModuleError:
        return False


def _cases(bench: Bench, by: str) -> list[Case]:
    if by != "depth":
        return bench.cases(by)
    alone = {case.layer: case for case in bench.cases("layer")}
    found: list[Case] = []
    for block in bench.blocks:
        if block in alone:
            before = found[-1].members if found else []
            found.append(Case("all", block, [*before, *alone[block].members]))
    return found
