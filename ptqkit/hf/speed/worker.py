"""Measure one model, in a process of its own: ``python -m ptqkit.hf.speed.worker``.

A job is a JSON object on standard input; events are JSON objects on lines of standard output, the
last of them ``{"event": "done", "values": ...}``. A process of its own, because peak memory is that
of a process, and because models are not freed to the byte.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ptqkit.hf.checkpoint.plugin import float_module
from ptqkit.hf.checkpoint.reader import load, model_class_of, read_folder
from ptqkit.hf.checkpoint.running import set_compute
from ptqkit.hf.data.calibration import max_positions
from ptqkit.hf.evaluation.likelihood import perplexity
from ptqkit.hf.models.int8_cache import Int8Cache
from ptqkit.hf.models.loading import load_tokenizer
from ptqkit.hf.speed.shapes import ModelShape
from ptqkit.nn.qlinear import QLinear

__all__ = ["measure", "memory"]

#: Tokens before the first generated one.
CONTEXT = 16


def memory(field: str = "VmHWM") -> int:
    """Return the bytes of a field of the process's status: its peak by default; 0 if unknown."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    found = [line for line in lines if line.startswith(f"{field}:")]
    return int(found[0].split()[1]) * 1024 if found else 0


def tensor_bytes(model: Any) -> int:
    """Return the bytes of the parameters and buffers of a model; each memory counts once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _open(job: dict[str, Any]) -> Any:
    dtype = getattr(torch, job["dtype"])
    if job["variant"]:
        from ptqkit.hf.speed.random_model import random_model

        shape = ModelShape(**job["shape"])
        return random_model(
            shape, job["variant"], dtype=dtype, compute=job["compute"], fused=job["fused"]
        )
    if not job["dequantized"]:
        model = load(job["folder"], dtype=dtype, compute=job["compute"], fused=job["fused"])
        return model.eval().requires_grad_(False)
    model = load(job["folder"], dtype=dtype, compute="auto")
    for name, module in list(model.named_modules()):
        if isinstance(module, QLinear):
            model.set_submodule(name, float_module(module, dtype))
    return model.to(dtype).eval().requires_grad_(False)


def _import_libraries(job: dict[str, Any]) -> None:
    """Import what the model will: libraries are not counted as its memory."""
    if job["variant"]:
        from ptqkit.hf.speed import random_model  # noqa: F401
    else:
        folder, config = read_folder(job["folder"])
        model_class_of(folder, config)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _tokens(model: Any, count: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (1, count), generator=random)


@torch.no_grad()
def _prompt(model: Any, tokens: int, repeat: int) -> float:
    """Return the median of the tokens per second of a prompt; one run before warms up."""
    ids = _tokens(model, tokens)

    def run() -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    run()
    return tokens / statistics.median(_seconds(run) for _ in range(repeat))


@torch.no_grad()
def _generate(model: Any, tokens: int, int8_cache: bool) -> tuple[float, int]:
    """Return the median of the tokens per second of greedy steps, and the bytes of the cache."""
    ids, seconds = _tokens(model, CONTEXT), []
    given = {"past_key_values": Int8Cache()} if int8_cache else {}
    output = model(ids, use_cache=True, **given)
    for _ in range(tokens):
        ids = output.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        output = model(ids, past_key_values=output.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - start)
    cache = output.past_key_values
    if isinstance(cache, Int8Cache):
        return 1 / statistics.median(seconds), cache.nbytes
    held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return 1 / statistics.median(seconds), sum(t.numel() * t.element_size() for t in held)


def measure(job: dict[str, Any], tell: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Load a model and measure it.

    Parameters
    ----------
    job : dict
        As :func:`ptqkit.hf.speed.run.measure_speed` makes it.
    tell : callable
        Called with what is done now.

    Returns
    -------
    dict
        Fields of :class:`ptqkit.hf.speed.report.SpeedRow`.
    """
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    _import_libraries(job)
    before = memory("VmRSS")
    tell("loading")
    start = time.perf_counter()
    model = _open(job)
    values: dict[str, Any] = {"load_seconds": time.perf_counter() - start}
    values["tensor_bytes"] = tensor_bytes(model)
    limit = max_positions(model) or job["prompt"] + job["tokens"]
    prompt = min(job["prompt"], limit)
    steps = min(job["tokens"], limit - CONTEXT)
    tell(f"prompt of {prompt} tokens")
    values["prompt_rate"] = _prompt(model, prompt, job["repeat"])
    tell(f"generating {steps} tokens")
    values["generation_rate"], values["cache_bytes"] = _generate(model, steps, job["int8_cache"])
    values["prompt"], values["tokens"] = prompt, steps
    if job["text"]:
        tell("perplexity")
        values["perplexity"] = _perplexity(model, job)
    # What is mapped from files counts as far as it was touched.
    values["peak_bytes"] = max(memory() - before, 0)
    values["threads"] = torch.get_num_threads()
    compute = getattr(model, "ptqkit_compute", None)
    values["computed"] = "" if compute is None or job["dequantized"] else str(compute)
    if job["variant"] not in ("", "float"):
        values["computed"] = str(set_compute(model, job["compute"], fused=job["fused"]))
    return values


def _perplexity(model: Any, job: dict[str, Any]) -> float:
    tokenizer = load_tokenizer(Path(job["folder"]))
    window = min(max_positions(model) or 2048, 2048)
    result = perplexity(
        model, tokenizer, job["text"], window=window, max_tokens=job["max_tokens"], progress=False
    )
    return result.perplexity


def main() -> None:
    """Read a job, measure, and write what was found."""

    def write(event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)

    job = json.load(sys.stdin)
    write({"event": "done", "values": measure(job, lambda what: write({"event": what}))})


if __name__ == "__main__":
    main()
