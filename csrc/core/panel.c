/* panel.c - panels of nr rows: loading, and fitting the grid of one group. */
#include <float.h>
#include <math.h>

#include "internal.h"

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
#define SHUFFLE __builtin_shufflevector

/* out[j * nr + r] = in[r * n + j] for a 4 x 4 tile. */
static inline void transpose4(const float *in, int64_t n, float *out, int64_t nr) {
    const four a = *(const four *)in, b = *(const four *)(in + n);
    const four c = *(const four *)(in + 2 * n), d = *(const four *)(in + 3 * n);
    const four ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
    const four AB = SHUFFLE(a, b, 2, 6, 3, 7), CD = SHUFFLE(c, d, 2, 6, 3, 7);
    *(four *)out = SHUFFLE(ab, cd, 0, 1, 4, 5);
    *(four *)(out + nr) = SHUFFLE(ab, cd, 2, 3, 6, 7);
    *(four *)(out + 2 * nr) = SHUFFLE(AB, CD, 0, 1, 4, 5);
    *(four *)(out + 3 * nr) = SHUFFLE(AB, CD, 2, 3, 6, 7);
}

void ptq_panel_load(const ptq_kernels *k, const float *W, int64_t rows, int64_t n, int64_t row,
                    float *panel) {
    const int64_t nr = k->nr, present = ptq_min64(nr, rows - row);
    const int64_t r4 = present / 4 * 4, j4 = n / 4 * 4;
    const float *w = W + row * n;
    if (present < nr) memset(panel, 0, sizeof(float) * (size_t)(n * nr));
    enum { BLOCK = 16 }; /* columns: whole cache lines of W */
    for (int64_t j0 = 0; j0 < n; j0 += BLOCK)
        for (int64_t r = 0; r < r4; r += 4)
            for (int64_t j = j0; j < ptq_min64(j0 + BLOCK, j4); j += 4)
                transpose4(w + r * n + j, n, panel + j * nr + r, nr);
    for (int64_t r = 0; r < present; r++)
        for (int64_t j = r < r4 ? j4 : 0; j < n; j++) panel[j * nr + r] = w[r * n + j];
}

typedef struct {
    ptq_grid_blocks *blocks;
    const float *H;
    int64_t n, G;
    const int64_t *index;
    ptq_status *status; /* (groups * per_group) */
} blocks_job;

static void block_task(void *ctx, int64_t i, int thread) {
    (void)thread;
    const blocks_job *job = ctx;
    const int64_t in_group = i % job->blocks->per_group * PTQ_GRID_BLOCK;
    const int64_t at = i / job->blocks->per_group * job->G + in_group;
    const int64_t width = ptq_min64(PTQ_GRID_BLOCK, job->G - in_group);
    job->status[i] = ptq_strips_make(&job->blocks->block[i], job->H, job->n, job->index + at, width,
                                     width, PTQ_STRIPS_HALF_DIAGONAL, 1);
}

static ptq_status fill_blocks(ptq_grid_blocks *b, blocks_job *job, int64_t count, int threads) {
    for (int64_t j = 0; j < job->n; j++)
        b->diagonal[j] = job->H[job->index[j] * job->n + job->index[j]];
    ptq_status status = ptq_parallel_for(count, threads, block_task, job);
    for (int64_t i = 0; i < count && !status; i++) status = job->status[i];
    return status;
}

ptq_status ptq_grid_blocks_make(ptq_grid_blocks *b, const float *H, int64_t n, int64_t G,
                                const int64_t *order, int threads) {
    b->groups = n / G;
    b->per_group = ptq_ceil_div(G, PTQ_GRID_BLOCK);
    const int64_t count = b->groups * b->per_group;
    b->block = calloc((size_t)count, sizeof *b->block);
    b->diagonal = ptq_alloc(n, sizeof *b->diagonal);
    int64_t *identity = order ? NULL : ptq_alloc(n, sizeof *identity);
    ptq_status *statuses = calloc((size_t)count, sizeof *statuses);
    blocks_job job = {b, H, n, G, order ? order : identity, statuses};
    threads = ptq_threads_for(threads, (double)n * (double)ptq_min64(G, PTQ_GRID_BLOCK));
    ptq_status status = PTQ_NOMEM;
    if (b->block && b->diagonal && job.index && statuses) {
        for (int64_t j = 0; identity && j < n; j++) identity[j] = j;
        status = fill_blocks(b, &job, count, threads);
    }
    free(identity);
    free(statuses);
    if (status) ptq_grid_blocks_free(b);
    return status;
}

void ptq_grid_blocks_free(ptq_grid_blocks *b) {
    for (int64_t i = 0; b->block && i < b->groups * b->per_group; i++)
        ptq_strips_free(&b->block[i]);
    free(b->block);
    free(b->diagonal);
    memset(b, 0, sizeof *b);
}

enum { LANES = 48, TILE = 8 * LANES };

/* A search walks the group in runs of PTQ_GRID_BLOCK columns, all candidates on each run, so that
 * the run and the candidates' grids stay in the first cache. */
int64_t ptq_panel_fit_work(int64_t G, const ptq_grid *grid) {
    (void)G;
    if (grid->method == PTQ_GRID_MINMAX) return 1;
    return (PTQ_GRID_BLOCK + 3 * grid->steps) * LANES;
}

/* error (nr) = d H_gg d^T of the grid's rounding error d, over the group's diagonal blocks. */
static void quadratic(const ptq_kernels *k, const ptq_grid *grid, int64_t G, const float *U,
                      const ptq_grid_blocks *blocks, int64_t g, const float *scale,
                      const float *zero, float *D, float *error) {
    const int64_t nr = k->nr;
    float T[TILE];
    double sum[LANES] = {0};
    for (int64_t i = 0; i < blocks->per_group; i++) {
        const ptq_strips *s = &blocks->block[g * blocks->per_group + i];
        const int64_t at = i * PTQ_GRID_BLOCK, width = ptq_min64(PTQ_GRID_BLOCK, G - at);
        k->fit_residual(grid, width, U + at * nr, scale, zero, D);
        for (int64_t t = 0; t < s->count; t++) {
            memset(T, 0, sizeof T);
            k->gemm_f32(T, s->data + s->offset[t], k->mr, D, s->start[t] + s->width[t]);
            k->dot(s->width[t], D + s->start[t] * nr, T, sum);
        }
    }
    for (int64_t r = 0; r < nr; r++) error[r] = (float)(2.0 * sum[r]);
}

/* Take each lane's smallest error out of the table: its factor goes to shrink. */
static void take_best(const ptq_kernels *k, const float *factors, float *errors, int steps,
                      float *shrink) {
    int best[LANES];
    k->fit_best(errors, steps, best);
    for (int64_t r = 0; r < k->nr; r++) {
        errors[best[r] * k->nr + r] = INFINITY;
        shrink[r] = factors[best[r]];
    }
}

/* The range of a group, and the search's candidates. */
typedef struct {
    float low[LANES], high[LANES], factors[PTQ_GRID_MAX_STEPS];
    float *scales, *zeros, *errors; /* (steps, nr) */
} candidates;

/* Errors of all candidates under the diagonal of H, or |d|^norm. */
static void rank_candidates(const ptq_kernels *k, const ptq_grid *grid, int64_t G, const float *U,
                            const float *diagonal, candidates *c) {
    const int64_t nr = k->nr;
    float shrink[LANES];
    k->fit_minmax(grid, G, U, c->low, c->high);
    for (int i = 0; i < grid->steps; i++) {
        const double step = grid->steps > 1 ? (double)i / (grid->steps - 1) : 0.0;
        c->factors[i] = (float)(1.0 - step * (1.0 - (double)grid->min_shrink));
        for (int64_t r = 0; r < nr; r++) shrink[r] = c->factors[i];
        k->fit_make(grid, c->low, c->high, shrink, c->scales + i * nr, c->zeros + i * nr);
    }
    memset(c->errors, 0, sizeof(float) * (size_t)(grid->steps * nr));
    for (int64_t at = 0; at < G; at += PTQ_GRID_BLOCK) {
        const int64_t width = ptq_min64(PTQ_GRID_BLOCK, G - at);
        for (int i = 0; i < grid->steps; i++)
            k->fit_error(grid, width, U + at * nr, c->scales + i * nr, c->zeros + i * nr,
                         diagonal ? diagonal + at : NULL, c->errors + i * nr);
    }
}

static void fit_search(const ptq_kernels *k, const ptq_grid *grid, int64_t G, const float *U,
                       const ptq_grid_blocks *blocks, int64_t g, float *work, float *s, float *z) {
    const int64_t nr = k->nr;
    const int hessian = grid->method == PTQ_GRID_HESSIAN;
    float *D = work, shrink[LANES], best[LANES], error[LANES], scale[LANES], zero[LANES];
    candidates c = {.scales = work + PTQ_GRID_BLOCK * LANES};
    c.zeros = c.scales + grid->steps * LANES;
    c.errors = c.zeros + grid->steps * LANES;
    rank_candidates(k, grid, G, U, hessian ? blocks->diagonal + g * G : NULL, &c);
    for (int64_t r = 0; r < nr; r++) best[r] = INFINITY;
    const int rounds = !hessian ? 1 : grid->candidates < grid->steps ? grid->candidates : grid->steps;
    for (int i = 0; i < rounds; i++) {
        take_best(k, c.factors, c.errors, grid->steps, shrink);
        k->fit_make(grid, c.low, c.high, shrink, scale, zero);
        if (rounds > 1) quadratic(k, grid, G, U, blocks, g, scale, zero, D, error);
        for (int64_t r = 0; r < nr; r++) {
            /* the first one is the fallback where every error overflows */
            if (i > 0 && !(error[r] < best[r])) continue;
            if (rounds > 1 && error[r] < best[r]) best[r] = error[r];
            s[r] = scale[r];
            z[r] = zero[r];
        }
    }
}

void ptq_panel_fit(const ptq_kernels *k, const ptq_grid *grid, int64_t G, const float *U,
                   const ptq_grid_blocks *blocks, int64_t g, float *work, float *s, float *z) {
    if (grid->method != PTQ_GRID_MINMAX) {
        fit_search(k, grid, G, U, blocks, g, work, s, z);
        return;
    }
    float low[LANES], high[LANES], shrink[LANES];
    k->fit_minmax(grid, G, U, low, high);
    for (int64_t r = 0; r < k->nr; r++) shrink[r] = 1.0f;
    k->fit_make(grid, low, high, shrink, s, z);
}
