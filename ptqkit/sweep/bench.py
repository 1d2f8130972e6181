"""The models of a sweep on a workbench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ptqkit.demo import DEMO, MODEL_DIR
from ptqkit.errors import PreflightError
from ptqkit.hf.equalization.outliers import inject_outliers
from ptqkit.hf.models.loading import read_config
from ptqkit.hf.workbench import Workbench
from ptqkit.study import making
from ptqkit.study.engine import Quantized
from ptqkit.sweep.plan import ModelPlan, RecipePlan
from ptqkit.sweep.tasks import documents_of

__all__ = ["open_bench", "quantized_copy"]

# Shape of the tokens of the forward pass that finds where outliers can be injected.
_PROBE = (1, 16)


def open_bench(plan: ModelPlan, device: str = "cpu", threads: int = 0) -> Workbench:
    """Load a model of a sweep.

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
    folder = MODEL_DIR if plan.path == DEMO else Path(plan.path)
    if read_config(folder).get("quantization_config"):
        raise PreflightError([f"model {plan.name!r} is quantized already; give the float one"])
    calibration = plan.calibration
    bench = Workbench.load(
        folder,
        dtype=plan.dtype,
        device=device,
        calibration=lambda: documents_of(calibration.text, "calibration"),
        calibration_options={
            "samples": calibration.samples,
            "sequence_length": calibration.sequence_length,
            "batch_size": calibration.batch_size,
            "seed": calibration.seed,
            "start_token": calibration.start_token,
        },
        threads=threads,
    )
    if bench.tokenizer is None:
        raise PreflightError([f"model {plan.name!r} has no tokenizer"])
    if plan.outliers is not None:
        _inject(bench.model, **plan.outliers)
    return bench


def _inject(model: Any, channels: int, factor: float, seed: int) -> None:
    # Tokens of its own: which channels are scaled depends on the seed, not on the text.
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, _PROBE, generator=generator).to(model.device)
    inject_outliers(model, {"input_ids": ids}, channels=channels, factor=factor, seed=seed)


def quantized_copy(bench: Workbench, recipe: RecipePlan, seed: int) -> Quantized:
    """Quantize a copy of the model as a recipe of the file says.

    Parameters
    ----------
    bench : Workbench
    recipe : RecipePlan
    seed : int
        Of the calibration windows.
    """
    data = None
    if recipe.fitted:
        bench.calibrate(seed=seed)
        data = bench.calibration
    return making.quantized_copy(bench, recipe.resolved, recipe.softmax, data)
