"""Load a model once, quantize copies of it, and measure them."""

from __future__ import annotations

import copy
import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr, summarize
from ptqkit.hf.data.calibration import CalibrationSet, max_positions, prepare_calibration
from ptqkit.hf.data.text import CachedTokenizer
from ptqkit.hf.evaluation.likelihood import PerplexityResult, perplexity
from ptqkit.hf.quantization.driver import QuantizationResult, quantize
from ptqkit.hf.quantization.opening import load_model
from ptqkit.nn.forward import calibration_mode
from ptqkit.recipe import as_recipe

__all__ = ["Workbench", "WorkbenchRow"]


@dataclass(frozen=True)
class WorkbenchRow(Tabular):
    """One quantization of a model and what it costs.

    Attributes
    ----------
    recipe : str
        Name of the preset or the parts; ``"float"`` for the model itself.
    bits : int, float (an average) or "ternary"
    symmetric : bool
    perplexity, excess : float
        ``excess`` is the perplexity above the float model's.
    bits_per_weight : float
        Of the quantized layers, with scales and zero-points.
    megabytes : float
        Of all tensors; what is not quantized counts in the dtype of the model's files.
    seconds, seconds_solve : float
        Of the quantization as a whole, and of solving for the codes in it.
    metric, metric_change : float
        What the workbench's ``metric`` gave, and that minus the float model's; NaN without one.
    """

    __repr__ = one_line_repr

    recipe: str
    bits: int | float | str
    symmetric: bool
    perplexity: float
    excess: float
    bits_per_weight: float
    megabytes: float
    seconds: float
    seconds_solve: float
    metric: float = math.nan
    metric_change: float = math.nan

    def _rows(self) -> list[dict[str, Any]]:
        return [asdict(self)]


class Workbench:
    """A model with its texts, for one quantization after another.

    Causal language models are measured by their perplexity on ``test``; for encoders, and any other
    task, ``metric`` measures (perplexities are then NaN unless ``test`` is given too).

    Parameters
    ----------
    model : nn.Module
        Never changed: what is quantized are copies of it.
    tokenizer : optional
        Needed unless all texts are tokens.
    calibration : optional
        What :func:`ptqkit.hf.prepare_calibration` takes, or a function that returns it; read when
        it is first needed.
    calibration_options : mapping, optional
        Options of :func:`ptqkit.hf.prepare_calibration`.
    test : optional
        Text to measure on, as :func:`ptqkit.hf.perplexity` takes it.
    test_options : mapping, optional
        Options of :func:`ptqkit.hf.perplexity`.
    stored_dtype : str, optional
        Dtype of the model's files, by default that of the model. If it is ``"float16"``, scales
        are float16 unless the recipe names their dtype: a checkpoint would hold them so.
    threads : int
        Of the solver; 0 is its own policy.
    metric : callable, optional
        ``metric(model)`` returns a number, such as an accuracy. It is called with the model in
        evaluation mode, without gradients.

    Examples
    --------
    >>> bench = Workbench.load("./model", calibration="train.txt", test=[text])
    >>> bench.measure("quality", bits=3, group_size=64).excess
    >>> bench = Workbench(bert, calibration=batches, metric=accuracy)
    >>> bench.measure("quality", bits=3, group_size=64).metric_change
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        calibration: Any | Callable[[], Any] = None,
        calibration_options: Mapping[str, Any] | None = None,
        test: Any = None,
        test_options: Mapping[str, Any] | None = None,
        stored_dtype: str | None = None,
        threads: int = 0,
        metric: Callable[[nn.Module], float] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.threads = model, tokenizer, threads
        self.metric = metric
        #: The tokenizer, which keeps the tokens of every text.
        self.cached_tokenizer = None if tokenizer is None else CachedTokenizer(tokenizer)
        self.stored_dtype = stored_dtype or str(model.dtype).removeprefix("torch.")
        self.test, self.test_options = test, dict(test_options or {})
        self._source = calibration
        self._options = {"max_length": max_positions(model), **(calibration_options or {})}
        self._calibration: CalibrationSet | None = None

    def __repr__(self) -> str:
        return f"Workbench({summarize(self.model)}, stored_dtype={self.stored_dtype!r})"

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        device: str = "auto",
        **options: Any,
    ) -> Workbench:
        """Load the model with :func:`load_model`; ``**options`` are those of the class."""
        model, tokenizer, facts = load_model(name, dtype, device)
        return cls(model, tokenizer, stored_dtype=facts["stored_dtype"], **options)

    def calibrate(self, **changes: Any) -> None:
        """Draw other calibration windows for what follows, such as ``seed=1``."""
        if any(self._options.get(name, self) != value for name, value in changes.items()):
            self._options.update(changes)
            self._calibration = None

    @property
    def calibration(self) -> CalibrationSet:
        """The calibration windows in use."""
        if self._calibration is None:
            source = self._source() if callable(self._source) else self._source
            self._calibration = prepare_calibration(source, self.cached_tokenizer, **self._options)
        return self._calibration

    @cached_property
    def float_result(self) -> PerplexityResult:
        """Perplexity of the model itself."""
        return self.perplexity_of(self.model)

    @cached_property
    def float_metric(self) -> float:
        """What ``metric`` gives for the model itself; NaN without one."""
        return self._metric_of(self.model)

    @property
    def scores_text(self) -> bool:
        """Whether perplexities are measured: unless there is a metric and no test text."""
        return self.metric is None or self.test is not None

    @property
    def float_bits(self) -> float:
        """Bits per weight of the model's files: 32 or 16."""
        return 32.0 if self.stored_dtype == "float32" else 16.0

    @property
    def float_row(self) -> WorkbenchRow:
        """The model itself."""
        bits = self.float_bits
        value = self.float_result.perplexity if self.scores_text else math.nan
        size = 1e-6 * bits / 8 * sum(p.numel() for p in self.model.parameters())
        excess = 0.0 if self.scores_text else math.nan
        row = WorkbenchRow("float", int(bits), True, value, excess, bits, size, 0.0, 0.0)
        return replace(row, metric=self.float_metric, metric_change=self.float_metric * 0)

    @property
    def settings(self) -> dict[str, Any]:
        """How measurements are made: tokens, window, stride, start token, Python, threads."""
        calibration = {
            "calibration_tokens": self.calibration.tokens,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        }
        if not self.scores_text:
            return calibration
        first = self.float_result
        start = first.start_token
        named = start is not None and self.tokenizer is not None
        return {
            "test_tokens": first.tokens,
            "window": first.window,
            "stride": first.stride,
            "start_token": self.tokenizer.convert_ids_to_tokens(start) if named else start,
            **calibration,
        }

    def measure(self, recipe: Any, **changes: Any) -> WorkbenchRow:
        """Quantize a copy of the model and measure its perplexity, its metric, or both.

        A perplexity that is not finite is a warning: other recipes may be better.

        Parameters
        ----------
        recipe, **changes
            As :meth:`quantize` takes them.
        """
        result = self.quantize(recipe, **changes)
        value = excess = math.nan
        if self.scores_text:
            found = self.perplexity_of(result.model, check=False)
            found.warn_unless_finite(f"the model quantized by {_name(recipe)}")
            value = found.perplexity
            excess = value - self.float_result.perplexity
        metric = self._metric_of(result.model)
        totals = result.report.totals()
        others = sum(p.numel() for p in result.model.parameters()) - totals["weights"]
        size = totals["weights"] * totals["bits_per_weight"] / 8 + self.float_bits / 8 * others
        return WorkbenchRow(
            _name(recipe),
            result.recipe.bits,
            result.recipe.symmetric,
            value,
            excess,
            totals["bits_per_weight"],
            1e-6 * size,
            result.report.seconds["total"],
            result.report.seconds["solve"],
            metric,
            metric - self.float_metric,
        )

    def quantize(
        self,
        recipe: Any,
        *,
        diagnostics: bool = False,
        calibration: CalibrationSet | None = None,
        **changes: Any,
    ) -> QuantizationResult:
        """Quantize a copy of the model.

        Parameters
        ----------
        recipe : Recipe, preset name, dict or list of parts
            As :func:`ptqkit.quantize` takes it.
        diagnostics : bool
            Compute what the report compares with, which costs time.
        calibration : CalibrationSet, optional
            Instead of the windows of the bench.
        **changes
            Options of the recipe, such as ``bits=3``.
        """
        chosen = replace(as_recipe(recipe), **changes)
        needed = chosen.needs_calibration()
        data = (self.calibration if calibration is None else calibration) if needed else None
        return quantize(
            copy.deepcopy(self.model),
            chosen,
            data,
            tokenizer=self.tokenizer,
            threads=self.threads,
            diagnostics=diagnostics,
            progress=False,
            stored_dtype=self.stored_dtype,
        )

    def _metric_of(self, model: nn.Module) -> float:
        if self.metric is None:
            return math.nan
        with calibration_mode(model):
            return float(self.metric(model))

    def perplexity_of(self, model: nn.Module, *, check: bool = True) -> PerplexityResult:
        """Perplexity of a model on the test text; if ``check``, an error unless it is finite."""
        options = {"check": check, **self.test_options}
        return perplexity(model, self.cached_tokenizer, self.test, **options)


def _name(recipe: Any) -> str:
    if isinstance(recipe, str):
        return recipe
    return " + ".join(map(repr, recipe)) if isinstance(recipe, (list, tuple)) else repr(recipe)
