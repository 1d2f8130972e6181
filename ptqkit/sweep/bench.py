"""One model of a sweep: loaded once, quantized again and again in copies."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptqkit.errors import PreflightError
from ptqkit.sweep.plan import DEMO, ModelPlan, RecipePlan, TaskPlan
from ptqkit.sweep.tasks import Measured, RememberingTokenizer, documents_of, measure

__all__ = ["Bench", "Quantized"]

# Tokens of the forward that finds where a model can be made hard.
_PROBE = (1, 16)

# What the literature calls activations that stay as they are: W8A16.
_FLOAT_BITS = 16.0


@dataclass
class Quantized:
    """A model to measure, and what it took.

    Attributes
    ----------
    model : nn.Module
    bits_per_weight, activation_bits : float
        Of the quantized layers; 16 is float.
    seconds : float
    warnings : list of str
    """

    model: Any
    bits_per_weight: float
    activation_bits: float
    seconds: float
    warnings: list[str]


class Bench:
    """A model with its tokenizer and calibration data.

    Parameters
    ----------
    plan : ModelPlan
    device : str
        As torch names it.
    threads : int
        Of the solver; 0 is its own policy.

    Raises
    ------
    PreflightError
        If the folder holds no float model with a tokenizer.
    """

    def __init__(self, plan: ModelPlan, device: str = "cpu", threads: int = 0) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ptqkit.cli.common import compute_dtype, stored_dtype

        self.plan, self.threads = plan, threads
        folder = _folder(plan.path)
        dtype = compute_dtype(plan.dtype, stored_dtype(folder), device.split(":")[0])
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = self.model.to(device).eval()
        if getattr(self.model.config, "quantization_config", None) is not None:
            raise PreflightError([f"model {plan.name!r} is quantized already; give the float one"])
        self.tokenizer = RememberingTokenizer(AutoTokenizer.from_pretrained(folder))
        self._batches: Any = None
        # Scales as a checkpoint of the stored model would hold them, whatever the arithmetic.
        self.stored = stored_dtype(folder)
        if plan.outliers is not None:
            self._make_hard(**plan.outliers)

    def _make_hard(self, channels: int, factor: float, seed: int) -> None:
        import torch

        from ptqkit.hf import inject_outliers

        # Tokens of its own: which channels are scaled depends on the seed, not on the text.
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, _PROBE, generator=generator).to(self.model.device)
        inject_outliers(self.model, {"input_ids": ids}, channels=channels, factor=factor, seed=seed)

    def as_it_is(self) -> Quantized:
        """The float model."""
        bits = 32.0 if self.stored == "float32" else 16.0
        return Quantized(self.model, bits, _FLOAT_BITS, 0.0, [])

    def quantize(self, recipe: RecipePlan) -> Quantized:
        """Quantize a copy of the model.

        Raises
        ------
        Exception
            Whatever :func:`ptqkit.quantize` raises.
        """
        from ptqkit.hf import quantize

        resolved = dict(recipe.resolved)
        if resolved.get("scale_dtype") is None and self.stored == "float16":
            resolved["scale_dtype"] = "float16"
        batches = self._calibration() if _needs_data(resolved) else None
        model = copy.deepcopy(self.model)
        started = time.perf_counter()
        result = quantize(
            model,
            resolved,
            batches,
            threads=self.threads,
            diagnostics=False,
            progress=False,
        )
        seconds = time.perf_counter() - started
        activations = getattr(result.recipe, "activations", None)
        return Quantized(
            model,
            result.report.totals()["bits_per_weight"],
            _FLOAT_BITS if activations is None else float(activations.bits),
            seconds,
            list(result.report.warnings),
        )

    def measure(self, model: Any, task: TaskPlan) -> Measured:
        """Measure the float model or a quantized copy."""
        return measure(model, self.tokenizer, task)

    def _calibration(self) -> Any:
        """Batches, the same for every recipe."""
        if self._batches is None:
            from ptqkit.hf.data.calibration import max_positions, prepare_calibration

            plan = self.plan.calibration
            self._batches = prepare_calibration(
                documents_of(plan.text, "calibration"),
                self.tokenizer,
                samples=plan.samples,
                sequence_length=plan.sequence_length,
                batch_size=plan.batch_size,
                seed=plan.seed,
                start_token=plan.start_token,
                max_length=max_positions(self.model),
            ).batches
        return self._batches


def _folder(path: str) -> Path:
    if path == DEMO:
        from ptqkit.demo import MODEL_DIR

        return MODEL_DIR
    return Path(path)


def _needs_data(recipe: dict[str, Any]) -> bool:
    """Whether more than rounding weights is to be done; without, no text is run for nothing."""
    plain = recipe["method"] == "rtn" and recipe["grid"] != "hessian" and not recipe["overrides"]
    extra = ("activations", "equalization", "bias_correction")
    return not plain or any(recipe.get(name) for name in extra)
