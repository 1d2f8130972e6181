"""Measure models one after the other, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptqkit._config import show_config
from ptqkit._repr import one_line_repr
from ptqkit.errors import PtqkitError
from ptqkit.hf.models.loading import compute_dtype, read_config, stored_dtype
from ptqkit.hf.speed.report import SpeedReport, SpeedRow
from ptqkit.hf.speed.shapes import ModelShape

__all__ = ["SpeedCase", "folder_cases", "measure_speed", "random_cases"]

_FLOATS = ("float32", "bfloat16")


@dataclass(frozen=True)
class SpeedCase:
    """One model in one form.

    Attributes
    ----------
    model, form : str
        For the report.
    folder : str
        Empty for a random model.
    dtype, compute : str
        As :func:`ptqkit.load` takes them.
    variant : str
        Of a random model.
    shape : ModelShape, optional
        Of a random model.
    dequantized : bool
        Run the float model that a quantized folder stands for.
    fused : bool
        As :func:`ptqkit.load` takes it.
    """

    __repr__ = one_line_repr

    model: str
    form: str
    folder: str = ""
    dtype: str = "float32"
    compute: str = "dequantize"
    variant: str = ""
    shape: ModelShape | None = None
    dequantized: bool = False
    fused: bool = True


def folder_cases(
    folders: Mapping[str, str | os.PathLike[str]],
    computes: Sequence[str] = ("auto",),
    floats: Sequence[str] = _FLOATS,
) -> list[SpeedCase]:
    """Return the cases of folders of models, by the names that the report shows.

    A float model runs in each dtype of ``floats``; a quantized one in the dtype of its files, and
    each way of ``computes``. If all folders are quantized, the float rows are those of the
    dequantized first.
    """
    cases: list[SpeedCase] = []
    quantized: list[SpeedCase] = []
    for name, path in folders.items():
        folder = os.fspath(path)
        settings = read_config(Path(folder)).get("quantization_config")
        if not settings:
            cases += [SpeedCase(name, dtype, folder, dtype) for dtype in floats]
            continue
        dtype = compute_dtype("auto", stored_dtype(Path(folder)), "cpu")
        for compute in computes:
            form = _form(settings) + ("" if compute == "auto" else f" {compute}")
            quantized.append(SpeedCase(name, form, folder, dtype, compute))
    if not cases and quantized:
        first = quantized[0]
        cases = [SpeedCase(first.model, d, first.folder, d, dequantized=True) for d in floats]
    return cases + quantized


def _form(settings: Mapping[str, Any]) -> str:
    """Return the short name of a format."""
    version = settings.get("format_version")
    method = settings.get("checkpoint_format") or settings.get("quant_method", "quantized")
    return f"{method} v{version}" if version else str(method)


def random_cases(
    name: str,
    shape: ModelShape,
    variants: Sequence[str],
    dtype: str = "float32",
    floats: Sequence[str] = _FLOATS,
    compute: str = "packed",
) -> list[SpeedCase]:
    """Return the cases of random weights: float ones, then packed ones with inputs of ``dtype``."""
    cases = [SpeedCase(name, d, dtype=d, variant="float", shape=shape) for d in floats]
    for variant in variants:
        form = variant + (" int8" if compute == "int8" and variant != "W8A8" else "")
        cases.append(SpeedCase(name, form, "", dtype, compute, variant, shape))
    return cases


def measure_speed(
    cases: Sequence[SpeedCase],
    *,
    prompt: int = 512,
    tokens: int = 32,
    repeat: int = 3,
    threads: int = 0,
    text: Sequence[str] | None = None,
    max_tokens: int | None = 4000,
    int8_cache: bool = False,
    tell: Callable[[str], None] | None = None,
) -> SpeedReport:
    """Measure the cases.

    Parameters
    ----------
    cases : sequence of SpeedCase
    prompt, tokens : int
        Length of the prompt, and greedy steps of the generation; less if the model takes less.
    repeat : int
        Prompts; the median counts.
    threads : int
        0: as the environment says.
    text : sequence of str, optional
        Documents whose perplexity is measured, of folders that hold a tokenizer.
    max_tokens : int, optional
        Of the text.
    int8_cache : bool
        Generate with :class:`ptqkit.hf.Int8Cache`.
    tell : callable, optional
        Called with a line when something new begins, and with a row's rates when it is done.

    Raises
    ------
    PtqkitError
        If a model cannot be measured; the message names it.
    """
    rows = []
    for number, case in enumerate(cases):
        label = f"[{number + 1}/{len(cases)}] {Path(case.model).name} {case.form}"
        job = {
            **asdict(case),
            "prompt": prompt,
            "tokens": tokens,
            "repeat": repeat,
            "threads": threads,
            "text": list(text) if text and case.folder else None,
            "max_tokens": max_tokens,
            "int8_cache": int8_cache,
        }

        def forward(what: str, label: str = label) -> None:
            if tell is not None:
                tell(f"{label}: {what}")

        values = _in_a_process(job, label, forward)
        row = SpeedRow(
            case.model, case.form, file_bytes=_file_bytes(case, values["tensor_bytes"]), **values
        )
        rows.append(row)
        # At once: a run that is broken off has told what it knew.
        forward(f"{row.prompt_rate:.4g} and {row.generation_rate:.4g} tokens/s")
    return SpeedReport(tuple(rows), str(show_config()["cpu_level"]))


def _file_bytes(case: SpeedCase, tensors: int) -> int:
    if not case.folder or case.dequantized:
        return tensors
    return sum(path.stat().st_size for path in Path(case.folder).glob("*.safetensors"))


def _in_a_process(job: dict[str, Any], label: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Run the worker; the process ends with this function, whatever happens."""
    root = str(Path(__file__).resolve().parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if job["threads"]:
        environment["OMP_NUM_THREADS"] = str(job["threads"])
    command = [sys.executable, "-m", "ptqkit.hf.speed.worker"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            # A process that has failed already reads nothing; its end says why.
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                pipe.write(json.dumps(job))
            for line in process.stdout:
                if not line.startswith('{"event"'):
                    continue
                event = json.loads(line)
                if event["event"] == "done":
                    return event["values"]
                tell(event["event"])
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
        errors.seek(0)
        last = [line for line in errors.read().splitlines() if line.strip()]
        reason = last[-1] if last else f"the process ended with code {process.returncode}"
        raise PtqkitError(f"{label} could not be measured: {reason}")
