"""The embedded model with its texts, for one quantization after another."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptqkit.demo import MODEL_DIR, text
from ptqkit.hf import inject_outliers, perplexity, prepare_calibration, quantize
from ptqkit.hf.data.calibration import CalibrationSet
from ptqkit.nn import remove_quantizers

__all__ = ["WINDOW", "DemoRow", "Workbench"]

WINDOW = 512
"""Tokens of a window, the start token included."""


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


class Workbench:
    """The embedded model with its texts, for one quantization after another.

    Parameters
    ----------
    test_windows, calibration_windows : int
        Windows of 512 tokens to measure and to calibrate on.
    threads : int
        Of the solver; 0 is its own policy.
    outliers : mapping, optional
        Make the model hard on purpose, the same in float: options of
        :func:`ptqkit.hf.inject_outliers`, such as ``{"factor": 30}``.

    Examples
    --------
    >>> bench = Workbench(test_windows=4, calibration_windows=4)
    >>> row = bench.measure("quality", bits=3, group_size=64)
    """

    def __init__(
        self,
        test_windows: int = 20,
        calibration_windows: int = 24,
        threads: int = 0,
        outliers: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        self.threads = threads
        self._test = self._spread(text("test"), test_windows)
        self.calibrate(calibration_windows)
        if outliers is not None:
            inject_outliers(self.model, self._calibration, **outliers)
        self._state = {name: t.clone() for name, t in self.model.state_dict().items()}
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

    def calibrate(self, windows: int, seed: int = 0) -> None:
        """Draw other windows of calibration text for what follows."""
        self._calibration = prepare_calibration(
            [text("calibration")],
            self.tokenizer,
            samples=windows,
            sequence_length=WINDOW,
            batch_size=8,
            seed=seed,
        )

    @property
    def calibration(self) -> CalibrationSet:
        """The windows of calibration text in use."""
        return self._calibration

    def reset(self) -> None:
        """Put the model back to what it was before the first quantization."""
        remove_quantizers(self.model)
        for name, module in self.model.named_modules():
            if getattr(module, "bias", None) is not None and f"{name}.bias" not in self._state:
                module.bias = None
        vars(self.model.config).pop("ptqkit_equalized", None)
        self.model.load_state_dict(self._state)

    def measure(self, recipe: Any, **changes: Any) -> DemoRow:
        """Quantize a fresh copy of the weights and measure the perplexity."""
        result = self.quantize(recipe, **changes)
        found = self._evaluate()
        totals = result.report.totals()
        others = sum(p.numel() for p in self.model.parameters()) - totals["weights"]
        return DemoRow(
            recipe if isinstance(recipe, str) else " + ".join(map(repr, recipe)),
            result.recipe.bits,
            result.recipe.symmetric,
            found.perplexity,
            found.perplexity - self.float_row.perplexity,
            totals["bits_per_weight"],
            1e-6 * (totals["weights"] * totals["bits_per_weight"] / 8 + 2 * others),
            result.report.seconds["total"],
            result.report.seconds["solve"],
        )

    def quantize(self, recipe: Any, *, diagnostics: bool = False, **changes: Any) -> Any:
        """Quantize a fresh copy of the weights; returns the driver's result.

        Parameters
        ----------
        recipe : str or list of parts
            As :func:`ptqkit.quantize` takes it.
        diagnostics : bool
            Compute what the report compares with, which costs time.
        **changes
            Options of the recipe, such as ``bits=3``. Scales are float16 unless they say.
        """
        self.reset()
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
