"""Diffusion models of diffusers: quantize the softmax of a UNet's attention, and its weights."""

from __future__ import annotations

from ptqkit.diffusion.attention import (
    attention_hooks,
    find_attention,
    install_attention,
    installed_attention,
    remove_attention,
)
from ptqkit.diffusion.calibration import CalibrationLatents, draw_calibration, run_calibration
from ptqkit.diffusion.clock import StepClock
from ptqkit.diffusion.sampling import ClassConditionalUNet, load_unet, sample, starting_noise
from ptqkit.diffusion.softmax import SoftmaxCalibration, UNetSoftmaxQuantization, quantize_softmax
from ptqkit.diffusion.state import load_softmax, save_softmax
from ptqkit.diffusion.step_quantizer import StepSoftmaxQuantizer
from ptqkit.diffusion.weights import quantize_weights

__all__ = [
    "CalibrationLatents",
    "ClassConditionalUNet",
    "SoftmaxCalibration",
    "StepClock",
    "StepSoftmaxQuantizer",
    "UNetSoftmaxQuantization",
    "attention_hooks",
    "draw_calibration",
    "find_attention",
    "install_attention",
    "installed_attention",
    "load_softmax",
    "load_unet",
    "quantize_softmax",
    "quantize_weights",
    "remove_attention",
    "run_calibration",
    "sample",
    "save_softmax",
    "starting_noise",
]
