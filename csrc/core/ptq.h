/* ptq.h - contract of the Python-free core.
 *
 * Letters: W (rows, n) weights, H (n, n) Hessian, G group size, rows = outputs, n = inputs.
 * All matrices are C-contiguous unless a leading dimension is given. Sums over samples and
 * objectives are in double; GEMM accumulators are float32 and always run over k in ascending
 * order, so neither block sizes nor thread counts change a bit of any result.
 * Every function is re-entrant, keeps no state and returns a ptq_status; none prints or aborts.
 */
#ifndef PTQ_H
#define PTQ_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
    PTQ_OK = 0,
    PTQ_NOMEM,       /* an allocation failed */
    PTQ_NOT_PD,      /* factorization met a non-positive pivot; see info */
    PTQ_NONFINITE,   /* NaN or Inf in an input, or produced by a hopeless Hessian */
    PTQ_INTERRUPTED, /* the poll callback asked to stop */
    PTQ_INVALID,     /* sizes or options the caller should have refused */
    PTQ_BLAS,        /* an external BLAS/LAPACK call failed */
} ptq_status;

typedef enum { PTQ_F32 = 0, PTQ_F16 = 1, PTQ_BF16 = 2 } ptq_dtype;
typedef enum { PTQ_GRID_MINMAX = 0, PTQ_GRID_MSE = 1, PTQ_GRID_HESSIAN = 2 } ptq_grid_method;

/* Width of the diagonal blocks that stand for H in the Hessian grid of wider groups. */
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
/* Threads that a request means: 0 asks for the policy (OpenMP's own); 1 in a forked child. */
int ptq_thread_count(int requested);
/* The same for a loop of about `work` operations: 1 where waking a team would cost more. */
int ptq_threads_for(int requested, double work);
int ptq_has_openmp(void);
/* For tasks that may run longer than about 0.1 s: non-zero when the loop should end, whatever the
 * task has left undone. */
int ptq_should_stop(void);
/* Run task(ctx, 0..tasks-1) on at most `threads` threads; PTQ_INTERRUPTED when poll said so. */
ptq_status ptq_parallel_for(int64_t tasks, int threads, ptq_task task, void *ctx);

/* ---- hessian.c ------------------------------------------------------------------------- */
/* S upper triangle += sum over the given rows of x x^T, in float32.
 * S (n, n) float32; X tokens of n values at stride ldx elements, of type `dtype`;
 * rows: indices of the tokens that count, or NULL for all `tokens`. bf16 products are exact in
 * float32 and are accumulated without widening where the CPU can. PTQ_NONFINITE leaves S as is. */
ptq_status ptq_hessian_update(float *S, int64_t n, const void *X, int64_t ldx, ptq_dtype dtype,
                              const int64_t *rows, int64_t tokens, int threads);
/* out (n, n) full symmetric = factor * S, from S's upper triangle. out may be S. */
ptq_status ptq_hessian_finish(const float *S, float *out, int64_t n, double factor, int threads);
/* PTQ_NONFINITE, or PTQ_INVALID where |H_ij - H_ji| > tolerance, else PTQ_OK. */
ptq_status ptq_symmetric_check(const float *H, int64_t n, float tolerance, int threads);
ptq_status ptq_finite_check(const float *x, int64_t count, int threads);

/* ---- cholesky.c ------------------------------------------------------------------------ */
/* R (n, n) upper triangular, float32, with R R^T = P H P^T + diag(shift), where
 * row i of the permuted matrix is row perm[i] of H. shift (n) is in the original order. The strict
 * lower triangle of R is not written. On PTQ_NOT_PD *info is the original index of the pivot. */
ptq_status ptq_factor(const float *H, int64_t n, const int64_t *perm, const double *shift,
                      float *R, int64_t *info, int threads);

/* ---- rtn.c ----------------------------------------------------------------------------- */
/* Grids and codes by rounding to nearest. H (n, n) is read for PTQ_GRID_HESSIAN only.
 * codes (rows, n); scales, zeros (rows, n / G). G divides n. */
ptq_status ptq_rtn(const float *W, int64_t rows, int64_t n, int64_t G, const ptq_grid *grid,
                   const float *H, uint8_t *codes, float *scales, uint8_t *zeros, int threads);

/* ---- gptq.c ---------------------------------------------------------------------------- */
typedef struct {
    const float *W;      /* (rows, n), columns of dead inputs already zero */
    const float *H;      /* (n, n) undamped: Hessian grids, sweeps */
    const float *R;      /* (n, n) from ptq_factor with the same perm */
    const int64_t *perm; /* (n) quantization order */
    int64_t rows, n, G, block;
    int static_groups;   /* grids from W beforehand, groups in original order */
    int runs;            /* groups are runs of the order (act-order with g_idx) */
    int feedback;        /* 0: every column is rounded as it is */
    int sweeps;          /* coordinate-descent passes after the solve */
    double damping;      /* absolute value that was added to the diagonal for R */
    ptq_grid grid;
    uint8_t *codes;      /* out (rows, n) original column order */
    float *scales;       /* out (rows, n / G) */
    uint8_t *zeros;      /* out (rows, n / G) */
    int32_t *g_idx;      /* out (n) group of each original column */
    double *history;     /* out (sweeps + 1, rows) objective under the undamped H; without
                          * feedback only its differences from row to row mean anything */
} ptq_gptq_args;

/* GPTQ as Babai's nearest plane (gptq.c), identical in exact arithmetic to [GPTQ] Algorithm 1. */
ptq_status ptq_gptq(const ptq_gptq_args *args, int threads);

/* ---- objective.c ----------------------------------------------------------------------- */
/* out (rows) = e H e^T of each row of E (rows, n). */
ptq_status ptq_objective(const float *E, int64_t rows, int64_t n, const float *H, double *out,
                         int threads);

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

typedef enum { PTQ_CORRECT_NONE = 0, PTQ_CORRECT_TABLE, PTQ_CORRECT_ROW_SUM } ptq_correction;

/* How the loop over rows went; rows with no allowed key are empty. */
typedef struct {
    int64_t bad;   /* first row that was refused, or -1 */
    int64_t empty; /* number of empty rows */
} ptq_rows_info;

/* out = softmax over the allowed keys, rounded to the grid, plus the row's correction; 0 elsewhere,
 * all 0 in empty rows. scores (rows, k) float32; -Inf is the same as not allowed.
 * Correction: none; table (heads or 1, lengths or 1) by head and number of allowed keys; row sum:
 * (1 - sum of the rounded row) / (number of allowed keys).
 * out: float32 values (may be scores), or with `codes` uint8 (uint16 where max_code > 255): zero
 * where not allowed. corrections (rows) or NULL: what was, or is to be, added.
 * PTQ_NONFINITE: NaN or Inf at an allowed key of row info->bad. PTQ_INVALID with info->bad >= 0:
 * codes cannot say which keys a -Inf among the scores leaves out of the correction. */
typedef struct {
    ptq_attention attention;
    ptq_softmax_grid grid;
    const float *scores;
    int correction; /* ptq_correction */
    const double *table;
    int64_t table_heads, table_lengths;
    int codes;
    void *out;
    float *corrections;
} ptq_softmax_args;
ptq_status ptq_softmax_quantize(const ptq_softmax_args *args, ptq_rows_info *info, int threads);

/* Row lengths are counted in 16 exact classes below 16, then in 8 to the octave. */
#define PTQ_LENGTH_CLASSES 240
int ptq_length_class(int64_t length);

/* sums (heads, PTQ_LENGTH_CLASSES, 4) = rows, allowed entries, sum of code - zero and entries
 * whose code is zero, by the number of allowed keys of the row. All are integers: no order of
 * summation changes them. P (rows, k) float32 probabilities.
 * PTQ_INVALID with info->bad >= 0: the row holds a negative value or NaN, or the sum over its
 * allowed entries is further from 1 than the tolerance. */
ptq_status ptq_softmax_statistics(const ptq_attention *attention, const float *P,
                                  const ptq_softmax_grid *grid, double tolerance, int64_t *sums,
                                  ptq_rows_info *info, int threads);
/* out (n) = exp(x), x <= 0: the softmax's own, for tests. */
ptq_status ptq_softmax_exp(const float *x, int64_t n, float *out, int threads);

/* ---- sqnr.c ---------------------------------------------------------------------------- */
/* out (rows, 2): sum of x^2 and of (y - x)^2 of every row, in double. x, y (rows, n), float64 where
 * `wide`, else float32. NaN and Inf arrive in out. */
ptq_status ptq_energy(const void *x, const void *y, int wide, int64_t rows, int64_t n, double *out,
                      int threads);
/* The same of every column: out (2, n). */
ptq_status ptq_energy_columns(const void *x, const void *y, int wide, int64_t rows, int64_t n,
                              double *out, int threads);

/* ---- cpu.c, blas.c --------------------------------------------------------------------- */
/* Choose the kernel level once: NULL or "" means the best this CPU runs. PTQ_INVALID when the
 * name is unknown or the CPU cannot run it. */
ptq_status ptq_cpu_select(const char *level);
const char *ptq_cpu_level(void);
/* 1 where the CPU can run the named level. */
int ptq_cpu_supports(const char *level);

typedef void (*ptq_ssyrk_fn)(char *, char *, int *, int *, float *, float *, int *, float *,
                             float *, int *);
typedef void (*ptq_spotrf_fn)(char *, int *, float *, int *, int *);
/* Hand over SciPy's routines; NULL keeps the built-in ones. */
void ptq_blas_set(ptq_ssyrk_fn ssyrk, ptq_spotrf_fn spotrf);
const char *ptq_blas_name(void);

#endif
