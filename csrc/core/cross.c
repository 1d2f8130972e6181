/* cross.c - S += (A - B)^T X by output tiles over packed tokens: how far a layer's inputs, or the
 * stream that it adds to, have moved, against the inputs that it has now. */
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdatomic.h>

#include "blas.h"
#include "internal.h"

enum {
    CHUNK = 1024, /* tokens packed at a time */
    DEPTH = 512,  /* tokens per register accumulation: two-level summation, and cache size */
    SCAN = 64,    /* tokens per task of a check */
};

typedef struct {
    const ptq_kernels *k;
    const ptq_cross_args *a;
    int64_t mr, nr;
    int64_t left, right;  /* panels of A - B and of X */
    int64_t first, count; /* tokens of this chunk */
    float *packed;        /* (left + right, CHUNK, nr) */
    float *scratch;       /* (threads, CHUNK, nr) */
    int64_t tile;         /* panels per tile side */
    float limit;          /* below it, no sum can overflow */
    atomic_int bad, large;
} update;

static float *panel(const update *u, int64_t i) { return u->packed + i * u->count * u->nr; }

/* Panels of A - B, then those of X. */
static void pack_task(void *ctx, int64_t i, int thread) {
    const update *u = ctx;
    const ptq_cross_args *a = u->a;
    float *out = panel(u, i), *other = u->scratch + thread * CHUNK * u->nr;
    if (i >= u->left) {
        u->k->tokens.pack(a->dtype, a->X, a->ldx, a->rows, u->first, u->count,
                          (i - u->left) * u->nr, a->n, out);
        return;
    }
    u->k->tokens.pack(a->dtype, a->A, a->lda, a->rows, u->first, u->count, i * u->nr, a->m, out);
    u->k->tokens.pack(a->dtype, a->B, a->ldb, a->rows, u->first, u->count, i * u->nr, a->m, other);
    for (int64_t j = 0; j < u->count * u->nr; j++) out[j] -= other[j];
}

/* S tile (mr rows from i, nr columns from j) += C, inside the matrix. */
static void add_tile(const update *u, const float *C, int64_t i, int64_t j) {
    const int64_t height = ptq_min64(u->mr, u->a->m - i), width = ptq_min64(u->nr, u->a->n - j);
    for (int64_t r = 0; r < height; r++) {
        float *s = u->a->S + (i + r) * u->a->n + j;
        for (int64_t c = 0; c < width; c++) s[c] += C[r * u->nr + c];
    }
}

static void multiply(const update *u, int64_t l, int64_t r, int64_t k0, int64_t depth) {
    const int64_t nr = u->nr, mr = u->mr;
    float C[PTQ_MAX_TILE];
    for (int64_t i = 0; i < nr && l * nr + i < u->a->m; i += mr) {
        memset(C, 0, sizeof C);
        u->k->gemm.f32(C, panel(u, l) + k0 * nr + i, nr, panel(u, u->left + r) + k0 * nr, depth);
        add_tile(u, C, l * nr + i, r * nr);
    }
}

static void tile_task(void *ctx, int64_t t, int thread) {
    (void)thread;
    const update *u = ctx;
    const int64_t across = ptq_ceil_div(u->right, u->tile);
    const int64_t l0 = t / across * u->tile, l1 = ptq_min64(l0 + u->tile, u->left);
    const int64_t r0 = t % across * u->tile, r1 = ptq_min64(r0 + u->tile, u->right);
    for (int64_t k0 = 0; k0 < u->count; k0 += DEPTH)
        for (int64_t r = r0; r < r1; r++)
            for (int64_t l = l0; l < l1; l++)
                multiply(u, l, r, k0, ptq_min64(DEPTH, u->count - k0));
}

static ptq_status update_builtin(update *u, int threads) {
    const int64_t tokens = u->a->tokens, chunk = ptq_min64(CHUNK, tokens);
    u->left = ptq_ceil_div(u->a->m, u->nr);
    u->right = ptq_ceil_div(u->a->n, u->nr);
    /* About 384 columns per side for cache, fewer if that would leave threads idle. */
    u->tile = ptq_max64(1, 384 / u->nr);
    while (u->tile > 1 &&
           ptq_ceil_div(u->left, u->tile) * ptq_ceil_div(u->right, u->tile) < 4 * threads)
        u->tile /= 2;
    const int64_t tiles = ptq_ceil_div(u->left, u->tile) * ptq_ceil_div(u->right, u->tile);
    u->packed = ptq_alloc_large((u->left + u->right) * chunk * u->nr, sizeof(float));
    u->scratch = ptq_alloc(threads * CHUNK * u->nr, sizeof(float));
    ptq_status status = u->packed && u->scratch ? PTQ_OK : PTQ_NOMEM;
    for (u->first = 0; u->first < tokens && !status; u->first += CHUNK) {
        u->count = ptq_min64(CHUNK, tokens - u->first);
        status = ptq_parallel_for(u->left + u->right, threads, pack_task, u);
        if (!status) status = ptq_parallel_for(tiles, threads, tile_task, u);
    }
    free(u->packed);
    free(u->scratch);
    return status;
}

/* ---- by BLAS: row-major S is column-major S^T = X^T (A - B) ------------------------------------
 */

typedef struct {
    const ptq_blas *blas;
    const update *u;
    int64_t across; /* tiles of a row of S */
    float *moved;   /* (depth, m) A - B */
} blas_update;

static void difference_task(void *ctx, int64_t t, int thread) {
    (void)thread;
    const blas_update *b = ctx;
    const ptq_cross_args *a = b->u->a;
    const float *x = (const float *)a->A + (b->u->first + t) * a->lda;
    const float *y = (const float *)a->B + (b->u->first + t) * a->ldb;
    float *out = b->moved + t * a->m;
    for (int64_t j = 0; j < a->m; j++) out[j] = x[j] - y[j];
}

static void blas_task(void *ctx, int64_t t, int thread) {
    (void)thread;
    const blas_update *b = ctx;
    const ptq_cross_args *a = b->u->a;
    const int64_t i = t / b->across * PTQ_BLAS_TILE, j = t % b->across * PTQ_BLAS_TILE;
    char plain = 'N', turned = 'T';
    int width = (int)ptq_min64(PTQ_BLAS_TILE, a->n - j), depth = (int)b->u->count;
    int height = (int)ptq_min64(PTQ_BLAS_TILE, a->m - i), n = (int)a->n, m = (int)a->m;
    int ldx = (int)a->ldx;
    float one = 1.0f, *X = (float *)(uintptr_t)a->X + b->u->first * a->ldx + j;
    b->blas->sgemm(&plain, &turned, &width, &height, &depth, &one, X, &ldx, b->moved + i, &m, &one,
                   a->S + i * a->n + j, &n);
}

static ptq_status update_blas(const ptq_blas *blas, update *u, int threads) {
    const ptq_cross_args *a = u->a;
    blas_update b = {blas, u, ptq_ceil_div(a->n, PTQ_BLAS_TILE), NULL};
    const int64_t tiles = ptq_ceil_div(a->m, PTQ_BLAS_TILE) * b.across;
    b.moved = ptq_alloc(ptq_min64(PTQ_BLAS_DEPTH, a->tokens) * a->m, sizeof(float));
    ptq_status status = b.moved ? PTQ_OK : PTQ_NOMEM;
    for (u->first = 0; u->first < a->tokens && !status; u->first += PTQ_BLAS_DEPTH) {
        u->count = ptq_min64(PTQ_BLAS_DEPTH, a->tokens - u->first);
        status = ptq_parallel_for(u->count, threads, difference_task, &b);
        if (!status) status = ptq_parallel_for(tiles, 1, blas_task, &b);
    }
    free(b.moved);
    return status;
}

/* ---- checks ------------------------------------------------------------------------------------
 */

static void scan(update *u, const void *values, int64_t ld, int64_t columns, int64_t t) {
    const int64_t size = u->a->dtype == PTQ_F32 ? 4 : 2, row = u->a->rows ? u->a->rows[t] : t;
    const char *x = (const char *)values + row * ld * size;
    if (u->k->tokens.all_below(u->a->dtype, x, columns, u->limit)) return;
    if (u->k->tokens.all_below(u->a->dtype, x, columns, INFINITY)) u->large = 1;
    else u->bad = 1;
}

static void tokens_task(void *ctx, int64_t i, int thread) {
    (void)thread;
    update *u = ctx;
    const ptq_cross_args *a = u->a;
    for (int64_t t = i * SCAN; t < ptq_min64((i + 1) * SCAN, a->tokens); t++) {
        scan(u, a->A, a->lda, a->m, t);
        scan(u, a->B, a->ldb, a->m, t);
        scan(u, a->X, a->ldx, a->n, t);
    }
}

static void sums_task(void *ctx, int64_t i, int thread) {
    (void)thread;
    update *u = ctx;
    if (!u->k->tokens.all_below(PTQ_F32, u->a->S + i * u->a->n, u->a->n, FLT_MAX / 4)) u->large = 1;
}

/* Whether all that is to be added is finite and leaves finite sums: of at most FLT_MAX / 4, each
 * gains at most tokens * 2 limit * limit. */
static ptq_status check(update *u, int threads) {
    const ptq_cross_args *a = u->a;
    u->limit = a->tokens ? (float)sqrt((double)FLT_MAX / 8.0 / (double)a->tokens) : 0.0f;
    const double work = (double)a->tokens * (double)(2 * a->m + a->n);
    const int scanners = ptq_worth_threads(work + (double)a->m * (double)a->n) ? threads : 1;
    ptq_status status = ptq_parallel_for(ptq_ceil_div(a->tokens, SCAN), scanners, tokens_task, u);
    if (status || u->bad) return status ? status : PTQ_NONFINITE;
    status = ptq_parallel_for(a->m, scanners, sums_task, u);
    return status ? status : u->large ? PTQ_OVERFLOW : PTQ_OK;
}

ptq_status ptq_cross_update(const ptq_cross_args *a, int threads) {
    if (a->m < 1 || a->n < 1 || a->tokens < 0 || a->lda < a->m || a->ldb < a->m || a->ldx < a->n)
        return PTQ_INVALID;
    update u = {.k = ptq_kernels_get(), .a = a};
    u.mr = u.k->gemm.mr;
    u.nr = u.k->gemm.nr;
    threads = ptq_thread_count(threads);
    const ptq_status status = check(&u, threads);
    if (status || a->tokens == 0) return status;
    const ptq_blas *blas = ptq_blas_get();
    if (!blas || a->dtype != PTQ_F32 || a->rows || a->m > INT_MAX || a->n > INT_MAX ||
        a->ldx > INT_MAX)
        return update_builtin(&u, threads);
    return update_blas(blas, &u, threads);
}
