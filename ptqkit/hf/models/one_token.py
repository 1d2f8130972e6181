"""Run the blocks of a decoder on one token at a time in one or two calls of the core.

Generation takes a block token after token, and what lies between its products (norms, rotation,
attention, residuals, and waking threads for each product) takes longer than reading the packed
weights. Here such a block is computed by :mod:`ptqkit.arrays.decoder` around the model's own cache,
or all blocks are, by the first of them, if that is a plain ``DynamicCache``, whose update is known.
Whatever is not exactly that case goes through the modules as ever: several tokens or sequences,
gradients, hooks on inner modules, other attention functions, layers that are not packed.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ptqkit.arrays import decoder
from ptqkit.nn.packed_linear import PackedLinear, bits_of

__all__ = ["OneToken", "fuse_blocks", "fused_blocks", "unfuse_blocks"]

_CLASSES = {
    ("llama", "LlamaDecoderLayer"): False,
    ("mistral", "MistralDecoderLayer"): False,
    ("qwen2", "Qwen2DecoderLayer"): False,
    ("qwen3", "Qwen3DecoderLayer"): True,
}
"""Decoder layers whose forward is known, and whether their heads have norms."""

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_KNOWN = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "position_embeddings",
    "cache_position",
}
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_CONSTANTS = (
    "training",
    "variance_epsilon",
    "scaling",
    "head_dim",
    "layer_idx",
    "compute",
    "activations",
    "_matrix",
)
_SDPA = F.scaled_dot_product_attention
_GLOBAL_HOOKS = [
    hooks
    for name, hooks in vars(nn.modules.module).items()
    if name.startswith("_global_") and name.endswith("_hooks")
]


def _has_head_norms(layer: nn.Module) -> bool | None:
    """Whether the heads of a known decoder layer have norms; None if the layer is not known."""
    kind = type(layer)
    places = kind.__module__.split(".")
    if places[:2] != ["transformers", "models"] or len(places) < 4:
        return None
    return _CLASSES.get((places[2], kind.__name__))


class _Step:
    """What the blocks of a model share in one step: each entry with what it was made from."""

    def __init__(self) -> None:
        self.blocks: list[OneToken] = []  # All there are, in order; or none.
        self.angles: tuple[Any, Any] = (None, None)
        self.mask: tuple[Any, Any, Any] = (None, 0, None)
        self.hidden: tuple[Any, Any] = (None, None)
        self.ahead: _Ahead | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"blocks": self.blocks}  # Of a copied model, nothing was run yet.

    def __setstate__(self, state: dict[str, Any]) -> None:
        _Step.__init__(self)
        self.blocks = state["blocks"]

    def angles_of(self, embeddings: Any, plan: _Plan, layer: Any) -> Any:
        """Return cosines and sines as arrays.

        None if they are not those of one token, or if attention is not the model's own.
        """
        known, found = self.angles
        if known is not embeddings:
            shape = (1, 1, plan.sizes.head_dim)
            fits = isinstance(embeddings, tuple) and len(embeddings) == 2
            fits = fits and _attention_is_plain(layer)
            fits = fits and all(_is_plain(t, plan.dtype, shape) for t in embeddings)
            found = tuple(_bits(t).reshape(-1) for t in embeddings) if fits else None
            self.angles = (embeddings, found)
        return found

    def allowed(self, mask: torch.Tensor) -> Any:
        """Return which keys a mask shows, uint8 (tokens,); None if it does more than hide some."""
        known, version, found = self.mask
        if known is mask and version is not None and version == _version(mask):
            return found
        found = None
        if mask.is_cpu and mask.dim() == 4 and mask.shape[:3] == (1, 1, 1):
            shown = mask if mask.dtype == torch.bool else mask == 0
            hidden = shown.logical_not()
            if mask.dtype != torch.bool and mask.is_floating_point():
                hidden = mask <= torch.finfo(mask.dtype).min
            if bool((shown | hidden).all()) and bool(shown.any()):
                found = shown.reshape(-1).contiguous().view(torch.uint8).numpy()
        self.mask = (mask, _version(mask), found)
        return found

    def array_of(self, hidden: torch.Tensor) -> np.ndarray:
        """Return the input of a block, which mostly is the output of the block before."""
        known, array = self.hidden
        return array if known is hidden else _bits(hidden).reshape(-1)


def _version(tensor: torch.Tensor) -> int | None:
    """Return a number that changes with the tensor's values; None if none is kept."""
    return None if tensor.is_inference() else tensor._version


def _bits(tensor: torch.Tensor) -> np.ndarray:
    return bits_of(tensor.detach() if tensor.requires_grad else tensor)


def _new(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, np.ndarray]:
    """Return a tensor and an array of its memory: made in this order they cost the least."""
    if dtype == torch.bfloat16:
        array = np.empty(shape, np.uint16)
        return torch.from_numpy(array).view(dtype), array
    array = np.empty(shape, np.float32)
    return torch.from_numpy(array), array


def _is_plain(tensor: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype == dtype
        and tensor.is_cpu
        and tuple(tensor.shape) == shape
    )


@dataclass
class _Plan:
    """A block as the core takes it, and what must not have changed since."""

    sizes: decoder.BlockSizes
    norms: tuple[Any, Any, Any]
    last_norm: np.ndarray
    qkv: tuple[Any, Any, Any]
    rest: tuple[Any, Any, Any, Any]
    dtype: torch.dtype
    scaling: float
    index: int
    watch: _Watch


@dataclass
class _Ahead:
    """What all blocks made of a token, at the first of them; each takes its own when it is asked.

    Attributes
    ----------
    call : tuple
        Cache, angles and mask that the blocks were given.
    outputs : sequence of Tensor
    version : int
        Of their values.
    new : sequence of Tensor
        Key and value of the first block, of the second, ...
    held : list of pairs of Tensor
        Keys and values that the cache held.
    following : int
        The block that is asked next.
    """

    call: tuple[Any, Any, Any]
    outputs: Sequence[torch.Tensor]
    version: int
    new: Sequence[torch.Tensor]
    held: list[tuple[torch.Tensor, torch.Tensor]]
    following: int = 0

    def take(
        self, at: int, index: int, hidden: torch.Tensor, call: tuple[Any, Any, Any]
    ) -> torch.Tensor | None:
        """Return the output of a block, and cache its key and value; None if something differs."""
        if at != self.following or not all(map(operator.is_, call, self.call)):
            return None
        if at and not (hidden is self.outputs[at - 1] and _version(hidden) == self.version):
            return None
        layer = call[0].layers[index]
        if layer.keys is not self.held[at][0] or layer.values is not self.held[at][1]:
            return None
        call[0].update(self.new[2 * at], self.new[2 * at + 1], index)
        self.following += 1
        return self.outputs[at]


class _Watch:
    """Notice if a block is no longer what a plan was made from: replaced parts, hooks, forwards."""

    def __init__(self, modules: list[Any], grids: list[torch.Tensor]) -> None:
        self._modules = modules
        self._types = [type(m) for m in modules]
        self._empty = list(_GLOBAL_HOOKS)
        self._tables: list[dict[str, Any]] = []
        # Constants of a module, and that nobody gave it a forward of its own.
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        for number, module in enumerate(modules):
            own = vars(module)
            if number:  # The forward and the hooks of the block itself are around this one.
                self._empty += [h for name, h in own.items() if name.endswith("_hooks")]
                self._owners.append(own)
                self._names.append("forward")
            tables = [own[name] for name in ("_modules", "_parameters", "_buffers")]
            self._empty += [table for table in tables if not table]
            self._tables += [table for table in tables if table]
            names = [name for name in _CONSTANTS if name in own]
            self._owners += [own] * len(names)
            self._names += names
        self._entries = sum(map(len, self._tables))
        self._held = list(self._current())
        self._values = [
            None if name == "forward" else own[name]
            for own, name in zip(self._owners, self._names, strict=True)
        ]
        self._versions = [(grid, _version(grid)) for grid in grids]
        # The same parameter may be given other memory (`parameter.data = ...`).
        parts = [p for m in modules[1:] for p in vars(m)["_parameters"].values()]
        self._parameters = [p for p in parts if p is not None]
        self._addresses = [p.data_ptr() for p in self._parameters]

    def _current(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(map(dict.values, self._tables))

    def same(self) -> bool:
        """Whether all is as it was; asked at every token, so loops are those of the interpreter."""
        return (
            not any(self._empty)
            and [*map(type, self._modules)] == self._types
            and sum(map(len, self._tables)) == self._entries
            and all(map(operator.is_, self._current(), self._held))
            and all(map(operator.is_, map(dict.get, self._owners, self._names), self._values))
            and [p.data_ptr() for p in self._parameters] == self._addresses
            and all(_version(grid) == version for grid, version in self._versions)
        )


def _sizes(layer: Any, dtype: torch.dtype) -> decoder.BlockSizes | None:
    """Return the sizes of a block; None if they do not belong together."""
    attention, mlp = layer.self_attn, layer.mlp
    head_dim = int(attention.head_dim)
    q, k, v, o = (getattr(attention, name) for name in _ATTENTION)
    gate, up, down = (getattr(mlp, name) for name in _MLP)
    hidden, inner = q.in_features, gate.out_features
    heads, kv_heads = q.out_features // head_dim, max(k.out_features // head_dim, 1)
    shapes = [
        (q, hidden, heads * head_dim),
        (k, hidden, kv_heads * head_dim),
        (v, hidden, kv_heads * head_dim),
        (o, heads * head_dim, hidden),
        (gate, hidden, inner),
        (up, hidden, inner),
        (down, inner, hidden),
    ]
    fits = all((m.in_features, m.out_features) == (i, n) for m, i, n in shapes)
    if not fits or head_dim % 2 or heads % kv_heads:
        return None
    norms = _norms(layer)
    wanted = [hidden, hidden, head_dim, head_dim][: len(norms)]
    if [tuple(norm.weight.shape) for norm in norms] != [(n,) for n in wanted]:
        return None
    eps = [float(norm.variance_epsilon) for norm in norms]
    if len({*eps[:2]}) > 1 or len({*eps[2:]}) > 1:
        return None
    head_eps = eps[2] if len(eps) > 2 else 0.0
    return decoder.BlockSizes(
        _DTYPES[dtype], hidden, inner, heads, kv_heads, head_dim, eps[0], head_eps
    )


def _norms(layer: Any) -> list[Any]:
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if _has_head_norms(layer):
        norms += [layer.self_attn.q_norm, layer.self_attn.k_norm]
    return norms


def _make_plan(layer: Any, dtype: torch.dtype) -> _Plan | None:
    """Prepare a block; None if it has to go through its modules."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = [getattr(attention, name) for name in _ATTENTION]
    linears += [getattr(mlp, name) for name in _MLP]
    if dtype not in _DTYPES or layer.training or attention.training:
        return None
    if not all(type(m) is PackedLinear and m.takes_one_token(dtype) for m in linears):
        return None
    act, norms = mlp.act_fn, _norms(layer)
    if not (type(act) is nn.SiLU or type(act).__name__ == "SiLUActivation"):
        return None
    if not all(type(norm).__name__.endswith("RMSNorm") for norm in norms):
        return None
    modules = [layer, attention, mlp, act, *norms, *linears]
    if not _Watch(modules, []).same():  # Hooks, or a forward of the user's.
        return None
    weights = [norm.weight for norm in norms]
    if any(w.dtype != dtype or not w.is_cpu for w in weights):
        return None
    sizes = _sizes(layer, dtype)
    parts = [m.one_token_layer(dtype) for m in linears] if sizes is not None else [None]
    if sizes is None or any(part is None for part in parts):
        return None
    arrays = [_bits(weight) for weight in weights]
    grids = [g for m in linears for g in (m.input_scale, m.input_zero_point) if g is not None]
    return _Plan(
        sizes,
        (arrays[0], arrays[2], arrays[3]) if len(arrays) > 2 else (arrays[0], None, None),
        arrays[1],
        (parts[0], parts[1], parts[2]),
        (parts[3], parts[4], parts[5], parts[6]),
        dtype,
        float(attention.scaling),
        attention.layer_idx,
        _Watch(modules, grids),
    )


def _attention_is_plain(layer: Any) -> bool:
    """Whether attention is what the model's own functions compute."""
    name = layer.self_attn.config._attn_implementation
    if name == "sdpa":
        known = ALL_ATTENTION_FUNCTIONS.get("sdpa") is sdpa_attention_forward
        return known and F.scaled_dot_product_attention is _SDPA
    return name == "eager" and "eager" not in ALL_ATTENTION_FUNCTIONS


def _is_watched() -> bool:
    """Whether someone compiles, traces or records operations, or changes their dtype."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.is_autocast_enabled("cpu")
    )


class OneToken:
    """The ``forward`` of a decoder layer, which takes single tokens itself.

    An attribute of the layer, so that its class, its ``state_dict`` and its hooks stay the same.

    Parameters
    ----------
    layer : nn.Module
    step : object, optional
        What the blocks of one model share; one per model.
    at : int
        Place of the layer among them.
    """

    def __init__(self, layer: nn.Module, step: _Step | None = None, at: int = 0) -> None:
        self.layer: Any = layer
        self._step = _Step() if step is None else step
        self._at = at
        self._plan: _Plan | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the layer has memory of its own, which its plan must view.
        return {**self.__dict__, "_plan": None}

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward that stands in the class, for those who ask for its signature."""
        return type(self.layer).forward.__get__(self.layer)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns."""
        if hidden_states.numel() == hidden_states.shape[-1] and not args and not _is_watched():
            result = self._one_token(hidden_states, kwargs)
            if result is not None:
                return result
        return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)

    def _ready(self, hidden: torch.Tensor) -> _Plan | None:
        plan = self._plan
        if plan is None or plan.dtype != hidden.dtype or not plan.watch.same():
            self._plan = plan = _make_plan(self.layer, hidden.dtype)
        return plan

    def _one_token(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        embeddings = kwargs.get("position_embeddings")
        if cache is None or embeddings is None or not _KNOWN.issuperset(kwargs):
            return None
        step = self._step
        call = (cache, embeddings, mask)
        if step.ahead is not None and self._plan is not None:
            result = step.ahead.take(self._at, self._plan.index, hidden, call)
            if result is None or self._at + 1 == len(step.blocks):
                step.ahead = None
            if result is not None:
                return result
        plan = self._ready(hidden)
        if plan is None or not _is_plain(hidden, plan.dtype, (1, 1, plan.sizes.hidden)):
            return None
        angles = step.angles_of(embeddings, plan, self.layer)
        allowed = None if mask is None else step.allowed(mask)
        if angles is None or (mask is not None and allowed is None):
            return None
        x = step.array_of(hidden)
        positions = kwargs.get("cache_position")
        if self._at == 0 and positions is None and type(cache) is DynamicCache:
            step.ahead = self._all_blocks(plan, hidden, x, angles, allowed, call)
            if step.ahead is not None:
                return step.ahead.take(0, plan.index, hidden, call)
        query, new = self._begin(plan, x, angles)
        more = () if positions is None else ({"cache_position": positions},)
        keys, values = cache.update(*new, plan.index, *more)
        return self._end(plan, hidden, x, query, (keys, values), allowed)

    def _all_blocks(
        self,
        plan: _Plan,
        hidden: torch.Tensor,
        x: np.ndarray,
        angles: Any,
        allowed: np.ndarray | None,
        call: tuple[Any, Any, Any],
    ) -> _Ahead | None:
        """Take the token through all blocks, if each of them is such a case; else None."""
        s, cache, others = plan.sizes, call[0], self._step.blocks
        if len(others) < 2 or self.layer.self_attn.config.num_hidden_layers != len(others):
            return None
        if hidden.is_inference() or getattr(cache, "offloading", False):
            return None
        parts, held = [], []
        for block in others:
            its = block._ready(hidden)
            if its is None or its.sizes != s or its.index >= len(cache.layers):
                return None
            layer = cache.layers[its.index]
            if type(layer) is not DynamicLayer or not layer.is_initialized:
                return None
            keys, values = layer.keys, layer.values
            shape = (1, s.kv_heads, keys.shape[-2], s.head_dim)
            if not (_is_plain(keys, its.dtype, shape) and _is_plain(values, its.dtype, shape)):
                return None
            held.append((keys, values))
            rest = (its.last_norm, its.scaling, *its.qkv, *its.rest)
            parts.append((*its.norms, *rest, _bits(keys)[0], _bits(values)[0]))
        count = len(parts)
        y, y_array = _new((count, 1, 1, s.hidden), plan.dtype)
        new, array = _new((2 * count, 1, s.kv_heads, 1, s.head_dim), plan.dtype)
        try:
            decoder.blocks(
                s,
                x,
                angles,
                tuple(parts),
                allowed,
                array.reshape(count, 2, -1),
                y_array.reshape(count, -1),
            )
        except FloatingPointError:
            raise self._not_finite() from None
        return _Ahead(call, y.unbind(), y._version, new.unbind(), held)

    def _begin(self, plan: _Plan, x: np.ndarray, angles: Any) -> tuple[np.ndarray, torch.Tensor]:
        """Return the query, and key and value as (2, 1, kv heads, 1, channels)."""
        s = plan.sizes
        query = np.empty((s.heads, s.head_dim), np.float32)
        new, array = _new((2, 1, s.kv_heads, 1, s.head_dim), plan.dtype)
        key, value = array.reshape(2, s.kv_heads, s.head_dim)
        try:
            decoder.begin(s, x, angles, plan.norms, plan.qkv, query, key, value)
        except FloatingPointError:
            raise self._not_finite() from None
        return query, new.unbind()

    def _end(
        self,
        plan: _Plan,
        hidden: torch.Tensor,
        x: np.ndarray,
        query: np.ndarray,
        cached: tuple[torch.Tensor, torch.Tensor],
        allowed: np.ndarray | None,
    ) -> torch.Tensor:
        s = plan.sizes
        keys, values = cached
        shape = (1, s.kv_heads, keys.shape[-2], s.head_dim)
        if not (_is_plain(keys, plan.dtype, shape) and _is_plain(values, plan.dtype, shape)):
            return self._through_modules(plan, hidden, query, cached, allowed)
        y, array = _new((1, 1, s.hidden), plan.dtype)
        array = array.reshape(-1)
        try:
            decoder.end(
                s,
                query,
                _bits(keys)[0],
                _bits(values)[0],
                allowed,
                plan.scaling,
                x,
                plan.last_norm,
                plan.rest,
                array,
            )
        except FloatingPointError:
            raise self._not_finite() from None
        self._step.hidden = (y, array)
        return y

    def _through_modules(
        self,
        plan: _Plan,
        hidden: torch.Tensor,
        query: np.ndarray,
        cached: tuple[torch.Tensor, torch.Tensor],
        allowed: np.ndarray | None,
    ) -> torch.Tensor:
        """Do the same as :meth:`_end` with keys and values that the core does not take."""
        q = torch.from_numpy(query).to(hidden.dtype).view(1, plan.sizes.heads, 1, -1)
        k, v = (part.to(q) for part in cached)
        mask = None if allowed is None else torch.from_numpy(allowed).bool().view(1, 1, 1, -1)
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=plan.scaling, enable_gqa=True
        )
        layer = self.layer
        hidden = hidden + layer.self_attn.o_proj(x.reshape(1, 1, -1))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    @staticmethod
    def _not_finite() -> Exception:
        return ValueError("an input of a layer holds NaN or Inf, or its range overflows")


def fuse_blocks(model: nn.Module) -> int:
    """Let the decoder layers of a model take single tokens in two calls each.

    Layers of Llama, Mistral, Qwen2 and Qwen3 whose linear layers are
    :class:`ptqkit.nn.PackedLinear`, where nobody has replaced a forward. A layer looks at every
    call whether it is such a case, and computes as ever if not.

    Returns
    -------
    int
        Layers that do so now.
    """
    count = 0
    for parent in list(model.modules()):
        layers: list[Any] = list(parent.children())
        found = [layer for layer in layers if _can_be_fused(layer)]
        step = _Step()
        made = [OneToken(layer, step, at) for at, layer in enumerate(found)]
        if len(found) == len(layers):
            step.blocks = made
        for layer, forward in zip(found, made, strict=True):
            layer.forward = forward
        count += len(found)
    return count


def _can_be_fused(layer: Any) -> bool:
    if _has_head_norms(layer) is None or "forward" in vars(layer):
        return False
    inner = [m for m in layer.modules() if hasattr(m, "in_features")]
    dtype = layer.input_layernorm.weight.dtype
    return all(type(m) is PackedLinear and m.takes_one_token(dtype) for m in inner)


def unfuse_blocks(model: nn.Module) -> int:
    """Take back :func:`fuse_blocks`; returns of how many layers."""
    found = [m for m in model.modules() if isinstance(vars(m).get("forward"), OneToken)]
    for module in found:
        del vars(module)["forward"]
    return len(found)


def fused_blocks(model: nn.Module) -> int:
    """Return how many layers of a model take single tokens in two calls."""
    return sum(isinstance(vars(m).get("forward"), OneToken) for m in model.modules())
