/* hessian.c - S += X^T X by output tiles over packed tokens; one triangle only. */
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdatomic.h>

#include "blas.h"
#include "internal.h"

enum {
    CHUNK = 2048,     /* tokens packed at a time: each time S is read and written */
    DEPTH = 512,      /* tokens per register accumulation: two-level summation, and cache size */
    WIDEST = 288,     /* columns of a side of a task: wider ones are slower */
    PACK_TOKENS = 32, /* packed at a time, so that their rows are read along */
    PACK_PANELS = 32,
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
    void *packed, *left;  /* (slices, panels, depth, nr) 32-bit values */
    int64_t depth;        /* of a slice and a sum, in rows of a panel */
    int64_t tile;         /* panels per tile side */
    int64_t wide;         /* right panels that pass by together */
    float *work;          /* (threads, wide, tile * nr, nr) sums of a chunk */
    float limit;          /* below it, no sum of squares can overflow */
    atomic_int bad, large;
} update;

/* Rows of a panel of `count` tokens. */
static int64_t rows_for(const update *u, int64_t count) {
    return u->pairs ? ptq_round_up(ptq_ceil_div(count, 2), u->k->pairs.step) : count;
}

static int64_t chunk_of(int64_t tokens) {
    return ptq_min64(ptq_tuned("PTQ_TUNE_CHUNK", CHUNK), tokens);
}

/* Where row k of a panel lies; rows of a slice follow each other. */
static int64_t place(const update *u, int64_t panel, int64_t k) {
    return ((k / u->depth * u->panels + panel) * u->depth + k % u->depth) * u->nr;
}

static int64_t slice_tokens(const update *u) { return u->pairs ? 2 * u->depth : u->depth; }
static int64_t panel_groups(const update *u) { return ptq_ceil_div(u->panels, PACK_PANELS); }

/* Tokens of a slice, some panels: a few tokens at a time for all of these. */
static void pack_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    update *u = ctx;
    const int64_t slice = task / panel_groups(u), p0 = task % panel_groups(u) * PACK_PANELS;
    const int64_t p1 = ptq_min64(p0 + PACK_PANELS, u->panels), nr = u->nr;
    const int64_t end = ptq_min64((slice + 1) * slice_tokens(u), u->count);
    for (int64_t t = slice * slice_tokens(u); t < end; t += PACK_TOKENS) {
        const int64_t count = ptq_min64(PACK_TOKENS, end - t);
        for (int64_t p = p0; p < p1; p++) {
            const int64_t at = place(u, p, u->pairs ? t / 2 : t);
            if (u->pairs)
                u->k->pairs.pack(u->X, u->ldx, u->rows, u->first + t, count, p * nr, u->n,
                                 (uint32_t *)u->packed + at, (uint32_t *)u->left + at);
            else
                u->k->tokens.pack(u->dtype, u->X, u->ldx, u->rows, u->first + t, count, p * nr,
                                  u->n, (float *)u->packed + at);
        }
    }
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

/* sum (mr, nr) += products of `depth` rows of two panels, in registers first: two-level summation.
 * A matrix unit keeps its sums in float32 too, but adds to those of the chunk. */
static void multiply(const update *u, int64_t a, int64_t b, int64_t depth, float *sum,
                     const ptq_ahead *ahead) {
    float C[PTQ_MAX_TILE];
    const int64_t size = u->mr * u->nr;
    if (u->turned) {
        u->k->pairs.gemm(sum, (const uint32_t *)u->left + a, 0, (const uint32_t *)u->packed + b,
                         depth, ahead);
        return;
    }
    memset(C, 0, sizeof(float) * (size_t)size);
    if (u->pairs)
        u->k->pairs.gemm(C, (const uint32_t *)u->packed + a, u->nr, (const uint32_t *)u->packed + b,
                         depth, ahead);
    else
        u->k->gemm.f32(C, (const float *)u->packed + a, u->nr, (const float *)u->packed + b, depth);
    u->k->gemm.add(sum, size, C, size, 1, size);
}

/* What of the next slice is to be fetched during product number `at` of a block: lines of left
 * panels [i0, i1), then of right ones [j0, j1), in equal shares. */
static ptq_ahead next_slice(const update *u, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                            int64_t k, int64_t at) {
    const int64_t panel = u->depth * u->nr, left = (i1 - i0) * panel,
                  all = left + (j1 - j0) * panel;
    const int64_t share = ptq_round_up(ptq_ceil_div(all, (i1 - i0) * (j1 - j0)), 16);
    const int64_t from = at * share;
    if (k >= rows_for(u, u->count) || from >= all) return (ptq_ahead){NULL, NULL};
    const uint32_t *start = from < left
                                ? (const uint32_t *)u->left + place(u, i0, k) + from
                                : (const uint32_t *)u->packed + place(u, j0, k) + from - left;
    return (ptq_ahead){start, start + share};
}

/* The products of panels [i0, i1) with those of [j0, j1) that are not before them: sums of the
 * chunk in `work`, which stays in the second cache with a slice of the panels, and then at once
 * into S. */
static void multiply_panels(const update *u, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                            float *work) {
    const int64_t nr = u->nr, full = rows_for(u, u->count);
    memset(work, 0, sizeof(float) * (size_t)((j1 - j0) * u->tile * nr * nr));
    for (int64_t k0 = 0; k0 < full; k0 += u->depth) {
        const int64_t depth = ptq_min64(u->depth, full - k0);
        const int ends = k0 + depth == full;
        int64_t done = 0;
        for (int64_t j = j0; j < j1; j++) {
            const int64_t last = ptq_min64(ptq_min64(i1, j + 1) * nr, u->n);
            for (int64_t i = i0 * nr; i < last; i += u->mr) {
                float *sum = work + ((j - j0) * u->tile * nr + i - i0 * nr) * nr;
                ptq_ahead ahead = {NULL, NULL};
                if (u->turned) ahead = next_slice(u, i0, i1, j0, j1, k0 + depth, done++);
                if (ends) fetch_tile(u, i, j * nr);
                multiply(u, place(u, i / nr, k0) + i % nr, place(u, j, k0), depth, sum, &ahead);
                if (ends) add_tile(u, sum, i, j * nr);
            }
        }
    }
}

/* Task t is the tile (ti, tj), ti <= tj, of the upper triangle, row after row: panels of a row stay
 * in the second cache. */
static void tile_task(void *ctx, int64_t t, int thread) {
    const update *u = ctx;
    const int64_t side = ptq_ceil_div(u->panels, u->tile);
    int64_t ti = 0;
    for (; t >= side - ti; ti++) t -= side - ti;
    const int64_t i0 = ti * u->tile, j0 = (ti + t) * u->tile;
    const int64_t iend = ptq_min64(i0 + u->tile, u->panels);
    const int64_t jend = ptq_min64(j0 + u->tile, u->panels);
    float *work = u->work + thread * u->wide * u->tile * u->nr * u->nr;
    if (u->pairs && u->k->pairs.enter) u->k->pairs.enter();
    for (int64_t j = j0; j < jend; j += u->wide)
        multiply_panels(u, i0, iend, j, ptq_min64(j + u->wide, jend), work);
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

/* Rows of a slice and panels of a side: a side, with one more panel, of the depth of a sum in about
 * half of the second cache. A matrix unit reads faster than that cache gives: its slices of two
 * panels and their sums share the first cache, and the sums of all pairs of panels of a task stay
 * in the second with two slices. Sides are shorter if threads would be left idle. */
static void choose_tiles(update *u, int64_t tokens, int threads) {
    const int64_t nr = u->nr, full = rows_for(u, chunk_of(tokens));
    const int64_t word = (int64_t)sizeof(float), second = ptq_second_cache();
    if (u->turned) {
        const int64_t depth = ptq_tuned("PTQ_TUNE_DEPTH", ptq_first_cache() / 3 / word / nr);
        const int64_t step = u->k->pairs.step;
        u->depth = ptq_min64(ptq_max64(depth / step, 1) * step, full);
        const int64_t sums = nr * nr * word, slices = 4 * u->depth * nr * word;
        for (u->tile = 1; (u->tile + 1) * ((u->tile + 1) * sums + slices) < second * 17 / 20;)
            u->tile++;
    } else {
        u->depth = ptq_tuned("PTQ_TUNE_DEPTH", u->pairs ? DEPTH / 2 : DEPTH);
        u->depth = ptq_min64(u->depth, full);
        u->tile = ptq_min64(second * 3 / 5 / (u->depth * nr * word) - 1, WIDEST / nr);
    }
    u->tile = ptq_max64(1, ptq_tuned("PTQ_TUNE_SIDE", u->tile * nr) / nr);
    while (u->tile > 1 && ptq_ceil_div(u->panels, u->tile) < 4 * threads) u->tile /= 2;
    u->wide = u->turned ? u->tile : 1;
}

static ptq_status update_chunks(update *u, int64_t tokens, int threads) {
    const int64_t side = ptq_ceil_div(u->panels, u->tile), chunk = chunk_of(tokens);
    ptq_status status = PTQ_OK;
    for (u->first = 0; u->first < tokens && !status; u->first += chunk) {
        u->count = ptq_min64(chunk, tokens - u->first);
        const int64_t slices = ptq_ceil_div(u->count, slice_tokens(u));
        status = ptq_parallel_for(slices * panel_groups(u), threads, pack_task, u);
        if (!status) status = ptq_parallel_for(side * (side + 1) / 2, threads, tile_task, u);
    }
    return status;
}

static ptq_status update_builtin(update *u, int64_t tokens, int threads) {
    if (!tokens) return PTQ_OK;
    u->panels = ptq_ceil_div(u->n, u->nr);
    choose_tiles(u, tokens, threads);
    const int64_t rows = ptq_round_up(rows_for(u, chunk_of(tokens)), u->depth);
    const int64_t words = u->panels * rows * u->nr;
    u->packed = ptq_alloc_large(words, sizeof(float));
    u->left = u->turned ? ptq_alloc_large(words, sizeof(float)) : u->packed;
    u->work = ptq_alloc(threads * u->wide * u->tile * u->nr * u->nr, sizeof(float));
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
