"""The table of a diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptqkit._tables import text_table

__all__ = ["number", "write_table"]

_SHOWN = 12


def number(value: float) -> str:
    """Four significant digits; "-" for what was not measured."""
    return "-" if value != value else f"{value:.4g}"


def write_table(report: Any) -> str:
    """Text of a :class:`~ptqkit.hf.diagnostics.diagnosis.DiagnosisReport`."""
    return "\n\n".join(part for part in (_inputs(report), _facts(report), _costs(report)) if part)


def _inputs(report: Any) -> str:
    header = ["input of", "part", "RMSE/token", "RMSE/tensor", "STD", "kurtosis", "max"]
    header += ["max/median", "STD(gain)", "sigma max", "stable rank", "outliers"]
    weights = {row.name: row for row in report.weights}
    cells: list[list[str]] = []
    for row in report.inputs:
        own = [weights[name] for name in row.consumers if name in weights]
        largest = max(own, key=lambda w: w.spectral_norm, default=None)
        values = [row.rmse_token, row.rmse_tensor, row.std, row.kurtosis, row.maximum]
        values += [row.max_to_median, row.norm_std]
        spectrum = [largest.spectral_norm, largest.stable_rank] if largest else [float("nan")] * 2
        found = str(len(report.outliers.get(row.name, ())) or "")
        cells.append([row.name, row.part, *map(number, [*values, *spectrum]), found])
    return text_table(header, cells)


def _facts(report: Any) -> str:
    lines, bits, rules = [], report.bits, report.options
    if report.attention:
        heads = "mean of the heads"
        lines = [
            f"attention sinks: {report.sink_share:.1%} of the heads give the first token more than "
            "0.3 on average",
            f"softmax with {bits} bits: {report.mass_lost:.2%} of the mass is lost, {heads}",
            f"key-value cache with {bits} bits: {report.cache_error:.3%} relative error, {heads}",
        ]
    names = list(report.outliers)
    if rules:
        rule = f"at least {rules['ratio']:g} times the median channel"
        lines.append(f"outlier channels ({rule}): {'' if names else 'none'}".rstrip())
        lines += [f"  {name}: {_list(report.outliers[name])}" for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        lines.append(f"  and in {len(names) - _SHOWN} more inputs")
    if rules and rules["value"] == rules["value"]:
        rule = f"|x| >= {rules['value']:g} in {rules['layers']:.0%} of the layers and "
        rule += f"{rules['tokens']:.0%} of the tokens"
        lines.append(f"outlier dimensions ({rule}): {_list(report.outlier_dimensions) or 'none'}")
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _list(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    return shown if len(numbers) <= _SHOWN else f"{shown}, ... ({len(numbers)} in all)"


def _costs(report: Any) -> str:
    titles = {
        "kind": "one kind of tensor quantized in all blocks",
        "layer": "one block quantized",
        "depth": "all blocks up to one quantized",
    }
    found = report.sensitivity.items()
    return "\n\n".join(
        f"{titles[by]}, {costs.bits} bits, all else float:\n{costs.table()}" for by, costs in found
    )
