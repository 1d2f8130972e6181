"""Which functions make a solve's steps on a device."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch

from ptqkit.nn.kernels import plain

__all__ = ["groups_on", "products_on", "steps_on", "why_no_kernels"]


def why_no_kernels(device: torch.device) -> str:
    """Return why a device has no kernels; empty if it has some."""
    if device.type != "cuda":
        return f"there are no kernels for {device.type}"
    return "" if _has_triton() else "the package 'triton' is not installed"


def steps_on(device: torch.device) -> ModuleType:
    """Return the module of the steps on a device: the compiled ones if there are kernels for it.

    Either has the functions of :mod:`ptqkit.nn.kernels.plain`.
    """
    if why_no_kernels(device):
        return plain
    return importlib.import_module("ptqkit.nn.kernels.compiled")


def groups_on(device: torch.device) -> ModuleType | None:
    """Return :mod:`ptqkit.nn.kernels.groups`, if there are kernels for a device."""
    return None if why_no_kernels(device) else importlib.import_module("ptqkit.nn.kernels.groups")


def products_on(device: torch.device) -> ModuleType | None:
    """Return :mod:`ptqkit.nn.kernels.products`, if there are kernels for a device."""
    return None if why_no_kernels(device) else importlib.import_module("ptqkit.nn.kernels.products")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
