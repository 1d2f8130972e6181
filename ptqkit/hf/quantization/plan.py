"""Which schedule a run takes, and why it is not one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ptqkit._units import show_bytes
from ptqkit.errors import UnsupportedModuleError
from ptqkit.hf.quantization.memory import available_memory, estimate_memory
from ptqkit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from ptqkit.hf.quantization.run import Runner

__all__ = ["only_one_pass", "why_not_one_pass"]


def why_not_one_pass(run: Runner, schedule: str, budget: int | None) -> str | None:
    """Choose the schedule: None for one pass, else the reason why it is re-forward.

    Raises
    ------
    PreflightError, UnsupportedModuleError
        If what was asked for, or error propagation, cannot be had.
    """
    assert run.calibration is not None
    needed = estimate_memory(
        run.model, run.structure.targets, run.probe.groups, run.calibration, run.propagate
    )
    free = available_memory(next(run.model.parameters()).device)
    limit = budget if budget is not None else free
    run.report.memory = {
        "estimate_one_pass": needed.one_pass,
        "estimate_re_forward": needed.reforward,
        "budget": budget,
        "available": free,
    }
    reason = _reason(run, schedule, needed.one_pass, limit, budget)
    if run.propagate and reason is not None:
        run.problems.add(only_one_pass(run.recipe, reason), UnsupportedModuleError)
        run.problems.raise_if_any()
    if schedule == "one-pass" and reason is not None:
        raise UnsupportedModuleError(f"schedule='one-pass' is not possible: {reason}")
    if reason is not None and limit is not None and needed.reforward > limit:
        text = f"re-forward needs about {show_bytes(needed.reforward)}, there is "
        text += show_bytes(limit)
        if budget is not None:
            run.problems.add(f"memory_budget: {text}; lower samples or batch_size")
            run.problems.raise_if_any()
        run.report.warnings.append(text)
    return reason


def _reason(
    run: Runner, schedule: str, needed: int, limit: int | None, budget: int | None
) -> str | None:
    if schedule == "re-forward":
        return "asked for"
    if run.probe.straddling is not None:
        return (
            f"{run.probe.straddling} runs inside a thread-local mode (such as autocast) set by the "
            "model"
        )
    if run.late:
        return f"a short probe did not reach {len(run.late)} layers ({min(run.late)}, ...)"
    if not _has_greenlet():
        return "the package 'greenlet' is not installed"
    if limit is not None and needed > limit:
        what = "the memory budget" if budget is not None else "the free memory"
        twice = " (for two models' activations)" if run.propagate else ""
        return f"one pass needs about {show_bytes(needed)}{twice}, {what} is {show_bytes(limit)}"
    return None


def only_one_pass(recipe: Recipe, reason: str) -> str:
    """The message where error propagation cannot have the one-pass schedule."""
    if reason == "asked for":
        reason = "schedule='re-forward' was asked for"
    return (
        f"error_propagation={recipe.error_propagation:g} needs the one-pass schedule, in "
        f"which the float model runs along, but {reason}; use error_propagation=0"
    )


def _has_greenlet() -> bool:
    try:
        import greenlet  # noqa: F401
    except ImportError:
        return False
    return True
