"""What is measured: perplexity of a text, accuracy on zero-shot items."""

from __future__ import annotations

from typing import Any

from ptqkit.demo import DEMO, text
from ptqkit.errors import CalibrationError
from ptqkit.hf.data.text import read_documents
from ptqkit.hf.evaluation.likelihood import perplexity
from ptqkit.sweep.measured import Measured
from ptqkit.sweep.plan import TaskPlan, TextSource
from ptqkit.sweep.zeroshot import zero_shot

__all__ = ["documents_of", "measure"]


def documents_of(source: TextSource, split: str = "test") -> list[str]:
    """Read the documents of a text, with white space as asked.

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
        documents = [text(split)]
    else:
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
    NotFiniteError
        If the logits, and so the value, are not finite.
    """
    if task.kind == "zero-shot":
        return zero_shot(model, tokenizer, task.source.path, **task.settings)
    found = perplexity(model, tokenizer, documents_of(task.source), **task.settings)
    found.check_finite()
    return Measured(found.perplexity, "perplexity", False, found.tokens)
