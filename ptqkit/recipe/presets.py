"""Named recipes."""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]


_REFERENCE = {"order": "natural", "static_groups": False, "grid": "minmax", "refine_passes": 0}


_RTN = {"method": "rtn", **_REFERENCE}


_RTN8 = {**_RTN, "bits": 8, "group_size": None, "symmetric": True}


_PER_TENSOR = {
    **_RTN8,
    "per_tensor": True,
    "activations": {"bits": 8, "granularity": "tensor", "symmetric": False},
}


_OBQ = {**_REFERENCE, "method": "obq", "group_size": None}


_BEST = {
    "error_propagation": 0.5,
    "residual_propagation": 0.5,
    "refit_rounds": 2,
    "row_coupling": 3,
}


#: Named recipes. ``quality`` is the default of the driver and of the command line: group-aware
#: order, grids searched under H on the updated weights, one sweep (of the variants measured in
#: ``benchmarks/quality.py`` the one with the least perplexity that costs no second forward);
#: ``best`` adds targets that know the errors already made, scales fitted again to their codes, and
#: rows that make up for each other's errors, at more than twice the time and twice the
#: activations' memory;
#: ``reference`` is GPTQ as published (Frantar et al. 2022); ``rtn`` rounds to nearest;
#: ``obq`` is what GPTQ approximates, for small models.
#: The others quantize activations too, to 8 bits: ``aweq`` (AWEQ: AWE by eq. 10, static per-tensor
#: grids, bias correction), ``smoothquant`` (the same grids, alpha 0.5, norms only), ``vector-wise``
#: (scales per output and per token), ``llm.int8`` (the same, columns with outliers left float) and
#: ``zeroquant`` (groups of weights, scales per token).
PRESETS: dict[str, dict[str, Any]] = {
    "quality": {},
    "best": _BEST,
    "reference": _REFERENCE,
    "rtn": _RTN,
    "obq": _OBQ,
    "aweq": {
        **_PER_TENSOR,
        "equalization": {"method": "awe", "alpha": 0.5},
        "bias_correction": True,
    },
    "smoothquant": {**_PER_TENSOR, "equalization": {"method": "smoothquant", "alpha": 0.5}},
    "vector-wise": {**_RTN8, "activations": {"bits": 8, "granularity": "token"}},
    "llm.int8": {
        **_RTN8,
        "activations": {"bits": 8, "granularity": "token", "outlier_threshold": 6.0},
    },
    "zeroquant": {
        **_RTN8,
        "group_size": 128,
        "activations": {"bits": 8, "granularity": "token"},
    },
}
