"""Calibration data: from text, token tensors, batches or a ``datasets`` name to model inputs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqkit._defaults import FORWARD_BATCH_SIZE, SAMPLES, SEQUENCE_LENGTH
from ptqkit._repr import one_line_repr
from ptqkit.errors import CalibrationError
from ptqkit.hf.data.text import (
    DATASET_NAME,
    MissingTextError,
    TextFile,
    dataset_documents,
    open_documents,
    start_token_id,
    tokenize,
)

__all__ = [
    "FEATURES",
    "CalibrationSet",
    "batch_shape",
    "max_positions",
    "prepare_calibration",
]

#: Inputs of models that read no token ids, or not them alone.
FEATURES = ("inputs_embeds", "pixel_values", "input_features", "input_values")

# Tokenizing stops at this multiple of the tokens that are needed.
_SURPLUS = 16


@dataclass
class CalibrationSet:
    """Batches of model inputs.

    Attributes
    ----------
    batches : list of dict of str to Tensor
        Keyword arguments of the model's forward: integer tensors of shape (batch, sequence), or
        whatever else the model takes, such as ``pixel_values``.
    tokens : int
        Positions that count, padding excluded. Of inputs without ``input_ids`` the number is known
        only to the model: each sample counts as one.
    samples : int
    sequence_length : int
        The longest.
    start_token : str
        How windows start: ``"<s>"`` (say), or ``"none"`` / ``"as given"``.
    source : str
    """

    __repr__ = one_line_repr

    batches: list[dict[str, torch.Tensor]]
    tokens: int
    samples: int
    sequence_length: int
    start_token: str
    source: str

    def masks(self) -> list[torch.Tensor | None]:
        """Per batch the positions that count, bool (batch, sequence); None if all do."""
        return [padding_mask(batch) for batch in self.batches]


def batch_shape(batch: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Return the rows and positions of a batch; 1 position per row if it has no token ids."""
    for key in ("input_ids", "decoder_input_ids"):
        if key in batch:
            return (batch[key].shape[0], batch[key].shape[1])
    return len(batch[_main_input(batch) or next(iter(batch))]), 1


def _main_input(batch: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the tensor that a model reads first; None if there is none."""
    known = [key for key in ("input_ids", *FEATURES) if key in batch]
    other = (k for k, v in batch.items() if v.is_floating_point() and v.dim() >= 2)
    return known[0] if known else next(other, None)


def padding_mask(
    batch: Mapping[str, torch.Tensor], key: str = "attention_mask"
) -> torch.Tensor | None:
    """Return the bool mask of real tokens, or None if nothing is padded."""
    mask = batch.get(key)
    if mask is None or mask.dim() != 2 or bool(mask.bool().all()):
        return None
    return mask.bool()


def max_positions(model: nn.Module) -> int | None:
    """Longest sequence a model takes according to its configuration; None if there is no limit."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    # RoBERTa counts positions from padding_idx + 1, so its table is longer than its sequences.
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            if module.padding_idx is not None:
                limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def prepare_calibration(
    source: Any,
    tokenizer: Any = None,
    *,
    samples: int = SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    batch_size: int = FORWARD_BATCH_SIZE,
    seed: int = 0,
    start_token: str | int | None = "auto",
    max_length: int | None = None,
) -> CalibrationSet:
    """Turn any accepted source into batches.

    Text is tokenized without special tokens in its order (at most 16 times what is needed),
    joined, and cut into consecutive windows; ``samples`` of them are drawn with a generator of
    their own, seeded by ``seed``, and kept in text order. With a start token, each window is that
    token and ``sequence_length - 1`` tokens of text. Token tensors and batches are used as given,
    and a calibration set is returned as it is.

    Parameters
    ----------
    source : str, path, iterable of str, Tensor, iterable of Tensor or dict, or CalibrationSet
        A text or ``.jsonl`` file (``.gz`` too); texts, or dicts with ``text``, read no further than
        needed; tokens of shape (samples, sequence), 1-D sequences, or batches of tokens, alone or
        in tuples of one, as a DataLoader gives them; dicts of the model's inputs, such as
        ``input_ids`` and ``attention_mask``, or ``pixel_values``; or ``"name:config:split"`` of
        the package ``datasets``.
    tokenizer : optional
        Needed for text.
    samples, sequence_length, batch_size, seed : int
    start_token : "auto", int or None
    max_length : int, optional
        Longest sequence of the model.

    Raises
    ------
    CalibrationError
        If the source is not understood, empty, or too small; the message says how many tokens
        were found and how many are needed.
    """
    for name, value in (
        ("samples", samples),
        ("sequence_length", sequence_length),
        ("batch_size", batch_size),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CalibrationError(f"{name} must be an integer of at least 1, not {value!r}")
    if isinstance(source, CalibrationSet):
        return source
    documents, described, source = _as_documents(source)
    if documents is None:
        return _from_tokens(source, batch_size, samples)
    if tokenizer is None:
        raise CalibrationError("calibration is text, so tokenizer= is needed")
    length = sequence_length if max_length is None else min(sequence_length, max_length)
    start = start_token_id(tokenizer, start_token)
    body = length - (start is not None)
    if body < 1:
        raise CalibrationError(f"sequence_length {length} leaves no room next to the start token")
    ids = tokenize(tokenizer, documents, _SURPLUS * samples * body)
    if len(ids) < samples * body:
        raise CalibrationError(
            f"calibration holds {len(ids)} tokens, but samples={samples} windows of {body} need "
            f"{samples * body}; give more text or lower samples or sequence_length"
        )
    windows = torch.tensor(ids[: len(ids) // body * body], dtype=torch.long).view(-1, body)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    windows = windows[order[:samples].sort().values]
    if start is not None:
        windows = torch.cat([torch.full((samples, 1), start, dtype=torch.long), windows], dim=1)
    name = "none" if start is None else str(tokenizer.convert_ids_to_tokens(start))
    batches = [{"input_ids": part.contiguous()} for part in windows.split(batch_size)]
    return CalibrationSet(batches, windows.numel(), samples, length, name, described)


def _as_documents(source: Any) -> tuple[Iterable[str | TextFile] | None, str, Any]:
    """Return the texts of a source, or None and the source itself if it holds tokens."""
    if isinstance(source, os.PathLike):
        return open_documents(source), Path(source).name, None
    if isinstance(source, str):
        if os.path.exists(source):
            return open_documents(source), Path(source).name, None
        if DATASET_NAME.fullmatch(source):
            return dataset_documents(source), source, None
        raise MissingTextError(
            f"calibration {source[:80]!r} is neither a file nor 'name:config:split' of datasets; "
            "give text itself as a list of strings"
        )
    if isinstance(source, Mapping):
        source = [source]
    if isinstance(source, np.ndarray) and source.dtype.kind in "USO":
        source = source.ravel().tolist()
    if isinstance(source, (torch.Tensor, np.ndarray)) or not isinstance(source, Iterable):
        return None, "", source
    items = iter(source)
    # A generator gives its items once: the first is looked at and put back.
    first = list(itertools.islice(items, 1))
    whole = itertools.chain(first, items)
    if first and _is_text(first[0]):
        count = f"{len(source)} texts" if isinstance(source, Sized) else "texts"
        return _texts(whole), count, None
    return None, "", source if isinstance(source, (list, tuple)) else whole


def _is_text(item: Any) -> bool:
    tokenized = isinstance(item, Mapping) and "input_ids" in item
    return isinstance(item, (str, TextFile)) or (
        isinstance(item, Mapping) and "text" in item and not tokenized
    )


def _texts(items: Iterable[Any]) -> Iterator[str | TextFile]:
    """Yield the texts of strings and of dicts with ``text``, which is a string or several."""
    for index, item in enumerate(items):
        if isinstance(item, TextFile):
            yield item
            continue
        text = item["text"] if _is_text(item) and not isinstance(item, str) else item
        for part in [text] if isinstance(text, (str, bytes)) or not _listed(text) else text:
            if not isinstance(part, str):
                raise CalibrationError(
                    f"calibration[{index}] is a {type(part).__name__}, not a text as the first is"
                )
            yield part


def _listed(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray))


def _from_tokens(source: Any, batch_size: int, samples: int) -> CalibrationSet:
    if source is None:
        raise CalibrationError("calibration is missing: give a text file, strings or tokens")
    if isinstance(source, (torch.Tensor, np.ndarray)):
        rows = torch.as_tensor(source)
        if rows.dim() != 2:
            hint = "" if rows.dim() < 3 else "; name other inputs, as in {'pixel_values': images}"
            raise CalibrationError(
                f"calibration tokens must have shape (samples, sequence), not {tuple(rows.shape)}"
                f"{hint}"
            )
        source = list(rows[:samples])
    if not isinstance(source, (list, tuple)):
        try:
            source = list(source)
        except TypeError:
            raise CalibrationError(
                f"calibration cannot be a {type(source).__name__}; give a text file, a list of "
                "strings, tokens, or a list of dicts of the model's inputs"
            ) from None
    if not source:
        raise CalibrationError("calibration is empty")
    source = [_unwrapped(item, i) for i, item in enumerate(source)]
    if any(_is_token_batch(item) for item in source):
        # Whole batches, as a DataLoader makes them.
        source = [item if isinstance(item, Mapping) else {"input_ids": item} for item in source]
    if all(isinstance(item, Mapping) for item in source):
        batches = [_check_batch(dict(item), i) for i, item in enumerate(source)]
    else:
        rows = [_check_row(row, i) for i, row in enumerate(source[:samples])]
        batches = _batch_rows(rows, batch_size)
    shapes = [batch_shape(b) for b in batches]
    masks = [padding_mask(b) if "input_ids" in b else None for b in batches]
    tokens = sum(
        rows * length if mask is None else int(mask.sum())
        for (rows, length), mask in zip(shapes, masks, strict=True)
    )
    if tokens == 0:
        raise CalibrationError("calibration holds no token: the attention masks are all zero")
    longest = max(length for _, length in shapes)
    described = "tokens as given" if "input_ids" in batches[0] else "inputs as given"
    samples = sum(rows for rows, _ in shapes)
    return CalibrationSet(batches, tokens, samples, longest, "as given", described)


def _unwrapped(item: Any, index: int) -> Any:
    """Take the tensor out of a tuple of one; of several only the caller knows what they are."""
    tensors = isinstance(item, (list, tuple)) and [
        x for x in item if isinstance(x, (torch.Tensor, np.ndarray)) and x.ndim > 0
    ]
    if not tensors:
        return item
    if len(item) > 1:
        raise CalibrationError(
            f"calibration[{index}] is a {type(item).__name__} of {len(item)}, of which nothing "
            "tells what they are to the model; give dicts, such as {'input_ids': ids, "
            "'attention_mask': mask}"
        )
    return tensors[0]


def _is_token_batch(item: Any) -> bool:
    """Whether these are the token ids of several samples."""
    if not isinstance(item, (torch.Tensor, np.ndarray)) or item.ndim != 2 or len(item) < 2:
        return False
    return not torch.as_tensor(item).is_floating_point()


def _check_row(row: Any, index: int) -> torch.Tensor:
    try:
        ids = torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError):
        raise CalibrationError(
            f"calibration[{index}] is a {type(row).__name__}, not a sequence of token ids"
        ) from None
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1 or ids.is_floating_point() or ids.numel() == 0:
        hint = "; name other inputs, as in {'pixel_values': images}" if ids.dim() > 1 else ""
        raise CalibrationError(
            f"calibration[{index}] must be a non-empty 1-D sequence of integer token ids, not "
            f"{ids.dtype} of shape {tuple(ids.shape)}{hint}"
        )
    return ids.long()


def _batch_rows(rows: list[torch.Tensor], batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Batch rows of equal length together, in their order: nothing needs padding."""
    by_length: dict[int, list[torch.Tensor]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    return [
        {"input_ids": torch.stack(group[i : i + batch_size])}
        for group in by_length.values()
        for i in range(0, len(group), batch_size)
    ]


def _check_batch(batch: dict[str, Any], index: int) -> dict[str, torch.Tensor]:
    where = f"calibration[{index}]"
    given = ", ".join(map(str, batch)) or "nothing"
    for key, value in batch.items():
        batch[key] = _as_tensor(value, f"{where}: {key}")
    batch.pop("labels", None)
    main = _main_input(batch)
    if main is None:
        raise CalibrationError(
            f"{where} has no input_ids, nor other inputs of a model such as {', '.join(FEATURES)}; "
            f"it has {given}"
        )
    if main != "input_ids":
        if batch[main].numel() == 0:
            raise CalibrationError(f"{where}: {main} is empty")
        return batch
    # One sequence is a batch of one.
    batch = {key: value[None] if value.dim() == 1 else value for key, value in batch.items()}
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise CalibrationError(
            f"{where}: input_ids must be integers of shape (batch, sequence), not {ids.dtype} of "
            f"shape {tuple(ids.shape)}"
        )
    if mask is not None and mask.dim() == 2 and mask.shape != ids.shape:
        raise CalibrationError(
            f"{where}: attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}"
        )
    return batch


def _as_tensor(value: Any, where: str) -> torch.Tensor:
    """Return a tensor of a batch; Python floats become float32, whatever the default dtype is."""
    if isinstance(value, torch.Tensor):
        return value
    try:
        array = np.asarray(value)
        return torch.as_tensor(array, dtype=torch.float32 if array.dtype.kind == "f" else None)
    except (TypeError, ValueError, RuntimeError):
        raise CalibrationError(
            f"{where} is a {type(value).__name__}, not a tensor; give the model's inputs alone, "
            "each as a tensor of equal rows"
        ) from None
