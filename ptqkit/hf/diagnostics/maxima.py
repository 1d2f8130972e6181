"""Read the largest magnitudes of a model's activations where the model itself is not at hand."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from ptqkit.errors import CalibrationError
from ptqkit.hf.diagnostics.diagnose import find_outliers
from ptqkit.hf.diagnostics.diagnosis import DiagnosisReport
from ptqkit.hf.diagnostics.rows import InputRow

__all__ = ["read_activation_maxima"]

_PREFIX = "absmax/"
_BLOCK = re.compile(r"(?P<block>.*?\.?(?P<number>\d+))\.(?P<rest>.+)")
_NAN = float("nan")


def read_activation_maxima(path: str | os.PathLike[str], *, ratio: float = 6.0) -> DiagnosisReport:
    """Return what can be said from the largest magnitude of every input channel.

    Such files are made for SmoothQuant: a safetensors file with a vector ``absmax/<module>`` for
    every linear layer. Layers of one block with equal vectors, one after the other, read one
    tensor. Only the channels' maxima, their outliers and the largest magnitudes are known.

    Parameters
    ----------
    path : str or path
    ratio : float above 1
        Of the rule "relative" of :func:`ptqkit.hf.diagnose`.

    Raises
    ------
    CalibrationError
        If the file holds no such vectors, or one of them is not finite or negative.
    """
    from safetensors.numpy import load_file

    vectors = {
        key.removeprefix(_PREFIX): np.asarray(value, np.float32)
        for key, value in load_file(os.fspath(path)).items()
        if key.startswith(_PREFIX)
    }
    found = {name: match for name in vectors if (match := _BLOCK.fullmatch(name))}
    if not found:
        raise CalibrationError(f"{path} holds no vectors {_PREFIX}<module> of layers in blocks")
    inside = sorted(
        found, key=lambda name: (int(found[name]["number"]), *_order(found[name]["rest"]))
    )
    report = DiagnosisReport(Path(path).stem)
    report.options = {"ratio": ratio, "value": _NAN, "layers": _NAN, "tokens": _NAN}
    for name in inside:
        _add(report, name, found[name]["block"], int(found[name]["number"]), vectors[name])
    report.notes.append("read from channel maxima alone: nothing else is known of the activations")
    find_outliers(report)
    return report


def _order(rest: str) -> tuple[int, int, str]:
    """Attention before the MLP; query, key and value before the output."""
    attention = re.search("attn|attention", rest, re.IGNORECASE) is not None
    out = re.search(r"out_proj|o_proj|c_proj|dense$|fc2|down_proj|4h_to_h", rest) is not None
    return (0 if attention else 1, int(out), rest)


def _add(report: DiagnosisReport, name: str, block: str, depth: int, absmax: np.ndarray) -> None:
    if absmax.ndim != 1 or not np.isfinite(absmax).all() or (absmax < 0).any():
        raise CalibrationError(f"{_PREFIX}{name} is not a vector of magnitudes")
    last = report.inputs[-1] if report.inputs else None
    if last is not None and last.block == block and last.channel_absmax == absmax.tolist():
        last.consumers.append(name)
        return
    attention, out, _ = _order(name[len(block) + 1 :])
    part = f"{'mlp' if attention else 'attention'} {'out' if out else 'in'}"
    order = np.argsort(-absmax, kind="stable")[:3]
    row = InputRow(name, block, depth, part, [name], absmax.size, maximum=float(absmax.max()))
    row.largest = [[float(absmax[c]), None, int(c)] for c in order]
    row.channel_absmax = absmax.tolist()
    report.inputs.append(row)
