/* ptq.h - contract of the Python-free core.
 *
 * Letters: W (rows, n) weights, H (n, n) Hessian, G group size, rows = outputs, n = inputs.
 * All matrices are C-contiguous unless a leading dimension is given. Sums over samples and
 * objectives are in double; GEMM accumulators are float32 and always run over k in ascending
 * order, so with the built-in kernels neither block sizes nor thread counts change a bit of any
 * result. The CPU level may: see ptq_cpu_select.
 *
 * SciPy's BLAS, if ptq_blas_set handed it over, replaces the products of ptq_hessian_update,
 * ptq_cross_update and ptq_target_correction and the factorization of ptq_factor (their prototypes
 * say when), and nothing else. There the order of summation is that library's: its version, the CPU
 * and the number of threads it takes from its own settings may change the last bits of the result,
 * `threads` does not reach it, and it cannot be interrupted. Everything computed from the same H
 * and R afterwards is the same again.
 *
 * threads: at most this many work on a call, at most one per processor that the process may use;
 * 0 = default policy. Every call resolves it once, at its start; so it does with the CPU level and
 * BLAS, which may be chosen anew while a call runs. Every function is re-entrant and keeps no other
 * state than these choices. All return a ptq_status unless they only answer a question; none prints
 * or aborts.
 *
 * Citations, here and in the Python sources:
 * [GPTQ] Frantar et al., arXiv:2210.17323. [QEP] Arai and Ichikawa, arXiv:2504.09629.
 * [AWEQ] Li et al., arXiv:2311.01305. [SBC] Pandey et al., arXiv:2309.01729.
 * [IPQS] Ahmadian et al., arXiv:2305.19268. [LLM.int8()] Dettmers et al., arXiv:2208.07339.
 */
#ifndef PTQ_H
#define PTQ_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
    PTQ_OK = 0,
    PTQ_NOMEM,         /* an allocation failed */
    PTQ_NOT_PD,        /* factorization met a non-positive pivot; see info */
    PTQ_NONFINITE,     /* NaN or Inf in an input, or produced by a numerically singular Hessian */
    PTQ_INTERRUPTED,   /* the poll callback asked to stop */
    PTQ_INVALID,       /* sizes or options the caller should have refused */
    PTQ_BLAS,          /* an external BLAS/LAPACK call failed */
    PTQ_NOT_SYMMETRIC, /* mirrored entries differ by more than the tolerance */
    PTQ_ROW_REFUSED,   /* a row breaks the function's condition; see info */
    PTQ_OVERFLOW,      /* finite inputs give a sum beyond float32 */
} ptq_status;

/* PTQ_F64 only for the arguments that name it. */
typedef enum { PTQ_F32 = 0, PTQ_F16 = 1, PTQ_BF16 = 2, PTQ_F64 = 3 } ptq_dtype;
typedef enum {
    PTQ_GRID_MINMAX = 0,
    PTQ_GRID_MSE = 1,
    PTQ_GRID_HESSIAN = 2,
    PTQ_GRID_FEEDBACK = 3, /* of gptq with whole groups in quantization order */
} ptq_grid_method;

/* Width of the diagonal blocks that stand for H in the Hessian grid of wider groups, and for R in
 * the feedback grid. */
#define PTQ_GRID_BLOCK 128
/* Most shrink factors a grid search may try. */
#define PTQ_GRID_MAX_STEPS 256

/* How a grid is fitted. */
typedef struct {
    int max_code;     /* 2^bits - 1, or 2 for ternary; at most 255 */
    int symmetric;    /* zero-point fixed at (max_code + 1) / 2 */
    int method;       /* ptq_grid_method */
    int steps;        /* shrink factors from 1 to min_shrink */
    int candidates;   /* of these, how many the full Hessian compares */
    int scale_type;   /* ptq_dtype in which every scale is exactly representable */
    int min_zero;     /* smallest zero-point allowed (1 for GPTQ v1 files) */
    float min_shrink; /* smallest shrink factor */
    float norm;       /* exponent of the MSE search */
} ptq_grid;

/* ---- threads.c ------------------------------------------------------------------------- */
typedef void (*ptq_task)(void *ctx, int64_t task, int thread);
/* Called about every 50 ms by the calling thread; non-zero stops the loop. */
typedef int (*ptq_poll)(void);

void ptq_set_poll(ptq_poll poll);
/* Number of threads for a request; 0 = default policy (OpenMP's own), 1 in a forked child. Never
 * more than there are processors: a runtime that cannot start a team ends the process. */
int ptq_thread_count(int requested);
/* The same for a loop of about `work` operations: 1 if it is too small to pay for a thread team. */
int ptq_threads_for_work(int requested, double work);
int ptq_worth_threads(double work);
int ptq_has_openmp(void);
/* For tasks that may run longer than about 0.1 s: non-zero if the loop should end, whatever the
 * task has left undone. */
int ptq_should_stop(void);
/* Run task(ctx, 0..tasks-1, thread) on at most `threads` threads, a count that ptq_thread_count
 * gave: it is not resolved again, as scratch memory was sized by it. thread is in [0, threads).
 * PTQ_INTERRUPTED if poll said so. */
ptq_status ptq_parallel_for(int64_t tasks, int threads, ptq_task task, void *ctx);

/* Tasks of a loop that may begin when those of the phase before are done. */
typedef struct {
    int64_t tasks; /* at least 1 */
    ptq_task task;
    void (*after)(void *ctx); /* run once when all are done, before the next phase; or NULL */
    void *ctx;
} ptq_phase;
/* Run phases one after the other, as ptq_parallel_for does each, for work that is over within
 * milliseconds: threads that have nothing to do until the next phase spin, then yield. */
ptq_status ptq_parallel_phases(const ptq_phase *phases, int count, int threads);

/* ---- hessian.c ------------------------------------------------------------------------- */
/* S upper triangle += sum over the given rows of x x^T, in float32; the strict lower triangle is
 * scratch, tiles on the diagonal write below it too.
 * S (n, n) float32; X tokens of n values at stride ldx elements, of type `dtype`;
 * rows: indices of the tokens that count, or NULL for all `tokens`. bf16 products are exact in
 * float32 and are accumulated without widening if the CPU can. PTQ_NONFINITE, and PTQ_OVERFLOW if
 * twice a sum of squares would be beyond float32, leave S as is; PTQ_INTERRUPTED does not.
 * BLAS: for float32 without `rows`, on its own threads. */
ptq_status ptq_hessian_update(float *S, int64_t n, const void *X, int64_t ldx, ptq_dtype dtype,
                              const int64_t *rows, int64_t tokens, int threads);
/* out (n, n) full symmetric = factor * S, from S's upper triangle. out may be S. */
ptq_status ptq_hessian_finish(const float *S, float *out, int64_t n, double factor, int threads);

/* ---- cross.c --------------------------------------------------------------------------- */
typedef struct {
    float *S; /* (m, n), added to */
    int64_t m, n;
    const void *A, *B; /* tokens of m values at strides lda, ldb elements */
    const void *X;     /* tokens of n values at stride ldx */
    int64_t lda, ldb, ldx;
    ptq_dtype dtype;     /* of all three */
    const int64_t *rows; /* indices of the tokens that count, or NULL for all `tokens` */
    int64_t tokens;
} ptq_cross_args;

/* S += sum over the given tokens of (a - b) x^T, differences and products in float32, whatever the
 * dtype. PTQ_NONFINITE, and PTQ_OVERFLOW if values are so large that sums might leave float32,
 * leave S as is; PTQ_INTERRUPTED does not. BLAS: for float32 without `rows`, on its own threads. */
ptq_status ptq_cross_update(const ptq_cross_args *args, int threads);

/* ---- moved.c --------------------------------------------------------------------------- */
typedef struct {
    float *out; /* (tokens, m), added to */
    int64_t tokens, m, n;
    const float *Y, *X; /* tokens of n values at strides ldy, ldx elements */
    int64_t ldy, ldx;
    const float *W; /* (m, n) */
} ptq_moved_args;

/* out += (Y - X) W^T, differences and products in float32. No BLAS; results do not depend on the
 * threads. */
ptq_status ptq_moved_outputs(const ptq_moved_args *args, int threads);

/* ---- checks.c -------------------------------------------------------------------------- */
/* PTQ_NONFINITE; else PTQ_NOT_SYMMETRIC if |H_ij - H_ji| > tolerance anywhere in H (n, n). */
ptq_status ptq_symmetric_check(const float *H, int64_t n, float tolerance, int threads);
/* PTQ_NONFINITE if a value is NaN or Inf. */
ptq_status ptq_finite_check(const float *x, int64_t count, int threads);

/* ---- ranges.c -------------------------------------------------------------------------- */
/* low, high (n) float32 and sum (n) of every column over the given rows: one pass, partial sums of
 * PTQ_RANGE_ROWS rows in float32, all others in double, the same bits for any number of threads.
 * X, ldx, dtype, rows, tokens (at least 1) as in ptq_hessian_update, but ldx may be 0. On
 * PTQ_NONFINITE, and when interrupted, nothing is written. */
ptq_status ptq_channel_ranges(const void *X, int64_t n, int64_t ldx, ptq_dtype dtype,
                              const int64_t *rows, int64_t tokens, float *low, float *high,
                              double *sum, int threads);

/* ---- equalize.c ------------------------------------------------------------------------ */
/* scales (n) = rx^alpha / rw^(1 - alpha) within [lowest, highest], 1 if either is 0; alpha = 1/2
 * is [AWEQ] eq. 10. rx, rw (n) spans of the channels of X and of the columns of W. */
ptq_status ptq_equalization_scales(const double *rx, const double *rw, int64_t n, double alpha,
                                   double lowest, double highest, float *scales);

typedef struct {
    const float *X; /* (tokens, n) */
    int64_t tokens, n;
    const float *const *W; /* (layers) matrices (rows[l], n) that X feeds */
    const int64_t *rows;   /* (layers) */
    int64_t layers;
    const float *scales; /* (candidates, n), positive */
    int64_t candidates;
    int64_t G;        /* weights: group size, n for one grid per row */
    int per_tensor;   /* weights: one grid for each whole matrix, G is n */
    ptq_grid grid;    /* weights: min-max only */
    int act_max_code; /* activations: 2^bits - 1, at most 65535; 0 leaves them as they are */
    int act_symmetric;
    int act_per_tensor;             /* static, from minimum and maximum; else from each token */
    const float *minimum, *maximum; /* (n) of X over the calibration set; with act_per_tensor */
    double *errors;                 /* out (candidates) sum of (Q_a(X / s) Q_w(W s)^T - X W^T)^2 */
} ptq_equalization_args;

/* Output error of each candidate: products in float32, squares of a tile row's mr tokens summed in
 * float32, all else in double in a fixed order. Needs (tokens, outputs) + (tokens, n) floats. */
ptq_status ptq_equalization_errors(const ptq_equalization_args *args, int threads);

/* ---- cholesky.c ------------------------------------------------------------------------ */
/* R (n, n) upper triangular, float32, with R R^T = P H P^T + diag(shift), where
 * row i of the permuted matrix is row perm[i] of H. shift (n) is in the original order. The strict
 * lower triangle of R is not written. On PTQ_NOT_PD *info is the original index of the pivot.
 * BLAS: for any n that an int holds, on its own threads. */
ptq_status ptq_factor(const float *H, int64_t n, const int64_t *perm, const double *shift, float *R,
                      int64_t *info, int threads);

/* ---- target.c -------------------------------------------------------------------------- */
typedef struct {
    const float *W;      /* (rows, n), or NULL: 0 */
    const double *F;     /* (n, n), read if W is there */
    const double *D;     /* (rows, n), or NULL: 0 */
    const float *H;      /* (n, n) symmetric */
    const double *shift; /* (n) added to its diagonal */
    int64_t rows, n;
    int below;   /* for rows = n: with L L^T = H + shift, Y = D L^-T keeps its entries below the
                  * diagonal alone before it becomes Y L^-1 */
    double *out; /* (rows, n) */
} ptq_target_args;

/* out = (W F + D) (H + shift)^-1, in double. On PTQ_NOT_PD *info is the pivot. BLAS: for any n that
 * an int holds, on its own threads. */
ptq_status ptq_target_correction(const ptq_target_args *args, int64_t *info, int threads);

/* ---- rtn.c ----------------------------------------------------------------------------- */
/* Grids and codes by rounding to nearest. H (n, n) is read for PTQ_GRID_HESSIAN only.
 * codes (rows, n); scales, zeros (rows, n / G). G divides n. */
ptq_status ptq_rtn(const float *W, int64_t rows, int64_t n, int64_t G, const ptq_grid *grid,
                   const float *H, uint8_t *codes, float *scales, uint8_t *zeros, int threads);

/* codes (rows, n) of W (rows, n) on given grids: scales, zeros (rows), one grid per row. */
ptq_status ptq_codes_on_grid(const float *W, int64_t rows, int64_t n, const float *scales,
                             const uint8_t *zeros, int max_code, uint8_t *codes, int threads);

/* ---- gptq.c ---------------------------------------------------------------------------- */
typedef struct {
    const float *W;      /* (rows, n), columns of dead inputs already zero */
    const float *H;      /* (n, n) undamped: Hessian grids, refine_passes */
    const float *R;      /* (n, n) from ptq_factor with the same perm */
    const int64_t *perm; /* (n) quantization order */
    int64_t rows, n, G, block;
    int static_groups;       /* grids from W beforehand, groups in original order */
    int groups_follow_order; /* groups are runs of perm (act-order with g_idx) */
    int feedback;            /* 0: every column is rounded as it is */
    int refine_passes;       /* coordinate-descent passes after the solve */
    int refit_rounds;        /* then: all scales of a row fitted anew, and another such pass */
    double shift;            /* absolute value that was added to the diagonal for R */
    ptq_grid grid;
    uint8_t *codes;  /* out (rows, n) original column order */
    float *scales;   /* out (rows, n / G) */
    uint8_t *zeros;  /* out (rows, n / G) */
    int32_t *g_idx;  /* out (n) group of each original column */
    double *history; /* out (1 + refine_passes + 2 * refit_rounds, rows) objective under the
                      * undamped H after the solve and each of these steps; without feedback only
                      * its differences from row to row mean anything */
} ptq_gptq_args;

/* GPTQ as Babai's nearest plane (gptq.c), identical in exact arithmetic to [GPTQ] Algorithm 1. No
 * later pass raises a row's objective: scales and codes that would are left as they were. */
ptq_status ptq_gptq(const ptq_gptq_args *args, int threads);

/* ---- paths.c --------------------------------------------------------------------------- */
typedef struct {
    const float *W;        /* (rows, n), columns of dead inputs zero */
    const float *H;        /* (n, n) undamped */
    const float *R;        /* (n, n) from ptq_factor with the same perm */
    const int64_t *perm;   /* (n) quantization order */
    const int32_t *g_idx;  /* (n) group of each original column */
    const float *scales;   /* (rows, groups) */
    const uint8_t *zeros;  /* (rows, groups) */
    const int64_t *chosen; /* (count) rows to search, each once */
    int64_t rows, n, groups, count;
    int max_code, paths; /* paths: 1 to 16 */
    uint8_t *codes;      /* in and out (rows, n) original column order */
    double *objective;   /* in and out (rows) e H e^T: differences are added */
} ptq_paths_args;

/* Better codes on the grids that the rows have: the best of `paths` partial roundings at a time,
 * then one coordinate-descent pass. A row whose objective would not fall keeps its codes. No BLAS;
 * results do not depend on the threads. */
ptq_status ptq_best_paths(const ptq_paths_args *args, int threads);

/* ---- coupled.c ------------------------------------------------------------------------- */
typedef struct {
    const float *W;       /* (rows, n) */
    const float *H;       /* (n, n) undamped */
    const double *B;      /* (rows, rows) symmetric */
    const int64_t *perm;  /* (n) order of a pass */
    const int32_t *g_idx; /* (n) group of each original column */
    const float *scales;  /* (rows, groups) */
    const uint8_t *zeros; /* (rows, groups) */
    int64_t rows, n, groups;
    int max_code, passes;
    uint8_t *codes;    /* in and out (rows, n) */
    double *objective; /* out (rows) e H e^T of the codes, which may have risen */
} ptq_coupled_args;

/* Coordinate-descent passes over the codes under tr(B E H E^T), which never rises: rows make up for
 * each other's errors. Rows whose B_ii is 0, and dead inputs, stay. In double, without BLAS;
 * results do not depend on the threads. */
ptq_status ptq_couple_rows(const ptq_coupled_args *args, int threads);

typedef struct {
    const float *S;      /* (runs, columns, rows) sums B P, P = E H */
    const float *B;      /* (runs, rows, rows) symmetric, or NULL: rows do not see each other */
    const float *H;      /* (columns, columns) */
    const float *scales; /* (runs, columns, rows) */
    int64_t runs, columns, rows;
    int max_code;
    uint8_t *codes; /* in and out (runs, columns, rows) */
    float *moved;   /* out (runs, columns, rows): by how much E = W - Q has changed */
} ptq_couple_block_args;

/* The same descent over a block of columns of many runs of rows, of which each has its own B:
 * column by column, and in it row by row. What the block does to P elsewhere is left to the caller,
 * who has the larger part of the work. */
ptq_status ptq_couple_block(const ptq_couple_block_args *args, int threads);

/* ---- objective.c ----------------------------------------------------------------------- */
/* out (rows) = e H e^T of each row of E (rows, n). Where the terms cancel, as they do for a
 * rank-deficient H, in double; what is below 0 by no more than rounding is 0. */
ptq_status ptq_objective(const float *E, int64_t rows, int64_t n, const float *H, double *out,
                         int threads);

/* ---- activations.c --------------------------------------------------------------------- */
/* Signed uniform grids, x = scale * (code - zero), code in [-2^(bits-1), 2^(bits-1) - 1]. */
typedef struct {
    int bits;      /* 2 to 16 */
    int symmetric; /* zero-point 0 */
    int narrow; /* symmetric only: without the smallest code, scale = max|x| / (2^(bits-1) - 1) */
    int bf16; /* every step of the arithmetic is rounded to bfloat16; at most 8 bits, not narrow */
} ptq_signed_grid;

/* Grid of the range [low, high] and 0, in float32. A range of 0 (or whose scale underflows) gets
 * scale 2^-23 and zero-point 0; the scale is infinite if high - low overflows. In bfloat16, whose
 * step at 1 is 2^-7, that is the scale instead. */
ptq_status ptq_signed_grid_fit(const ptq_signed_grid *grid, float low, float high, float *scale,
                               int *zero);
/* Extremes of 0 and X (tokens, n), of type `dtype`. Columns with a non-zero skip[c] (NULL: none)
 * count as zeros, here and below. PTQ_NONFINITE for NaN or Inf, skipped or not. */
ptq_status ptq_activation_range(const void *X, int64_t n, ptq_dtype dtype, const uint8_t *skip,
                                int64_t tokens, float *low, float *high, int threads);
/* codes (tokens, n) int8, or int16 above 8 bits: clamp(round(x / scale + zero)), ties to even.
 * per_token: scales, zeros (tokens) are fitted to each row and written; else (1) are read. On
 * PTQ_NONFINITE outputs are partly written. */
ptq_status ptq_activations_quantize(const void *X, int64_t n, ptq_dtype dtype, const uint8_t *skip,
                                    int64_t tokens, const ptq_signed_grid *grid, int per_token,
                                    void *codes, float *scales, int16_t *zeros, int threads);
/* outliers (n) = 1 for columns with an |x| >= threshold [LLM.int8()]. */
ptq_status ptq_outlier_columns(const void *X, int64_t n, ptq_dtype dtype, int64_t tokens,
                               float threshold, uint8_t *outliers, int threads);

/* ---- bias_correction.c ----------------------------------------------------------------- */
/* out (rows) = (W_hat - W) mean, in double [AWEQ, eqs. 11-15]. W, W_hat (rows, n) of `dtype`,
 * PTQ_F32 or PTQ_F64; mean (n). */
ptq_status ptq_bias_correction(const void *W, const void *W_hat, ptq_dtype dtype, int64_t rows,
                               int64_t n, const double *mean, double *out, int threads);

/* ---- int8_gemm.c ----------------------------------------------------------------------- */
/* Most inputs of a product whose sums surely fit int32: each product of two codes less their middle
 * is at most 2^14. Kernels that multiply unsigned codes work modulo 2^32 on the way there. */
#define PTQ_INT8_INPUTS ((INT32_MAX) >> 14)

/* 32-bit words of the panels of `outputs` rows of n 8-bit codes (words.h). */
int64_t ptq_int8_words(int64_t outputs, int64_t n);

/* words of codes (outputs, n), unsigned; if `flipped`, signed ones, to which 128 is added. sums
 * (outputs), which may be NULL: the sum of each row's codes less 128. */
ptq_status ptq_int8_pack(const void *codes, int flipped, int64_t outputs, int64_t n,
                         uint32_t *words, int32_t *sums, int threads);

/* The weights are either w with w_zeros, or words with zero_points; so are the tokens either codes
 * with x_scales and x_zeros, or values of `dtype` whose codes are made on the way. */
typedef struct {
    int64_t tokens, outputs, n; /* n at most PTQ_INT8_INPUTS */
    const int8_t *x;            /* (tokens, n) codes, or NULL */
    const void *values;         /* (tokens, n), rows ldx apart */
    int64_t ldx;
    ptq_dtype dtype;
    ptq_signed_grid grid;   /* of values, at most 8 bits */
    int64_t x_grids;        /* tokens or 1; values: 1, or 0 for a grid fitted to each token */
    const float *x_scales;  /* (x_grids) */
    const int8_t *x_zeros;  /* (x_grids) */
    const int8_t *w;        /* (outputs, n) codes, or NULL */
    const uint32_t *words;  /* ptq_int8_words(outputs, n), codes + 128 */
    const int32_t *sums;    /* (outputs) of ptq_int8_pack, or NULL: summed when needed */
    int64_t w_grids;        /* outputs or 1 */
    const float *w_scales;  /* (w_grids) */
    const int8_t *w_zeros;  /* (w_grids) */
    const float *w_offsets; /* (w_grids) instead of w_zeros: of codes from 0 to 255 */
    const float *bias;      /* (outputs), or NULL */
    int64_t columns;        /* columns multiplied in float32, whose codes are their zeros */
    const float *x_float, *w_float; /* (tokens, columns) and (columns, outputs) */
    float *y;                       /* out (tokens, outputs) */
} ptq_int8_args;

/* y = s_x s_w sum (x - zero_x)(w - zero_w) + bias, the sum exact, one rounding; + x_float w_float.
 * PTQ_NONFINITE if values are NaN or Inf, or the range of a token overflows; y is then undefined.
 */
ptq_status ptq_int8_matmul(const ptq_int8_args *args, int threads);

/* ---- obq.c ----------------------------------------------------------------------------- */
/* Optimal Brain Quantization of rows on given per-column grids, in double throughout.
 * inverse (n, n) is the inverse of the damped Hessian; scale, zero (rows, n) per column. */
ptq_status ptq_obq(const double *W, int64_t rows, int64_t n, const double *inverse,
                   const double *scale, const double *zero, int max_code, uint8_t *codes,
                   int threads);

/* ---- pack.c ---------------------------------------------------------------------------- */
/* Dense little-endian bit stream per row: element i at bits [i*bits, i*bits + bits).
 * words = ceil(columns * bits / 32) per row. bits from 1 to 8. */
ptq_status ptq_pack(const uint8_t *codes, int64_t rows, int64_t columns, int bits, uint32_t *words,
                    int threads);
ptq_status ptq_unpack(const uint32_t *words, int64_t rows, int64_t columns, int bits,
                      uint8_t *codes, int threads);

/* ---- softmax.c ------------------------------------------------------------------------- */
/* Value of a code: scale * (code - zero), codes from 0 to max_code (at most 65535). */
typedef struct {
    float scale;
    int zero, max_code;
} ptq_softmax_grid;

/* Rows of attention (batch, heads, q, k), numbered in this order, and the keys each row may see:
 * with `causal` the first k - q + 1 + (its index in q), at least none, at most k; and of these the
 * ones whose `allowed` is non-zero. Other entries are never read into a result. */
typedef struct {
    int64_t batch, heads, q, k;
    int causal;
    const uint8_t *allowed; /* NULL, or C-contiguous with k as its last axis and these sizes: */
    int64_t allowed_batch, allowed_heads, allowed_q; /* each 1 or the full size */
    const uint8_t *queries; /* NULL, or (batch, q): rows that count, for statistics only */
} ptq_attention;

typedef enum {
    PTQ_CORRECT_NONE = 0,
    PTQ_CORRECT_TABLE,
    PTQ_CORRECT_ROW_SUM,
    PTQ_CORRECT_CODE_SUM, /* not of probabilities */
} ptq_correction;

/* What is rounded to a grid. */
typedef enum {
    PTQ_OF_PROBABILITIES = 0,
    PTQ_OF_EXPONENTIALS,
    PTQ_OF_SQUARES, /* exponentials, by their roots */
} ptq_grid_of;

/* What the loop over rows met; a row without an allowed key is empty. */
typedef struct {
    int64_t bad;   /* first row that was refused, or -1 */
    int64_t empty; /* number of empty rows */
} ptq_rows_info;

/* out = softmax over the allowed keys, rounded to the grid, plus the row's correction [SBC]; 0
 * elsewhere, all 0 in empty rows. scores (rows, k) float32; -Inf is the same as not allowed.
 * Correction: none; table (heads or 1, lengths or 1) by head and number of allowed keys; row sum:
 * (1 - sum of the rounded row) / (number of allowed keys).
 * out: float32 values (may be scores), or with `codes` uint8 (uint16 if max_code > 255), the
 * grid's zero at keys that are not allowed. corrections (rows) or NULL: what was, or is to be,
 * added. PTQ_NONFINITE: NaN or Inf at an allowed key of some row. PTQ_ROW_REFUSED: codes cannot say
 * which keys a -Inf among the scores leaves out of the correction. info->bad is the first such row.
 * A grid of exponentials is not that of p = e / sum(e), but of e = exp(x - the row's largest x) in
 * (0, 1]: values are scale / sum(e) * code, plus the correction. Code sum: code / sum(codes)
 * instead. A grid of squares is that of sqrt(e): values are scale^2 / sum(e) * code^2, plus the
 * correction, or code^2 / sum(code^2). Both have zero = 0 and scale <= 1, so that the largest e has
 * a code above 0.
 * scales (rows) or NULL: by what a row's codes, or their squares, are or are to be multiplied. */
typedef struct {
    ptq_attention attention;
    ptq_softmax_grid grid;
    const float *scores;
    int correction; /* ptq_correction */
    const double *table;
    int64_t table_heads, table_lengths;
    int codes;
    void *out;
    float *corrections, *scales;
    int of; /* ptq_grid_of */
} ptq_softmax_args;
ptq_status ptq_softmax_quantize(const ptq_softmax_args *args, ptq_rows_info *info, int threads);

/* Row lengths are counted in 16 exact classes below 16, then in 8 to the octave. */
#define PTQ_LENGTH_CLASSES 240
int ptq_length_class(int64_t length);

/* sums (heads, PTQ_LENGTH_CLASSES, 4) = rows, allowed entries, sum of code - zero and entries
 * whose code is zero, by the number of allowed keys of the row. All are integers: no order of
 * summation changes them. P (rows, k) float32 probabilities.
 * PTQ_ROW_REFUSED: row info->bad holds a negative value or NaN, or the sum over its allowed entries
 * is further from 1 than the tolerance. */
ptq_status ptq_softmax_statistics(const ptq_attention *attention, const float *P,
                                  const ptq_softmax_grid *grid, double tolerance, int64_t *sums,
                                  ptq_rows_info *info, int threads);
/* out (n) = exp(x), x <= 0: the softmax's own, for tests. */
ptq_status ptq_softmax_exp(const float *x, int64_t n, float *out, int threads);

/* ---- energy.c -------------------------------------------------------------------------- */
/* out (rows, 2): sum of x^2 and of (y - x)^2 of every row, in double. x, y (rows, n) of `dtype`,
 * PTQ_F32 or PTQ_F64. NaN and Inf propagate to out. */
ptq_status ptq_energy(const void *x, const void *y, ptq_dtype dtype, int64_t rows, int64_t n,
                      double *out, int threads);
/* The same of every column: out (2, n). */
ptq_status ptq_energy_columns(const void *x, const void *y, ptq_dtype dtype, int64_t rows,
                              int64_t n, double *out, int threads);

/* ---- statistics.c ---------------------------------------------------------------------- */
/* A magnitude's bin is its float32 bits without the lowest 18: 32 bins to the octave. */
#define PTQ_MAGNITUDE_SHIFT 18
#define PTQ_MAGNITUDE_BINS (1 << (31 - PTQ_MAGNITUDE_SHIFT))
#define PTQ_LARGEST 3

typedef struct {
    const void *X; /* as in ptq_channel_ranges */
    int64_t n, ldx;
    ptq_dtype dtype;
    const int64_t *rows;
    int64_t tokens;
    int bits;        /* of the symmetric grids, 2 to 16: scale = absmax / (2^(bits-1) - 1) */
    float threshold; /* magnitude of an outlier */
    float absmax;    /* of the tensor's grid, whose codes saturate; 0: that of these tokens */
} ptq_statistics_args;

/* Sums over tokens: of x^2; the standard deviation and the excess kurtosis over the channels of a
 * token (its fourth central moment by its squared variance, less 3), tokens that have a kurtosis
 * (not all their values are equal), squared rounding errors on a grid per token and on the
 * tensor's. */
enum {
    PTQ_SUM_ENERGY,
    PTQ_SUM_STD,
    PTQ_SUM_KURTOSIS,
    PTQ_SUM_VARIED,
    PTQ_SUM_TOKEN_ERROR,
    PTQ_SUM_TENSOR_ERROR,
    PTQ_STATISTICS_SUMS
};

typedef struct {
    double *sums;       /* (PTQ_STATISTICS_SUMS) */
    float *most;        /* (n) largest magnitude of each channel */
    int64_t *counts;    /* (n) tokens with |x| >= threshold */
    int64_t *histogram; /* (PTQ_MAGNITUDE_BINS) */
    float *largest;     /* (PTQ_LARGEST) in falling order, of equal ones the first token's */
    int64_t *places;    /* (PTQ_LARGEST, 2) its token, counting the given rows, and channel */
} ptq_statistics;

/* One batch; all sums in double, the same bits for any number of threads and any CPU level. Nothing
 * is written unless PTQ_OK. [IPQS], [LLM.int8()] */
ptq_status ptq_activation_statistics(const ptq_statistics_args *args, ptq_statistics *out,
                                     int threads);

/* ---- lowbit.c -------------------------------------------------------------------------- */
/* Weights of 2, 3, 4 or 8 bits in the layout of words.h: w = scale * (code - zero). */
typedef struct {
    int bits;
    int64_t outputs, inputs, places, groups;
    const uint32_t *words; /* (panels, lane words, 16) */
    const void *scales;    /* (panels, groups, 16) of scale_dtype */
    ptq_dtype scale_dtype; /* float32, float16 or bfloat16 */
    const uint8_t *zeros;  /* (panels, groups, 16) */
    const int32_t
        *starts;          /* (groups + 1) first place of each group: whole steps from 0 to places */
    const int32_t *order; /* (places) the input at each place, any other number: padding; NULL: as
                           * they are, with padding at the end */
} ptq_packed;

/* Longest group whose int8 products surely fit int32: 255 * 127 each. */
#define PTQ_INT8_GROUP 66311

/* words (panels, lane words, 16), written, from codes (outputs, inputs) below 2^bits. Needs bits,
 * outputs, inputs, places and order of w. */
ptq_status ptq_words_pack(const ptq_packed *w, const uint8_t *codes, uint32_t *words, int threads);
/* The inverse. */
ptq_status ptq_words_unpack(const ptq_packed *w, uint8_t *codes, int threads);
/* out (outputs, inputs) = scale * (code - zero), rounded once. */
ptq_status ptq_packed_dequantize(const ptq_packed *w, float *out, int threads);

/* y (tokens, outputs) = x w^T; x tokens of `inputs` values at stride ldx elements, of `dtype`.
 * Float: sums of a group's codes times x in float32, or exactly with x in fixed point (23 bits
 * under the group's largest), whichever is faster; less zero times the sum of x; then the scale.
 * With u = 2^-24 and k the places, |error| <= 2 (k + 8) u sum over groups of 2^bits scale sum |x|.
 * int8: the x of a token and a group become round(x / s), s = max |x| / 127; then products and sums
 * are exact integers, and the result is the same at every CPU level. PTQ_NONFINITE (int8 only): x
 * holds NaN or Inf; PTQ_INVALID (int8 only): a group of more than PTQ_INT8_GROUP places.
 * No sum depends on the number of threads. */
ptq_status ptq_packed_matmul(const ptq_packed *w, const void *x, int64_t ldx, ptq_dtype dtype,
                             int64_t tokens, int int8, float *y, int threads);

/* ---- decoder.c ------------------------------------------------------------------------- */
/* One layer of packed weights as it is used in a block. Float: as ptq_packed_matmul; int8: with its
 * int8. Simulated: w has 8 bits, one group and no order, and the token is rounded to `grid`, its
 * own or (x_grids 1) one that is given, as by ptq_int8_matmul; scales and zeros of w are not used.
 */
typedef enum { PTQ_ROW_FLOAT = 0, PTQ_ROW_INT8 = 1, PTQ_ROW_SIMULATED = 2 } ptq_row_mode;

/* Most places of simulated layers: their products of 255 and 128 surely fit int32. */
#define PTQ_DOTS_PLACES ((INT32_MAX) / (255 * 128))

typedef struct {
    ptq_packed w;
    ptq_row_mode mode;
    const void *bias; /* (outputs) of the block's dtype, or NULL */
    ptq_signed_grid grid;
    int x_grids, x_zero;
    float x_scale;
    const int32_t *w_sums;           /* (outputs) of ptq_int8_pack */
    const float *w_scales, *w_zeros; /* (outputs) */
} ptq_row_layer;

/* A root mean square norm: weight * (x / sqrt(mean(x^2) + eps)), weight NULL: none. */
typedef struct {
    const void *weight;
    float eps;
} ptq_norm;

/* Sizes of a block, and its dtype: float32 or bfloat16. */
typedef struct {
    ptq_dtype dtype;
    int64_t hidden, inner;             /* of the block's input, of the MLP */
    int64_t heads, kv_heads, head_dim; /* heads a multiple of kv_heads, head_dim even */
} ptq_block;

/* What comes before the keys and values are cached: norm, products, norms of heads, rotation. */
typedef struct {
    ptq_block block;
    const void *x, *cos, *sin; /* (hidden), (head_dim) */
    ptq_norm norm, q_norm, k_norm;
    ptq_row_layer q, k, v;
    float *query;      /* out (heads, head_dim) */
    void *key, *value; /* out (kv_heads, head_dim) */
} ptq_block_begin;

/* What comes after: attention, product, residual, norm, products, residual. */
typedef struct {
    ptq_block block;
    const float *query;
    const void *keys, *values; /* (kv_heads, tokens, head_dim), the last contiguous */
    int64_t tokens, key_head, key_token, value_head, value_token; /* strides in elements */
    const uint8_t *allowed; /* (tokens), not 0 where the token sees one, or NULL: all */
    float scaling;
    const void *x; /* (hidden) the block's input */
    ptq_norm norm;
    ptq_row_layer o, gate, up, down;
    void *y; /* out (hidden) */
} ptq_block_end;

/* One token of one sequence, in one parallel region each; between operations, numbers are rounded
 * to the dtype where PyTorch's modules round them. The numbers of products are those of the
 * functions named above; scores and their softmax are in float32. No result depends on the number
 * of threads. PTQ_NONFINITE: a layer rounds its input, which is not finite. PTQ_ROW_REFUSED: no
 * token is allowed. */
ptq_status ptq_decoder_begin(const ptq_block_begin *args, int threads);
ptq_status ptq_decoder_end(const ptq_block_end *args, int threads);

/* Blocks one after the other in one parallel region. A block's x, but for the first one's, is the y
 * of the one before; the keys and values of its end, of 0 tokens or more, are followed by those of
 * its beginning, which `allowed` (tokens + 1) counts too. */
typedef struct {
    ptq_block_begin begin;
    ptq_block_end end;
} ptq_whole_block;
enum { PTQ_MOST_BLOCKS = 1 << 16 };
ptq_status ptq_decoder_blocks(const ptq_whole_block *blocks, int64_t count, int threads);

/* ---- cpu.c, blas.c --------------------------------------------------------------------- */
/* Choose the kernels: the name of a level ("base", "avx2", "avx512", "neon"), with an underscore
 * and a name for each of its features that is wanted, in this order: "vnni", "bf16" and "amx" of
 * avx512, "dotprod" of neon ("avx512_vnni_bf16"); NULL or "" means the best level with all features
 * that this CPU has. PTQ_INVALID if the name is unknown or the CPU cannot run it. Levels differ in
 * the order of float32 sums and in fused multiply-adds, so in last bits, which may flip a code that
 * lies on a rounding tie; sums of integers and of doubles are the same on all. The Hessian of bf16
 * tokens takes numbers below 2^-126 for 0, in tokens and in sums, if "bf16" or "amx" is used. */
ptq_status ptq_cpu_select(const char *name);
/* Name of the kernels in use. */
const char *ptq_cpu_level(void);
/* 1 if the CPU can run what the name says. */
int ptq_cpu_supports(const char *name);

typedef struct {
    void (*sgemm)(char *, char *, int *, int *, int *, float *, float *, int *, float *, int *,
                  float *, float *, int *);
    void (*ssyrk)(char *, char *, int *, int *, float *, float *, int *, float *, float *, int *);
    void (*strsm)(char *, char *, char *, char *, int *, int *, float *, float *, int *, float *,
                  int *);
    void (*spotrf)(char *, int *, float *, int *, int *);
    void (*dgemm)(char *, char *, int *, int *, int *, double *, double *, int *, double *, int *,
                  double *, double *, int *);
} ptq_blas;
/* Hand over SciPy's routines, which must stay where they are; NULL: the built-in ones. */
void ptq_blas_set(const ptq_blas *blas);
const char *ptq_blas_name(void);

#endif
