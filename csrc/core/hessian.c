/* hessian.c - S += X^T X by output tiles over packed tokens; one triangle only. */
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdatomic.h>

#include "blas.h"
#include "internal.h"

enum {
    CHUNK = 1024,        /* tokens packed at a time */
    MATRIX_CHUNK = 2048, /* if a matrix unit multiplies: it waits for S, else */
    DEPTH = 512,         /* tokens per register accumulation: two-level summation, and cache size */
    WIDEST = 288, /* columns of a side of a task: wider ones are slower, with AMX by a fifth */
};

typedef struct {
    const ptq_kernels *k;
    float *S;
    int mr, nr; /* of the kernel that multiplies */
    int64_t n, panels;
    const void *X;
    int64_t ldx;
    ptq_dtype dtype;
    const int64_t *rows;
    int64_t first, count; /* tokens of this chunk */
    int pairs;            /* packed as bf16 pairs */
    int turned;           /* left operands are packed apart */
    void *packed, *left;  /* (panels, panel_depth, nr) 32-bit values */
    int64_t depth;        /* of a sum, in rows of a panel */
    int64_t tile;         /* panels per tile side */
    float *work;          /* (threads, tile * nr, nr) sums of a chunk */
    float limit;          /* below it, no sum of squares can overflow */
    atomic_int bad, large;
} update;

/* Rows of a panel of `count` tokens. */
static int64_t rows_for(const update *u, int64_t count) {
    return u->pairs ? ptq_round_up(ptq_ceil_div(count, 2), u->k->pairs.step) : count;
}

static int64_t chunk_of(const update *u, int64_t tokens) {
    return ptq_min64(u->turned ? MATRIX_CHUNK : CHUNK, tokens);
}

static int64_t panel_depth(const update *u) { return rows_for(u, u->count); }

static void pack_task(void *ctx, int64_t panel, int thread) {
    (void)thread;
    update *u = ctx;
    const int64_t nr = u->nr, at = panel * panel_depth(u) * nr;
    if (u->pairs)
        u->k->pairs.pack(u->X, u->ldx, u->rows, u->first, u->count, panel * nr, u->n,
                         (uint32_t *)u->packed + at, (uint32_t *)u->left + at);
    else
        u->k->tokens.pack(u->dtype, u->X, u->ldx, u->rows, u->first, u->count, panel * nr, u->n,
                          (float *)u->packed + at);
}

/* Fetch the tile of S that add_tile will change: its rows lie on pages of their own. */
static void fetch_tile(const update *u, int64_t i, int64_t j) {
    const int64_t height = ptq_min64(u->mr, u->n - i), width = ptq_min64(u->nr, u->n - j);
    enum { LINE = 16 };
    for (int64_t a = 0; a < height; a++) {
        const float *s = u->S + (i + a) * u->n + j;
        for (int64_t b = 0; b < width; b += LINE) __builtin_prefetch(s + b, 1);
        __builtin_prefetch(s + width - 1, 1);
    }
}

/* S tile (mr rows from i, nr columns from j) += C, inside the matrix. */
static void add_tile(const update *u, const float *C, int64_t i, int64_t j) {
    u->k->gemm.add(u->S + i * u->n + j, u->n, C, u->nr, ptq_min64(u->mr, u->n - i),
                   ptq_min64(u->nr, u->n - j));
}

/* sum (mr, nr) += products of rows [k0, k0 + depth) of two panels, in registers first: two-level
 * summation. A matrix unit keeps its sums in float32 too, but adds to those of the chunk. */
static void multiply(const update *u, int64_t a, int64_t b, int64_t depth, float *sum) {
    float C[PTQ_MAX_TILE];
    const int64_t size = u->mr * u->nr;
    if (u->turned) {
        u->k->pairs.gemm(sum, (const uint32_t *)u->left + a, 0, (const uint32_t *)u->packed + b,
                         depth);
        return;
    }
    memset(C, 0, sizeof(float) * (size_t)size);
    if (u->pairs)
        u->k->pairs.gemm(C, (const uint32_t *)u->packed + a, u->nr, (const uint32_t *)u->packed + b,
                         depth);
    else
        u->k->gemm.f32(C, (const float *)u->packed + a, u->nr, (const float *)u->packed + b, depth);
    u->k->gemm.add(sum, size, C, size, 1, size);
}

/* The products of panels [i0, i1) with panel j: sums of the chunk in `work`, which stays in the
 * second cache with the panels, and then at once into S. */
static void multiply_panels(const update *u, int64_t i0, int64_t i1, int64_t j, float *work) {
    const int64_t nr = u->nr, full = panel_depth(u), last = ptq_min64(i1 * nr, u->n);
    memset(work, 0, sizeof(float) * (size_t)((i1 - i0) * nr * nr));
    for (int64_t k0 = 0; k0 < full; k0 += u->depth) {
        const int64_t depth = ptq_min64(u->depth, full - k0);
        for (int64_t i = i0 * nr; i < last; i += u->mr) {
            float *sum = work + (i - i0 * nr) * nr;
            const int ends = k0 + depth == full;
            if (ends) fetch_tile(u, i, j * nr);
            multiply(u, (i / nr * full + k0) * nr + i % nr, (j * full + k0) * nr, depth, sum);
            if (ends) add_tile(u, sum, i, j * nr);
        }
    }
}

/* Task t is the tile (ti, tj), ti <= tj, of the upper triangle. */
static void tile_task(void *ctx, int64_t t, int thread) {
    const update *u = ctx;
    int64_t tj = 0;
    while ((tj + 1) * (tj + 2) / 2 <= t) tj++;
    const int64_t i0 = (t - tj * (tj + 1) / 2) * u->tile;
    const int64_t iend = ptq_min64(i0 + u->tile, u->panels);
    const int64_t jend = ptq_min64((tj + 1) * u->tile, u->panels);
    float *work = u->work + thread * u->tile * u->nr * u->nr;
    if (u->pairs && u->k->pairs.enter) u->k->pairs.enter();
    for (int64_t j = tj * u->tile; j < jend; j++)
        multiply_panels(u, i0, ptq_min64(iend, j + 1), j, work);
    if (u->pairs && u->k->pairs.leave) u->k->pairs.leave();
}

static void finite_task(void *ctx, int64_t i, int thread) {
    (void)thread;
    update *u = ctx;
    const int64_t size = u->dtype == PTQ_F32 ? 4 : 2, end = ptq_min64((i + 1) * 64, u->count);
    for (int64_t t = i * 64; t < end; t++) {
        const int64_t row = u->rows ? u->rows[t] : t;
        const char *x = (const char *)u->X + row * u->ldx * size;
        if (u->k->tokens.all_below(u->dtype, x, u->n, u->limit)) continue;
        if (u->k->tokens.all_below(u->dtype, x, u->n, INFINITY)) u->large = 1;
        else u->bad = 1;
    }
}

enum { SQUARES = 256 }; /* columns of a task */

/* Set `bad` if twice a sum of squares of some columns would overflow: H of one token has it. */
static void squares_task(void *ctx, int64_t i, int thread) {
    (void)thread;
    update *u = ctx;
    const int64_t size = u->dtype == PTQ_F32 ? 4 : 2, c = i * SQUARES;
    const int64_t columns = ptq_min64(SQUARES, u->n - c);
    float x[SQUARES];
    double sum[SQUARES];
    for (int64_t j = 0; j < columns; j++) sum[j] = (double)u->S[(c + j) * u->n + c + j];
    for (int64_t t = 0; t < u->count; t++) {
        if (t % 1024 == 1023 && ptq_should_stop()) return;
        const int64_t row = u->rows ? u->rows[t] : t;
        u->k->tokens.widen(u->dtype, (const char *)u->X + (row * u->ldx + c) * size, NULL, columns,
                           x);
        for (int64_t j = 0; j < columns; j++) sum[j] += (double)x[j] * (double)x[j];
    }
    for (int64_t j = 0; j < columns; j++)
        if (!(2.001 * sum[j] < (double)FLT_MAX)) u->bad = 1;
}

/* Whether all that is to be added is finite and leaves finite sums. */
static ptq_status check_tokens(update *u, int threads) {
    double most = 0.0;
    for (int64_t i = 0; i < u->n; i++) /* fmax here stops GCC 12 for Arm with an internal error */
        if ((double)u->S[i * u->n + i] > most) most = (double)u->S[i * u->n + i];
    const double room = (double)FLT_MAX / 2.002 - most, tokens = (double)u->count;
    u->limit = room > 0.0 && tokens > 0.0 ? (float)sqrt(room / tokens) : 0.0f;
    const int scanners = ptq_worth_threads(tokens * (double)u->n) ? threads : 1;
    ptq_status status = ptq_parallel_for(ptq_ceil_div(u->count, 64), scanners, finite_task, u);
    if (status || u->bad) return status ? status : PTQ_NONFINITE;
    if (!u->large) return PTQ_OK;
    status = ptq_parallel_for(ptq_ceil_div(u->n, SQUARES), scanners, squares_task, u);
    return status ? status : u->bad ? PTQ_OVERFLOW : PTQ_OK;
}

typedef struct {
    const ptq_blas *blas;
    const update *u;
    int64_t chunks; /* of tokens */
} blas_update;

/* A chunk of tokens of a tile. Row-major S upper is column-major lower; row-major X is X^T. */
static void blas_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const blas_update *b = ctx;
    const update *u = b->u;
    const int64_t t = task / b->chunks, first = task % b->chunks * PTQ_BLAS_DEPTH;
    int64_t tj = 0;
    while ((tj + 1) * (tj + 2) / 2 <= t) tj++;
    const int64_t j = tj * PTQ_BLAS_TILE, i = (t - tj * (tj + 1) / 2) * PTQ_BLAS_TILE;
    char lower = 'L', plain = 'N', turned = 'T';
    int height = (int)ptq_min64(PTQ_BLAS_TILE, u->n - j), width = PTQ_BLAS_TILE;
    int depth = (int)ptq_min64(PTQ_BLAS_DEPTH, u->count - first), ldx = (int)u->ldx, n = (int)u->n;
    float one = 1.0f, *X = (float *)(uintptr_t)u->X + first * u->ldx, *S = u->S + i * u->n + j;
    if (i == j) b->blas->ssyrk(&lower, &plain, &height, &depth, &one, X + j, &ldx, &one, S, &n);
    else
        b->blas->sgemm(&plain, &turned, &height, &width, &depth, &one, X + j, &ldx, X + i, &ldx,
                       &one, S, &n);
}

static ptq_status update_blas(const ptq_blas *blas, const update *u) {
    blas_update b = {blas, u, ptq_ceil_div(u->count, PTQ_BLAS_DEPTH)};
    const int64_t side = ptq_ceil_div(u->n, PTQ_BLAS_TILE);
    return ptq_parallel_for(side * (side + 1) / 2 * b.chunks, 1, blas_task, &b);
}

/* Panels of a side: with one more, of the depth of a sum, in about half of the second cache, and
 * fewer if that would leave threads idle. */
static void choose_tiles(update *u, int64_t tokens, int threads) {
    const int64_t nr = u->nr, full = rows_for(u, chunk_of(u, tokens));
    u->depth = ptq_tuned("PTQ_TUNE_DEPTH", u->pairs ? DEPTH / 2 : DEPTH);
    if (u->turned) { /* a matrix unit needs one operand in the first cache */
        const int64_t fitting = ptq_max64(1, ptq_first_cache() * 3 / 5 / 4 / nr);
        const int64_t deepest = ptq_tuned("PTQ_TUNE_DEPTH", fitting);
        u->depth = ptq_round_up(ptq_ceil_div(full, ptq_ceil_div(full, deepest)), u->k->pairs.step);
    }
    const int64_t panel = ptq_min64(u->depth, full) * nr * (int64_t)sizeof(float);
    u->tile = ptq_min64(ptq_second_cache() * 3 / 5 / panel - 1, WIDEST / nr);
    u->tile = ptq_max64(1, ptq_tuned("PTQ_TUNE_SIDE", u->tile * nr) / nr);
    while (u->tile > 1 && ptq_ceil_div(u->panels, u->tile) < 4 * threads) u->tile /= 2;
}

static ptq_status update_chunks(update *u, int64_t tokens, int threads) {
    const int64_t side = ptq_ceil_div(u->panels, u->tile), chunk = chunk_of(u, tokens);
    ptq_status status = PTQ_OK;
    for (u->first = 0; u->first < tokens && !status; u->first += chunk) {
        u->count = ptq_min64(chunk, tokens - u->first);
        status = ptq_parallel_for(u->panels, threads, pack_task, u);
        if (!status) status = ptq_parallel_for(side * (side + 1) / 2, threads, tile_task, u);
    }
    return status;
}

static ptq_status update_builtin(update *u, int64_t tokens, int threads) {
    if (!tokens) return PTQ_OK;
    u->panels = ptq_ceil_div(u->n, u->nr);
    choose_tiles(u, tokens, threads);
    const int64_t words = u->panels * rows_for(u, chunk_of(u, tokens)) * u->nr;
    u->packed = ptq_alloc(words, sizeof(float));
    u->left = u->turned ? ptq_alloc(words, sizeof(float)) : u->packed;
    u->work = ptq_alloc(threads * u->tile * u->nr * u->nr, sizeof(float));
    const ptq_status status =
        u->packed && u->left && u->work ? update_chunks(u, tokens, threads) : PTQ_NOMEM;
    if (u->turned) free(u->left);
    free(u->packed);
    free(u->work);
    return status;
}

ptq_status ptq_hessian_update(float *S, int64_t n, const void *X, int64_t ldx, ptq_dtype dtype,
                              const int64_t *rows, int64_t tokens, int threads) {
    if (n < 1 || tokens < 0 || ldx < n) return PTQ_INVALID;
    update u = {.k = ptq_kernels_get(),
                .S = S,
                .n = n,
                .X = X,
                .ldx = ldx,
                .dtype = dtype,
                .rows = rows,
                .count = tokens};
    u.pairs = dtype == PTQ_BF16 && u.k->pairs.gemm != NULL;
    u.turned = u.pairs && u.k->pairs.turned;
    u.mr = u.pairs ? u.k->pairs.mr : u.k->gemm.mr;
    u.nr = u.pairs ? u.k->pairs.nr : u.k->gemm.nr;
    threads = ptq_thread_count(threads);
    const ptq_status status = check_tokens(&u, threads);
    if (status) return status;
    const ptq_blas *blas = ptq_blas_get();
    if (!blas || dtype != PTQ_F32 || rows || n > INT_MAX || ldx > INT_MAX)
        return update_builtin(&u, tokens, threads);
    return update_blas(blas, &u);
}

typedef struct {
    const float *S;
    float *out;
    int64_t n;
    double factor;
} finish_args;

enum { BLOCK = 64 };

/* Block row b: scale the upper part and mirror it, block by block to keep both sides cached. */
static void finish_task(void *ctx, int64_t b, int thread) {
    (void)thread;
    const finish_args *f = ctx;
    const int64_t n = f->n, i0 = b * BLOCK, i1 = ptq_min64(i0 + BLOCK, n);
    for (int64_t j0 = i0; j0 < n; j0 += BLOCK) {
        const int64_t j1 = ptq_min64(j0 + BLOCK, n);
        for (int64_t i = i0; i < i1; i++)
            for (int64_t j = ptq_max64(i, j0); j < j1; j++)
                f->out[i * n + j] = (float)(f->factor * (double)f->S[i * n + j]);
        for (int64_t j = j0; j < j1; j++)
            for (int64_t i = i0; i < ptq_min64(i1, j); i++) f->out[j * n + i] = f->out[i * n + j];
    }
}

ptq_status ptq_hessian_finish(const float *S, float *out, int64_t n, double factor, int threads) {
    finish_args f = {S, out, n, factor};
    threads = ptq_threads_for_work(threads, (double)n * (double)n);
    return ptq_parallel_for(ptq_ceil_div(n, BLOCK), threads, finish_task, &f);
}
