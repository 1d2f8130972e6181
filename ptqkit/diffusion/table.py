"""What a quantized softmax costs a UNet, and what corrections give back: Tables 2 and 3 of SBC."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import nn

from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit._tables import text_table
from ptqkit.arrays.metrics import sqnr
from ptqkit.diffusion.attention import attention_hooks
from ptqkit.diffusion.calibration import draw_calibration, run_calibration
from ptqkit.diffusion.sampling import ClassConditionalUNet, sample
from ptqkit.diffusion.softmax import SoftmaxCalibration
from ptqkit.errors import check_choice
from ptqkit.nn.softmax.compare import softmax_hooks
from ptqkit.nn.softmax.variants import UNET_VARIANTS, row_name

__all__ = ["UNetTable", "UNetTableRow", "softmax_table"]


@dataclass
class UNetTableRow:
    """One line.

    Attributes
    ----------
    bits : int or None
        None for a float softmax.
    correction : str
        Of :data:`ptqkit.nn.softmax.variants.UNET_VARIANTS`.
    sqnr_db, sqnr_error : float
        Of final samples against those of the float model from the same noise (SBC eq. 1), in dB,
        and its standard error over the samples.
    calibration_db : float
        Of the UNet's output on the calibration latents.
    weights : str
        Name of the weights, if they are not the float ones.
    """

    __repr__ = one_line_repr

    bits: int | None
    correction: str = "none"
    sqnr_db: float = math.inf
    sqnr_error: float = 0.0
    calibration_db: float = math.inf
    weights: str = ""

    @property
    def name(self) -> str:
        """Name as in the paper's Table 3."""
        return row_name(self.bits, self.correction, self.weights, "FP32")


@dataclass
class UNetTable(Tabular):
    """Signal-to-quantization-noise ratios of one UNet.

    Attributes
    ----------
    rows : list of UNetTableRow
    settings : dict
        Images, steps, latents, guidance and seed.
    """

    __repr__ = one_line_repr

    settings: dict[str, Any]
    rows: list[UNetTableRow] = field(default_factory=list)

    def _rows(self) -> list[dict[str, Any]]:
        return [{"name": row.name, **asdict(row)} for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; infinity stays."""
        rows = [{**asdict(row), "name": row.name} for row in self.rows]
        return {"rows": rows, "settings": self.settings}

    def table(self) -> str:
        """Plain text table."""
        header = ("softmax", "final samples, dB", "±", "calibration latents, dB")
        cells = (
            (
                row.name,
                "" if math.isinf(row.sqnr_db) else f"{row.sqnr_db:.2f}",
                "" if math.isinf(row.sqnr_db) else f"{row.sqnr_error:.2f}",
                "" if math.isinf(row.calibration_db) else f"{row.calibration_db:.2f}",
            )
            for row in self.rows
        )
        return text_table(header, cells)


def decibel_with_error(reference: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Return SBC's eq. 1 over samples (n, ...), in dB, and its standard error; NaN for one."""
    value = float(sqnr(reference, found, per="sample"))
    exact, other = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (reference, found))
    noise = ((other - exact) ** 2).sum(1)
    if len(exact) < 2 or not noise.all():
        return value, math.nan
    ratios = (exact**2).sum(1) / noise
    relative = float(ratios.std(ddof=1) / ratios.mean() / math.sqrt(len(ratios)))
    return value, 10 / math.log(10) * relative


def softmax_table(
    model: ClassConditionalUNet,
    *,
    bits: Sequence[int] = (8,),
    corrections: Sequence[str] = ("bias", "bias/head", "row_sum", "before", "before/row_sum"),
    grid_range: str = "fixed",
    images: int = 8,
    steps: int = 20,
    latents: int = 100,
    guidance: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
    rounded: nn.Module | None = None,
    rounded_name: str = "W8A16",
    progress: Callable[[str], None] | None = None,
) -> UNetTable:
    """Measure final samples with a float and a quantized softmax, corrected or not.

    The quantized softmax without correction is always measured. The model stays as it was.

    Parameters
    ----------
    model : ClassConditionalUNet
        With classes, or with prompts (:func:`ptqkit.diffusion.with_prompts`).
    bits : sequence of int from 2 to 16
    corrections : sequence of str
        Of :data:`ptqkit.nn.softmax.variants.UNET_VARIANTS`.
    grid_range : {"fixed", "calibrated", "search"}
        Of the grids of probabilities.
    images : int
        Samples, of the classes or prompts in turn.
    steps : int
        Of DDIM, in sampling and in drawing the calibration latents.
    latents : int
        For calibration, uniform over the steps, from other noise.
    guidance : float
        Of classifier-free guidance; 1 is none.
    rounded : nn.Module, optional
        The same UNet with quantized weights: all lines again, with the corrections of its own.
    rounded_name : str
        What these lines are called after.
    progress : callable, optional
        Called with the name of what comes next.
    """
    for correction in corrections:
        check_choice("each of corrections", correction, UNET_VARIANTS)
    report_next = progress or (lambda name: None)
    options = {
        "steps": steps,
        "guidance": guidance,
        "no_class": model.labels[-1],
        "batch_size": batch_size,
    }
    noise, context = model.noise(images, seed=seed), model.context(images)
    settings = {"images": images, "steps": steps, "latents": latents, "guidance": guidance}
    table = UNetTable({**settings, "seed": seed})

    def final(unet: nn.Module, hooks: Any = None) -> np.ndarray:
        with attention_hooks(unet, hooks) if hooks else contextlib.nullcontext():
            return sample(unet, model.scheduler, noise, context, **options).numpy()

    report_next("float samples")
    reference = final(model.unet)
    report_next("calibration latents")
    count = max(8, -(-latents // steps))
    calibration = draw_calibration(
        model.unet,
        model.scheduler,
        model.noise(count, seed=seed + 1),
        model.context(count),
        count=latents,
        seed=seed + 1,
        **options,
    )
    table.rows.append(UNetTableRow(None))
    for weights, unet in (("", model.unet), (rounded_name, rounded)):
        if unet is None:
            continue
        if weights:
            report_next(weights)
            found = decibel_with_error(reference, final(unet))
            table.rows.append(UNetTableRow(None, "none", *found, weights=weights))
        for width in bits:
            label = f"{weights} SM{width}".strip()
            report_next(f"{label}: calibration")
            study = SoftmaxCalibration(unet, calibration, bits=width, grid_range=grid_range)
            for name in dict.fromkeys(["none", *corrections]):
                report_next(f"{label} {name}")
                hooks = softmax_hooks(study.quantizers(*UNET_VARIANTS[name]))
                seen = run_calibration(unet, calibration, hooks).numpy()
                row = UNetTableRow(
                    width,
                    name,
                    *decibel_with_error(reference, final(unet, hooks)),
                    calibration_db=float(sqnr(study.outputs, seen, per="sample")),
                    weights=weights,
                )
                table.rows.append(row)
    return table
