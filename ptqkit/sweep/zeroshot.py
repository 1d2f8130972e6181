"""Zero-shot tasks through lm-eval, on a model in memory and items in a local file."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import logging
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqkit.hf.data.calibration import max_positions
from ptqkit.hf.data.text import CachedTokenizer
from ptqkit.study.measured import Measured
from ptqkit.sweep.items import chance, read_items

__all__ = ["INSTALL", "has_lm_eval", "zero_shot"]

INSTALL = "zero-shot tasks need lm-eval; install it with: pip install 'ptqkit[eval]'"

_NAME = "ptqkit_local"
_LONGEST = 2048
_REPORTS = ("add_env_info", "get_git_commit_hash")


def has_lm_eval() -> bool:
    """Whether lm-eval is installed (without importing it)."""
    return importlib.util.find_spec("lm_eval") is not None


def zero_shot(
    model: nn.Module,
    tokenizer: Any,
    path: str,
    *,
    limit: int | None = None,
    metric: str = "acc",
    too_long: str = "error",
    batch_size: int = 8,
) -> Measured:
    """Accuracy of a model on a file of items, as lm-eval measures it.

    The choice with the highest log-likelihood after its context counts (``acc_norm``: divided by
    its length in characters). The tokenizer's own start token stands before the context. Seeds,
    environment and mode of the model are left as found.

    Parameters
    ----------
    model : nn.Module
        With whatever hooks it has.
    tokenizer
    path : str
        See :func:`ptqkit.sweep.items.read_items`.
    limit : int, optional
        The first so many items.
    metric : {"acc", "acc_norm"}
    too_long : {"error", "skip"}
        What to do with items whose choices alone are longer than the model takes.
    batch_size : int

    Raises
    ------
    ValueError
        If items are too long, with ``too_long="error"``, or none is left.
    ArithmeticError
        If a log-likelihood is not finite.
    ModuleNotFoundError
        If lm-eval is not installed.
    """
    if not has_lm_eval():
        raise ModuleNotFoundError(INSTALL, name="lm_eval")
    if isinstance(tokenizer, CachedTokenizer):
        tokenizer = tokenizer.tokenizer
    form, items = read_items(path, limit)
    longest = max_positions(model) or _LONGEST
    fitting, truncated = _fitting(tokenizer, form, items, longest)
    if len(fitting) < len(items) and too_long == "error":
        raise ValueError(
            f"{len(items) - len(fitting)} of {len(items)} items of {Path(path).name} are longer "
            f'than the {longest} tokens the model takes; too_long = "skip" leaves them out'
        )
    if not fitting:
        raise ValueError(f"no item of {Path(path).name} fits the {longest} tokens of the model")
    with _as_found(model):
        value = _evaluate(model, tokenizer, form, fitting, metric, batch_size, longest)
    left_out = len(items) - len(fitting)
    share = chance(form, fitting)
    return Measured(value, metric, True, len(fitting), left_out, truncated, share)


def _requests(form: str, item: dict[str, Any]) -> list[tuple[str, str]]:
    """Contexts and continuations that an item is scored by."""
    if form == "choices":
        return [(item["context"], " " + c) for c in item["choices"]]
    if form == "contexts":
        return [(c, " " + item["continuation"]) for c in item["contexts"]]
    return [(item["context"], " " + item["continuation"])]


def _fitting(
    tokenizer: Any, form: str, items: list[dict[str, Any]], longest: int
) -> tuple[list[dict[str, Any]], int]:
    """Items whose continuations fit, and how many of their contexts are cut off."""
    fitting, truncated = [], 0
    for item in items:
        pairs = _requests(form, item)
        ends = [
            len(tokenizer(b, add_special_tokens=False, verbose=False)["input_ids"])
            for _, b in pairs
        ]
        # The last token is only predicted, so one more than the positions fits; one stays free
        # for the context.
        if max(ends) > longest - 1:
            continue
        fitting.append(item)
        whole = (len(tokenizer(a + b, verbose=False)["input_ids"]) for a, b in pairs)
        truncated += any(n > longest + 1 for n in whole)
    return fitting, truncated


def _task(folder: Path, form: str, items: list[dict[str, Any]], metric: str) -> None:
    """Write items and description of a task; JSON is YAML too."""
    fields: dict[str, Any] = {"output_type": "multiple_choice", "target_delimiter": " "}
    if form == "choices":
        fields |= {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "gold"}
    elif form == "contexts":
        # A number as the text makes lm-eval compare contexts instead of continuations.
        fields |= {"doc_to_text": "gold", "doc_to_choice": "contexts"}
        fields |= {"doc_to_target": "continuation"}
    else:
        # Of this type lm-eval joins text and target as they are.
        items = [{**i, "continuation": " " + i["continuation"]} for i in items]
        fields |= {"doc_to_text": "context", "doc_to_target": "continuation"}
        fields["output_type"] = "loglikelihood"
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(i) + "\n" for i in items), encoding="utf-8")
    fields |= {
        "task": _NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{_NAME}.yaml").write_text(json.dumps(fields), encoding="utf-8")


def _evaluate(
    model: nn.Module,
    tokenizer: Any,
    form: str,
    items: list[dict[str, Any]],
    metric: str,
    batch_size: int,
    longest: int,
) -> float:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="ptqkit-eval-") as folder, _no_environment_report():
        _task(Path(folder), form, items, metric)
        # It gives the tokenizer a padding token.
        lm = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            max_length=longest,
        )
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=[_NAME],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
    answers = [a for sample in found["samples"][_NAME] for a in _log_likelihoods(sample)]
    if not np.isfinite(answers).all():
        # The likeliest of choices that are all NaN would be the first: an accuracy at chance.
        raise ArithmeticError("log-likelihoods are not finite: the model gives no usable logits")
    return float(found["results"][_NAME][f"{metric},none"])


def _log_likelihoods(sample: dict[str, Any]) -> list[float]:
    """All that an item was scored by: one (log-likelihood, greedy) per request."""
    return [float(response[0][0]) for response in sample["resps"]]


@contextlib.contextmanager
def _no_environment_report() -> Iterator[None]:
    """Keep lm-eval from running git and others after every task to describe the machine."""
    from lm_eval import evaluator

    kept = {n: getattr(evaluator, n) for n in _REPORTS if hasattr(evaluator, n)}
    for name in kept:
        setattr(evaluator, name, lambda *args, **options: None)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(evaluator, name, function)


@contextlib.contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Put back what lm-eval changes: three generators, environment, log level, mode."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    deterministic = torch.backends.cudnn.deterministic
    environment = dict(os.environ)
    logger = logging.getLogger("lm_eval")
    level = logger.level
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        torch.backends.cudnn.deterministic = deterministic
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        logger.setLevel(level)
        for module, mode in modes.items():
            module.training = mode
