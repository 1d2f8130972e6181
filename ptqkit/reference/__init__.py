"""Float64 NumPy twins of the C core, written to be read beside the papers.

Every function of :mod:`ptqkit._core` has its twin here. The twins are slow, take no shortcuts and
use the published form of each algorithm (for GPTQ the Cholesky factor of the inverse Hessian),
while the core uses an equivalent form that is cheaper; the tests hold one against the other.
"""

from ptqkit.reference.activations import (
    bias_correction,
    code_limits,
    dequantize_activations,
    integer_matmul,
    outlier_columns,
    quantize_activations,
    signed_grid,
)
from ptqkit.reference.equalization import (
    channel_ranges,
    equalization_error,
    equalization_scales,
    fake_quantize,
    static_range,
    weight_extent,
)
from ptqkit.reference.grids import (
    dequantize,
    fit_grid,
    fit_groups,
    quantize,
    round_to_dtype,
    shrink_factors,
)
from ptqkit.reference.hessian import dampen, hessian, merge
from ptqkit.reference.packing import pack_rows, unpack_rows
from ptqkit.reference.solvers import (
    brute_force,
    gptq,
    make_order,
    objective,
    obq,
    propagate_error,
    quantization_targets,
    rtn,
    sweep,
    upper_factor,
)

__all__ = [
    "bias_correction",
    "brute_force",
    "channel_ranges",
    "code_limits",
    "dampen",
    "dequantize",
    "dequantize_activations",
    "equalization_error",
    "equalization_scales",
    "fake_quantize",
    "fit_grid",
    "fit_groups",
    "gptq",
    "hessian",
    "integer_matmul",
    "make_order",
    "merge",
    "objective",
    "obq",
    "outlier_columns",
    "pack_rows",
    "propagate_error",
    "quantization_targets",
    "quantize",
    "quantize_activations",
    "round_to_dtype",
    "rtn",
    "shrink_factors",
    "signed_grid",
    "static_range",
    "sweep",
    "unpack_rows",
    "upper_factor",
    "weight_extent",
]
