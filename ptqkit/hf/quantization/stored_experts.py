"""Parameters of the linear layers of experts, from the files of a model that is streamed.

Most files have a tensor of its own for each expert and projection: such a layer is read alone.
Where they have the parameters that the class joins (GPT-OSS, Llama 4), or other names, those are
read whole, and the layers are views of them, as they are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ptqkit.hf.checkpoint.stored_model import StoredModel
from ptqkit.hf.models.experts import saved_expert_names
from ptqkit.nn.experts import ExpertLinears

__all__ = ["StoredExperts"]


class StoredExperts:
    """Where the parameters of experts' linear layers lie.

    Parameters
    ----------
    stored : StoredModel
    modules : mapping of str to ExpertLinears
        Modules of its model, by name.

    Attributes
    ----------
    names : dict of str to str
        Names in the files of what has a tensor of its own there, by names in memory.
    parts : dict of str to (str, ExpertLinears, int, str)
        Of what is part of a joined parameter: its name, and module, expert and projection.
    """

    def __init__(self, stored: StoredModel, modules: Mapping[str, ExpertLinears]) -> None:
        self._stored = stored
        self.names: dict[str, str] = {}
        self.parts: dict[str, tuple[str, ExpertLinears, int, str]] = {}
        shapes = {name: module.shape for name, module in modules.items()}
        saved = saved_expert_names(stored.model, shapes)
        for name, module in modules.items():
            self._find(name, module, saved[name])

    def _find(self, name: str, module: ExpertLinears, saved: Mapping[str, str]) -> None:
        kinds = ("weight", "bias") if module.shape.biased else ("weight",)
        for inside, _ in module.linears():
            layer = f"{name}.{inside}"
            number, projection = inside.split(".")
            for kind in kinds:
                alone = f"{saved.get(layer, layer)}.{kind}"
                if alone in self._stored.tensors.places:
                    self.names[f"{layer}.{kind}"] = alone
                else:
                    joined = f"{name}.{module.joined_name(projection, kind)}"
                    self.parts[f"{layer}.{kind}"] = (joined, module, int(number), projection)

    def __contains__(self, name: str) -> bool:
        return name in self.names or name in self.parts

    def joining_bytes(self) -> int:
        """Return what is needed meanwhile to join the largest parameter from its tensors."""
        found = 0
        for whole, module, _, projection in self.parts.values():
            if whole in self._stored.converted:
                kind = "weight" if whole.endswith("_proj") else "bias"
                own = module.fused.get_parameter(module.joined_name(projection, kind))
                found = max(found, own.numel() * own.element_size())
        return found

    def read(
        self, names: Iterable[str], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, torch.Tensor]:
        """Read parameters by their names in memory; parts share the memory of what they join to.

        Parameters
        ----------
        names : iterable of str
        dtypes : mapping of str to torch.dtype
            That each has in memory.
        """
        found: dict[str, torch.Tensor] = {}
        joined: dict[str, torch.Tensor] = {}
        for name in names:
            if name in self.names:
                found[name] = self._stored.tensors.read(self.names[name]).to(dtypes[name])
                continue
            whole, module, index, projection = self.parts[name]
            if whole not in joined:
                joined |= self._stored.read([whole], {whole: dtypes[name]})
            found[name] = module.part(joined[whole], index, projection)
        return found
