"""The models of the tables: how each is calibrated, quantized and measured, item by item."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import ptqkit
from benchmarks.kinds import encoder, minilm, resnet
from benchmarks.kinds.adaround import adaround
from ptqkit.nn import quantize_module
from ptqkit.nn.forward import hooks
from ptqkit.nn.module_inputs import InputMoments
from ptqkit.nn.module_layers import find_layers

__all__ = ["CASES", "METHODS", "Case", "load_case"]

#: Name: recipe and what is changed in it. All have one asymmetric grid per output channel.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "gptq": ("reference", {}),
    "gptq, float inputs": ("reference", {"calibrate_on": "float"}),
    "obq": ("obq", {}),
    "obq, float inputs": ("obq", {"calibrate_on": "float"}),
    "quality": ("quality", {}),
    "best": ("best", {}),
    "adaround": ("", {}),
}


@dataclass
class Case:
    """A model with its data.

    Attributes
    ----------
    model : nn.Module
        In float; never changed.
    draw : callable
        Calibration batches of a seed.
    measure : callable
        Returns which items a model gets right, bool (items,), and vectors of its outputs or None.
    whole_model : bool
        Whether ``ptqkit.quantize`` quantizes it; otherwise ``quantize_module`` does.
    overrides : dict
        For every recipe.
    slow : dict
        For OBQ, besides.
    """

    model: nn.Module
    draw: Callable[[int], list[Any]]
    measure: Callable[[nn.Module], tuple[np.ndarray, torch.Tensor | None]]
    whole_model: bool
    overrides: dict[str, Any]
    slow: dict[str, Any]

    def methods(self) -> list[str]:
        """Return the methods that there are for this model."""
        missing = {"adaround"} if self.whole_model else {"best"}
        return [m for m in METHODS if m not in missing]

    def quantize(self, method: str, bits: int, seed: int) -> nn.Module:
        """Quantize a copy of the model."""
        model, data = copy.deepcopy(self.model), self.draw(seed)
        if method == "adaround":
            _adaround(model, data, bits)
            return model
        recipe, changes = METHODS[method]
        overrides = {**self.overrides, **(self.slow if recipe == "obq" else {})}
        options = {"bits": bits, "group_size": None, "overrides": overrides, **changes}
        if self.whole_model:
            return ptqkit.quantize(model, recipe, data, progress=False, **options).model
        return quantize_module(model, data, recipe, **options).model


@torch.no_grad()
def _adaround(model: nn.Module, data: list[torch.Tensor], bits: int) -> None:
    """Quantize layer by layer, on the inputs after the quantized layers before it."""
    layers = find_layers(model, ptqkit.Recipe(group_size=None), True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, layer in layers.items():  # registered in order of execution
        moments = InputMoments(name, layer.view)
        with hooks({name: layer.module}, lambda _, value, m=moments: m.add(value)):
            for batch in data:
                model(batch)
        (hessian,) = moments.finish().hessians
        with torch.enable_grad():
            layer.view.write(adaround(layer.view.read(), hessian.matrix, bits, device=device))


def _resnet(data: Path, models: Path, samples: int) -> Case:
    model = resnet.load(models)
    images, _ = resnet.read_split(data / "fashion-mnist", "train")
    test, labels = resnet.read_split(data / "fashion-mnist", "t10k")

    def draw(seed: int) -> list[Any]:
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:samples]
        return list(images[rows].split(128))

    return Case(model, draw, lambda m: (resnet.correct(m, test, labels), None), False, {}, {})


def _encoder(data: Path, models: Path, samples: int) -> Case:
    arrays = np.load(models / "windows.npz")
    train, test, labels = (
        torch.from_numpy(arrays[k].astype(np.int64))
        for k in ("train_ids", "test_ids", "test_labels")
    )

    def draw(seed: int) -> list[Any]:
        rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:samples]
        return [{"input_ids": ids} for ids in train[rows].split(64)]

    return Case(
        encoder.load(models),
        draw,
        lambda m: (encoder.correct(m, test, labels), None),
        True,
        {},
        {},
    )


def _minilm(data: Path, models: Path, samples: int) -> Case:
    model, tokenizer = minilm.load(models / "minilm")
    texts, articles = minilm.paragraphs(data / "wikitext2")
    return Case(
        model,
        lambda seed: minilm.calibration(data / "wikitext2", tokenizer, seed, min(samples, 256)),
        lambda m: minilm.same_article(m, tokenizer, texts, articles),
        True,
        {},
        # 1,536 inputs would take OBQ hours
        {"*.output.dense": {"method": "gptq"}, "*.attention.output.dense": {"method": "obq"}},
    )


CASES: dict[str, Callable[[Path, Path, int], Case]] = {
    "resnet": _resnet,
    "encoder": _encoder,
    "minilm": _minilm,
}


def load_case(name: str, data: Path, models: Path, samples: int) -> Case:
    """Load a model and its data.

    Parameters
    ----------
    name : {"resnet", "encoder", "minilm"}
    data : path
        Folder of ``fashion-mnist`` and ``wikitext2``.
    models : path
        What ``benchmarks.kinds.train`` wrote, and ``minilm``.
    samples : int
        Images or passages per calibration draw.
    """
    return CASES[name](data, models, samples)
