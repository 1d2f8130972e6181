"""Calibration windows that a language model writes itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ptqkit.errors import CalibrationError, NotFiniteError, UnsupportedModuleError
from ptqkit.nn.forward import calibration_mode, device_of, model_inputs
from ptqkit.recipe.options import check_int

__all__ = ["own_text"]

Window = dict[str, torch.Tensor]


def own_text(
    model: nn.Module,
    windows: Sequence[Mapping[str, torch.Tensor]],
    count: int,
    *,
    prefix: int = 8,
    batch_size: int = 64,
    seed: int = 0,
    parameters: Mapping[str, torch.Tensor] | None = None,
) -> list[Window]:
    """Let a model go on from the first tokens of calibration windows, token by token.

    Tokens are drawn from the model's predictions as they are (temperature 1), so that the text is
    what the model takes for likely: as much calibration text as is wanted, without any corpus
    (LLM-QAT, Liu et al. 2023, arXiv:2305.17888).

    Parameters
    ----------
    model : nn.Module
        A causal language model of transformers, in float. It is as before afterwards.
    windows : sequence of mapping
        Calibration windows of one sample each; of those that are longest and have no padding.
    count : int
        Windows to write, of that length.
    prefix : int
        Tokens that are kept of a window.
    batch_size : int
        Windows that are written at once.
    seed : int
        Of the windows that are begun from, and of the tokens drawn.
    parameters : mapping of str to Tensor, optional
        Values to run the model with instead of its own, by name.

    Returns
    -------
    list of dict
        Windows of one sample, with the keys of the given ones, on the CPU.

    Raises
    ------
    CalibrationError
        If no window is without padding or longer than ``prefix``.
    UnsupportedModuleError
        If windows hold more than tokens, or the model keeps no cache of what it has read.
    ValueError
        If ``count`` is negative, or ``prefix`` or ``batch_size`` is less than 1.
    """
    for name, value, least in (
        ("count", count, 0),
        ("prefix", prefix, 1),
        ("batch_size", batch_size, 1),
    ):
        check_int(name, value, least)
    whole = [w for w in windows if _is_whole(w)]
    length = max((w["input_ids"].shape[1] for w in whole), default=0)
    if length <= prefix:
        raise CalibrationError(
            f"the model's own text begins with {prefix} tokens of calibration windows without "
            "padding, and none is longer; give longer windows"
        )
    starts = torch.cat(
        [w["input_ids"][:, :prefix].cpu() for w in whole if w["input_ids"].shape[1] == length]
    )
    masked = "attention_mask" in whole[0]
    generator = torch.Generator().manual_seed(seed)
    # Drawn beforehand on the CPU: the same on every device and for every size of a batch.
    chosen = starts[torch.randint(len(starts), (count,), generator=generator)]
    draws = torch.rand((count, length - prefix), dtype=torch.float32, generator=generator)

    def run(ids: torch.Tensor, cache: Any) -> Any:
        inputs = {**model_inputs(model, {"input_ids": ids}), "past_key_values": cache}
        output: Any = functional_call(
            model, dict(parameters or {}), (), {**inputs, "use_cache": True}
        )
        if getattr(output, "past_key_values", None) is None:
            raise UnsupportedModuleError(
                f"{type(model).__name__} keeps no cache of what it has read, so that its own text "
                "would take too long: tune with own_text=0"
            )
        return output

    written: list[Window] = []
    device = device_of(model)
    with calibration_mode(model):
        for ids, values in zip(chosen.split(batch_size), draws.split(batch_size), strict=True):
            for row in _continued(run, ids.to(device), values.to(device)).cpu().split(1):
                written.append({"input_ids": row})
                if masked:
                    written[-1]["attention_mask"] = torch.ones_like(row)
    return written


def _is_whole(window: Mapping[str, torch.Tensor]) -> bool:
    if set(window) - {"input_ids", "attention_mask"} or "input_ids" not in window:
        raise UnsupportedModuleError(
            f"a model writes text of its own from tokens alone, not from {', '.join(window)}: "
            "tune with own_text=0"
        )
    mask = window.get("attention_mask")
    return mask is None or bool(mask.all())


def _continued(
    run: Callable[[torch.Tensor, Any], Any], ids: torch.Tensor, draws: torch.Tensor
) -> torch.Tensor:
    """Return rows of tokens that go on by one for each draw, which is a number from 0 to 1."""
    rows, cache = [ids], None
    finite = torch.ones((), dtype=torch.bool, device=ids.device)
    for draw in draws.split(1, dim=1):
        output = run(rows[-1], cache)
        cache = output.past_key_values
        # Of 32,768 tokens the sums in float32 would miss some.
        sums = output.logits[:, -1].double().softmax(-1).cumsum(-1)
        finite &= sums.isfinite().all()
        found = torch.searchsorted(sums, draw * sums[:, -1:], right=True)
        rows.append(found.clamp_(max=sums.shape[1] - 1))
    if not bool(finite):
        raise NotFiniteError("the float model's logits are not finite: it is damaged")
    return torch.cat(rows, 1)
