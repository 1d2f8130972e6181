"""What is measured: perplexity of a text, accuracy on zero-shot items."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ptqkit.errors import CalibrationError
from ptqkit.sweep.plan import DEMO, TaskPlan, TextSource

__all__ = ["Measured", "RememberingTokenizer", "documents_of", "measure"]


@dataclass(frozen=True)
class Measured:
    """One value and what it was measured over.

    Attributes
    ----------
    value : float
    metric : {"perplexity", "acc", "acc_norm"}
        Accuracies are shares from 0 to 1.
    higher_is_better : bool
    count : int
        Tokens scored, or items.
    left_out : int
        Items longer than the model takes.
    truncated : int
        Contexts whose beginning was cut off to fit the model.
    chance : float
        Value that guessing gives; NaN for a perplexity.
    """

    value: float
    metric: str
    higher_is_better: bool
    count: int
    left_out: int = 0
    truncated: int = 0
    chance: float = math.nan


class RememberingTokenizer:
    """A tokenizer that keeps the tokens of every text: a sweep reads the same texts again."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: dict[tuple[Any, ...], Any] = {}

    def __call__(self, text: str, **options: Any) -> Any:
        key = (text, *sorted(options.items()))
        if key not in self._tokens:
            self._tokens[key] = self._tokenizer(text, **options)
        return self._tokens[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def documents_of(source: TextSource, split: str = "test") -> list[str]:
    """Documents of a text, with white space as asked.

    Parameters
    ----------
    source : TextSource
    split : {"test", "calibration"}
        Of the demo's text.

    Raises
    ------
    CalibrationError
        If the file holds fewer documents than asked for, or no text.
    """
    if source.path == DEMO:
        from ptqkit.demo import text

        documents = [text(split)]
    else:
        from ptqkit.hf.data.text import read_documents

        documents = list(read_documents(source.path))
    if source.documents is not None:
        first, end = source.documents
        if end > len(documents):
            raise CalibrationError(
                f"documents = [{first}, {end}], but {source.path} holds {len(documents)}"
            )
        documents = documents[first:end]
    if source.whitespace == "collapse":
        documents = [" ".join(d.split()) for d in documents]
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise CalibrationError(f"{source.path} holds no text")
    return documents


def measure(model: Any, tokenizer: Any, task: TaskPlan) -> Measured:
    """Measure a model on a task.

    Parameters
    ----------
    model : nn.Module
        A causal language model of transformers, left as found.
    tokenizer
    task : TaskPlan

    Raises
    ------
    ArithmeticError
        If the logits, and so the value, are not finite.
    """
    if task.kind == "zero-shot":
        from ptqkit.sweep.zeroshot import zero_shot

        return zero_shot(model, tokenizer, task.source.path, **task.settings)
    from ptqkit.hf.evaluation.perplexity import perplexity

    settings = dict(task.settings)
    text: Any = documents_of(task.source)
    windows = settings.pop("windows", None)
    if windows is not None:
        text = _spread(tokenizer, text, windows, settings["window"], settings["start_token"])
    found = perplexity(model, tokenizer, text, **settings)
    if not math.isfinite(found.perplexity):
        raise ArithmeticError(
            f"the perplexity is {found.perplexity} ({found.nll_per_token} nats a token): "
            "the logits of the model are no longer those of a language model"
        )
    return Measured(found.perplexity, "perplexity", False, found.tokens)


def _spread(
    tokenizer: Any, documents: list[str], windows: int, window: int, start_token: Any
) -> Any:
    """Windows at equal distances from the joined text, so that few speak for all of it."""
    import torch

    from ptqkit.hf.data.text import start_token_id

    body = window - (start_token_id(tokenizer, start_token) is not None)
    found = (tokenizer(d, add_special_tokens=False, verbose=False)["input_ids"] for d in documents)
    ids = [token for tokens in found for token in tokens]
    count = len(ids) // body
    if count < windows:
        raise CalibrationError(
            f"windows = {windows} of {body} tokens are more than the {len(ids)} tokens of the text"
        )
    rows = torch.tensor(ids[: count * body]).view(count, body)
    return rows[torch.linspace(0, count - 1, windows).round().long()]
