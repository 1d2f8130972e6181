"""Find the repeated blocks of a model and the linear layers inside them, by structure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ptqkit.errors import UnsupportedModuleError
from ptqkit.nn.linear import LinearView, is_linear
from ptqkit.recipe.recipe import Recipe, match_pattern

__all__ = ["FEW_OUTPUTS", "Structure", "Target", "find_blocks", "find_structure"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: Linear layers with fewer outputs stay float: other readers build routers and gates from floats.
FEW_OUTPUTS = 16
# What configurations call the number of experts, which is a router's number of outputs.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LEFT_ALONE = (nn.Embedding, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True, eq=False)
class Target:
    """One linear layer to quantize.

    Attributes
    ----------
    name : str
        Full module name.
    view : LinearView
    options : Recipe
        The recipe with the overrides for this layer applied.
    block : str or None
        Name of the block that holds the layer; None if it lies outside the blocks.
    """

    name: str
    view: LinearView
    options: Recipe
    block: str | None

    @property
    def module(self) -> nn.Module:
        """The module itself, for hooks."""
        return self.view.module


@dataclass
class Structure:
    """What a model consists of, as far as quantization is concerned.

    Attributes
    ----------
    stacks : dict of str to list of str
        Path of each block list and the names of its blocks.
    targets : dict of str to Target
        Linear layers to quantize, in the order the model registers them.
    skipped : dict of str to str
        Modules with matrices that stay as they are, with the reason.
    problems : list of str
        Reasons why the model cannot be quantized as asked.
    known_names : list of str
        Names of all modules, for patterns that match none.
    """

    stacks: dict[str, list[str]]
    targets: dict[str, Target] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    known_names: list[str] = field(default_factory=list)

    @property
    def blocks(self) -> list[str]:
        """Names of all blocks, stack by stack."""
        return [block for blocks in self.stacks.values() for block in blocks]


def find_blocks(model: nn.Module, paths: tuple[str, ...] | None = None) -> dict[str, list[str]]:
    """Find the lists of repeated blocks.

    A stack is an outermost ``nn.ModuleList`` whose items share a class and hold linear layers;
    lists of one item count only if there is no longer list.

    Parameters
    ----------
    model : nn.Module
    paths : tuple of str, optional
        Names of the lists, if structure cannot tell.

    Returns
    -------
    dict of str to list of str
        Path of each list and the names of its items.

    Raises
    ------
    UnsupportedModuleError
        If there is no such list, or a given path is not a list of modules.
    """
    if paths is not None:
        return {path: _list_items(model, path) for path in paths}
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(module, nn.ModuleList) and _is_stack(module):
            found[name] = [f"{name}.{i}" if name else str(i) for i in range(len(module))]
    longest = max((len(items) for items in found.values()), default=0)
    if longest == 0:
        raise UnsupportedModuleError(
            f"{type(model).__name__} has no nn.ModuleList of equal blocks with linear layers; "
            "name the list with blocks=('path.to.list',), or use ptqkit.nn.quantize_module, which "
            "takes any torch module"
        )
    return {k: v for k, v in found.items() if len(v) > 1 or longest == 1}


def _list_items(model: nn.Module, path: str) -> list[str]:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise UnsupportedModuleError(
            f"blocks: {type(model).__name__} has no module {path!r}"
        ) from None
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) == 0:
        raise UnsupportedModuleError(f"blocks: {path!r} is not a non-empty list of modules")
    return [f"{path}.{i}" for i in range(len(module))]


def _is_stack(modules: nn.ModuleList) -> bool:
    if len({type(m) for m in modules}) != 1:
        return False
    return any(is_linear(sub) for sub in modules[0].modules())


def find_structure(
    model: nn.Module, recipe: Recipe, paths: tuple[str, ...] | None = None
) -> Structure:
    """Find blocks, the linear layers to quantize, and everything that cannot be."""
    structure = Structure(find_blocks(model, paths))
    prefixes = [(block, f"{block}.") for block in structure.blocks]
    first_name: dict[int, str] = {}
    owners, experts = _weight_owners(model), _expert_counts(model)
    for name, module in model.named_modules(remove_duplicate=False):
        structure.known_names.append(name)
        block = next((b for b, p in prefixes if name.startswith(p) or name == b), None)
        shared = id(module) in first_name and is_linear(module) and block is not None
        if shared and recipe.for_layer(name) is not None:
            structure.problems.append(
                f"{name} is the same module as {first_name[id(module)]}: a shared linear layer "
                "cannot be quantized; add an override 'skip' for both names"
            )
            continue
        first_name.setdefault(id(module), name)
        if is_linear(module):
            _add_linear(structure, recipe, name, module, block, owners, experts)
        elif block is not None:
            _note_other(structure, recipe, name, module)
    if not structure.targets and not structure.problems:
        structure.problems.append("no linear layer is left to quantize: every one is skipped")
    return structure


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of the modules that hold each parameter (tied weights have several)."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() >= 2:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _expert_counts(model: nn.Module) -> set[int]:
    """Return the numbers of experts that the configuration of the language model names."""
    text: Any = getattr(model, "config", None)
    if hasattr(text, "get_text_config"):
        text = text.get_text_config()
    counts = (getattr(text, key, None) for key in _EXPERTS)
    return {count for count in counts if isinstance(count, int)}


def _add_linear(
    structure: Structure,
    recipe: Recipe,
    name: str,
    module: nn.Module,
    block: str | None,
    owners: dict[int, list[str]],
    experts: set[int],
) -> None:
    included = any(match_pattern(p, name) for p in recipe.include)
    if block is None and not included:
        structure.skipped[name] = "outside the repeated blocks"
        return
    options = recipe.for_layer(name)
    if options is None:
        structure.skipped[name] = "override 'skip'"
        return
    weight = getattr(module, "weight", None)
    if weight is None:
        structure.problems.append(f"{name} ({type(module).__name__}) holds no float weight")
        return
    if weight.dim() != 2 or weight.dtype not in _FLOATS:
        structure.problems.append(
            f"{name} ({type(module).__name__}) holds a weight of dtype {weight.dtype} and shape "
            f"{tuple(weight.shape)}; only floating-point matrices can be quantized"
        )
        return
    outputs = LinearView(module).shape[0]
    if not included and (outputs < FEW_OUTPUTS or outputs in experts):
        why = f"fewer than {FEW_OUTPUTS}" if outputs < FEW_OUTPUTS else "one per expert"
        structure.skipped[name] = (
            f"{outputs} output{'s' if outputs > 1 else ''} ({why}): other readers build routers "
            "and gates from floats; `include` quantizes it"
        )
        return
    others = [o for o in owners.get(id(weight), []) if o != name]
    if others:
        structure.problems.append(
            f"{name} shares its weight with {', '.join(others)}: tied weights cannot be "
            "quantized; add an override 'skip'"
        )
        return
    structure.targets[name] = Target(name, LinearView(module), options, block)


def _note_other(structure: Structure, recipe: Recipe, name: str, module: nn.Module) -> None:
    """Record matrices inside a block that are not linear layers: left float, or not supported."""
    if isinstance(module, _LEFT_ALONE):
        return
    shapes = {k: tuple(p.shape) for k, p in module._parameters.items() if p is not None}
    kind = type(module).__name__
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    fused = [k for k, s in shapes.items() if len(s) == 3 and min(s) > 1 and not convolution]
    if recipe.for_layer(name) is None:
        if any(len(s) >= 2 for s in shapes.values()):
            structure.skipped[name] = "override 'skip'"
    elif fused:
        structure.problems.append(
            f"{name} ({kind}) fuses several linear layers into 3-D weights "
            f"({', '.join(f'{k} {shapes[k]}' for k in fused)}), which is not supported; "
            f"leave it float with overrides={{'{_glob(name)}': 'skip'}}"
        )
    elif any(len(s) >= 2 and min(s) > 1 for s in shapes.values()):
        structure.skipped[name] = f"{kind} is not a linear layer"


def _glob(name: str) -> str:
    """Generalize a name over its block numbers, for a message."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
