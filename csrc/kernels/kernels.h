/* kernels.h - the operations that are compiled once per CPU level.
 *
 * A panel holds nr rows of W as (columns, nr): lane r of column j at [j * nr + r]. A strip holds
 * mr columns of the other operand as (k, mr). All lanes are independent of each other.
 *
 * A level (level_*.c) fills the whole table. A feature (feature_*.c) is something that CPUs of a
 * level may have on top of it: it replaces groups of that level's table when the table is selected.
 */
#ifndef PTQ_KERNELS_H
#define PTQ_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "../core/ptq.h"
#include "../core/words.h"

/* Largest tiles of any level or feature, asserted where they are set: sizes of arrays on stacks. */
#define PTQ_MAX_MR 8
#define PTQ_MAX_NR 48
#define PTQ_PATHS 16 /* partial roundings of a row, side by side */
#define PTQ_MAX_TILE (PTQ_MAX_MR * PTQ_MAX_NR)
#define PTQ_PAIRS_MAX_TILE (32 * 32)
/* The same of the products of int8 codes, tokens and panels. */
#define PTQ_INT8_MAX_MR 32
#define PTQ_INT8_MAX_PANELS 3

/* Digits of 8 bits of an activation in fixed point. */
#define PTQ_DIGITS 3
/* Products of 255 and 128 that surely fit int32. */
#define PTQ_FIXED_GROUP 65536
/* Largest tile of a low-bit kernel. */
#define PTQ_LOWBIT_TOKENS 8
#define PTQ_LOWBIT_PANELS 8

/* Tokens that `ranges.add` takes at once. */
#define PTQ_RANGE_ROWS 8

/* Floats of a row of exponentials that are written at a time. */
#define PTQ_ROW_LANES 32

/* Fence after non-temporal stores. */
#if defined(__x86_64__) && defined(__GNUC__)
#define PTQ_STORE_FENCE() __builtin_ia32_sfence()
#else
#define PTQ_STORE_FENCE() ((void)0)
#endif

/* float32 products. nr is also the width of the panels of `solve` and `grid`, mr of their strips.
 */
typedef struct {
    int mr, nr;
    /* C (mr, nr) += sum over k < K of A[k * sa + i] * B[k * nr + r], k ascending. */
    void (*f32)(float *C, const float *A, ptrdiff_t sa, const float *B, ptrdiff_t K);
    /* sum (nr) += sum over a few columns (a strip's) of A * B. */
    void (*dot)(int64_t columns, const float *A, const float *B, double *sum);
    /* S (height, width), rows lds apart, += C, rows ldc apart. */
    void (*add)(float *S, int64_t lds, const float *C, int64_t ldc, int64_t height, int64_t width);
} ptq_gemm_kernels;

/* Words that will be read next, [start, end): a matrix unit waits for what is not in the second
 * cache, so its kernel fetches them meanwhile. */
typedef struct {
    const uint32_t *start, *end;
} ptq_ahead;

/* Products of pairs of bf16 tokens packed in 32 bits, low half first; gemm is NULL if unsupported.
 */
typedef struct {
    int mr, nr;
    int step;   /* the pairs of a panel are filled up to a multiple of it with zeros */
    int turned; /* panels are packed a second time as left operands, at the same places */
    /* As gemm.f32; both products of a pair are exact in float32. With `turned`, sa is ignored;
     * without, `ahead` is. */
    void (*gemm)(float *C, const uint32_t *A, ptrdiff_t sa, const uint32_t *B, ptrdiff_t K,
                 const ptq_ahead *ahead);
    /* Columns [c, c + nr) of `count` tokens into (ceil(count / 2), nr) words, and those of the left
     * operand if `turned`; absent columns and absent last tokens are zero. */
    void (*pack)(const uint16_t *X, int64_t ldx, const int64_t *rows, int64_t first, int64_t count,
                 int64_t c, int64_t columns, uint32_t *out, uint32_t *left);
    /* Around the calls of `gemm` of one thread, as in ptq_int8_kernels. */
    void (*enter)(void);
    void (*leave)(void);
} ptq_pairs_kernels;

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
    float *T;           /* (mr, nr) in: sum over earlier strips of E_k R_kj */
    float *E;           /* (width, nr) sweep: in and out; else out */
    float *dE;          /* (width, nr) sweep only: out, change of E */
    const float *hdiag; /* (width) sweep only: undamped diagonal of H, 0 for dead inputs */
    uint8_t *codes;     /* (width, nr) out */
    double *objective;  /* (nr) accumulated */
    double *error2;     /* (nr) solve only: sum of E^2, accumulated */
} ptq_strip_args;

typedef struct {
    /* Round the columns of a strip in turn, feeding each error to the later ones. */
    void (*quantize)(const ptq_strip_args *args);
    /* One coordinate-descent step per column of a strip. */
    void (*sweep)(const ptq_strip_args *args);
    /* X (width, nr) = (T + in-strip terms) / R_jj: column j of X R = T for one strip. The caller
     * keeps -X in N, so that the GEMM kernel can accumulate it. */
    void (*trisolve)(int width, const float *diag, float *T, float *N);
} ptq_solve_kernels;

/* Partial roundings of one row, PTQ_PATHS of them. */
typedef struct {
    /* T (width, paths) = sum over i < count of R[i * ldr + j] * E (count, paths). */
    void (*sums)(const float *R, ptrdiff_t ldr, const float *E, ptrdiff_t count, int width,
                 float *T);
} ptq_paths_kernels;

/* In double, each sum in the order of its terms: the same at every level. */
typedef struct {
    /* C (rows, columns) += sign * A (rows, depth) B (depth, columns); rows lda, ldb, ldc apart. */
    void (*product)(double sign, int64_t rows, int64_t columns, int64_t depth, const double *A,
                    int64_t lda, const double *B, int64_t ldb, double *C, int64_t ldc);
    void (*product_f32)(double sign, int64_t rows, int64_t columns, int64_t depth, const double *A,
                        int64_t lda, const float *B, int64_t ldb, double *C, int64_t ldc);
    /* y (n) += factor * x */
    void (*add)(int64_t n, double factor, const double *x, double *y);
    void (*add_f32)(int64_t n, double factor, const float *x, double *y);
} ptq_doubles_kernels;

/* Grids of a panel U (G, nr), one per lane. */
typedef struct {
    /* Round columns to nearest on their grid. */
    void (*quantize)(int64_t columns, const float *W, const float *scale, const float *zero,
                     int max_code, uint8_t *codes);
    /* Extremes of each lane and 0. */
    void (*range)(int64_t G, const float *U, float *low, float *high);
    /* Grid over the range times shrink. */
    void (*from_range)(const ptq_grid *grid, const float *low, const float *high,
                       const float *shrink, float *scale, float *zero);
    /* error (nr) += sum_j weight_j d_j^2 (weight NULL: |d_j|^norm). */
    void (*error)(const ptq_grid *grid, int64_t G, const float *U, const float *scale,
                  const float *zero, const float *weight, float *error);
    /* D (G, nr) = rounding error. */
    void (*residual)(const ptq_grid *grid, int64_t G, const float *U, const float *scale,
                     const float *zero, float *D);
    /* best (nr): for each lane the first i of the smallest errors[i * nr + lane]. */
    void (*best)(const float *errors, int steps, int *best);
} ptq_grid_kernels;

/* Tokens of a 16- or 32-bit dtype as floats. */
typedef struct {
    /* Columns [c, c + gemm.nr) of `count` tokens into (count, nr); absent columns are zero. */
    void (*pack)(ptq_dtype dtype, const void *X, int64_t ldx, const int64_t *rows, int64_t first,
                 int64_t count, int64_t c, int64_t columns, float *out);
    /* 1 if all `count` values are below the limit, rounded down to the dtype, in absolute value;
     * INFINITY: if all are finite. */
    int (*all_below)(ptq_dtype dtype, const void *x, int64_t count, float limit);
    /* n values, 0 if skip (may be NULL) is non-zero. */
    void (*widen)(ptq_dtype dtype, const void *x, const uint8_t *skip, int64_t n, float *out);
} ptq_tokens_kernels;

typedef struct {
    /* low, high, sum (columns) of PTQ_RANGE_ROWS tokens, which are added up in float32 first;
     * `ahead` holds the token that follows each of them in memory. ahead NULL: of one token. In
     * float16 Inf and NaN count as 65536 and more, or as Inf and NaN. */
    void (*add)(ptq_dtype dtype, const void *const *rows, const void *const *ahead, int64_t columns,
                float *low, float *high, double *sum);
} ptq_ranges_kernels;

/* n values of one token. */
typedef struct {
    /* Extremes of the values and 0. */
    void (*range)(const float *x, int64_t n, float *low, float *high);
    /* Codes clamp(round(x / scale + zero), low, high) as integers of 1 or 2 bytes. */
    void (*codes)(const float *x, int64_t n, float scale, float zero, int low, int high,
                  int code_bytes, void *codes);
    /* int8 codes, every step rounded to bfloat16; scale and zero are of that dtype. */
    void (*codes_bf16)(const float *x, int64_t n, float scale, float zero, int low, int high,
                       int8_t *codes);
    /* any[i] |= |x[i]| >= threshold */
    void (*outliers)(const float *x, int64_t n, float threshold, uint8_t *any);
} ptq_activations_kernels;

/* What one row of probabilities adds to the statistics of softmax quantization. */
typedef struct {
    double sum;    /* of the probabilities: float sums of 16 terms, then double */
    float low;     /* smallest, or 0 */
    int64_t code;  /* sum of code - zero */
    int64_t zeros; /* codes equal to zero */
} ptq_row_statistics;

/* Rows of attention of n keys. e (n, padded with zeros to a multiple of PTQ_ROW_LANES) holds
 * exponentials, factor is 1 / (their sum * the grid's scale), or 1 / scale on a grid of
 * exponentials or, with their roots in e, of squares. An entry in steps of the grid is
 * round(min(e * factor, top)) with top = max_code - zero, the most steps above 0. */
typedef struct {
    /* Smallest and largest value; NaN may be overlooked. */
    void (*range)(int64_t n, const float *x, float *low, float *high);
    /* e = exp(x - shift), for shift no less than any x, and its sum: float sums of at most 17
     * terms, then double. The first n values of next, any address, are fetched meanwhile. */
    double (*exp)(int64_t n, const float *x, float shift, const float *next, float *e);
    /* e = sqrt(e) */
    void (*root)(int64_t n, float *e);
    /* Sum of the steps, or of their squares. */
    int64_t (*code_sum)(int64_t n, const float *e, float factor, float top, int squares);
    /* out = scale * steps (or their squares) + shift, but 0 if x (which may be NULL) is -Inf, and 0
     * in [n, width). stream: with non-temporal stores; PTQ_STORE_FENCE() must follow. out may be x.
     */
    void (*values)(int64_t n, int64_t width, const float *e, float factor, float top,
                   const float *x, float scale, float shift, int squares, int stream, float *out);
    /* out = steps + zero as unsigned integers of 1 or 2 bytes. */
    void (*codes)(int64_t n, const float *e, float factor, float top, int zero, int code_bytes,
                  void *out);
    /* out = allowed ? x : absent; returns how many are allowed. */
    int64_t (*mask)(int64_t n, const float *x, const uint8_t *allowed, float absent, float *out);
    /* next: the row after this one, any address, fetched ahead. */
    void (*statistics)(int64_t n, const float *p, const float *next, const ptq_softmax_grid *grid,
                       ptq_row_statistics *out);
} ptq_softmax_kernels;

/* out (2) += sums of x^2 and (y - x)^2; signal, noise (n) += the same per column of one row. */
typedef struct {
    void (*f32)(int64_t n, const void *x, const void *y, double *out);
    void (*f64)(int64_t n, const void *x, const void *y, double *out);
    void (*columns_f32)(int64_t n, const void *x, const void *y, double *signal, double *noise);
    void (*columns_f64)(int64_t n, const void *x, const void *y, double *signal, double *noise);
} ptq_energy_kernels;

/* What one token of n values adds to the statistics of activations. */
typedef struct {
    /* out (3) = sum of x^2; sums of (x - mean)^2 and (x - mean)^4. */
    void (*moments)(const float *x, int64_t n, double *out);
    /* Sum of (x - scale * code)^2 for codes clamp(round(x / scale), -top, top). */
    double (*error)(const float *x, int64_t n, float scale, float top);
    /* most (n) = max(most, |x|), counts (n) += |x| >= threshold, and a histogram of |x|. */
    void (*magnitudes)(const float *x, int64_t n, float threshold, float *most, int64_t *counts,
                       int64_t *histogram);
} ptq_statistics_kernels;

/* What the results of one token have in common. */
typedef struct {
    double scale, zero;
    double sum;    /* of its codes less the zero-point */
    int32_t codes; /* sum of its codes */
} ptq_int8_row;

/* Products of signed 8-bit codes of tokens, packed in strips, and unsigned ones of weights in
 * panels (words.h). A strip is mr tokens, `token_bytes` for each and each word of weights; its
 * words are filled up to a multiple of `step` with zeros. */
typedef struct {
    int mr, panels; /* the tile of `dots` */
    int token_bytes, step;
    int offset; /* `dots` multiplies the weights' codes less 128 - offset */
    /* Codes of `tokens` rows of n, `stride` apart, into a strip; absent tokens are zero. */
    void (*pack)(const int8_t *codes, int64_t stride, int64_t n, int tokens, void *strip);
    /* C (mr, panels * PTQ_LANES) += products of tokens <= mr rows and panels <= panels whose first
     * words are `stride` words apart, modulo 2^32. Only matrix units heed `ahead`. */
    void (*dots)(int tokens, int panels, const void *strip, const uint32_t *B, int64_t stride,
                 int64_t words, int32_t *C, int64_t ldc, const ptq_ahead *ahead);
    /* Around the calls of `dots` of one thread, without ptq_should_stop; NULL: nothing to do. */
    void (*enter)(void);
    void (*leave)(void);
    /* y (n) = (C - row zero * sum_w - row sum * zero_w) * row scale * scale_w + bias, in double;
     * sums and zeros of codes less 128; bias may be NULL. */
    void (*finish)(const ptq_int8_row *row, int64_t n, const int32_t *C, const double *sum_w,
                   const double *zero_w, const double *scale_w, const float *bias, float *y);
} ptq_int8_kernels;

/* Panels of packed weights (words.h) times a tile of tokens. */
typedef struct {
    int bits, panels, tokens;
    int64_t groups;
    const int32_t *starts; /* (groups + 1) places */
    const uint32_t *words; /* from panel to panel word_step apart */
    int64_t word_step;
    const void *scales; /* (panels, groups, 16) */
    ptq_dtype scale_dtype;
    const uint8_t *zeros;     /* the same */
    const float *x;           /* as `arrange` left it */
    const float *sums;        /* (groups, tokens) of x; `fixed`: in units of code_scales */
    const int8_t *codes;      /* (places / 4, tokens, 4) of x; `fixed`: (..., tokens, 3, 4) */
    const int32_t *code_sums; /* (groups, tokens) */
    const float *code_scales; /* (groups, tokens) */
    float *y;                 /* (tokens, panels, 16), written */
} ptq_lowbit_args;

typedef struct {
    int tokens, panels; /* most of a call; tokens come in powers of two */
    /* Floats in which `arrange` keeps a step of `tokens` tokens. */
    int64_t (*floats)(int bits, int tokens);
    /* Rows (tokens, places), whole steps, as `f32` takes them. */
    void (*arrange)(int bits, int tokens, int64_t places, const float *rows, float *out);
    /* Of n values: in double, rounded once. */
    float (*sum)(const float *x, int64_t n);
    void (*f32)(const ptq_lowbit_args *args);
    int block_tokens; /* from so many on, `decode` and gemm.f32 are faster */
    /* Places [first, first + places) of a group, whole steps, of a panel as float weights in panels
     * of gemm.nr, (depth, nr) each: the panel's outputs from `lane` of the first on. */
    void (*decode)(const ptq_lowbit_args *args, int panel, int64_t group, int64_t first,
                   int64_t places, float *out, int64_t lane, int64_t depth);
    /* codes (n) = round(x / scale), scale = max |x| / 127; returns 0 if x holds NaN or Inf. The
     * same at every level. */
    int (*quantize)(const float *x, int64_t n, int8_t *codes, float *scale, int32_t *sum);
    /* Products and sums of a group are exact; then float operations in the same order at every
     * level: float(dot - zero * sum) * (scale * code scale), added group after group. */
    void (*int8)(const ptq_lowbit_args *args);
    /* digits (3, n), lowest first: x / scale rounded to an integer, scale a power of two and at
     * most 2^-22 of the largest |x|; *sum of these integers. NaN or Inf in x: scale is NaN. */
    void (*digits)(const float *x, int64_t n, int8_t *digits, int64_t stride, float *scale,
                   float *sum);
    /* As `f32` from digits, or NULL where that is not faster; exact sums of a group of at most
     * PTQ_FIXED_GROUP places, the same at every level that has it. */
    void (*fixed)(const ptq_lowbit_args *args);
    int fixed_bits, fixed_tokens; /* most with which it is faster than f32 */
    /* sums (panels, 16) of the products of codes of 8 bits with those of one token, all places,
     * modulo 2^32. */
    void (*dots)(const ptq_lowbit_args *args, int32_t *sums);
} ptq_lowbit_kernels;

/* One token in a decoder block: n floats that hold numbers of a dtype, float32 or bfloat16, to
 * which results are rounded where PyTorch rounds; cos, sin and weights are floats too. */
typedef struct {
    /* Sum of x^2, in double: the same at every level. */
    double (*squares)(const float *x, int64_t n);
    void (*round)(ptq_dtype dtype, int64_t n, float *x);
    /* y += x */
    void (*add)(ptq_dtype dtype, int64_t n, const float *x, float *y);
    /* out = weight * (x * factor) */
    void (*norm)(ptq_dtype dtype, int64_t n, const float *x, float factor, const float *weight,
                 float *out);
    /* x (2, half) turned by the angles of cos, sin (2, half) */
    void (*rotate)(ptq_dtype dtype, int64_t half, const float *cos, const float *sin, float *x);
    /* out = gate / (1 + e^-gate) * up */
    void (*swish)(ptq_dtype dtype, int64_t n, const float *gate, const float *up, float *out);
    /* out (n) of the dtype */
    void (*narrow)(ptq_dtype dtype, int64_t n, const float *x, void *out);
    /* Not rounded: scores (n) = scale * the products of q (d) with keys, `stride` bytes apart. */
    void (*scores)(ptq_dtype dtype, int64_t n, int64_t d, const float *q, const char *keys,
                   int64_t stride, float scale, float *scores);
    /* Not rounded: out (d) = factor * sum of p_t times the values of t. */
    void (*mix)(ptq_dtype dtype, int64_t n, int64_t d, const float *p, const char *values,
                int64_t stride, float factor, float *out);
} ptq_decoder_kernels;

typedef struct {
    const char *name;
    ptq_gemm_kernels gemm;
    ptq_pairs_kernels pairs;
    ptq_solve_kernels solve;
    ptq_paths_kernels paths;
    ptq_doubles_kernels doubles;
    ptq_grid_kernels grid;
    ptq_tokens_kernels tokens;
    ptq_ranges_kernels ranges;
    ptq_activations_kernels activations;
    ptq_softmax_kernels softmax;
    ptq_energy_kernels energy;
    ptq_int8_kernels int8;
    ptq_statistics_kernels statistics;
    ptq_lowbit_kernels lowbit;
    ptq_decoder_kernels decoder;
} ptq_kernels;

extern const ptq_kernels ptq_kernels_base;
#if defined(__x86_64__) && defined(__GNUC__)
#define PTQ_X86 1
extern const ptq_kernels ptq_kernels_avx2;
extern const ptq_kernels ptq_kernels_avx512;
/* Features: put their groups over those of a copy of the level's table. */
void ptq_add_avx512_vnni(ptq_kernels *avx512);
void ptq_add_avx512_bf16(ptq_kernels *avx512);
void ptq_add_avx512_amx(ptq_kernels *avx512);
#endif
#if defined(__aarch64__) && defined(__GNUC__)
#define PTQ_ARM64 1
extern const ptq_kernels ptq_kernels_neon;
void ptq_add_neon_dotprod(ptq_kernels *neon);
#endif

/* The table chosen by ptq_cpu_select. An entry point of the core asks once and passes it down. */
const ptq_kernels *ptq_kernels_get(void);

#endif
