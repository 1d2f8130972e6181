/* coupled.c - codes of rows that answer for each other.
 *
 * gptq.c treats rows alone: each makes its own e H e^T small. What the model loses by all of them
 * is tr(B E H E^T), B the second moment of the loss's gradients at the layer's outputs: an error of
 * one output may make up for that of another. Here coordinate descent goes over the codes under
 * that sum. With P = E H the gradient for row i is sum over k of B_ik P_k, and a change d of e_ij
 * adds d H_j to P_i.
 *
 * The sums of BLOCK rows are made at once, by all threads; inside of the block rows take turns, and
 * hand on what they have changed. Each sum is in the order of its terms, whatever the tile. */
#include <math.h>

#include "internal.h"
#include "round.h"

enum { BLOCK = 16, TILE = 64 };

typedef struct {
    const ptq_coupled_args *a;
    const ptq_kernels *k;
    double *E, *P; /* (rows, n) */
    double *G;     /* (BLOCK, n) */
    double *moved; /* (n) what a row's turn has added to its P */
    int64_t first;
} state;

static double row_scale(const ptq_coupled_args *a, int64_t i, int64_t j) {
    return (double)a->scales[i * a->groups + a->g_idx[j]];
}

/* Errors of rows, and P of them. */
static void start_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const state *s = ctx;
    const ptq_coupled_args *a = s->a;
    const int64_t n = a->n, first = task * BLOCK, end = ptq_min64(first + BLOCK, a->rows);
    for (int64_t i = first; i < end; i++)
        for (int64_t j = 0; j < n; j++) {
            const double zero = (double)a->zeros[i * a->groups + a->g_idx[j]];
            s->E[i * n + j] =
                (double)a->W[i * n + j] - row_scale(a, i, j) * ((double)a->codes[i * n + j] - zero);
        }
    memset(s->P + first * n, 0, sizeof(double) * (size_t)((end - first) * n));
    s->k->doubles.product_f32(1.0, end - first, n, n, s->E + first * n, n, a->H, n,
                              s->P + first * n, n);
}

/* A tile of the sums of all rows of a block. */
static void sums_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const state *s = ctx;
    const ptq_coupled_args *a = s->a;
    const int64_t n = a->n, at = task * TILE, width = ptq_min64(TILE, n - at),
                  rows = ptq_min64(BLOCK, a->rows - s->first);
    for (int64_t i = 0; i < rows; i++) memset(s->G + i * n + at, 0, sizeof(double) * (size_t)width);
    s->k->doubles.product(1.0, rows, width, a->rows, a->B + s->first * a->rows, a->rows, s->P + at,
                          n, s->G + at, n);
}

/* One pass over the codes of row i, whose gradients are g + B_ii moved; returns if any changed. */
static int descend(const state *s, int64_t i, const double *g) {
    const ptq_coupled_args *a = s->a;
    const int64_t n = a->n;
    const double b = a->B[i * a->rows + i];
    double *e = s->E + i * n;
    int changed = 0;
    memset(s->moved, 0, sizeof(double) * (size_t)n);
    if (!(b > 0.0)) return 0;
    for (int64_t at = 0; at < n; at++) {
        const int64_t j = a->perm[at];
        const double h = (double)a->H[j * n + j], gradient = g[j] + b * s->moved[j];
        if (!(h > 0.0)) continue;
        const double w = (double)a->W[i * n + j], scale = row_scale(a, i, j);
        const float zero = (float)a->zeros[i * a->groups + a->g_idx[j]];
        const float code = ptq_code((float)(w - e[j] + gradient / (b * h)), (float)scale, zero,
                                    (float)a->max_code);
        const double d = w - scale * (double)(code - zero) - e[j];
        if (!(d * (2.0 * gradient + d * b * h) < 0.0)) continue;
        e[j] += d;
        a->codes[i * n + j] = (uint8_t)(int)code;
        s->k->doubles.add_f32(n, d, a->H + j * n, s->moved);
        changed = 1;
    }
    return changed;
}

static ptq_status pass(state *s, int threads) {
    const ptq_coupled_args *a = s->a;
    const int64_t n = a->n;
    for (s->first = 0; s->first < a->rows; s->first += BLOCK) {
        const int64_t end = ptq_min64(s->first + BLOCK, a->rows);
        const ptq_status status = ptq_parallel_for((n + TILE - 1) / TILE, threads, sums_task, s);
        if (status) return status;
        for (int64_t i = s->first; i < end; i++) {
            if (!descend(s, i, s->G + (i - s->first) * n)) continue;
            s->k->doubles.add(n, 1.0, s->moved, s->P + i * n);
            for (int64_t k = i + 1; k < end; k++)
                s->k->doubles.add(n, a->B[k * a->rows + i], s->moved, s->G + (k - s->first) * n);
        }
    }
    return PTQ_OK;
}

ptq_status ptq_couple_rows(const ptq_coupled_args *a, int threads) {
    if (a->rows < 1 || a->n < 1 || a->groups < 1 || a->passes < 0) return PTQ_INVALID;
    threads = ptq_thread_count(threads);
    const int64_t n = a->n;
    double *work = ptq_alloc((2 * a->rows + BLOCK + 1) * n, sizeof *work);
    if (!work) return PTQ_NOMEM;
    state s = {.a = a, .k = ptq_kernels_get(), .E = work, .P = work + a->rows * n};
    s.G = s.P + a->rows * n;
    s.moved = s.G + BLOCK * n;
    ptq_status status = ptq_parallel_for((a->rows + BLOCK - 1) / BLOCK, threads, start_task, &s);
    for (int done = 0; done < a->passes && !status; done++) status = pass(&s, threads);
    for (int64_t i = 0; i < a->rows && !status; i++) {
        double sum = 0.0;
        for (int64_t j = 0; j < n; j++) sum += s.E[i * n + j] * s.P[i * n + j];
        a->objective[i] = sum;
    }
    free(work);
    return status;
}

typedef struct {
    const ptq_couple_block_args *a;
    float *work; /* (threads, rows + columns rows) */
} block_job;

/* One column of one run: the codes row by row. t = B times what has moved so far, so that the
 * gradient is s + h t; returns if any code has changed. */
static int descend_column(const ptq_couple_block_args *a, const float *B, float h,
                          const float *restrict s, const float *scales, uint8_t *codes,
                          float *restrict moved, float *restrict t) {
    const int64_t rows = a->rows;
    int changed = 0;
    memset(t, 0, sizeof(float) * (size_t)rows);
    for (int64_t i = 0; i < rows; i++) {
        const float curve = B ? B[i * rows + i] * h : h, gradient = s[i] + h * t[i],
                    scale = scales[i];
        if (!(curve > 0.0f && scale > 0.0f)) continue;
        const float code = (float)codes[i];
        const float found =
            ptq_clamp(ptq_rne(code + gradient / (curve * scale)), 0.0f, (float)a->max_code);
        const float d = scale * (code - found);
        if (!(d * (2.0f * gradient + d * curve) < 0.0f)) continue;
        codes[i] = (uint8_t)(int)found;
        moved[i] = d;
        changed = 1;
        if (B) {
            const float *restrict row = B + i * rows;
            for (int64_t k = 0; k < rows; k++) t[k] += d * row[k];
        } else t[i] = d;
    }
    return changed;
}

static void block_task(void *ctx, int64_t run, int thread) {
    const block_job *job = ctx;
    const ptq_couple_block_args *a = job->a;
    const int64_t rows = a->rows, size = a->columns * rows;
    const float *B = a->B ? a->B + run * rows * rows : NULL;
    float *t = job->work + thread * (rows + size), *S = t + rows;
    memcpy(S, a->S + run * size, sizeof(float) * (size_t)size);
    memset(a->moved + run * size, 0, sizeof(float) * (size_t)size);
    for (int64_t j = 0; j < a->columns; j++) {
        const int64_t at = run * size + j * rows;
        const float *H = a->H + j * a->columns;
        if (!descend_column(a, B, H[j], S + j * rows, a->scales + at, a->codes + at, a->moved + at,
                            t))
            continue;
        for (int64_t k = j + 1; k < a->columns; k++) {
            float *restrict s = S + k * rows;
            for (int64_t i = 0; i < rows; i++) s[i] += H[k] * t[i];
        }
    }
}

ptq_status ptq_couple_block(const ptq_couple_block_args *a, int threads) {
    if (a->runs < 1 || a->columns < 1 || a->rows < 1) return PTQ_INVALID;
    threads = (int)ptq_min64(ptq_thread_count(threads), a->runs);
    float *work = ptq_alloc((a->columns + 1) * a->rows * threads, sizeof *work);
    if (!work) return PTQ_NOMEM;
    block_job job = {.a = a, .work = work};
    const ptq_status status = ptq_parallel_for(a->runs, threads, block_task, &job);
    free(work);
    return status;
}
