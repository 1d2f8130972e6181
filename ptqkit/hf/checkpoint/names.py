"""Give tensors the names, and the form, that ``save_pretrained`` would give them.

transformers converts the weights of some classes on loading (fused experts, renamed parts of vision
models) and reverses that on saving. Other readers know the saved names alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from ptqkit._repr import one_line_repr
from ptqkit.hf.checkpoint.files import TensorPlan
from ptqkit.hf.models.experts import expert_modules, saved_expert_names

__all__ = ["SavedNames", "convert_plans", "saved_names"]


@dataclass(frozen=True)
class SavedNames:
    """Say what ``save_pretrained`` calls the tensors of a model.

    Attributes
    ----------
    tensors : dict of str to str
        Saved names by names in memory, of tensors that are saved as they are.
    converted : frozenset of str
        Names in memory of tensors that are split, joined or transposed on saving.
    """

    __repr__ = one_line_repr

    tensors: Mapping[str, str] = field(default_factory=dict)
    converted: frozenset[str] = frozenset()

    def module(self, name: str) -> str:
        """Return the saved name of the module that holds ``name.weight``."""
        saved = self.tensors.get(f"{name}.weight", "")
        return saved.removesuffix(".weight") if saved.endswith(".weight") else name

    def problems(self, modules: Iterable[str]) -> list[str]:
        """Return the modules whose packed weight cannot have the form that is saved."""
        return [
            f"{name}: save_pretrained splits, joins or transposes its weight, which packed codes "
            "cannot follow"
            for name in modules
            if f"{name}.weight" in self.converted
        ]


def saved_names(model: Any) -> SavedNames:
    """Ask transformers for the saved names of everything that ``model`` holds."""
    held = {
        name: torch.empty(t.shape, dtype=t.dtype, device="meta")
        for name, t in model.state_dict().items()
    }
    # What is only renamed comes back as the same object.
    names = {id(tensor): name for name, tensor in held.items()}
    reverted = revert_weight_conversion(model, held)
    same = {names[id(t)]: name for name, t in reverted.items() if id(t) in names}
    shapes = {name: module.shape for name, module in expert_modules(model).items()}
    for saved in saved_expert_names(model, shapes).values():
        for name, other in saved.items():
            parts = [p for p in ("weight", "bias") if f"{name}.{p}" in held]
            same.update({f"{name}.{part}": f"{other}.{part}" for part in parts})
    return SavedNames(same, frozenset(held.keys() - same.keys()))


def convert_plans(model: Any, plans: Sequence[TensorPlan], names: SavedNames) -> list[TensorPlan]:
    """Return plans for the saved form of float tensors; conversions run when a file is written."""
    result, rest = [], {}
    for plan in plans:
        if plan.name in names.converted:
            rest[plan.name] = plan
        else:
            saved = names.tensors.get(plan.name, plan.name)
            result.append(TensorPlan(saved, plan.dtype, plan.shape, plan.make))
    for sources in _joined(model, rest):
        result += _Conversion(model, [rest[name] for name in sources]).plans()
    return result


def _joined(model: Any, plans: Mapping[str, TensorPlan]) -> list[list[str]]:
    """Group tensors that become parts of one tensor."""
    groups: list[tuple[list[str], set[str]]] = []
    for name, plan in plans.items():
        members, made = [name], set(_revert(model, [plan]))
        for group in [g for g in groups if g[1] & made]:
            groups.remove(group)
            members, made = group[0] + members, group[1] | made
        groups.append((members, made))
    return [members for members, _ in groups]


def _revert(model: Any, plans: Sequence[TensorPlan]) -> dict[str, torch.Tensor]:
    held = {p.name: torch.empty(p.shape, dtype=p.dtype, device="meta") for p in plans}
    return revert_weight_conversion(model, held)


class _Conversion:
    """Convert some tensors when the first result is asked for, and forget each once it is taken."""

    def __init__(self, model: Any, sources: Sequence[TensorPlan]) -> None:
        self._model, self._sources = model, sources
        self._made: dict[str, torch.Tensor] = {}

    def plans(self) -> list[TensorPlan]:
        """Return a plan for every result."""
        return [
            TensorPlan(name, t.dtype, tuple(t.shape), partial(self._take, name))
            for name, t in _revert(self._model, self._sources).items()
        ]

    def _take(self, name: str) -> torch.Tensor:
        if name not in self._made:
            held = {plan.name: plan.make().detach() for plan in self._sources}
            self._made = dict(revert_weight_conversion(self._model, held))
        return self._made.pop(name)
