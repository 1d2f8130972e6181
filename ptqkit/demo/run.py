"""The demo: nine quantizations of the embedded model, measured on text it never saw.

Text: of the standard library's sources, tokens of the test split to measure on and of the
calibration split to calibrate on, in windows spread evenly over (test) or drawn from
(calibration) the whole split. Perplexity is per token, in float32 arithmetic, in windows of 512
tokens of which the first is the start token, without overlap.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptqkit.demo import MODEL_DIR, text
from ptqkit.hf import perplexity, prepare_calibration, quantize

__all__ = ["DemoResult", "DemoRow", "Workbench", "generate", "run_demo"]

GROUP_SIZE = 64
WINDOW = 512
METHODS = {"rtn": "RTN", "reference": "GPTQ, as published", "quality": "GPTQ, quality recipe"}
PROMPT = "def read_lines(path):\n    "


@dataclass(frozen=True)
class DemoRow:
    """One quantization of the model.

    Attributes
    ----------
    recipe : str
        ``"rtn"``, ``"reference"`` or ``"quality"``; ``"float"`` for the model itself.
    bits : int
    symmetric : bool
    perplexity, excess : float
        ``excess`` is the perplexity above the float model's.
    bits_per_weight : float
        Of the quantized layers, with scales and zero-points.
    megabytes : float
        Of all tensors, what is not quantized in float16.
    seconds, seconds_solve : float
        Of the quantization as a whole, and of solving for the codes in it.
    """

    recipe: str
    bits: int
    symmetric: bool
    perplexity: float
    excess: float
    bits_per_weight: float
    megabytes: float
    seconds: float
    seconds_solve: float


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


class Workbench:
    """The embedded model with its texts, for one quantization after another.

    Parameters
    ----------
    test_windows, calibration_windows : int
        Windows of 512 tokens to measure and to calibrate on.
    threads : int
        Of the solver; 0 is its own policy.

    Examples
    --------
    >>> bench = Workbench(test_windows=4, calibration_windows=4)
    >>> row = bench.measure("quality", bits=3, group_size=64)
    """

    def __init__(
        self, test_windows: int = 20, calibration_windows: int = 24, threads: int = 0
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        self.threads = threads
        self._state = {name: t.clone() for name, t in self.model.state_dict().items()}
        self._test = self._spread(text("test"), test_windows)
        self._calibration = prepare_calibration(
            [text("calibration")],
            self.tokenizer,
            samples=calibration_windows,
            sequence_length=WINDOW,
            batch_size=8,
        )
        first = self._evaluate()
        self.settings = {
            "test_tokens": first.tokens,
            "window": first.window,
            "stride": first.stride,
            "start_token": self.tokenizer.convert_ids_to_tokens(first.start_token),
            "calibration_tokens": self._calibration.tokens,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        }
        parameters = sum(p.numel() for p in self.model.parameters())
        self.float_row = DemoRow(
            "float", 16, True, first.perplexity, 0.0, 16.0, 2e-6 * parameters, 0.0, 0.0
        )

    def measure(self, recipe: str, **changes: Any) -> DemoRow:
        """Quantize a fresh copy of the weights and measure the perplexity."""
        result = self.quantize(recipe, **changes)
        found = self._evaluate()
        totals = result.report.totals()
        others = sum(p.numel() for p in self.model.parameters()) - totals["weights"]
        return DemoRow(
            recipe,
            result.recipe.bits,
            result.recipe.symmetric,
            found.perplexity,
            found.perplexity - self.float_row.perplexity,
            totals["bits_per_weight"],
            1e-6 * (totals["weights"] * totals["bits_per_weight"] / 8 + 2 * others),
            result.report.seconds["total"],
            result.report.seconds["solve"],
        )

    def quantize(self, recipe: str, *, diagnostics: bool = False, **changes: Any) -> Any:
        """Quantize a fresh copy of the weights; returns the driver's result.

        Parameters
        ----------
        recipe : {"quality", "reference", "rtn"}
        diagnostics : bool
            Compute what the report compares with, which costs time.
        **changes
            Options of the recipe, such as ``bits=3``. Scales are float16 unless they say.
        """
        self.model.load_state_dict(self._state)
        changes.setdefault("scale_dtype", "float16")
        needs_data = recipe != "rtn" or changes.get("grid") == "hessian"
        return quantize(
            self.model,
            recipe,
            self._calibration.batches if needs_data else None,
            tokenizer=self.tokenizer,
            threads=self.threads,
            diagnostics=diagnostics,
            progress=False,
            **changes,
        )

    def _spread(self, words: str, windows: int) -> torch.Tensor:
        """Take windows at equal distances from a text, so that few speak for all of it."""
        ids = self.tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
        body = WINDOW - 1
        rows = torch.tensor(ids[: len(ids) // body * body]).view(-1, body)
        chosen = torch.linspace(0, len(rows) - 1, min(windows, len(rows))).round().long()
        return rows[chosen]

    def _evaluate(self) -> Any:
        return self.perplexity_of(self.model)

    def perplexity_of(self, model: Any) -> Any:
        """Perplexity of a model on the windows of test text."""
        return perplexity(model, self.tokenizer, self._test, window=WINDOW, batch_size=4)

    def logits_of(self, model: Any) -> torch.Tensor:
        """Logits of a model for one window of test text."""
        with torch.no_grad():
            return model(input_ids=self._test[:1]).logits


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
