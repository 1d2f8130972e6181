"""Find biases that linear layers gained, and how a checkpoint can carry them.

Bias correction subtracts the mean output error of a layer from its bias, so a layer without one
gains it. A stock loader builds its modules from the configuration, and takes such a bias only
if a setting of the model (``attention_bias``, ``mlp_bias``) creates it; that may create others
too, which are written as zeros. ptqkit's own format lists the modules instead.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["GainedBiases", "find_gained_biases", "plan_biases"]


@dataclass(frozen=True)
class GainedBiases:
    """Describe biases that the model class does not create with the present configuration.

    Attributes
    ----------
    names : tuple of str
        Modules that have one.
    settings : tuple of str
        Attributes of the configuration that create them when they are True.
    zeros : dict of str to tuple of int
        Names and shapes of the further biases that come with these settings.
    orphans : tuple of str
        Modules whose bias no setting creates.
    """

    names: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    zeros: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    orphans: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """Return the reasons why a format that relies on the model class cannot carry the model."""
        return [
            f"{name}: it gained a bias, and no setting of the model's configuration creates one"
            for name in self.orphans
        ]

    def apply(self, config: Any) -> None:
        """Change the settings in ``config``, the copy that is saved."""
        for setting in self.settings:
            setattr(config.get_text_config(), setting, True)


def find_gained_biases(model: nn.Module) -> GainedBiases:
    """Compare the biases of ``model`` with those its class creates, on the meta device."""
    biased = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module.bias is not None
    ]
    return plan_biases(model, biased) if biased else GainedBiases()


def plan_biases(model: nn.Module, names: Iterable[str]) -> GainedBiases:
    """Tell how a checkpoint of ``model`` could carry biases on these modules.

    Parameters
    ----------
    names : iterable of str
        Linear modules that have a bias, or will have one; those whose bias the model class creates
        anyway do not count.
    """
    built = _parameters(model, ())
    names = [n for n in names if f"{n}.bias" not in built and f"{n}.weight" in built]
    if not names:
        return GainedBiases()
    keys = {f"{name}.bias" for name in names}
    settings = [s for s in _false_bias_settings(model) if _adds(model, built, (s,)) & keys]
    added = _adds(model, built, settings)
    if not added:
        return GainedBiases(tuple(names), orphans=tuple(names))
    shapes = _parameters(model, settings)
    return GainedBiases(
        tuple(names),
        tuple(settings),
        {key: shapes[key] for key in sorted(added - keys)},
        tuple(name for name in names if f"{name}.bias" not in added),
    )


def _false_bias_settings(model: Any) -> list[str]:
    values = vars(model.config.get_text_config())
    return sorted(name for name, value in values.items() if "bias" in name and value is False)


def _parameters(model: Any, settings: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the model class creates with these settings True."""
    config = copy.deepcopy(model.config)
    for setting in settings:
        setattr(config.get_text_config(), setting, True)
    with torch.device("meta"):
        skeleton = type(model)(config)
    return {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}


def _adds(model: Any, built: Mapping[str, tuple[int, ...]], settings: Any) -> set[str]:
    """Return linear biases that come with the settings; none if anything else changes."""
    if not settings:
        return set()
    shapes = _parameters(model, settings)
    added = shapes.keys() - built.keys()
    linears = {
        f"{name}.bias"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    same = all(shapes.get(name) == shape for name, shape in built.items())
    return set(added) if same and added <= linears else set()
