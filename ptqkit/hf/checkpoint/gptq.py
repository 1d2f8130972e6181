"""Define the GPTQ format, for other tools that read it.

For a layer ``P`` with weight (out, in), ``b`` bits and groups of inputs:

=============  ===============  ===========================================================
``P.qweight``  int32            (in*b/32, out): unsigned codes, a dense stream along ``in``
``P.qzeros``   int32            (groups, out*b/32), a stream along ``out``: zero-points minus
                                one (``gptq``), or as they are (``gptq_v2``)
``P.scales``   float16          (groups, out)
``P.g_idx``    int32            (in,): group of each input, always present
=============  ===============  ===========================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.hf.checkpoint.base import (
    FLOATS,
    CheckpointFormat,
    Fetch,
    build_matrix,
    float_plan,
    g_idx_plan,
    int_plan,
    shared_limits,
    with_suffix,
)
from ptqkit.hf.checkpoint.compressed_tensors import compressed_pack, compressed_unpack
from ptqkit.hf.checkpoint.files import TensorPlan
from ptqkit.hf.checkpoint.spec import LayerSpec
from ptqkit.nn.activations import ActivationQuantizer
from ptqkit.recipe.recipe import Recipe

__all__ = ["GptqFormat"]

_BITS = (2, 3, 4, 8)


class GptqFormat(CheckpointFormat):
    """``quant_method: "gptq"`` with ``checkpoint_format`` "gptq" or "gptq_v2".

    Parameters
    ----------
    version : {1, 2}
    """

    method = "gptq"
    float_parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = "gptq" if version == 1 else "gptq_v2"

    def adapt(self, recipe: Recipe) -> Recipe:
        """Return the recipe with what its numbers need to fit the format."""
        if self.version == 1:
            # A zero-point of 0 is stored as -1, which readers take for a carry.
            recipe = replace(recipe, min_zero_point=1)
        return replace(recipe, scale_dtype="float16")

    def _limits(self, spec: LayerSpec) -> list[str]:
        found = shared_limits(spec, "the GPTQ format")
        if spec.activations is not None:
            found.append(
                "the GPTQ format has no quantized activations (use 'compressed-tensors' or "
                "'ptqkit')"
            )
        if spec.grid.bits == "ternary":
            return found
        if spec.grid.bits not in _BITS:
            found.append(f"the GPTQ format has no {spec.grid.bits}-bit layout, only {_BITS}")
            return found
        for side, size in (("in", spec.in_features), ("out", spec.out_features)):
            if size * int(spec.grid.bits) % 32:
                found.append(f"{side}_features {size} times {spec.grid.bits} bits: not whole words")
        return found

    def joint_problems(self, specs: Sequence[LayerSpec], linears: Sequence[str]) -> list[str]:
        """Return the reasons why the format cannot carry these layers in one model."""
        found = []
        kinds = {(spec.grid.bits, spec.grid.group_size) for spec in specs}
        if len(kinds) > 1:
            listed = ", ".join(f"{b} bit group {g}" for b, g in sorted(kinds, key=str))
            found.append(f"the GPTQ format takes one bits and group_size for all layers: {listed}")
        try:
            block_pattern(specs, linears)
        except ValueError as error:
            found.append(str(error))
        return found

    def scale_dtype(self, spec: LayerSpec) -> str:
        """Return the dtype in which the scales of the layer are stored."""
        return "float16"

    def _data_limits(
        self, spec: LayerSpec, matrix: QuantizedMatrix, quantizer: ActivationQuantizer | None
    ) -> list[str]:
        if self.version == 2 or not matrix.zero_points.size or matrix.zero_points.min() >= 1:
            return []
        return [
            "GPTQ version 1 cannot carry a zero-point of 0: "
            "use checkpoint_format='gptq_v2' or quantize with min_zero_point=1"
        ]

    def config(
        self,
        specs: Sequence[LayerSpec],
        *,
        linears: Sequence[str],
        act_order: bool = False,
        gained_biases: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Return the ``quantization_config`` of ``config.json``."""
        first = specs[0]
        return {
            "quant_method": "gptq",
            "bits": first.grid.bits,
            "group_size": -1 if first.grid.group_size is None else first.grid.group_size,
            "desc_act": any(spec.permuted for spec in specs),
            "sym": all(spec.grid.symmetric for spec in specs),
            "checkpoint_format": self.name,
            "damp_percent": 0.01,
            "true_sequential": True,
            "lm_head": False,
            "modules_in_block_to_quantize": block_pattern(specs, linears),
        }

    def plans(
        self,
        spec: LayerSpec,
        matrix: QuantizedMatrix,
        quantizer: ActivationQuantizer | None = None,
    ) -> list[TensorPlan]:
        """Return the tensors that replace the weight of one layer; nothing is packed yet."""
        name, (out, inputs), bits = spec.name, matrix.shape, int(matrix.bits)
        groups = matrix.scales.shape[1]
        return [
            int_plan(
                f"{name}.qweight",
                torch.int32,
                (inputs * bits // 32, out),
                lambda: gptq_pack_weight(matrix.codes, bits),
            ),
            int_plan(
                f"{name}.qzeros",
                torch.int32,
                (groups, out * bits // 32),
                lambda: gptq_pack_zeros(matrix.zero_points, bits, self.version),
            ),
            float_plan(f"{name}.scales", matrix.scales.T, "float16"),
            g_idx_plan(spec, matrix),
        ]

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Whether this is the format of a file with this ``quantization_config``."""
        # Files without the key predate version 2.
        return super().reads(settings) and settings.get("checkpoint_format", "gptq") == self.name

    def layers(
        self, settings: Mapping[str, Any], tensors: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        """Return what a reader must know of every quantized layer, by module name."""
        size = settings["group_size"]
        options = {
            "bits": settings["bits"],
            "group_size": None if size == -1 else size,
            "symmetric": bool(settings.get("sym", False)),
        }
        return dict.fromkeys(with_suffix(tensors, ".qweight"), options)

    def parts(self, options: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, ...]]:
        """Return the tensors of a layer by the end of the name, with the dtypes each may have."""
        whole = (torch.int32,)
        return {"qweight": whole, "qzeros": whole, "scales": FLOATS, "g_idx": whole}

    def read(self, name: str, fetch: Fetch, options: Mapping[str, Any]) -> QuantizedMatrix:
        """Read one layer back."""
        bits = options["bits"]
        try:
            zeros = gptq_unpack_zeros(fetch(f"{name}.qzeros").numpy(), bits, self.version)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        codes = gptq_unpack_weight(fetch(f"{name}.qweight").numpy(), bits)
        g_idx = fetch(f"{name}.g_idx").numpy()
        return build_matrix(codes, fetch(f"{name}.scales").T, zeros, g_idx, options)


def _split_block(name: str) -> tuple[str, str] | None:
    """Split ``model.layers.3.mlp.up`` at its first number into ``model.layers.3``, ``mlp.up``."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: place + 1]), ".".join(parts[place + 1 :])
    return None


def block_pattern(specs: Sequence[LayerSpec], linears: Sequence[str]) -> list[list[str]] | None:
    """Return ``modules_in_block_to_quantize``: None if every linear of a block is quantized.

    Raises
    ------
    ValueError
        If the blocks differ, which the GPTQ format has no way to say.
    """
    chosen = {spec.name for spec in specs}
    outside = sorted(name for name in chosen if _split_block(name) is None)
    if outside:
        raise ValueError(
            f"format 'gptq' takes layers inside the repeated blocks only, not {', '.join(outside)}"
        )
    blocks: dict[str, list[str]] = {}
    for name in linears:
        split = _split_block(name)
        if split is not None:
            blocks.setdefault(split[0], []).append(split[1])
    stacks = {block.rpartition(".")[0] for block in blocks if _uses(block, blocks, chosen)}
    patterns = {}
    for block, names in blocks.items():
        if block.rpartition(".")[0] in stacks:
            patterns[block] = tuple(n for n in names if f"{block}.{n}" in chosen)
    # Blocks may have other layers (dense ones before mixtures), but a layer that several have is
    # quantized in all or none of them.
    union = list(dict.fromkeys(name for chosen_here in patterns.values() for name in chosen_here))
    wanted = set(union)
    for block, found in patterns.items():
        if not found or len(found) < sum(name in wanted for name in blocks[block]):
            raise ValueError(
                f"format 'gptq' needs the same layers quantized in every block; {block} differs"
            )
    every = all(len(found) == len(blocks[block]) for block, found in patterns.items())
    return None if every else [union]


def _uses(block: str, blocks: Mapping[str, list[str]], chosen: set[str]) -> bool:
    return any(f"{block}.{name}" in chosen for name in blocks[block])


def gptq_pack_weight(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned codes (out, in) into ``qweight`` int32 (in*bits/32, out).

    Raises
    ------
    ValueError
        If a column of ``qweight`` does not fill whole 32-bit words.
    """
    if codes.shape[1] * bits % 32:
        raise ValueError(
            f"the GPTQ format needs in_features * bits to be a multiple of 32, "
            f"not {codes.shape[1]} * {bits}"
        )
    return np.ascontiguousarray(compressed_pack(codes, bits).T)


def gptq_unpack_weight(qweight: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of :func:`gptq_pack_weight`: uint8 codes (out, in)."""
    return compressed_unpack(qweight.T, bits, qweight.shape[0] * 32 // bits)


def gptq_pack_zeros(zeros: np.ndarray, bits: int, version: int) -> np.ndarray:
    """Pack zero-points (out, groups) into ``qzeros`` int32 (groups, out*bits/32).

    Parameters
    ----------
    version : {1, 2}
        1 (``"gptq"``) stores ``zero - 1``, 2 (``"gptq_v2"``) stores ``zero``.

    Raises
    ------
    ValueError
        If version 1 is asked to carry a zero-point of 0, which readers turn into a carry that
        shifts the neighbouring zero-points, or if the rows do not fill whole 32-bit words.
    """
    if version not in (1, 2):
        raise ValueError(f"version must be 1 or 2, not {version!r}")
    if zeros.shape[0] * bits % 32:
        raise ValueError(
            f"the GPTQ format needs out_features * bits to be a multiple of 32, "
            f"not {zeros.shape[0]} * {bits}"
        )
    if version == 1 and zeros.size and zeros.min() < 1:
        raise ValueError(
            "version 1 of the GPTQ format cannot carry a zero-point of 0: "
            "write version 2 or quantize with min_zero_point=1"
        )
    stored = zeros.T.astype(np.int16) - (1 if version == 1 else 0)
    return compressed_pack(stored, bits)


def gptq_unpack_zeros(qzeros: np.ndarray, bits: int, version: int) -> np.ndarray:
    """Inverse of :func:`gptq_pack_zeros`: uint8 zero-points (out, groups).

    Raises
    ------
    ValueError
        If version 1 holds the largest stored value: writers disagree whether it means a
        zero-point of 0 or of ``2**bits``.
    """
    if version not in (1, 2):
        raise ValueError(f"version must be 1 or 2, not {version!r}")
    stored = compressed_unpack(qzeros, bits, qzeros.shape[1] * 32 // bits)
    if version == 1:
        if stored.size and stored.max() == (1 << bits) - 1:
            raise ValueError(
                f"qzeros of GPTQ version 1 holds {(1 << bits) - 1}, which is a zero-point of 0 for "
                f"some writers and of {1 << bits} for others"
            )
        stored = stored + np.uint8(1)
    return np.ascontiguousarray(stored.T)
