"""Warn of layers that other readers fuse into one, if they are not quantized alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ptqkit.hf.checkpoint.spec import LayerSpec

__all__ = ["FUSED", "CheckpointWarning", "sibling_warnings"]


class CheckpointWarning(UserWarning):
    """Readers other than transformers refuse a checkpoint."""


#: Last parts of the names of layers that vLLM and SGLang compute as one.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def sibling_warnings(specs: Sequence[LayerSpec], linears: Iterable[str]) -> list[str]:
    """Return one warning for each kind of fused layers with different schemes.

    Parameters
    ----------
    linears : iterable of str
        Names of all linear modules; those without a spec are float.
    """
    schemes = {spec.name: (spec.grid, spec.activations) for spec in specs}
    every = set(linears)
    found = []
    for family in FUSED:
        parents = dict.fromkeys(
            name.rpartition(".")[0] for name in every if name.rpartition(".")[2] == family[0]
        )
        different = []
        for parent in sorted(parents):
            siblings = [f"{parent}.{end}" for end in family if f"{parent}.{end}" in every]
            if len({repr(schemes.get(name)) for name in siblings}) > 1:
                different.append(siblings)
        if different:
            more = f" (and in {len(different) - 1} more places)" if len(different) > 1 else ""
            found.append(
                f"{', '.join(different[0])}{more} have different schemes: vLLM and SGLang compute "
                "them as one layer and refuse these files; give them one scheme"
            )
    return found
