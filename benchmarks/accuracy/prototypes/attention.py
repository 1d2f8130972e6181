"""What attention knows of a layer's errors: token weights, H under v, rows of q and k."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ptqkit.hf.quantization import solve
from ptqkit.hf.quantization.moments import MomentAccumulator


def _heads(model: Any, layer: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any, int]:
    """Return queries, keys (batch, heads, tokens, width) with positions, cos and sin, groups."""
    attention = model.get_submodule(layer.rpartition(".")[0])
    shape = (*x.shape[:-1], -1, attention.head_dim)
    positions = torch.arange(x.shape[1])[None]
    cos, sin = model.model.rotary_emb(x, positions)
    weight = {n: getattr(attention, f"{n}_proj").weight for n in "qk"}
    q, k = ((x @ weight[n].T).view(shape).transpose(1, 2) for n in "qk")
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    return q, k, (cos, sin), q.shape[1] // k.shape[1]


def _probabilities(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    length = scores.shape[-1]
    return (scores + torch.full((length, length), -torch.inf).triu(1)).softmax(-1)


@torch.no_grad()
def received(model: Any, batches: Any, power: float, floor: float) -> dict[Any, torch.Tensor]:
    """Return a weight per token, block and batch: attention received from later tokens, mean 1."""
    found = {}

    def hook(name: str, key: list[int]):
        def run(module: Any, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            q, k, _, groups = _heads(model, f"{name}.q_proj", x)
            attention = _probabilities(q, k.repeat_interleave(groups, 1)).mean(1)
            length = attention.shape[-1]
            # Tokens near the end are seen by few.
            seen = attention.sum(1) / torch.arange(length, 0, -1) * length
            weight = (seen / seen.mean()).clamp(min=floor, max=10.0) ** power
            found[name.split(".layers.")[1].split(".")[0], key[0]] = weight / weight.mean()

        return run

    key = [0]
    handles = [
        module.register_forward_pre_hook(hook(name, key), with_kwargs=True)
        for name, module in model.named_modules()
        if name.endswith("self_attn")
    ]
    for batch in batches:
        key[0] = batch["input_ids"].data_ptr()
        model(batch["input_ids"], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@contextlib.contextmanager
def _accumulated(model: Any, sums: dict[str, Any], add_to: Any) -> Iterator[None]:
    own = MomentAccumulator.add

    def add(self: Any, value: Any, batch: Any, mask: Any, *rest: Any) -> None:
        if self.name.endswith("q_proj"):
            with torch.no_grad():
                q, k, positions, groups = _heads(model, self.name, value)
                add_to(sums.setdefault(self.name, {}), value, q, k, positions, groups)
        own(self, value, batch, mask, *rest)

    with mock.patch.object(MomentAccumulator, "add", add):
        yield


def _parts(model: Any, name: str) -> dict[str, slice]:
    """Return the rows of each layer of a stack."""
    found, row = {}, 0
    for layer in name.split(", "):
        rows = len(model.get_submodule(layer).weight)
        found[layer.rpartition(".")[2]] = slice(row, row + rows)
        row += rows
    return found


def _stacked(parts: list[Any]) -> Any:
    return replace(
        parts[0],
        codes=np.concatenate([p.codes for p in parts]),
        scales=np.concatenate([p.scales for p in parts]),
        zero_points=np.concatenate([p.zero_points for p in parts]),
        row_objectives=np.concatenate([p.row_objectives[-1:] for p in parts], 1),
        rtn_objectives=None,
    )


@contextlib.contextmanager
def attended_values(model: Any) -> Iterator[None]:
    """Solve each head of v under H of A x, the inputs as its attention adds them up."""
    sums: dict[str, Any] = {}

    def add_to(into: Any, x: Any, q: Any, k: Any, positions: Any, groups: int) -> None:
        attention = _probabilities(q, k.repeat_interleave(groups, 1))
        for head in range(k.shape[1]):
            mixed = attention[:, head * groups : (head + 1) * groups] @ x[:, None]
            mixed = mixed.reshape(-1, x.shape[-1])
            into[head] = into.get(head, 0) + (2.0 / groups) * (mixed.T @ mixed).double()
        into["tokens"] = into.get("tokens", 0) + x.shape[0] * x.shape[1]

    own = solve.quantize_matrix

    def quantize(weight: Any, source: Any, options: Any, *, name: str, **rest: Any):
        first = name.split(", ")[0]
        if "v_proj" not in name or first not in sums:
            return own(weight, source, options, name=name, **rest)
        rows, found = _parts(model, name)["v_proj"], sums[first]
        heads = [h for h in found if h != "tokens"]
        width = (rows.stop - rows.start) // len(heads)
        parts = [own(weight[: rows.start], source, options, name=name, **rest)]
        for head in heads:
            part = weight[rows.start + head * width : rows.start + (head + 1) * width]
            h = (found[head] / found["tokens"]).float().numpy()
            parts.append(own(part, h, options, name=name, **rest))
        assert rows.stop == len(weight)
        return _stacked(parts)

    with _accumulated(model, sums, add_to), mock.patch.object(solve, "quantize_matrix", quantize):
        yield


def _unrotated(v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return apply_rotary_pos_emb(v, v, cos, -sin)[0]


@contextlib.contextmanager
def coupled_rows(model: Any, positions_of: int = 24) -> Iterator[None]:
    """Sweep q and k once more under tr(S E H E^T), S of the keys (or queries) of their head.

    S is averaged over pairs of positions, a sample of them on the one side.
    """
    sums: dict[str, Any] = {}

    def add_to(into: Any, x: Any, q: Any, k: Any, positions: Any, groups: int) -> None:
        cos, sin = positions
        length = x.shape[1]
        for t in np.linspace(length // 8, length - 1, positions_of).astype(int):
            now = cos[:, t : t + 1], sin[:, t : t + 1]
            keys = _unrotated(k[:, :, : t + 1], *now)
            total = torch.einsum("bhti,bhtj->hij", keys, keys) / (t + 1)
            into["q"] = into.get("q", 0) + total.double()
            u = length - 1 - t
            now = cos[:, u : u + 1], sin[:, u : u + 1]
            queries = _unrotated(q[:, :, u:], *now)
            total = torch.einsum("bhti,bhtj->hij", queries, queries) / (length - u)
            total = total.view(-1, groups, *total.shape[1:]).sum(1)
            into["k"] = into.get("k", 0) + total.double()
        into["groups"] = groups

    own = solve.quantize_matrix

    def quantize(weight: Any, source: Any, options: Any, *, name: str, **rest: Any):
        matrix = own(weight, source, options, name=name, **rest)
        first = name.split(", ")[0]
        if "q_proj" not in name or first not in sums:
            return matrix
        rows, found = _parts(model, name), sums[first]
        codes, H = matrix.codes.copy(), np.asarray(source.matrix, np.float64)
        for kind in "qk":
            S = found[kind].numpy()
            if kind == "q":
                S = S.repeat(found["groups"], 0)
            part = rows[f"{kind}_proj"]
            codes[part] = _coupled(weight[part], matrix.rows(part.start, part.stop), S, H)
        return replace(matrix, codes=codes)

    with _accumulated(model, sums, add_to), mock.patch.object(solve, "quantize_matrix", quantize):
        yield


def _coupled(weight: np.ndarray, matrix: Any, S: np.ndarray, H: np.ndarray) -> np.ndarray:
    """Return codes after one pass over columns and rows of each head (heads side by side)."""
    heads, width = S.shape[:2]
    n, top = weight.shape[1], matrix.max_code
    shape = (heads, width, n)
    s = matrix.scales[:, matrix.g_idx].reshape(shape).astype(np.float64)
    z = matrix.zero_points[:, matrix.g_idx].reshape(shape).astype(np.float64)
    q = matrix.codes.reshape(shape).astype(np.float64)
    W = weight.reshape(shape).astype(np.float64)
    S = S + 1e-3 * np.einsum("hii->h", S)[:, None, None] / width * np.eye(width)
    E = W - s * (q - z)
    EH = E @ H
    for j in np.argsort(-np.diagonal(H)):
        if H[j, j] == 0:
            continue
        for i in range(width):
            slope = np.einsum("hk,hk->h", S[:, i], EH[:, :, j])
            wanted = W[:, i, j] - E[:, i, j] + slope / (S[:, i, i] * H[j, j])
            new = np.clip(np.round(wanted / s[:, i, j]) + z[:, i, j], 0, top)
            moved = W[:, i, j] - s[:, i, j] * (new - z[:, i, j]) - E[:, i, j]
            if moved.any():
                EH[:, i] += moved[:, None] * H[j]
                E[:, i, j] += moved
                q[:, i, j] = new
    return q.reshape(len(weight), n).astype(np.uint8)
