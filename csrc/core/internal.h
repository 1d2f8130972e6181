/* internal.h - helpers shared by the core's own files; not part of its contract. `threads` is
 * resolved here, at least 1: see ptq_parallel_for. */
#ifndef PTQ_INTERNAL_H
#define PTQ_INTERNAL_H

#include <stdlib.h>
#include <string.h>

#include "../kernels/kernels.h"
#include "ptq.h"

/* 64-byte aligned memory of `count` items of `size` bytes, or NULL (also on overflow). */
static inline void *ptq_alloc(int64_t count, size_t size) {
    void *p = NULL;
    if (count < 0 || (count > 0 && (size_t)count > (SIZE_MAX - 64) / size)) return NULL;
    size_t bytes = ((size_t)count * size + 63) / 64 * 64;
    return posix_memalign(&p, 64, bytes ? bytes : 64) ? NULL : p;
}

/* The same for much that is used at once: on large pages where the system has them and lets us,
 * which are mapped in a fraction of the time (caches.c). */
void *ptq_alloc_large(int64_t count, size_t size);

static inline int64_t ptq_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t ptq_round_up(int64_t a, int64_t b) { return ptq_ceil_div(a, b) * b; }
static inline int64_t ptq_min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ptq_max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* Bytes of the first and the second data cache of a core (caches.c). */
int64_t ptq_first_cache(void);
int64_t ptq_second_cache(void);

/* Codes of n values of one token, int8 or above 8 bits int16 (activations.c). */
void ptq_signed_grid_codes(const ptq_kernels *k, const ptq_signed_grid *grid, const float *x,
                           int64_t n, float scale, int zero, void *codes);

/* Whether sizes and groups of packed weights belong together, no group having more places than
 * `longest` (lowbit.c). */
int ptq_packed_valid(const ptq_packed *w, int64_t longest);

/* A size of blocks, or what an environment variable says in a build for measuring (-DPTQ_TUNE). */
#ifdef PTQ_TUNE
static inline int64_t ptq_tuned(const char *variable, int64_t size) {
    const char *given = getenv(variable);
    return given ? atoll(given) : size;
}
#else
#define ptq_tuned(variable, size) (size)
#endif

/* An upper triangular matrix cut into strips of at most mr columns; strip s holds, for
 * k = 0 .. start+width-1, mr consecutive values of row k (zero beyond width and below the
 * diagonal): the left operand of the GEMM kernel. Strips never straddle a multiple of `align`. */
typedef struct {
    int64_t count;
    int64_t *start, *offset;
    int *width;
    float *data;
} ptq_strips;

typedef enum { PTQ_STRIPS_UPPER, PTQ_STRIPS_HALF_DIAGONAL, PTQ_STRIPS_FULL } ptq_strips_kind;

/* Cut the n columns of M[index, index] (leading dimension ld, index NULL: as it is) into strips.
 * UPPER: entries on and above the diagonal. HALF_DIAGONAL: the same with the diagonal halved, so
 * that 2 * sum_j e_j (strips^T e)_j = e M e^T. FULL: all n rows of every strip. */
ptq_status ptq_strips_make(const ptq_kernels *k, ptq_strips *strips, const float *M, int64_t ld,
                           const int64_t *index, int64_t n, int64_t align, ptq_strips_kind kind,
                           int threads);
void ptq_strips_free(ptq_strips *strips);

/* The diagonal blocks of H that the Hessian grid of each group reads. */
typedef struct {
    int64_t groups, per_group;
    ptq_strips *block; /* groups * per_group of them, HALF_DIAGONAL */
    float *diagonal;   /* (n) diagonal of H in the same order */
} ptq_grid_blocks;

ptq_status ptq_grid_blocks_make(const ptq_kernels *k, ptq_grid_blocks *blocks, const float *H,
                                int64_t n, int64_t G, const int64_t *perm, int threads);
void ptq_grid_blocks_free(ptq_grid_blocks *blocks);

/* The error (nr) of a candidate grid, of the caller's own. */
typedef void (*ptq_grid_error)(void *ctx, const float *scale, const float *zero, float *error);
/* The shrunk range of U (G, nr) whose grid has the least error of all steps: s, z (nr). */
void ptq_grid_fit_all(const ptq_kernels *k, const ptq_grid *grid, int64_t G, const float *U,
                      ptq_grid_error error, void *ctx, float *s, float *z);
/* Floats of scratch that ptq_grid_fit needs. */
int64_t ptq_grid_fit_work(const ptq_grid *grid);
/* Fit the grid of group g to U (G, nr): s, z (nr). blocks may be NULL unless the method reads H. */
void ptq_grid_fit(const ptq_kernels *k, const ptq_grid *grid, int64_t G, const float *U,
                  const ptq_grid_blocks *blocks, int64_t g, float *work, float *s, float *z);
/* For fitting scales again: M of refit.c in strips that end with groups. */
typedef struct {
    int64_t n, G, groups;
    ptq_strips H;   /* HALF_DIAGONAL, columns in the order of their groups */
    int64_t *place; /* (n) where each of them is in quantization order */
} ptq_refit;

/* A panel in quantization order, scales and zeros (groups, nr), objective (nr). */
typedef struct {
    const ptq_grid *grid;
    const float *W, *zeros;
    const uint8_t *codes;
    float *E, *scales;
    double *objective;
} ptq_refit_panel;

/* group (n): that of the i-th quantized column; each has G. */
ptq_status ptq_refit_make(const ptq_kernels *k, ptq_refit *refit, const float *H, int64_t n,
                          int64_t G, const int64_t *perm, const int32_t *group, int threads);
void ptq_refit_free(ptq_refit *refit);
/* Floats of scratch, aligned as doubles are, that ptq_refit_scales needs. */
int64_t ptq_refit_work(const ptq_refit *refit, const ptq_kernels *k);
/* Scales, E and objective of the rows whose objective falls; the codes stay. */
void ptq_refit_scales(const ptq_refit *refit, const ptq_kernels *k, const ptq_refit_panel *panel,
                      float *work);

/* Rows [row, row + nr) of W into a panel (n, nr); missing rows are zero. */
void ptq_panel_load(const ptq_kernels *k, const float *W, int64_t rows, int64_t n, int64_t row,
                    float *panel);

/* Replace objective (nr), sums e H e^T of the columns e of E (n, nr), by values computed in double
 * where their terms have cancelled so far that little but rounding is left: below `least` (nr), or
 * far below what the diagonal of H allows. What is below 0 by no more than rounding becomes 0; an
 * H that is not positive semidefinite gives its negative values. index: the rows of H in the order
 * of E, NULL: as they are. */
void ptq_objective_repair(const float *H, int64_t n, const int64_t *index, const float *E,
                          int64_t nr, const double *least, double *objective);

/* ptq_channel_ranges on given kernels and resolved threads. */
ptq_status ptq_column_ranges(const ptq_kernels *k, const void *X, int64_t n, int64_t ldx,
                             ptq_dtype dtype, const int64_t *rows, int64_t tokens, float *low,
                             float *high, double *sum, int threads);

#endif
