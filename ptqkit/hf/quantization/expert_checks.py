"""Check before a run what mixtures of experts cannot have, or have wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ptqkit.errors import Problems, UnsupportedModuleError
from ptqkit.hf.models.structure import Target
from ptqkit.nn.experts import ExpertLinears

__all__ = ["check_experts"]

# What configurations call the number of experts that a token is sent to.
_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")


def check_experts(
    problems: Problems,
    model: nn.Module,
    targets: Mapping[str, Target],
    modules: Mapping[str, ExpertLinears],
) -> None:
    """Note what cannot be quantized of these modules' layers, once for all of them.

    Parameters
    ----------
    targets : mapping of str to Target
        All layers to quantize.
    modules : mapping of str to ExpertLinears
    """
    layers = {n: t for n, t in targets.items() if n.rsplit(".", 2)[0] in modules}
    found = [n for n, t in layers.items() if t.options.activations is not None]
    if found:
        problems.add(
            f"{found[0]} and {len(found) - 1} more layers of experts: their inputs cannot be "
            "quantized, the model's experts take float ones; quantize their weights alone with "
            f"overrides={{'{_glob(found[0])}': {{'activations': None}}}}, or leave them float with "
            "'skip'",
            UnsupportedModuleError,
        )
    found = [
        n for n, t in layers.items() if t.options.bias_correction and t.view.module.bias is None
    ]
    if found:
        problems.add(
            f"{found[0]} and {len(found) - 1} more layers of experts: bias_correction needs a "
            "bias, which the model's experts have no place for; leave it out with "
            f"overrides={{'{_glob(found[0])}': {{'bias_correction': False}}}}",
            UnsupportedModuleError,
        )
    _check_chosen(problems, model, modules)


def _check_chosen(
    problems: Problems, model: nn.Module, modules: Mapping[str, ExpertLinears]
) -> None:
    text: Any = getattr(model, "config", None)
    if hasattr(text, "get_text_config"):
        text = text.get_text_config()
    chosen = [c for key in _CHOSEN if isinstance(c := getattr(text, key, None), int)]
    for name, module in modules.items():
        if chosen and chosen[0] > module.shape.experts:
            problems.add(
                f"{name}: the configuration sends a token to {chosen[0]} experts, but there are "
                f"{module.shape.experts}",
                UnsupportedModuleError,
            )
            return


def _glob(name: str) -> str:
    """Generalize the name of an expert's layer to all of all mixtures, for a message."""
    return "*." + name.rsplit(".", 2)[0].rsplit(".", 1)[-1] + ".*"
