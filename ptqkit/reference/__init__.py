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
    weight_span,
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
from ptqkit.reference.softmax import (
    allowed_keys,
    length_class,
    softmax,
    softmax_bias,
    softmax_codes,
    softmax_grid,
    softmax_on_grid,
    softmax_statistics,
)
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
from ptqkit.reference.sqnr import energies, sqnr
from ptqkit.reference.statistics import (
    activation_statistics,
    outlier_dimensions,
    spectral_norm,
    stable_rank,
)

__all__ = [
    "activation_statistics",
    "allowed_keys",
    "bias_correction",
    "brute_force",
    "channel_ranges",
    "code_limits",
    "dampen",
    "dequantize",
    "dequantize_activations",
    "energies",
    "equalization_error",
    "equalization_scales",
    "fake_quantize",
    "fit_grid",
    "fit_groups",
    "gptq",
    "hessian",
    "integer_matmul",
    "length_class",
    "make_order",
    "merge",
    "objective",
    "obq",
    "outlier_columns",
    "outlier_dimensions",
    "pack_rows",
    "propagate_error",
    "quantization_targets",
    "quantize",
    "quantize_activations",
    "round_to_dtype",
    "rtn",
    "shrink_factors",
    "signed_grid",
    "softmax",
    "softmax_bias",
    "softmax_codes",
    "softmax_grid",
    "softmax_on_grid",
    "softmax_statistics",
    "spectral_norm",
    "sqnr",
    "stable_rank",
    "static_range",
    "sweep",
    "unpack_rows",
    "upper_factor",
    "weight_span",
]
