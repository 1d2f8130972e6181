"""What is measured: perplexity of a text, accuracy on zero-shot items."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from ptqkit.demo import DEMO, text
from ptqkit.errors import CalibrationError
from ptqkit.hf.data.text import TextFile, open_documents, read_beginning, whole_documents
from ptqkit.study.measured import Measured, measure_text
from ptqkit.sweep.plan import TaskPlan, TextSource
from ptqkit.sweep.zeroshot import zero_shot

__all__ = ["documents_of", "measure"]


def documents_of(source: TextSource, split: str = "test") -> Iterator[str | TextFile]:
    """Yield the documents of a text, with white space as asked, read as far as they are asked for.

    A text file is given open, to be read before the next step. Documents without text are left out.

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
    collapse = source.whitespace == "collapse"
    opened: Iterator[str | TextFile]
    if source.path == DEMO:
        whole = text(split)
        opened = iter([" ".join(whole.split()) if collapse else whole])
    else:
        opened = open_documents(source.path, collapse=collapse)
    documents = opened
    if source.documents is not None:
        first, end = source.documents
        held = list(itertools.islice(opened, end))
        if len(held) < end:
            raise CalibrationError(
                f"documents = [{first}, {end}], but {source.path} holds {len(held)}"
            )
        documents = iter(held[first:])
    empty = True
    for document in documents:
        if isinstance(document, TextFile) or document.strip():
            empty = False
            yield document
    if empty:
        raise _no_text(source)


def _no_text(source: TextSource) -> CalibrationError:
    return CalibrationError(f"{source.path} holds no text")


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
    opened, needed = documents_of(task.source), task.settings.get("max_tokens")
    if needed is None:
        texts = list(whole_documents(opened))
    else:
        texts = read_beginning(opened, tokenizer, needed)
    if not any(t.strip() for t in texts):
        raise _no_text(task.source)
    return measure_text(model, tokenizer, texts, **task.settings)
