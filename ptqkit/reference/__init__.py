"""Float64 NumPy twins of the C core, written to be read next to the papers.

Every function of :mod:`ptqkit._core` has its twin here. The twins are slow, take no shortcuts and
use the published form of each algorithm (for GPTQ the Cholesky factor of the inverse Hessian),
while the core uses an equivalent form that is cheaper; the tests compare the two.

Papers cited in brackets, here, in :mod:`ptqkit.arrays` and in :mod:`ptqkit.recipe`:

- [AWEQ] Li et al. 2023, AWEQ, arXiv 2311.01305.
- [GPTQ] Frantar et al. 2022, GPTQ, arXiv 2210.17323.
- [IPQS] Ahmadian et al. 2023, Intriguing Properties of Quantization at Scale, arXiv 2305.19268.
- [LLM.int8()] Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339.
- [OBQ] Frantar et al. 2022, Optimal Brain Compression, arXiv 2208.11580.
- [QEP] Arai and Ichikawa 2025, Quantization Error Propagation, arXiv 2504.09629.
- [SBC] Pandey et al. 2023, Softmax Bias Correction, arXiv 2309.01729.
- [SmoothQuant] Xiao et al. 2022, SmoothQuant, arXiv 2211.10438.
"""

from __future__ import annotations

from ptqkit.reference.activations import bias_correction as bias_correction
from ptqkit.reference.activations import code_limits as code_limits
from ptqkit.reference.activations import dequantize_activations as dequantize_activations
from ptqkit.reference.activations import int8_linear as int8_linear
from ptqkit.reference.activations import integer_matmul as integer_matmul
from ptqkit.reference.activations import outlier_columns as outlier_columns
from ptqkit.reference.activations import quantize_activations as quantize_activations
from ptqkit.reference.activations import (
    quantize_activations_bf16 as quantize_activations_bf16,
)
from ptqkit.reference.activations import signed_grid as signed_grid
from ptqkit.reference.convolution import im2col as im2col
from ptqkit.reference.equalization import channel_ranges as channel_ranges
from ptqkit.reference.equalization import equalization_error as equalization_error
from ptqkit.reference.equalization import equalization_precision as equalization_precision
from ptqkit.reference.equalization import equalization_scales as equalization_scales
from ptqkit.reference.equalization import fake_quantize as fake_quantize
from ptqkit.reference.equalization import static_range as static_range
from ptqkit.reference.equalization import weight_span as weight_span
from ptqkit.reference.grids import dequantize as dequantize
from ptqkit.reference.grids import fit_grid as fit_grid
from ptqkit.reference.grids import fit_groups as fit_groups
from ptqkit.reference.grids import quantize as quantize
from ptqkit.reference.grids import round_to_dtype as round_to_dtype
from ptqkit.reference.grids import shrink_factors as shrink_factors
from ptqkit.reference.grids import to_bfloat16 as to_bfloat16
from ptqkit.reference.hessian import dampen as dampen
from ptqkit.reference.hessian import hessian as hessian
from ptqkit.reference.hessian import merge as merge
from ptqkit.reference.metrics import energies as energies
from ptqkit.reference.metrics import sqnr as sqnr
from ptqkit.reference.packed import packed_matmul as packed_matmul
from ptqkit.reference.packed import packed_matmul_int8 as packed_matmul_int8
from ptqkit.reference.packed import word_codes as word_codes
from ptqkit.reference.packing import pack_rows as pack_rows
from ptqkit.reference.packing import unpack_rows as unpack_rows
from ptqkit.reference.softmax import allowed_keys as allowed_keys
from ptqkit.reference.softmax import exponentials_on_grid as exponentials_on_grid
from ptqkit.reference.softmax import length_class as length_class
from ptqkit.reference.softmax import softmax as softmax
from ptqkit.reference.softmax import softmax_bias as softmax_bias
from ptqkit.reference.softmax import softmax_codes as softmax_codes
from ptqkit.reference.softmax import softmax_grid as softmax_grid
from ptqkit.reference.softmax import softmax_on_grid as softmax_on_grid
from ptqkit.reference.softmax import softmax_statistics as softmax_statistics
from ptqkit.reference.softmax import squares_on_grid as squares_on_grid
from ptqkit.reference.solvers import best_paths as best_paths
from ptqkit.reference.solvers import brute_force as brute_force
from ptqkit.reference.solvers import couple_rows as couple_rows
from ptqkit.reference.solvers import gptaq_target as gptaq_target
from ptqkit.reference.solvers import gptq as gptq
from ptqkit.reference.solvers import make_order as make_order
from ptqkit.reference.solvers import objective as objective
from ptqkit.reference.solvers import obq as obq
from ptqkit.reference.solvers import propagate_error as propagate_error
from ptqkit.reference.solvers import qronos_target as qronos_target
from ptqkit.reference.solvers import quantization_targets as quantization_targets
from ptqkit.reference.solvers import refit as refit
from ptqkit.reference.solvers import rtn as rtn
from ptqkit.reference.solvers import sweep as sweep
from ptqkit.reference.solvers import target_weights as target_weights
from ptqkit.reference.solvers import upper_factor as upper_factor
from ptqkit.reference.statistics import activation_statistics as activation_statistics
from ptqkit.reference.statistics import outlier_dimensions as outlier_dimensions
from ptqkit.reference.statistics import spectral_norm as spectral_norm
from ptqkit.reference.statistics import stable_rank as stable_rank
