"""Make room for experts that a file holds one by one, some of them quantized."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ptqkit.hf.models.experts import replace_experts, saved_expert_names
from ptqkit.nn.experts import expert_shape

__all__ = ["LoadedExperts"]


class LoadedExperts:
    """Experts of a model on the meta device, as linear layers, and how their tensors get there.

    Modules with a quantized expert are replaced, and with them all whose experts a file holds one
    by one: the conversions that would join those go by names that both have.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place.
    quantized : container of str
        Names of the quantized layers in the file.

    Attributes
    ----------
    names : dict of str to str
        Names in memory of the experts' layers by those in the file.
    """

    def __init__(self, model: Any, quantized: Container[str]) -> None:
        self.names: dict[str, str] = {}
        self._joined: set[str] = set()
        self._renamings: list[WeightRenaming] = []
        shapes = {n: s for n, m in model.named_modules() if (s := expert_shape(m)) is not None}
        if not shapes:
            return
        split = saved_expert_names(model, shapes)
        held = {}
        for name, shape in shapes.items():
            layers = [f"{name}.{e}.{p}" for e in range(shape.experts) for p in shape.projections]
            held[name] = {split[name].get(layer, layer): layer for layer in layers}
        if not any(saved in quantized for found in held.values() for saved in found):
            return
        chosen = {
            name
            for name, found in held.items()
            if split[name] or any(saved in quantized for saved in found)
        }
        for name in chosen:
            self.names.update(held[name])
        first = {name: shapes[name].first for name in chosen}
        self._joined = {f"{n}.{p}" for n, f in first.items() for p in (f, "down_proj")}
        self._renamings = _renamings(model, self.names)
        replace_experts(model, chosen.__contains__, share=False)

    def conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Return the conversions without those that join experts, with renamings in their place."""
        if not self.names:
            return weight_conversions
        kept = [c for c in weight_conversions if not self._joins(c)]
        # Behind the model's own, so that saving, which reverses the order, does them first.
        return kept + self._renamings

    def _joins(self, conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return False
        reverse = conversion.reverse_transform()
        return any(reverse.rename_source_key(name)[1] is not None for name in self._joined)


def _renamings(model: nn.Module, names: dict[str, str]) -> list[WeightRenaming]:
    """Return renamings for what is called otherwise in memory, one for all numbers."""
    own = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    rules: dict[str, str] = {}
    seen: set[str] = set()
    for saved, name in names.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "#", saved)
        if pattern in seen:
            continue
        seen.add(pattern)
        # As the model's own renamings leave it, which come first.
        middle = rename_source_key(f"{saved}.weight", own, [])[0].removesuffix(".weight")
        if middle == name:
            continue
        (path, number, old), (wanted, same, new) = (n.rsplit(".", 2) for n in (middle, name))
        if path != wanted or number != same:
            raise ValueError(
                f"{saved}: stored in the checkpoint under a name that {type(model).__name__} does "
                f"not read as {name}"
            )
        last = path.rpartition(".")[2]
        rules[rf"{last}\.(\d+)\.{old}\."] = rf"{last}.\1.{new}."
    return [WeightRenaming(source, target) for source, target in rules.items()]
