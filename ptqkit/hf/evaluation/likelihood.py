"""Perplexity per token of a causal language model, with its conventions stated."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ptqkit._defaults import FORWARD_BATCH_SIZE
from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit.errors import CalibrationError, NotFiniteError, UsageError
from ptqkit.hf.data.calibration import max_positions
from ptqkit.hf.data.text import start_token_id
from ptqkit.hf.progress import Progress, ProgressStage, close_progress, make_progress
from ptqkit.nn.forward import calibration_mode

__all__ = ["PerplexityResult", "perplexity"]

# Tokens, if the model has no limit.
_DEFAULT_WINDOW = 2048
# Logits turned to float32 at once.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class PerplexityResult(Tabular):
    """Mean negative log-likelihood and what it was measured over.

    Attributes
    ----------
    nll_per_token : float
        In nats.
    perplexity : float
    tokens : int
        Tokens scored.
    window : int
        Longest input, the start token included.
    stride : int
        New tokens per window.
    start_token : int or None
        Id prepended to every window; None if there is none, and then the first token of a
        text (with ``stride == window``: of every window) is not scored.
    texts : int
        Texts that were measured.
    losses : tuple of float
        Of each window, in the order of the text: the sum of its tokens' negative log-likelihoods,
        in nats. What two models lose on the same windows can be paired.
    scored : tuple of int
        Tokens scored in each window; their sum is ``tokens``.
    """

    __repr__ = one_line_repr

    nll_per_token: float
    perplexity: float
    tokens: int
    window: int
    stride: int
    start_token: int | None
    texts: int
    losses: tuple[float, ...] = field(default=(), repr=False)
    scored: tuple[int, ...] = field(default=(), repr=False)

    def check_finite(self, where: str = "the model") -> None:
        """Raise NotFiniteError, which names ``where``, if the perplexity is not finite."""
        problem = self._problem(where)
        if problem is not None:
            raise NotFiniteError(problem)

    def warn_unless_finite(self, where: str) -> None:
        """Warn, for a table that goes on, if the perplexity is not finite."""
        problem = self._problem(where)
        if problem is not None:
            warnings.warn(problem, RuntimeWarning, stacklevel=3)

    def _problem(self, where: str) -> str | None:
        if math.isfinite(self.perplexity):
            return None
        return (
            f"the perplexity of {where} is {self.perplexity} ({self.nll_per_token} nats per "
            "token): its weights are damaged, or its arithmetic overflows (try float32)"
        )

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"window": i, "tokens": n, "loss": loss, "nats_per_token": loss / n}
            for i, (loss, n) in enumerate(zip(self.losses, self.scored, strict=True))
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict, but for those of the windows."""
        return {k: v for k, v in asdict(self).items() if k not in ("losses", "scored")}


@dataclass
class _Window:
    ids: list[int]
    scored: int  # only so many targets at the end count


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: Any,
    *,
    window: int | None = None,
    stride: int | None = None,
    start_token: str | int | None = "auto",
    batch_size: int = FORWARD_BATCH_SIZE,
    max_tokens: int | None = None,
    windows: int | None = None,
    check: bool = True,
    progress: bool | Progress | None = False,
) -> PerplexityResult:
    """Measure the perplexity per token of a text.

    A text is tokenized without special tokens and cut into windows that each advance by ``stride``
    tokens. With overlap (``stride`` below the window) a window scores only the tokens that no
    window before it has scored; every token is scored once, each with as much context as its
    window holds.

    Parameters
    ----------
    model : nn.Module
        A causal language model of transformers.
    tokenizer
        May be None if ``text`` is tokens.
    text : str, list of str, or integer Tensor
        A string is one text; the items of a list, and the rows of a 2-D tensor, are independent
        texts, each starting a window of its own.
    window : int, optional
        Longest input; by default what the model takes, or 2048 if it has no limit.
    stride : int, optional
        By default as many tokens as fit a window: no overlap.
    start_token : {"auto", int, None}
        Token before every window; "auto" is the tokenizer's ``bos_token`` if it has one.
    batch_size : int
        Windows of equal length that run together.
    max_tokens : int, optional
        Use at most so many tokens of text.
    windows : int, optional
        Join the texts and measure so many windows at equal distances, each a text of its own, so
        that few windows speak for all of the text. Excludes ``max_tokens`` and ``stride``.
    check : bool
        Raise NotFiniteError if the perplexity is not finite; otherwise it is returned as it is.
    progress : bool or callable, optional
        An event per batch of windows, with stage "measuring"; see
        :func:`ptqkit.hf.progress.make_progress`.

    Raises
    ------
    CalibrationError
        If the text holds too few tokens to score one.
    UsageError
        If window, stride, batch_size or windows is out of range.
    NotFiniteError
        If the logits are not finite, or the perplexity overflows.
    """
    limit = max_positions(model)
    window = window if window is not None else (limit or _DEFAULT_WINDOW)
    if limit is not None and window > limit:
        raise UsageError(f"window {window} is longer than the {limit} positions of the model")
    start = start_token_id(tokenizer, start_token)
    body = window - (start is not None)
    stride = stride if stride is not None else body
    if window < 2 or not 1 <= stride <= body:
        raise UsageError(
            f"stride must be from 1 to {body} for window {window} "
            f"{'with' if start is not None else 'without'} a start token, not {stride}"
        )
    if windows is not None and (windows < 1 or max_tokens is not None or stride != body):
        raise UsageError(f"windows={windows} must be at least 1 and excludes max_tokens and stride")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")
    texts = _token_lists(tokenizer, text, max_tokens)
    if windows is not None:
        texts = _spread(texts, windows, body)
    parts = [w for ids in texts for w in _windows(ids, body, stride, start)]
    total = sum(w.scored for w in parts)
    if total == 0:
        raise CalibrationError("text holds too few tokens: none can be scored")
    reported = make_progress(progress)
    try:
        losses = _score(model, parts, batch_size, reported)
    finally:
        close_progress(reported)
    # Every sum of losses is exact, so that no order of the windows shows.
    nll = math.fsum(losses) / total if all(map(math.isfinite, losses)) else sum(losses) / total
    value = math.inf if nll >= 700 else math.exp(nll)
    scored = tuple(w.scored for w in parts)
    result = PerplexityResult(
        nll, value, total, window, stride, start, len(texts), tuple(losses), scored
    )
    if check:
        result.check_finite()
    return result


def _token_lists(tokenizer: Any, text: Any, max_tokens: int | None) -> list[list[int]]:
    """Token ids of each text; each is tokenized as a whole, since pieces may give other tokens."""
    texts: Iterable[list[int]]
    if isinstance(text, torch.Tensor):
        texts = (row.tolist() for row in (text if text.dim() == 2 else text[None]))
    elif tokenizer is None:
        raise UsageError("tokenizer is needed, since text is not a tensor of tokens")
    else:
        documents: Sequence[str] = [text] if isinstance(text, str) else list(text)
        texts = (
            tokenizer(d, add_special_tokens=False, verbose=False)["input_ids"] for d in documents
        )
    kept: list[list[int]] = []
    left = math.inf if max_tokens is None else max_tokens
    for ids in texts:
        kept.append(ids[: int(min(left, len(ids)))])
        left -= len(kept[-1])
        if left <= 0:
            break
    return [ids for ids in kept if ids]


def _spread(texts: list[list[int]], windows: int, body: int) -> list[list[int]]:
    """Windows at equal distances from the joined texts."""
    ids = [token for tokens in texts for token in tokens]
    count = len(ids) // body
    if count < windows:
        raise CalibrationError(
            f"windows = {windows} of {body} tokens are more than the {len(ids)} tokens of the text"
        )
    places = torch.linspace(0, count - 1, windows, dtype=torch.float32).round().long().tolist()
    return [ids[place * body : (place + 1) * body] for place in places]


def _windows(ids: list[int], body: int, stride: int, start: int | None) -> Iterator[_Window]:
    """Windows over one text; each scores what those before it have not."""
    done = 0
    begin = 0
    prefix = [] if start is None else [start]
    while done < len(ids):
        end = min(begin + body, len(ids))
        # Without a start token the first token of a window has no context to be predicted from.
        first = begin + (0 if prefix else 1)
        scored = end - max(done, first)
        if scored > 0:
            yield _Window([*prefix, *ids[begin:end]], scored)
        done = end
        begin += stride


def _score(
    model: nn.Module,
    windows: list[_Window],
    batch_size: int,
    progress: Progress | None,
) -> list[float]:
    """Sum of the negative log-likelihoods of each window's scored tokens, in double."""
    device = next(model.parameters()).device
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
    losses, position = [0.0] * len(windows), 0
    stage = ProgressStage(progress, "measuring", len(order))
    with calibration_mode(model):
        while position < len(order):
            length = len(windows[order[position]].ids)
            part: list[int] = []
            while position < len(order) and len(part) < batch_size:
                if len(windows[order[position]].ids) != length:
                    break
                part.append(order[position])
                position += 1
            rows = [windows[i] for i in part]
            ids = torch.tensor([w.ids for w in rows], dtype=torch.long, device=device)
            found = _batch_nll(model(input_ids=ids).logits, ids, [w.scored for w in rows])
            for i, loss in zip(part, found, strict=True):
                losses[i] = loss
            for _ in part[1:]:
                stage.skip()
            stage.step("windows")
    return losses


def _batch_nll(logits: torch.Tensor, ids: torch.Tensor, scored: list[int]) -> list[float]:
    found = []
    for row, count in enumerate(scored):
        chosen = logits[row, -count - 1 : -1]
        targets = ids[row, -count:]
        step = max(1, _CHUNK // chosen.shape[-1])
        total = 0.0
        for begin in range(0, count, step):
            losses = F.cross_entropy(
                chosen[begin : begin + step].float(),
                targets[begin : begin + step],
                reduction="none",
            )
            total += float(losses.double().sum())
        found.append(total)
    return found
