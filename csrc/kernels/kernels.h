/* kernels.h - the operations that are compiled once per CPU level.
 *
 * A panel holds nr rows of W as (columns, nr): lane r of column j at [j * nr + r]. A strip holds
 * mr columns of the other operand as (k, mr). All lanes are independent of each other.
 */
#ifndef PTQ_KERNELS_H
#define PTQ_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "../core/ptq.h"

/* What quantizing a strip of columns reads and writes; per-column arrays start at the strip. */
typedef struct {
    int width;            /* columns in the strip, at most mr */
    int feedback;         /* 0: ignore T */
    const float *diag;    /* (width, mr) rows start..start+width of the strip: the R triangle */
    const float *W;       /* (width, nr) */
    const float *scales;  /* (groups, nr) */
    const float *zeros;   /* (groups, nr) */
    const int32_t *group; /* (width) */
    int max_code;
    float *T;             /* (mr, nr) in: sum over earlier strips of E_k R_kj */
    float *E;             /* (width, nr) sweep: in and out; else out */
    float *dE;            /* (width, nr) sweep only: out, change of E */
    const float *hdiag;   /* (width) sweep only: undamped diagonal of H, 0 for dead inputs */
    uint8_t *codes;       /* (width, nr) out */
    double *objective;    /* (nr) accumulated */
    double *error2;       /* (nr) solve only: sum of E^2, accumulated */
} ptq_strip_args;

/* Rows that `ranges` takes at once. */
#define PTQ_RANGE_ROWS 8

/* Floats of a row of exponentials that are written at a time. */
#define PTQ_ROW_LANES 32

/* Orders stores past the caches before what other threads are told next. */
#if defined(__x86_64__) && defined(__GNUC__)
#define PTQ_STREAMED() __builtin_ia32_sfence()
#else
#define PTQ_STREAMED() ((void)0)
#endif

/* What one row of probabilities adds to the statistics of softmax quantization. */
typedef struct {
    double sum;    /* of the probabilities: float sums of 16 terms, then double */
    float low;     /* smallest, or 0 */
    int64_t code;  /* sum of code - zero */
    int64_t zeros; /* codes equal to zero */
} ptq_row_statistics;

typedef struct {
    const char *name;
    int mr, nr;
    /* C (mr, nr) += sum over k < K of A[k * sa + i] * B[k * nr + r], k ascending. */
    void (*gemm_f32)(float *C, const float *A, ptrdiff_t sa, const float *B, ptrdiff_t K);
    /* The same over pairs of bf16 packed in 32 bits (low half first); NULL where unsupported. */
    void (*gemm_bf16)(float *C, const uint32_t *A, ptrdiff_t sa, const uint32_t *B, ptrdiff_t K);
    /* Round the columns of a strip in turn, feeding each error to the later ones. */
    void (*strip_quantize)(const ptq_strip_args *args);
    /* One coordinate-descent step per column of a strip. */
    void (*strip_sweep)(const ptq_strip_args *args);
    /* X (width, nr) = (T + in-strip terms) / R_jj: column j of X R = T for one strip. The caller
     * keeps -X in N, so that the GEMM kernel can accumulate it. */
    void (*strip_trisolve)(int width, const float *diag, float *T, float *N);
    /* Round columns to nearest on their grid. */
    void (*quantize)(int64_t columns, const float *W, const float *scale, const float *zero,
                     int max_code, uint8_t *codes);
    /* Grid fitting over a panel U (G, nr). */
    void (*fit_minmax)(const ptq_grid *grid, int64_t G, const float *U, float *low, float *high);
    void (*fit_make)(const ptq_grid *grid, const float *low, const float *high, const float *shrink,
                     float *scale, float *zero);
    /* error (nr) += sum_j weight_j d_j^2 (weight NULL: |d_j|^norm). */
    void (*fit_error)(const ptq_grid *grid, int64_t G, const float *U, const float *scale,
                      const float *zero, const float *weight, float *error);
    /* D (G, nr) = rounding error. */
    void (*fit_residual)(const ptq_grid *grid, int64_t G, const float *U, const float *scale,
                         const float *zero, float *D);
    /* best (nr): for each lane the first i of the smallest errors[i * nr + lane]. */
    void (*fit_best)(const float *errors, int steps, int *best);
    /* sum (nr) += sum over a few columns (a strip's) of A * B. */
    void (*dot)(int64_t columns, const float *A, const float *B, double *sum);
    /* Columns [c, c + nr) of `count` tokens into (count, nr) floats; absent columns are zero. */
    void (*pack_tokens)(ptq_dtype dtype, const void *X, int64_t ldx, const int64_t *rows,
                        int64_t first, int64_t count, int64_t c, int64_t columns, float *out);
    /* The same for bf16 pairs of tokens: (ceil(count / 2), nr) words. */
    void (*pack_pairs)(const uint16_t *X, int64_t ldx, const int64_t *rows, int64_t first,
                       int64_t count, int64_t c, int64_t columns, uint32_t *out);
    /* 1 when all `count` values are finite. */
    int (*all_finite)(ptq_dtype dtype, const void *x, int64_t count);
    /* n values as floats, 0 where skip (may be NULL) is non-zero. */
    void (*row_widen)(ptq_dtype dtype, const void *x, const uint8_t *skip, int64_t n, float *out);
    /* Extremes of n values and 0. */
    void (*row_range)(const float *x, int64_t n, float *low, float *high);
    /* n codes clamp(round(x / scale + zero), low, high): int16 where wide, else int8. */
    void (*row_codes)(const float *x, int64_t n, float scale, float zero, int low, int high,
                      int wide, void *codes);
    /* any[i] |= |x[i]| >= threshold */
    void (*row_reach)(const float *x, int64_t n, float threshold, uint8_t *any);
    /* n codes as int16; returns their sum. */
    int32_t (*int8_widen)(const int8_t *codes, int64_t n, int16_t *out);
    /* C (4, 2) += sum over n of A (4 rows) * B (2 rows), in int32. */
    void (*int16_dots)(const int16_t *A, const int16_t *B, int64_t stride, int64_t n, int32_t *C,
                       int64_t ldc);
    /* low, high, sum (columns) of PTQ_RANGE_ROWS rows, which are added up in float32 first; `ahead`
     * holds the row that follows each of them in memory. ahead NULL: of one row. In float16 Inf and NaN count as
     * 65536 and more, or as Inf and NaN. */
    void (*ranges)(ptq_dtype dtype, const void *const *rows, const void *const *ahead,
                   int64_t columns, float *low, float *high, double *sum);
    /* Rows of attention (softmax.inc). */
    /* Smallest and largest value; NaN may be overlooked. */
    void (*softmax_range)(int64_t n, const float *x, float *low, float *high);
    /* e = exp(x - shift), for shift no less than any x, and its sum; e is filled up with zeros to a
     * multiple of PTQ_ROW_LANES. Float sums of 17 terms at most, then double. The first n values
     * of next, any address, are fetched meanwhile. */
    double (*softmax_exp)(int64_t n, const float *x, float shift, const float *next, float *e);
    /* steps = round(min(e * factor, top)): their sum; scale * steps + shift, but 0 where x (NULL:
     * nowhere) is -Inf; steps + zero as uint8, or uint16 where wide. */
    int64_t (*softmax_code_sum)(int64_t n, const float *e, float factor, float top);
    /* [n, width) of out become 0. stream: past the caches; PTQ_STREAMED() must follow. */
    void (*softmax_values)(int64_t n, int64_t width, const float *e, float factor, float top,
                           const float *x, float scale, float shift, int stream, float *out);
    void (*softmax_codes)(int64_t n, const float *e, float factor, float top, int zero, int wide,
                      void *out);
    /* out = allowed ? x : absent; returns how many are allowed. */
    int64_t (*softmax_mask)(int64_t n, const float *x, const uint8_t *allowed, float absent,
                        float *out);
    /* next: the row after this one, any address, fetched ahead. */
    void (*softmax_statistics)(int64_t n, const float *p, const float *next,
                               const ptq_softmax_grid *grid, ptq_row_statistics *out);
    /* For float32 and float64: out (2) += sums of x^2 and (y - x)^2; the same per column. */
    void (*energy[2])(int64_t n, const void *x, const void *y, double *out);
    void (*energy_row[2])(int64_t n, const void *x, const void *y, double *signal, double *noise);
} ptq_kernels;

extern const ptq_kernels ptq_kernels_base;
#if defined(__x86_64__) && defined(__GNUC__)
#define PTQ_X86 1
extern const ptq_kernels ptq_kernels_avx2;
extern const ptq_kernels ptq_kernels_avx512;
extern const ptq_kernels ptq_kernels_avx512_bf16;
#endif

/* The level chosen by ptq_cpu_select. */
const ptq_kernels *ptq_kernels_get(void);

#endif
