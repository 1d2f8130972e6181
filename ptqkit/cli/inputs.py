"""What the arguments name: models, texts and tokens."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from ptqkit.cli.options import prefixed
from ptqkit.cli.output import no_bars
from ptqkit.demo import DEMO, MODEL_DIR, text
from ptqkit.errors import UsageError

__all__ = ["calibration_source", "load_model", "pick_device", "read_text"]

# Of 64 Ki characters, in which a text file must have one that is not a blank.
_PIECES_LOOKED_AT = 256


def pick_device(args: argparse.Namespace) -> str:
    """Resolve ``--device``."""
    from ptqkit.hf.models import loading

    with prefixed("--"):
        return loading.pick_device(args.device)


def load_model(
    args: argparse.Namespace, stream: bool | None = False
) -> tuple[Any, Any, dict[str, str]]:
    """Load the model and tokenizer that the arguments name.

    Parameters
    ----------
    args : argparse.Namespace
    stream : bool, optional
        Leave a float model in its files; None: if it does not fit into memory.

    Returns
    -------
    model, tokenizer, facts
        See :func:`ptqkit.hf.open_model`.
    """
    from ptqkit.hf.models.loading import model_folder
    from ptqkit.hf.quantization import opening

    device = pick_device(args)
    with prefixed("MODEL "):
        folder = MODEL_DIR if args.model == DEMO else model_folder(args.model)
    # A checkpoint that is damaged or of an unknown kind is data that cannot be used.
    with no_bars(), prefixed():
        model, tokenizer, facts = opening.open_model(folder, args.dtype, device, stream)
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        _first_forward(model)
    return model, tokenizer, facts


def _first_forward(model: Any) -> None:
    """Run one token: compressed-tensors decompresses a model, with a bar, when it first runs."""
    import torch

    with no_bars(), torch.no_grad():
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))


def read_text(
    option: str,
    name: str | None,
    tokenizer: Any,
    split: str = "test",
    *,
    max_tokens: int | None = None,
) -> Any:
    """Read what an option names.

    Parameters
    ----------
    option : str
        Name of the option, for messages.
    name : str or None
        A text or ``.jsonl`` file (``.gz`` too), or token ids (``.npy``); None is the demo's text.
    tokenizer
    split : {"test", "calibration"}
        Of the demo's text.
    max_tokens : int, optional
        Read no more text than so many tokens come from.

    Returns
    -------
    list of str or Tensor
        Documents, or token ids of shape (samples, sequence).
    """
    if name is None:
        return [text(split)]
    if name.endswith(".npy"):
        return _read_tokens(option, name)
    _refuse_empty(option, name, tokenizer)
    from ptqkit.hf.data.text import open_documents, read_beginning, read_documents

    if max_tokens is not None:
        return read_beginning(open_documents(name), tokenizer, max_tokens)
    return list(read_documents(name))


def calibration_source(option: str, name: str, tokenizer: Any) -> Any:
    """Return what a run calibrates on: a text file, read as far as it is needed, or token ids."""
    if name.endswith(".npy"):
        return _read_tokens(option, name)
    _refuse_empty(option, name, tokenizer)
    return Path(name)


def _refuse_empty(option: str, name: str, tokenizer: Any) -> None:
    """Refuse text that nobody can tokenize, and a file without any."""
    if tokenizer is None:
        raise UsageError(f"{option} {name} is text, but MODEL has no tokenizer; give tokens (.npy)")
    from ptqkit.hf.data.text import open_documents, text_pieces

    pieces = (piece for document in open_documents(name) for piece in text_pieces(document))
    # A file may expand to blanks without end.
    if not any(piece.strip() for piece in itertools.islice(pieces, _PIECES_LOOKED_AT)):
        raise UsageError(f"{option} {name}: the file is empty, or begins with blanks alone")


def _read_tokens(option: str, name: str) -> Any:
    import numpy as np
    import torch

    try:
        tokens = np.load(Path(name), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UsageError(f"{option} {name} is not a .npy file: {error}") from None
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim != 2:
        raise UsageError(
            f"{option} {name}: tokens must be integers of shape (samples, sequence), not "
            f"{tokens.dtype} of shape {tokens.shape}"
        )
    return torch.from_numpy(tokens.astype(np.int64))
