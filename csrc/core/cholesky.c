/* cholesky.c - H = R R^T with R upper triangular, by a left-looking Cholesky factorization of the
 * matrix with rows and columns reversed.
 *
 * Reversed and permuted, the matrix is A; L, lower, is kept as panels of nr rows stored (k, nr),
 * which serve as both operands of the GEMM kernel. For each block column: the diagonal block is
 * updated by all earlier columns and factorized, then the panels below it, independent of each
 * other, are updated and solved against it. */
#include <float.h>
#include <limits.h>
#include <math.h>

#include "blas.h"
#include "internal.h"

enum { DEPTH = 512 }; /* columns of L per pass, so that its strips stay in the second cache */

typedef struct {
    const ptq_kernels *k;
    const float *H;
    const double *shift;
    const int64_t *perm;
    int64_t n, padded; /* padded: n up to whole panels, the padding an identity matrix */
    int64_t width;     /* columns per block */
    int64_t j0, j1;    /* current block */
    float *L;          /* (panels, padded, nr) */
    float *T;          /* (threads + panels per block, width, nr) */
    float *diagonal;   /* (panels per block strips) triangle of the current block as strips */
    float *R;
} factor;

/* Original index of row i of the reversed matrix. */
static inline int64_t source(const factor *f, int64_t i) { return f->perm[f->n - 1 - i]; }

/* T (columns j0..j1, nr) = -A of panel p, row after row of the symmetric H: down its columns every
 * value would lie on a page of its own. */
static void load_panel(const factor *f, int64_t p, float *T) {
    const int64_t nr = f->k->gemm.nr, n = f->n, first = p * nr, end = ptq_min64(f->j1, n);
    memset(T, 0, sizeof(float) * (size_t)((f->j1 - f->j0) * nr));
    for (int64_t r = 0; r < ptq_min64(nr, n - first); r++) {
        const float *row = f->H + source(f, first + r) * n;
        float *out = T + r;
        for (int64_t c = f->j0; c < end; c++, out += nr) *out = -row[source(f, c)];
    }
    for (int64_t i = ptq_max64(first, f->j0); i < ptq_min64(first + nr, f->j1); i++) {
        const int64_t from = i < n ? source(f, i) : 0;
        const float a = i < n ? (float)((double)f->H[from * n + from] + f->shift[from]) : 1.0f;
        T[(i - f->j0) * nr + i - first] = -a;
    }
}

/* T += L[panel p, k0:k1] L[block rows, k0:k1]^T for strips [s0, s1) of the block's columns. */
static void update_panel(const factor *f, int64_t p, float *T, int64_t c0, int64_t c1,
                         int64_t end) {
    const int64_t nr = f->k->gemm.nr, mr = f->k->gemm.mr;
    for (int64_t k0 = 0; k0 < end; k0 += DEPTH) {
        const int64_t depth = ptq_min64(DEPTH, end - k0);
        for (int64_t c = c0; c < c1; c += mr) {
            const int64_t row = f->j0 + c;
            const float *A = f->L + (row / nr * f->padded + k0) * nr + row % nr;
            f->k->gemm.f32(T + c * nr, A, nr, f->L + (p * f->padded + k0) * nr, depth);
        }
    }
}

typedef struct {
    factor *f;
    int64_t strips;
} diagonal_job;

static void diagonal_update(void *ctx, int64_t task, int thread) {
    (void)thread;
    const diagonal_job *d = ctx;
    const factor *f = d->f;
    const int64_t p = task / d->strips, c = task % d->strips * f->k->gemm.mr;
    float *T = f->T + p * f->width * f->k->gemm.nr;
    if (c / f->k->gemm.nr > p) return; /* above the diagonal */
    update_panel(f, f->j0 / f->k->gemm.nr + p, T, c, c + f->k->gemm.mr, f->j0);
}

/* Solve one strip (columns c..c+mr of the block) of panel p whose T holds all earlier terms:
 * x_j = (a_j - sum_i x_i L_ji) / L_jj, with -a in T. Rows above the diagonal become 0. */
static void finish_strip(const factor *f, int64_t p, const float *tri, float *T, int64_t c) {
    const int64_t nr = f->k->gemm.nr, mr = f->k->gemm.mr;
    float N[PTQ_MAX_TILE];
    /* strip_trisolve returns N = -T / L_jj = x and accumulates with it */
    f->k->solve.trisolve((int)mr, tri, T + c * nr, N);
    memcpy(f->L + (p * f->padded + f->j0 + c) * nr, N, sizeof(float) * (size_t)(mr * nr));
}

static double pivot_scale(const factor *f, int64_t i) {
    if (i >= f->n) return 1.0;
    const int64_t from = source(f, i);
    return (double)f->H[from * f->n + from] + f->shift[from];
}

/* Factorize the diagonal tile of the strip at column c of the block, in double; T points at the
 * strip. Returns -1, or the failing column of the strip. */
static int64_t factor_tile(const factor *f, int64_t c, const float *T, float *tri) {
    const int64_t lane = c % f->k->gemm.nr;
    const int64_t nr = f->k->gemm.nr, mr = f->k->gemm.mr;
    double a[PTQ_MAX_MR][PTQ_MAX_MR];
    for (int64_t j = 0; j < mr; j++) {
        for (int64_t i = j; i < mr; i++) {
            double x = -(double)T[j * nr + lane + i];
            for (int64_t k = 0; k < j; k++) x -= a[i][k] * a[j][k];
            if (i > j) {
                a[i][j] = x / a[j][j];
                continue;
            }
            /* A pivot at the level of rounding is noise, whatever its sign. */
            if (!(x > 4.0 * FLT_EPSILON * pivot_scale(f, f->j0 + c + j)) || !isfinite(x)) return j;
            a[j][j] = sqrt(x);
        }
        /* strips are stored (row k, column j): the in-strip triangle R_kj is L_jk */
        for (int64_t i = j; i < mr; i++) tri[j * mr + i] = (float)a[i][j];
    }
    return -1;
}

/* Factorize the diagonal block, its T already updated. Returns the failing column or -1. */
static int64_t diagonal_factor(factor *f) {
    const int64_t nr = f->k->gemm.nr, mr = f->k->gemm.mr, p0 = f->j0 / nr,
                  count = (f->j1 - f->j0) / nr;
    for (int64_t c = 0; c < f->j1 - f->j0; c += mr) {
        const int64_t own = c / nr;
        float *tri = f->diagonal + c * mr;
        for (int64_t q = own; q < count; q++) {
            float *T = f->T + q * f->width * nr;
            const int64_t row = f->j0 + c;
            f->k->gemm.f32(T + c * nr, f->L + (row / nr * f->padded + f->j0) * nr + row % nr, nr,
                           f->L + ((p0 + q) * f->padded + f->j0) * nr, c);
            if (q == own) {
                memset(tri, 0, sizeof(float) * (size_t)(mr * mr));
                const int64_t bad = factor_tile(f, c, T + c * nr, tri);
                if (bad >= 0) return f->j0 + c + bad;
            }
            finish_strip(f, p0 + q, tri, T, c);
        }
        /* exact zeros above the diagonal, and the tile itself as factorized */
        float *Lp = f->L + ((p0 + own) * f->padded + f->j0 + c) * nr;
        for (int64_t j = 0; j < mr; j++) {
            for (int64_t r = 0; r < c % nr; r++) Lp[j * nr + r] = 0.0f;
            for (int64_t i = 0; i < mr; i++)
                Lp[j * nr + c % nr + i] = i < j ? 0.0f : tri[j * mr + i];
        }
        for (int64_t q = 0; q < own; q++)
            memset(f->L + ((p0 + q) * f->padded + f->j0 + c) * nr, 0,
                   sizeof(float) * (size_t)(mr * nr));
    }
    return -1;
}

static void panel_task(void *ctx, int64_t task, int thread) {
    const factor *f = ctx;
    const int64_t nr = f->k->gemm.nr, mr = f->k->gemm.mr, p = f->j1 / nr + task,
                  width = f->j1 - f->j0;
    float *T = f->T + thread * f->width * nr;
    load_panel(f, p, T);
    update_panel(f, p, T, 0, width, f->j0);
    for (int64_t c = 0; c < width; c += mr) {
        const int64_t row = f->j0 + c;
        f->k->gemm.f32(T + c * nr, f->L + (row / nr * f->padded + f->j0) * nr + row % nr, nr,
                       f->L + (p * f->padded + f->j0) * nr, c);
        finish_strip(f, p, f->diagonal + c * mr, T, c);
    }
}

/* The rows of R that are panel p of L, R[k][j] = L[n-1-k][n-1-j], a few columns at a time: a line
 * is read once and written once. */
static void store_task(void *ctx, int64_t p, int thread) {
    (void)thread;
    enum { COLUMNS = 64 };
    const factor *f = ctx;
    const int64_t nr = f->k->gemm.nr, n = f->n, last = ptq_min64(n, (p + 1) * nr);
    const float *L = f->L + p * f->padded * nr;
    for (int64_t c0 = 0; c0 < last; c0 += COLUMNS)
        for (int64_t i = ptq_max64(p * nr, c0); i < last; i++) {
            float *row = f->R + (n - 1 - i) * n + n - 1;
            for (int64_t c = c0; c < ptq_min64(i + 1, c0 + COLUMNS); c++)
                row[-c] = L[c * nr + i % nr];
        }
}

static ptq_status factor_blocks(factor *f, int64_t *info, int threads) {
    const int64_t nr = f->k->gemm.nr;
    for (f->j0 = 0; f->j0 < f->padded; f->j0 = f->j1) {
        f->j1 = ptq_min64(f->j0 + f->width, f->padded);
        const int64_t panels = (f->j1 - f->j0) / nr;
        for (int64_t q = 0; q < panels; q++)
            load_panel(f, f->j0 / nr + q, f->T + q * f->width * nr);
        diagonal_job job = {f, (f->j1 - f->j0) / f->k->gemm.mr};
        ptq_status status = PTQ_OK;
        if (f->j0) status = ptq_parallel_for(panels * job.strips, threads, diagonal_update, &job);
        if (status) return status;
        const int64_t bad = diagonal_factor(f);
        if (bad >= 0) {
            *info = bad < f->n ? source(f, bad) : -1;
            return PTQ_NOT_PD;
        }
        status = ptq_parallel_for((f->padded - f->j1) / nr, threads, panel_task, f);
        if (status) return status;
    }
    return ptq_parallel_for(f->padded / nr, threads, store_task, f);
}

/* ---- by BLAS -------------------------------------------------------------------------------
 * Right-looking, on A as row-major lower, which is column-major upper: A = U^T U. */

typedef struct {
    const factor *f;
    const ptq_blas *blas;
    float *A;      /* (n, n) */
    int64_t k, k1; /* rows of U that are computed */
    int64_t tiles; /* along the rest of a row */
    int info;
} blas_factor;

/* Rows [64 b, 64 b + 64) of the lower triangle of A. */
static void gather_task(void *ctx, int64_t b, int thread) {
    (void)thread;
    const blas_factor *g = ctx;
    const factor *f = g->f;
    for (int64_t i = b * 64; i < ptq_min64(b * 64 + 64, f->n); i++) {
        const int64_t from = source(f, i);
        const float *row = f->H + from * f->n;
        float *a = g->A + i * f->n;
        for (int64_t j = 0; j <= i; j++) a[j] = row[source(f, j)];
        a[i] = (float)((double)a[i] + f->shift[from]);
    }
}

/* The block at k on the diagonal. */
static void pivot_block(blas_factor *g) {
    char upper = 'U';
    int size = (int)(g->k1 - g->k), n = (int)g->f->n, result = 0;
    g->blas->spotrf(&upper, &size, g->A + g->k * g->f->n + g->k, &n, &result);
    g->info = result > 0 ? (int)g->k + result : result;
}

/* Tile j of the block row: U_kj = U_kk^-T A_kj. */
static void solve_tile(const blas_factor *g, int64_t j) {
    const int64_t n = g->f->n;
    char left = 'L', upper = 'U', turned = 'T', plain = 'N';
    int height = (int)(g->k1 - g->k), width = (int)ptq_min64(PTQ_BLAS_TILE, n - j), ld = (int)n;
    float one = 1.0f;
    g->blas->strsm(&left, &upper, &turned, &plain, &height, &width, &one, g->A + g->k * n + g->k,
                   &ld, g->A + j * n + g->k, &ld);
}

/* A_ij -= U_ki^T U_kj. */
static void subtract_tile(const blas_factor *g, int64_t i, int64_t j) {
    const int64_t n = g->f->n;
    char upper = 'U', turned = 'T', plain = 'N';
    int height = (int)ptq_min64(PTQ_BLAS_TILE, n - i), width = (int)ptq_min64(PTQ_BLAS_TILE, n - j);
    int depth = (int)(g->k1 - g->k), ld = (int)n;
    float one = 1.0f, minus = -1.0f, *Ui = g->A + i * n + g->k, *A = g->A + j * n + i;
    if (i == j) g->blas->ssyrk(&upper, &turned, &width, &depth, &minus, Ui, &ld, &one, A, &ld);
    else
        g->blas->sgemm(&turned, &plain, &height, &width, &depth, &minus, Ui, &ld,
                       g->A + j * n + g->k, &ld, &one, A, &ld);
}

/* Task 0, then `tiles` tasks, then those of the rest of A, in this order. */
static void blas_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    blas_factor *g = ctx;
    if (task == 0) pivot_block(g);
    if (task == 0 || g->info) return;
    if (task <= g->tiles) {
        solve_tile(g, g->k1 + (task - 1) * PTQ_BLAS_TILE);
        return;
    }
    const int64_t t = task - 1 - g->tiles;
    int64_t tj = 0;
    while ((tj + 1) * (tj + 2) / 2 <= t) tj++;
    const int64_t ti = t - tj * (tj + 1) / 2;
    subtract_tile(g, g->k1 + ti * PTQ_BLAS_TILE, g->k1 + tj * PTQ_BLAS_TILE);
}

/* Rows [64 b, 64 b + 64) of R from A. */
static void turn_task(void *ctx, int64_t b, int thread) {
    (void)thread;
    const blas_factor *g = ctx;
    const int64_t n = g->f->n;
    for (int64_t k = b * 64; k < ptq_min64(b * 64 + 64, n); k++)
        for (int64_t j = k; j < n; j++) g->f->R[k * n + j] = g->A[(n - 1 - k) * n + (n - 1 - j)];
}

static ptq_status blas_blocks(blas_factor *g, int64_t *info, int threads) {
    const factor *f = g->f;
    const int64_t n = f->n, stripes = ptq_ceil_div(n, 64);
    ptq_status status = ptq_parallel_for(stripes, threads, gather_task, g);
    for (; g->k < n && !status && !g->info; g->k = g->k1) {
        g->k1 = ptq_min64(g->k + PTQ_BLAS_DEPTH, n);
        g->tiles = ptq_ceil_div(n - g->k1, PTQ_BLAS_TILE);
        const int64_t tasks = 1 + g->tiles + g->tiles * (g->tiles + 1) / 2;
        status = ptq_parallel_for(tasks, 1, blas_task, g);
    }
    if (status || g->info < 0) return status ? status : PTQ_BLAS;
    /* A pivot at the level of rounding is noise here too, see factor_tile. */
    for (int64_t i = 0; i < n && !g->info; i++) {
        const double root = (double)g->A[i * n + i];
        if (!(root * root > 4.0 * FLT_EPSILON * pivot_scale(f, i))) g->info = (int)(i + 1);
    }
    if (!g->info) return ptq_parallel_for(stripes, threads, turn_task, g);
    *info = source(f, g->info - 1);
    return PTQ_NOT_PD;
}

static ptq_status factor_blas(const factor *f, const ptq_blas *blas, int64_t *info, int threads) {
    blas_factor g = {.f = f, .blas = blas, .A = ptq_alloc_large(f->n * f->n, sizeof(float))};
    if (!g.A) return PTQ_NOMEM;
    const ptq_status status = blas_blocks(&g, info, threads);
    free(g.A);
    return status;
}

ptq_status ptq_factor(const float *H, int64_t n, const int64_t *perm, const double *shift, float *R,
                      int64_t *info, int threads) {
    *info = -1;
    if (n < 1) return PTQ_INVALID;
    const ptq_kernels *k = ptq_kernels_get();
    factor f = {.k = k, .H = H, .shift = shift, .perm = perm, .n = n, .R = R};
    threads = ptq_threads_for_work(threads, (double)n * (double)n * (double)n / 16.0);
    const ptq_blas *blas = ptq_blas_get();
    if (blas && n <= INT_MAX) return factor_blas(&f, blas, info, threads);
    f.padded = ptq_ceil_div(n, k->gemm.nr) * k->gemm.nr;
    f.width = ptq_max64(1, 2 * PTQ_MAX_NR / k->gemm.nr) * k->gemm.nr;
    const int64_t slots = threads + f.width / k->gemm.nr;
    f.L = ptq_alloc_large(f.padded * f.padded, sizeof(float));
    f.T = ptq_alloc(slots * f.width * k->gemm.nr, sizeof(float));
    f.diagonal = ptq_alloc(f.width * k->gemm.mr, sizeof(float));
    ptq_status status = PTQ_NOMEM;
    if (f.L && f.T && f.diagonal) status = factor_blocks(&f, info, threads);
    free(f.L);
    free(f.T);
    free(f.diagonal);
    return status;
}
