"""What a study measures: the perplexity of texts, or any function of the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqkit._repr import one_line_repr
from ptqkit.demo import DEMO, text
from ptqkit.errors import CalibrationError, UsageError
from ptqkit.hf.data.text import open_documents, read_beginning, read_documents
from ptqkit.nn.forward import calibration_mode
from ptqkit.study.digests import values_digest
from ptqkit.study.measured import Measured, measure_text

__all__ = ["MetricTask", "TextTask", "calibration_source", "tasks_of"]


@dataclass(frozen=True)
class TextTask:
    """The perplexity of a text.

    Attributes
    ----------
    name : str
    text : str, list of str, or Tensor of tokens
    settings : mapping
        Options of :func:`ptqkit.hf.perplexity`.
    """

    __repr__ = one_line_repr

    name: str
    text: Any
    settings: Mapping[str, Any]
    kind = "perplexity"

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides a measurement."""
        return {"kind": self.kind, **self.settings, "source": values_digest(self.text)}

    def measure(self, model: nn.Module, tokenizer: Any) -> Measured:
        """Measure a model."""
        return measure_text(model, tokenizer, self.text, **self.settings)


@dataclass(frozen=True)
class MetricTask:
    """What a function of the model gives.

    Attributes
    ----------
    name : str
        The function is known by it: a changed one needs another name to be measured anew.
    function : callable
        Called with the model in evaluation mode, without gradients; returns a number, or one per
        item of its data, of which the mean counts.
    """

    __repr__ = one_line_repr

    name: str
    function: Callable[[nn.Module], Any]
    kind = "metric"

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides a measurement."""
        return {"kind": self.kind, "name": self.name}

    def measure(self, model: nn.Module, tokenizer: Any) -> Measured:
        """Measure a model."""
        with calibration_mode(model):
            found = self.function(model)
        if isinstance(found, torch.Tensor):
            found = found.detach().cpu().double().numpy()
        values = np.asarray(found, dtype=np.float64)
        if values.ndim > 1 or values.size == 0:
            raise UsageError(
                f"metric {self.name!r} must return a number or one per item, not an array of shape "
                f"{values.shape}"
            )
        if not np.isfinite(values).all():
            raise ArithmeticError(f"metric {self.name!r} is not finite")
        items = values.tolist() if values.ndim else []
        return Measured(
            float(values.mean()),
            self.name,
            True,
            values.size,
            losses=items,
            scored=[1] * len(items),
        )


def tasks_of(
    test: Any,
    metric: Callable[[nn.Module], Any] | Mapping[str, Callable[[nn.Module], Any]] | None,
    tokenizer: Any,
    settings: Mapping[str, Any],
) -> dict[str, TextTask | MetricTask]:
    """Return the tasks of a study by their names.

    Parameters
    ----------
    test : path, list of str, Tensor, ``"demo"``, a mapping of names to such, or None
    metric : callable, mapping of names to callables, or None
    tokenizer
    settings : mapping
        Options of :func:`ptqkit.hf.perplexity`.

    Raises
    ------
    UsageError
        If there is nothing to measure.
    CalibrationError
        If a text file is not there, or empty.
    """
    found: dict[str, TextTask | MetricTask] = {}
    if test is not None:
        texts = test if isinstance(test, Mapping) else {_named(test): test}
        for name, source in texts.items():
            found[name] = TextTask(name, _text(source, tokenizer, settings), settings)
    if metric is not None:
        functions = metric if isinstance(metric, Mapping) else {_function_name(metric): metric}
        for name, function in functions.items():
            if name in found:
                raise UsageError(f"a text and a metric are both called {name!r}")
            found[name] = MetricTask(name, function)
    if not found:
        raise UsageError("nothing to measure: give test= (a text) or metric= (a function)")
    return found


def calibration_source(source: Any) -> Any:
    """Return what :func:`ptqkit.hf.prepare_calibration` takes; the demo's text by its name."""
    return [text("calibration")] if isinstance(source, str) and source == DEMO else source


def _text(source: Any, tokenizer: Any, settings: Mapping[str, Any]) -> Any:
    if isinstance(source, str) and source == DEMO:
        return text("test")
    if isinstance(source, torch.Tensor):
        return source
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():
            raise CalibrationError(
                f"test {str(source)[:80]!r}: there is no such file; give text itself as a list"
            )
        needed = settings.get("max_tokens")
        if needed is None:
            return list(read_documents(path))
        return read_beginning(open_documents(path), tokenizer, needed)
    return list(source)


def _named(test: Any) -> str:
    if isinstance(test, (str, os.PathLike)):
        return Path(test).name.partition(".")[0] or "text"
    return "text"


def _function_name(function: Any) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return "metric" if name == "<lambda>" else name
