/* target.c - (W F + D) (H + shift)^-1 in double, by Cholesky: what a layer's weights lack if its
 * inputs, or the stream it writes into, carry errors.
 *
 * A = L L^T is kept whole, L below the diagonal and its transpose above: then every product, of the
 * left-looking factorization and of both solves, is a plain one of row-major matrices. */
#include <float.h>
#include <limits.h>
#include <math.h>

#include "blas.h"
#include "internal.h"

enum {
    BLOCK = 32,  /* columns that are solved one by one */
    ROWS = 32,   /* rows per task with the built-in product */
    DEPTH = 512, /* columns of W that are widened at a time */
    WIDTH = 128, /* columns of F at a time with the built-in product: its rows stay cached */
};

typedef struct {
    const ptq_target_args *a;
    const ptq_kernels *k;
    const ptq_blas *blas;
    int64_t n;
    double *A;      /* (n, n) */
    double *wide;   /* (threads, tile, DEPTH) of W */
    int64_t tile;   /* rows per task */
    int64_t k0, k1; /* block column that is factorized */
    int64_t bad;    /* pivot that failed, or -1 */
} job;

/* C (rows, columns) += sign * A (rows, depth) B (depth, columns). Row-major is column-major of the
 * transposed: C^T = B^T A^T. */
static void product(const job *t, double sign, int64_t rows, int64_t columns, int64_t depth,
                    const double *A, int64_t lda, const double *B, int64_t ldb, double *C,
                    int64_t ldc) {
    if (rows < 1 || columns < 1 || depth < 1) return;
    if (!t->blas) {
        t->k->doubles.product(sign, rows, columns, depth, A, lda, B, ldb, C, ldc);
        return;
    }
    char plain = 'N';
    int m = (int)columns, n = (int)rows, k = (int)depth;
    int la = (int)lda, lb = (int)ldb, lc = (int)ldc;
    double one = 1.0;
    t->blas->dgemm(&plain, &plain, &m, &n, &k, &sign, (double *)(uintptr_t)B, &lb,
                   (double *)(uintptr_t)A, &la, &one, C, &lc);
}

/* X (rows, width), stride n, becomes X U^-1 with U (width, width) upper, stride n. */
static void solve_upper(int64_t n, int64_t rows, int64_t width, const double *U, double *X) {
    for (int64_t r = 0; r < rows; r++) {
        double *restrict x = X + r * n;
        for (int64_t k = 0; k < width; k++) {
            const double *restrict u = U + k * n;
            const double value = x[k] /= u[k];
            for (int64_t j = k + 1; j < width; j++) x[j] -= value * u[j];
        }
    }
}

/* The same with L lower, from its last column to its first. */
static void solve_lower(int64_t n, int64_t rows, int64_t width, const double *L, double *X) {
    for (int64_t r = 0; r < rows; r++) {
        double *restrict x = X + r * n;
        for (int64_t k = width - 1; k >= 0; k--) {
            const double *restrict l = L + k * n;
            const double value = x[k] /= l[k];
            for (int64_t j = 0; j < k; j++) x[j] -= value * l[j];
        }
    }
}

/* ---- factorization ---------------------------------------------------------------------------
 */

static void load_task(void *ctx, int64_t i, int thread) {
    (void)thread;
    const job *t = ctx;
    const float *h = t->a->H + i * t->n;
    double *a = t->A + i * t->n;
    for (int64_t j = 0; j < t->n; j++) a[j] = (double)h[j];
    a[i] += t->a->shift[i];
}

/* The block on the diagonal. */
static void pivot_task(void *ctx, int64_t task, int thread) {
    (void)task;
    (void)thread;
    job *t = ctx;
    const int64_t n = t->n, k0 = t->k0, width = t->k1 - k0;
    double *A = t->A + k0 * n + k0;
    product(t, -1.0, width, width, k0, t->A + k0 * n, n, t->A + k0, n, A, n);
    for (int64_t j = 0; j < width; j++) {
        double pivot = A[j * n + j];
        for (int64_t k = 0; k < j; k++) pivot -= A[j * n + k] * A[j * n + k];
        const double scale = (double)t->a->H[(k0 + j) * (n + 1)] + t->a->shift[k0 + j];
        if (!(pivot > 4.0 * DBL_EPSILON * scale) || !isfinite(pivot)) { /* noise, if not negative */
            t->bad = k0 + j;
            return;
        }
        const double root = A[j * n + j] = sqrt(pivot);
        for (int64_t i = j + 1; i < width; i++) {
            double x = A[i * n + j];
            for (int64_t k = 0; k < j; k++) x -= A[i * n + k] * A[j * n + k];
            A[i * n + j] = A[j * n + i] = x / root;
        }
    }
}

/* Rows below the diagonal block: L_ik, and its transpose above the diagonal. */
static void column_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const job *t = ctx;
    const int64_t n = t->n, i = t->k1 + task * t->tile, rows = ptq_min64(t->tile, n - i);
    const int64_t width = t->k1 - t->k0;
    double *X = t->A + i * n + t->k0;
    product(t, -1.0, rows, width, t->k0, t->A + i * n, n, t->A + t->k0, n, X, n);
    solve_upper(n, rows, width, t->A + t->k0 * n + t->k0, X);
    for (int64_t r0 = 0; r0 < rows; r0 += 16)
        for (int64_t j = 0; j < width; j++)
            for (int64_t r = r0; r < ptq_min64(r0 + 16, rows); r++)
                t->A[(t->k0 + j) * n + i + r] = X[r * n + j];
}

static ptq_status factorize(job *t, int threads) {
    const int64_t n = t->n;
    ptq_status status = ptq_parallel_for(n, threads, load_task, t);
    for (t->k0 = 0; t->k0 < n && !status; t->k0 = t->k1) {
        t->k1 = ptq_min64(t->k0 + BLOCK, n);
        status = ptq_parallel_for(1, 1, pivot_task, t);
        if (!status && t->bad >= 0) return PTQ_NOT_PD;
        if (!status)
            status = ptq_parallel_for(ptq_ceil_div(n - t->k1, t->tile), threads, column_task, t);
    }
    return status;
}

/* ---- solves ----------------------------------------------------------------------------------
 */

/* Rows of W F + D. */
static void load_rows(const job *t, int64_t row, int64_t rows, double *wide) {
    const ptq_target_args *a = t->a;
    const int64_t n = t->n;
    double *X = a->out + row * n;
    if (a->D) memcpy(X, a->D + row * n, sizeof(double) * (size_t)(rows * n));
    else memset(X, 0, sizeof(double) * (size_t)(rows * n));
    for (int64_t k = 0; a->W && k < n && !ptq_should_stop(); k += DEPTH) {
        const int64_t depth = ptq_min64(DEPTH, n - k);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < depth; j++)
                wide[r * DEPTH + j] = (double)a->W[(row + r) * n + k + j];
        const int64_t step = t->blas ? PTQ_BLAS_TILE : WIDTH;
        for (int64_t j = 0; j < n && !ptq_should_stop(); j += step)
            product(t, 1.0, rows, ptq_min64(step, n - j), depth, wide, DEPTH, a->F + k * n + j, n,
                    X + j, n);
    }
}

static void rows_task(void *ctx, int64_t task, int thread) {
    const job *t = ctx;
    const int64_t n = t->n, row = task * t->tile, rows = ptq_min64(t->tile, t->a->rows - row);
    double *X = t->a->out + row * n;
    load_rows(t, row, rows, t->wide + thread * t->tile * DEPTH);
    for (int64_t k = 0; k < n && !ptq_should_stop(); k += BLOCK) { /* Y U = X */
        const int64_t width = ptq_min64(BLOCK, n - k);
        product(t, -1.0, rows, width, k, X, n, t->A + k, n, X + k, n);
        solve_upper(n, rows, width, t->A + k * n + k, X + k);
    }
    for (int64_t r = 0; t->a->below && r < rows; r++)
        for (int64_t j = row + r; j < n; j++) X[r * n + j] = 0.0;
    for (int64_t k = (n - 1) / BLOCK * BLOCK; k >= 0 && !ptq_should_stop(); k -= BLOCK) {
        const int64_t width = ptq_min64(BLOCK, n - k), after = k + width; /* Z L = Y */
        product(t, -1.0, rows, width, n - after, X + after, n, t->A + after * n + k, n, X + k, n);
        solve_lower(n, rows, width, t->A + k * n + k, X + k);
    }
}

ptq_status ptq_target_correction(const ptq_target_args *a, int64_t *info, int threads) {
    *info = -1;
    if (a->rows < 1 || a->n < 1 || (a->below && a->rows != a->n)) return PTQ_INVALID;
    job t = {.a = a, .k = ptq_kernels_get(), .n = a->n, .bad = -1};
    if (a->n <= INT_MAX) t.blas = ptq_blas_get();
    threads = ptq_threads_for_work(threads, (double)a->n * (double)a->n * (double)a->n / 16.0);
    if (t.blas) threads = 1;
    t.tile = t.blas ? PTQ_BLAS_TILE : ROWS;
    t.A = ptq_alloc_large(a->n * a->n, sizeof(double));
    t.wide = ptq_alloc(threads * t.tile * DEPTH, sizeof(double));
    ptq_status status = t.A && t.wide ? factorize(&t, threads) : PTQ_NOMEM;
    if (status == PTQ_NOT_PD) *info = t.bad;
    if (!status) status = ptq_parallel_for(ptq_ceil_div(a->rows, t.tile), threads, rows_task, &t);
    free(t.A);
    free(t.wide);
    return status;
}
