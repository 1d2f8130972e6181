"""Diffusion models of diffusers: quantize the softmax of a UNet's attention, and its weights."""

from __future__ import annotations

try:
    import diffusers as _diffusers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ptqkit.diffusion needs diffusers; install it with: pip install 'ptqkit[diffusion]'",
        name=error.name,
    ) from error

from ptqkit.diffusion.attention import (
    attention_hooks,
    find_attention,
    install_attention,
    installed_attention,
    remove_attention,
)
from ptqkit.diffusion.calibration import CalibrationLatents, draw_calibration, run_calibration
from ptqkit.diffusion.sampling import ClassConditionalUNet, load_unet, sample, starting_noise
from ptqkit.diffusion.softmax import (
    SoftmaxCalibration,
    UNetSoftmaxQuantization,
    load_softmax,
    quantize_softmax,
    save_softmax,
)
from ptqkit.diffusion.table import UNetTable, softmax_table
from ptqkit.diffusion.text import load_text_to_image, with_prompts
from ptqkit.diffusion.weights import quantize_weights
from ptqkit.nn.softmax.steps import StepSoftmaxQuantizer

__all__ = [
    "CalibrationLatents",
    "ClassConditionalUNet",
    "SoftmaxCalibration",
    "StepSoftmaxQuantizer",
    "UNetSoftmaxQuantization",
    "UNetTable",
    "attention_hooks",
    "draw_calibration",
    "find_attention",
    "install_attention",
    "installed_attention",
    "load_softmax",
    "load_text_to_image",
    "load_unet",
    "quantize_softmax",
    "quantize_weights",
    "remove_attention",
    "run_calibration",
    "sample",
    "save_softmax",
    "softmax_table",
    "starting_noise",
    "with_prompts",
]
