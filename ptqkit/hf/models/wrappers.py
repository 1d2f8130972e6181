"""Models inside of others: compiled, with adapters, or spread over devices."""

from __future__ import annotations

from torch import nn

from ptqkit.nn.forward import eager_attributes

__all__ = ["is_compiled", "unwrap_compiled", "wrapper_problem"]


def is_compiled(model: nn.Module) -> bool:
    """Whether :func:`torch.compile` has compiled a module of a model in place."""
    return any(eager_attributes(module) for module in model.modules())


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """Return the model that ``torch.compile(model)`` wraps; any other as it is.

    Both hold the same weights.
    """
    while _is_wrapper(model):
        model = model.get_submodule("_orig_mod")
    return model


def _is_wrapper(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


def wrapper_problem(model: nn.Module) -> str | None:
    """Return why the names of a model's weights are not those of its class; None if they are."""
    kind = type(model).__name__
    adapted = [n for n, m in model.named_modules() if _has_adapter(m)]
    if adapted:
        where = f" (the first is {adapted[0]})" if adapted[0] else ""
        return (
            f"{kind} has adapters of PEFT{where}: merge them into the weights first, with "
            "model = model.merge_and_unload()"
        )
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, parallel):
        return f"the model is wrapped in {kind}: give the model itself, model.module"
    compiled = [n for n, m in model.named_modules() if _is_wrapper(m)]
    if compiled:
        return (
            f"{compiled[0]} is wrapped by torch.compile, which renames its weights: put its "
            "_orig_mod back in its place (module.compile() compiles without wrapping)"
        )
    return None


def _has_adapter(module: nn.Module) -> bool:
    return (
        hasattr(module, "merge_and_unload")
        or type(module).__module__.startswith("peft.")
        or (hasattr(module, "base_layer") and hasattr(module, "merge"))
    )
