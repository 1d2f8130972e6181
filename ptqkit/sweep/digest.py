"""What decides a cell of a sweep, as plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ptqkit._version import __version__
from ptqkit.demo import DEMO
from ptqkit.study.keys import SCHEMA, demo_text_digest, file_digest, model_digest
from ptqkit.sweep.plan import ModelPlan, RecipePlan, TaskPlan, TextSource

__all__ = ["cell_inputs", "text_digest"]


def cell_inputs(
    model: ModelPlan, recipe: RecipePlan | None, task: TaskPlan, device: str, draw: int = 0
) -> dict[str, Any]:
    """All that decides a cell, as plain values; names do not, so renaming measures nothing anew.

    Parameters
    ----------
    model, recipe, task
        No recipe for the model as it is.
    device : str
        Type of the device: other hardware sums in another order.
    draw : int
        Of the calibration windows.
    """
    diffusion = model.sampling is not None
    inputs: dict[str, Any] = {
        "schema": SCHEMA,
        "version": __version__,
        "device": device,
        "model": model_digest(model.path, subfolders=diffusion),
        "dtype": model.dtype,
        "outliers": dict(model.outliers) if model.outliers is not None else None,
        "task": {"kind": task.kind, **task.settings},
    }
    if model.sampling is not None:
        prompts = None if model.prompts is None else file_digest(model.prompts)
        inputs["sampling"] = {**asdict(model.sampling), "prompts": prompts}
    else:
        inputs["task"]["source"] = text_digest(task.source)
    if recipe is not None and diffusion:
        inputs |= {
            "recipe": None if recipe.resolved is None else dict(recipe.resolved),
            "softmax": None if recipe.softmax is None else dict(recipe.softmax),
            "calibration": {"seed": model.calibration.seed + draw},
        }
    elif recipe is not None:
        calibration = asdict(model.calibration)
        del calibration["draws"]
        calibration["seed"] += draw
        calibration["text"] = text_digest(model.calibration.text)
        inputs |= {
            "recipe": None if recipe.resolved is None else dict(recipe.resolved),
            "softmax": None if recipe.softmax is None else dict(recipe.softmax),
            "calibration": calibration,
        }
    return inputs


def text_digest(source: TextSource) -> dict[str, Any]:
    """Return what a text is, wherever its file lies."""
    return {
        "digest": demo_text_digest() if source.path == DEMO else file_digest(source.path),
        "documents": source.documents and list(source.documents),
        "whitespace": source.whitespace,
    }
