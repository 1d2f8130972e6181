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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ptqkit.demo.workbench import DemoRow, Workbench

__all__ = ["METHODS", "DemoResult", "generate", "run_demo"]

GROUP_SIZE = 64
METHODS = {"rtn": "RTN", "reference": "GPTQ, as published", "quality": "GPTQ, quality recipe"}
PROMPT = 'def read_lines(path):\n    """Return'


@dataclass
class DemoResult:
    """All rows, how they were measured, and what was written.

    Attributes
    ----------
    rows : list of DemoRow
        The float model first.
    settings : dict
        Conventions: tokens, window, stride, start token, calibration, group size, Python.
    checkpoint : dict
        Directory, format, bytes, the largest difference between the logits of the model loaded
        from it and of the one in memory, its perplexity, and the text it wrote.
    picture : str or None
    seconds : float
    """

    rows: list[DemoRow] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    picture: str | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)

    def row(self, recipe: str, bits: int) -> DemoRow:
        """Row of a recipe at a number of bits."""
        return next(r for r in self.rows if (r.recipe, r.bits) == (recipe, bits))

    def table(self) -> str:
        """Plain text table."""
        return "\n".join([_HEADER, "-" * len(_HEADER), *map(_line, self.rows)])


_HEADER = (
    f"{'':<22}{'bits':>5}{'perplexity':>12}{'excess':>9}{'bits/weight':>13}{'MB':>7}"
    f"{'seconds':>9}{'solving':>9}"
)


def _line(row: DemoRow) -> str:
    start = f"{METHODS.get(row.recipe, 'float16'):<22}{row.bits:>5}{row.perplexity:>12.3f}"
    if row.recipe == "float":
        return f"{start}{'':>9}{row.bits_per_weight:>13.2f}{row.megabytes:>7.2f}"
    return (
        f"{start}{row.excess:>9.3f}{row.bits_per_weight:>13.2f}{row.megabytes:>7.2f}"
        f"{row.seconds:>9.2f}{row.seconds_solve:>9.2f}"
    )


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
    tell: Callable[[str], None] | None = None,
) -> DemoResult:
    """Run the whole demo.

    Parameters
    ----------
    folder : path
        An existing folder; gets ``checkpoint/`` and, without ``picture``, ``demo.png``.
    quick : bool
        3 bits alone, on a fifth of the text.
    picture : path, optional
    tell : callable, optional
        Called with each line of the report as soon as it is known.

    Returns
    -------
    DemoResult
    """
    started = time.perf_counter()
    tell = tell or (lambda line: None)
    bench = Workbench(4, 6) if quick else Workbench()
    result = DemoResult([bench.float_row], {**bench.settings, "group_size": GROUP_SIZE})
    for line in (*_introduction(result.settings), "", _HEADER, "-" * len(_HEADER)):
        tell(line)
    tell(_line(bench.float_row))
    for bits in (3,) if quick else (4, 3, 2):
        for recipe in METHODS:
            result.rows.append(bench.measure(recipe, bits=bits, group_size=GROUP_SIZE))
            tell(_line(result.rows[-1]))
    tell("")
    result.checkpoint = _round_trip(bench, Path(folder) / "checkpoint", tell)
    target = Path(picture) if picture is not None else Path(folder) / "demo.png"
    result.picture = _picture(result, target, tell)
    result.seconds = time.perf_counter() - started
    tell(f"{result.seconds:.0f} s in all")
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


def _round_trip(bench: Workbench, where: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Write a symmetric 4-bit checkpoint, load it with transformers alone, use it."""
    quantized = bench.quantize("quality", bits=4, group_size=GROUP_SIZE, symmetric=True)
    expected = bench.logits_of(bench.model)
    # The model came as float16 and its scales are float16: storing it so loses nothing.
    bench.model.half()
    info = quantized.save(where)
    loaded = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    difference = float((bench.logits_of(loaded) - expected).abs().max())
    found = bench.perplexity_of(loaded)
    words = generate(loaded, bench.tokenizer, PROMPT)
    tell(f"Wrote {info.directory}")
    tell(f"  {info.format}, quality recipe, 4 bits symmetric: {info.bytes / 1e6:.1f} MB in all")
    tell("Loaded with plain transformers:")
    tell(f"  AutoModelForCausalLM.from_pretrained({str(info.directory)!r}, dtype='float32')")
    tell(f"  largest difference of its logits from the model in memory: {difference:g}")
    tell(f"  perplexity {found.perplexity:.3f}; it writes (temperature 0.7):")
    for line in words.splitlines():
        tell(f"  | {line}")
    return {
        "directory": str(info.directory),
        "format": info.format,
        "bytes": info.bytes,
        "logits_difference": difference,
        "perplexity": found.perplexity,
        "text": words,
    }


def _picture(result: DemoResult, target: Path, tell: Callable[[str], None]) -> str | None:
    try:
        from ptqkit.demo.picture import draw
    except ModuleNotFoundError as error:
        tell(f"No picture: {error.name} is not installed (it comes with ptqkit[hf])")
        return None
    draw(result, target)
    tell(f"Picture: {target}")
    return str(target)
