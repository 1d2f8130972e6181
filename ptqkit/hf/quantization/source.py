"""Parameters of a model that are in memory only while they are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ptqkit.hf.checkpoint.stored_model import StoredModel
from ptqkit.hf.models.experts import expert_modules
from ptqkit.hf.quantization.stored_experts import StoredExperts
from ptqkit.nn.linear import is_linear

__all__ = ["BlockSource"]


class BlockSource:
    """Fill the blocks of a stored model one at a time, and the rest of it as it is cheapest.

    A block is read when its forward begins, or by :meth:`enter`, and dropped when another one is.
    Outside of the blocks, parameters are used in the files themselves (mapped, read only) if they
    are computed with on the host in the dtype in which they are stored. Otherwise linear layers
    (a head) are read for each forward and the rest stays in memory. Layers that are quantized have
    memory of their own from when they are first read.

    Parameters
    ----------
    stored : StoredModel
    blocks : sequence of str
    targets : sequence of str
        Layers outside of the blocks that are quantized.

    Attributes
    ----------
    experts : StoredExperts
    loaded : callable or None
        Called with the name of a block, or of a layer outside of them, after it was read.
    """

    def __init__(
        self,
        stored: StoredModel,
        blocks: Sequence[str],
        targets: Sequence[str],
    ) -> None:
        self.stored, self.device = stored, stored.device
        self.model = stored.model
        self.experts = StoredExperts(stored, expert_modules(stored.model))
        self.loaded: Callable[[str], None] | None = None
        self.resident: str | None = None
        names = [n for n, _ in self.model.named_parameters(remove_duplicate=False)]
        self._blocks = {b: [n for n in names if n.startswith(f"{b}.")] for b in blocks}
        inside = {name for own in self._blocks.values() for name in own}
        outside = [name for name in names if name not in inside]
        self._pinned = {t: [n for n in outside if n.rpartition(".")[0] == t] for t in targets}
        pinned = {name for own in self._pinned.values() for name in own}
        self._meta: dict[str, nn.Parameter] = {}
        self._heads: dict[str, list[str]] = {}
        self._kept: list[str] = []
        for name in outside:
            if name in pinned:
                continue
            module = name.rpartition(".")[0]
            if self._mapped(name) is None and is_linear(self.model.get_submodule(module)):
                self._heads.setdefault(module, []).append(name)
            else:
                self._kept.append(name)

    def block_bytes(self) -> int:
        """Return the size of the largest block, or layer, that is in memory by turns.

        With what reading it takes meanwhile, where experts have to be joined.
        """
        units = [*self._blocks.values(), *self._heads.values()]
        largest = max((self._bytes(names) for names in units), default=0)
        return largest + self.experts.joining_bytes()

    def rest_bytes(self) -> int:
        """Return the size of what is in memory all the time."""
        kept = [n for n in self._kept if self._mapped(n) is None]
        pinned = [n for names in self._pinned.values() for n in names]
        return self._bytes([*kept, *pinned])

    def _bytes(self, names: Sequence[str]) -> int:
        sizes = {id(p): p.numel() * p.element_size() for p in map(self._parameter, names)}
        return sum(sizes.values())

    def _parameter(self, name: str) -> nn.Parameter:
        held = self._meta.get(name)
        return self.model.get_parameter(name) if held is None else held

    def _mapped(self, name: str) -> torch.Tensor | None:
        """Return a parameter as it is in its file, if it can be used there."""
        held = self.stored.names.get(name)
        if self.device.type != "cpu" or held is None:
            return None
        if self.stored.tensors.places[held].dtype != self._parameter(name).dtype:
            return None
        return self.stored.tensors.map(held)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Let modules fill themselves when they run; all is as it was built on leaving."""
        patched = [*self._blocks, *self._heads, *self._pinned]
        modules = {name: self.model.get_submodule(name) for name in patched}
        try:
            self._fill_buffers()
            self._fill_kept()
            for name, module in modules.items():
                module.__dict__["forward"] = self._forward(name, module.forward)
            yield
        finally:
            for module in modules.values():
                module.__dict__.pop("forward", None)
            self.release()

    def _forward(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def filled(*args: Any, **kwargs: Any) -> Any:
            if name not in self._heads:
                self.enter(name)
                return original(*args, **kwargs)
            self._fill(self._heads[name])
            try:
                return original(*args, **kwargs)
            finally:
                self._drop(self._heads[name])

        return filled

    def enter(self, name: str) -> None:
        """Read a block, or a quantized layer outside of the blocks, unless it is in memory."""
        if name in self._pinned:
            if self._pinned[name][0] not in self._meta:
                self._fill(self._pinned[name])
                self._tell(name)
            return
        if name == self.resident:
            return
        self.leave()
        self._fill(self._blocks[name])
        self.resident = name
        self._tell(name)

    def leave(self) -> None:
        """Drop the block that is in memory, if any."""
        if self.resident is not None:
            self._drop(self._blocks[self.resident])
            self.resident = None

    def release(self) -> None:
        """Drop everything."""
        self.resident = None
        self._drop(list(self._meta))

    def _tell(self, name: str) -> None:
        if self.loaded is not None:
            self.loaded(name)

    def _fill_kept(self) -> None:
        rest = []
        for name in self._kept:
            mapped = self._mapped(name)
            if mapped is None:
                rest.append(name)
            else:
                self._set(name, nn.Parameter(mapped, requires_grad=False))
        self._fill(rest)

    def _fill_buffers(self) -> None:
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        held = [n for n in self.model.state_dict() if n in buffers]
        read = self.stored.read(held, {n: buffers[n].dtype for n in held})
        for name in held:
            module, _, key = name.rpartition(".")
            self.model.get_submodule(module)._buffers[key] = read[name].to(self.device)
        for name in buffers.keys() - set(held):
            module, _, key = name.rpartition(".")
            self.model.get_submodule(module)._buffers[key] = buffers[name].to(self.device)

    def _fill(self, names: Sequence[str]) -> None:
        """Read parameters; one that has several names is one object still."""
        made: dict[int, nn.Parameter] = {}
        experts = [n for n in names if n in self.experts]
        rest = [n for n in names if n not in self.experts]
        plain = [n for n in rest if n in self.stored.names]
        joined = [n for n in rest if n not in self.stored.names]
        for group in [*([n] for n in plain), joined, experts]:
            missing = [n for n in group if id(self._parameter(n)) not in made]
            dtypes = {n: self._parameter(n).dtype for n in missing}
            values = (self.experts if group is experts else self.stored).read(missing, dtypes)
            for name in group:
                key = id(self._parameter(name))
                if key not in made:
                    value = values.pop(name).to(self.device)
                    made[key] = nn.Parameter(value, requires_grad=False)
                self._set(name, made[key])

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        module, _, key = name.rpartition(".")
        own = self.model.get_submodule(module)._parameters
        current = own[key]
        assert current is not None
        self._meta.setdefault(name, current)
        own[key] = parameter

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self._meta:
                module, _, key = name.rpartition(".")
                self.model.get_submodule(module)._parameters[key] = self._meta.pop(name)
