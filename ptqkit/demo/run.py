"""The demo: nine quantizations of the embedded model, measured on text it never saw.

Text: of the standard library's sources, tokens of the test split to measure on and of the
calibration split to calibrate on, in windows spread evenly over (test) or drawn from
(calibration) the whole split. Perplexity is per token, in float32 arithmetic, in windows of 512
tokens of which the first is the start token, without overlap.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ptqkit.demo import text
from ptqkit.demo.result import METHODS, DemoResult, demo_table
from ptqkit.demo.workbench import WINDOW, demo_workbench
from ptqkit.hf.workbench import Workbench

__all__ = ["generate", "run_demo"]

GROUP_SIZE = 64
PROMPT = 'def read_lines(path):\n    """Return'


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    tokens: int = 48,
    temperature: float = 0.7,
    seed: int = 0,
) -> str:
    """Continue a prompt; draws with a generator of its own, so that no global seed moves.

    Parameters
    ----------
    model, tokenizer
        Of transformers.
    prompt : str
    tokens : int
        At most so many new tokens.
    temperature : float
    seed : int

    Returns
    -------
    str
        Prompt and continuation.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    step, cache = ids, None
    with torch.no_grad():
        for _ in range(tokens):
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            odds = torch.softmax(out.logits[0, -1].float() / temperature, dim=-1)
            step = torch.multinomial(odds, 1, generator=generator)[None]
            if int(step) == tokenizer.eos_token_id:
                break
            ids, cache = torch.cat([ids, step], dim=1), out.past_key_values
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def run_demo(
    folder: str | os.PathLike[str],
    *,
    quick: bool = False,
    picture: str | os.PathLike[str] | None = None,
    log: Callable[[str], None] | None = None,
) -> DemoResult:
    """Run the whole demo.

    Parameters
    ----------
    folder : path
        An existing folder; gets ``checkpoint/`` and, without ``picture``, ``demo.png``.
    quick : bool
        3 bits alone, on a fifth of the text.
    picture : path, optional
    log : callable, optional
        Called with each line of the report as soon as it is known.

    Returns
    -------
    DemoResult
    """
    started = time.perf_counter()
    log = log or (lambda line: None)
    bench = demo_workbench(4, 6) if quick else demo_workbench()
    result = DemoResult([bench.float_row], {**bench.settings, "group_size": GROUP_SIZE})
    for line in (*_introduction(result.settings), "", *demo_table(result.rows).splitlines()):
        log(line)
    for bits in (3,) if quick else (4, 3, 2):
        for recipe in METHODS:
            result.rows.append(bench.measure(recipe, bits=bits, group_size=GROUP_SIZE))
            log(demo_table(result.rows[-1:]).splitlines()[-1])
    log("")
    result.checkpoint = _round_trip(bench, Path(folder) / "checkpoint", log)
    target = Path(picture) if picture is not None else Path(folder) / "demo.png"
    result.picture = _picture(result, target, log)
    result.seconds = time.perf_counter() - started
    log(f"{result.seconds:.0f} s in all")
    return result


def _introduction(settings: dict[str, Any]) -> list[str]:
    return [
        "Embedded model: LLaMA shape, 7.3 million parameters, trained on Python source code.",
        f"Measured on {settings['test_tokens']:,} tokens of the standard library of Python "
        f"{settings['python']} that it never saw",
        f"(float32, window {settings['window']}, stride {settings['stride']}, start token "
        f"{settings['start_token']}); calibrated on {settings['calibration_tokens']:,} others; "
        f"groups of {settings['group_size']}.",
    ]


def _round_trip(bench: Workbench, where: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Write a symmetric 4-bit checkpoint, load it with transformers alone, use it."""
    quantized = bench.quantize("quality", bits=4, group_size=GROUP_SIZE, symmetric=True)
    ids = bench.tokenizer(text("test"), add_special_tokens=False, verbose=False)
    probe = torch.tensor([ids["input_ids"][: WINDOW - 1]], dtype=torch.long)
    expected = _logits(quantized.model, probe)
    info = quantized.save(where)
    loaded = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    difference = float((_logits(loaded, probe) - expected).abs().max())
    found = bench.perplexity_of(loaded)
    words = generate(loaded, bench.tokenizer, PROMPT)
    log(f"Wrote {info.directory}")
    log(f"  {info.format}, quality recipe, 4 bits symmetric: {info.bytes / 1e6:.1f} MB in all")
    log("Loaded with plain transformers:")
    log(f"  AutoModelForCausalLM.from_pretrained({str(info.directory)!r}, dtype='float32')")
    log(f"  largest difference of its logits from the model in memory: {difference:g}")
    log(f"  perplexity {found.perplexity:.3f}; it writes (temperature 0.7):")
    for line in words.splitlines():
        log(f"  | {line}")
    return {
        "directory": str(info.directory),
        "format": info.format,
        "bytes": info.bytes,
        "logits_difference": difference,
        "perplexity": found.perplexity,
        "text": words,
    }


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def _picture(result: DemoResult, target: Path, log: Callable[[str], None]) -> str | None:
    try:
        from ptqkit.demo.picture import draw
    except ModuleNotFoundError as error:
        log(f"No picture: {error.name} is not installed (it comes with ptqkit[hf])")
        return None
    draw(result, target)
    log(f"Picture: {target}")
    return str(target)
