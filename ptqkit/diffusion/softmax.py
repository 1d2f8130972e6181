"""Quantize the softmax of a UNet and correct its bias."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from ptqkit._files import write_atomically
from ptqkit._repr import one_line_repr
from ptqkit.diffusion import attention
from ptqkit.diffusion.calibration import CalibrationLatents, run_calibration
from ptqkit.errors import check_choice
from ptqkit.nn.attention import AttentionHook
from ptqkit.nn.softmax.file import SOFTMAX_FILE, SoftmaxValues, read_values, to_json
from ptqkit.nn.softmax.search import SearchEnds
from ptqkit.nn.softmax.statistics import Quantizer
from ptqkit.nn.softmax.steps import check_steps
from ptqkit.nn.softmax.study import (
    AttentionAccess,
    SoftmaxQuantization,
    SoftmaxStudy,
    check_heads,
    fixed_grid,
)

__all__ = [
    "CORRECTIONS",
    "GRANULARITIES",
    "SoftmaxCalibration",
    "UNetSoftmaxQuantization",
    "load_softmax",
    "quantize_softmax",
    "save_softmax",
]

CORRECTIONS = ("bias", "row_sum", "code_sum", None)
GRANULARITIES = ("tensor", "head", "step", "step_head")


class _UNet:
    """A UNet with calibration latents; see SoftmaxBackend."""

    attention: AttentionAccess = attention
    corrections: tuple[str | None, ...] = CORRECTIONS
    granularities: tuple[str, ...] = GRANULARITIES
    # Rows are long, and nothing makes one probability 1 as the first row of a text does.
    ends = SearchEnds((1.0,), tuple(2.0 ** (-k / 2) for k in range(12)))
    by_total = True

    def __init__(self, model: nn.Module, calibration: CalibrationLatents) -> None:
        if not isinstance(calibration, CalibrationLatents):
            kind = type(calibration).__name__
            raise TypeError(f"calibration must be CalibrationLatents, not {kind}")
        self.model, self.calibration = model, calibration
        self.steps = calibration.steps
        self.float_outputs = np.empty(0)

    def run(self, hooks: Mapping[str, AttentionHook]) -> None:
        self.float_outputs = run_calibration(self.model, self.calibration, hooks).numpy()

    def outputs(
        self, variants: Sequence[Mapping[str, AttentionHook]]
    ) -> Iterator[Sequence[np.ndarray]]:
        # Small enough to be kept and compared at once.
        found = [run_calibration(self.model, self.calibration, hooks) for hooks in variants]
        yield [self.float_outputs, *(x.numpy() for x in found)]

    def describe(self) -> dict[str, Any]:
        return {"latents": len(self.calibration), "steps": list(self.steps)}


class SoftmaxCalibration(SoftmaxStudy):
    """Statistics of the softmax of a UNet, from one pass over calibration latents.

    Parameters
    ----------
    unet : diffusers.UNet2DConditionModel
    calibration : CalibrationLatents
    bits, grid_range
        See :class:`ptqkit.nn.softmax.study.SoftmaxStudy`. "search" tries [0, 1] and
        [0, m * 2**(-k/2)], k from 0 to 11, with m the largest probability of the module; finding
        m needs one more pass.
    layers : iterable of str, optional
        Patterns of attention modules, "self" for those over positions, "cross" for those over the
        condition; by default all.

    Attributes
    ----------
    outputs : ndarray of float32, shape (n, channels, height, width)
        Outputs of the float UNet, in the order of ``calibration.batches()``.
    """

    def __init__(
        self,
        unet: nn.Module,
        calibration: CalibrationLatents,
        *,
        bits: int = 8,
        grid_range: str = "fixed",
        layers: Iterable[str] | None = None,
    ) -> None:
        self._unet = _UNet(unet, calibration)
        super().__init__(self._unet, bits=bits, grid_range=grid_range, layers=layers)

    @property
    def outputs(self) -> np.ndarray:
        """Outputs of the float model, of every calibration latent."""
        return self._unet.float_outputs


@dataclass
class UNetSoftmaxQuantization(SoftmaxQuantization):
    """A quantized softmax on a UNet.

    Attributes
    ----------
    steps : tuple of int
        Calibrated time steps.
    """

    __repr__ = one_line_repr

    attention: ClassVar[AttentionAccess] = attention
    steps: tuple[int, ...] = ()

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the corrections next to the weights; see :func:`save_softmax`."""
        return save_softmax(self.model, self.quantizers, self.steps, directory)


def quantize_softmax(
    unet: nn.Module,
    calibration: CalibrationLatents,
    *,
    bits: int = 8,
    correction: str | None = "bias",
    granularity: str = "head",
    grid_range: str = "fixed",
    layers: Iterable[str] | None = None,
    grid_of: str = "probabilities",
    diagnostics: bool = True,
) -> UNetSoftmaxQuantization:
    """Quantize the softmax outputs of a UNet's attention, with a correction of their bias.

    The quantizers are put on the UNet and stay until ``.remove()``; the bias is that of the model
    as it is given. Weights are left alone.

    Parameters
    ----------
    unet, calibration, bits, grid_range, layers
        See :class:`SoftmaxCalibration`.
    correction : {"bias", "row_sum", "code_sum", None}
        "bias" is the paper's; "row_sum" needs one sum per row at run time and no calibration;
        "code_sum" is for exponentials.
    granularity : {"head", "tensor", "step", "step_head"}
        Of "bias". Those with steps are for the time steps of the calibration set; at others the
        nearest one counts.
    grid_of : {"probabilities", "exponentials", "squares"}
        What is rounded; see :func:`ptqkit.quantize_softmax`.
    diagnostics : bool
        Three more passes for signal-to-noise ratios of layers and UNet; corrections that lower
        them are left out, see :meth:`SoftmaxCalibration.compare`.

    Raises
    ------
    UnsupportedModuleError
        If an attention processor of the UNet is not one of diffusers' two plain ones.
    CalibrationError
        If its attention or its output is not finite.
    ValueError
        If an option is not one of those above, or attention hooks are installed already.

    Source: Pandey et al. 2023, "Softmax Bias Correction for Quantized Generative Models", eq. 4.
    """
    check_choice("correction", correction, CORRECTIONS)
    check_choice("granularity", granularity, GRANULARITIES)
    fixed_grid(bits, grid_of, correction, grid_range)
    study = SoftmaxCalibration(unet, calibration, bits=bits, grid_range=grid_range, layers=layers)
    quantizers = study.quantizers(correction, granularity, grid_of)
    report = study.compare(quantizers) if diagnostics else None
    result = UNetSoftmaxQuantization(unet, quantizers, report, calibration.steps)
    result.install()
    return result


def save_softmax(
    unet: nn.Module,
    quantizers: Mapping[str, Quantizer],
    steps: Iterable[int],
    directory: str | os.PathLike[str],
) -> Path:
    """Write ``ptqkit_softmax.json`` into an existing folder, all at once or not at all.

    Parameters
    ----------
    steps : iterable of int
        Calibrated time steps.

    Returns
    -------
    Path
        Of the file.

    Raises
    ------
    NotADirectoryError
        If there is no such folder.
    """
    path = Path(directory) / SOFTMAX_FILE
    if not path.parent.is_dir():
        raise NotADirectoryError(f"{path.parent} is not a folder: save the UNet there, or make it")
    modules = attention.find_attention(unet)
    check_heads(modules, quantizers)
    heads = {name: module.heads for name, module in modules.items()}
    write_atomically(path, to_json(SoftmaxValues(quantizers, heads, check_steps(steps))))
    return path


def load_softmax(
    unet: nn.Module, directory: str | os.PathLike[str]
) -> UNetSoftmaxQuantization | None:
    """Install what ``ptqkit_softmax.json`` in a folder says; None if there is no such file.

    Raises
    ------
    ValueError
        If the file is damaged, from a later version, or for another model; it names the layer.
    """
    path = Path(directory) / SOFTMAX_FILE
    if not path.is_file():
        return None
    values = read_values(path, attention.find_attention(unet), unet=True)
    result = UNetSoftmaxQuantization(unet, dict(values.quantizers), steps=values.steps)
    result.install()
    return result
