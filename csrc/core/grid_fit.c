/* grid_fit.c - the grid of one group of a panel: min-max, or a search over shrunk ranges. */
#include <math.h>

#include "internal.h"

typedef struct {
    const ptq_kernels *k;
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
    job->status[i] = ptq_strips_make(job->k, &job->blocks->block[i], job->H, job->n,
                                     job->index + at, width, width, PTQ_STRIPS_HALF_DIAGONAL, 1);
}

static ptq_status fill_blocks(ptq_grid_blocks *b, blocks_job *job, int64_t count, int threads) {
    for (int64_t j = 0; j < job->n; j++)
        b->diagonal[j] = job->H[job->index[j] * job->n + job->index[j]];
    ptq_status status = ptq_parallel_for(count, threads, block_task, job);
    for (int64_t i = 0; i < count && !status; i++) status = job->status[i];
    return status;
}

ptq_status ptq_grid_blocks_make(const ptq_kernels *k, ptq_grid_blocks *b, const float *H, int64_t n,
                                int64_t G, const int64_t *perm, int threads) {
    b->groups = n / G;
    b->per_group = ptq_ceil_div(G, PTQ_GRID_BLOCK);
    const int64_t count = b->groups * b->per_group;
    b->block = calloc((size_t)count, sizeof *b->block);
    b->diagonal = ptq_alloc(n, sizeof *b->diagonal);
    int64_t *identity = perm ? NULL : ptq_alloc(n, sizeof *identity);
    ptq_status *statuses = calloc((size_t)count, sizeof *statuses);
    blocks_job job = {k, b, H, n, G, perm ? perm : identity, statuses};
    if (!ptq_worth_threads((double)n * (double)ptq_min64(G, PTQ_GRID_BLOCK))) threads = 1;
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

/* A search walks the group in runs of PTQ_GRID_BLOCK columns, all candidates on each run, so that
 * the run and the candidates' grids stay in the first cache. */
int64_t ptq_grid_fit_work(const ptq_grid *grid) {
    if (grid->method == PTQ_GRID_MINMAX) return 1;
    return (PTQ_GRID_BLOCK + 3 * grid->steps) * PTQ_MAX_NR;
}

/* error (nr) = d H_gg d^T of the grid's rounding error d, over the group's diagonal blocks. */
static void hessian_error(const ptq_kernels *k, const ptq_grid *grid, int64_t G, const float *U,
                          const ptq_grid_blocks *blocks, int64_t g, const float *scale,
                          const float *zero, float *D, float *error) {
    const int64_t nr = k->gemm.nr;
    float T[PTQ_MAX_TILE];
    double sum[PTQ_MAX_NR] = {0};
    for (int64_t i = 0; i < blocks->per_group; i++) {
        const ptq_strips *s = &blocks->block[g * blocks->per_group + i];
        const int64_t at = i * PTQ_GRID_BLOCK, width = ptq_min64(PTQ_GRID_BLOCK, G - at);
        k->grid.residual(grid, width, U + at * nr, scale, zero, D);
        for (int64_t t = 0; t < s->count; t++) {
            memset(T, 0, sizeof T);
            k->gemm.f32(T, s->data + s->offset[t], k->gemm.mr, D, s->start[t] + s->width[t]);
            k->gemm.dot(s->width[t], D + s->start[t] * nr, T, sum);
        }
    }
    for (int64_t r = 0; r < nr; r++) error[r] = (float)(2.0 * sum[r]);
}

/* Take each lane's smallest error out of the table: its factor goes to shrink. */
static void take_best(const ptq_kernels *k, const float *factors, float *errors, int steps,
                      float *shrink) {
    int best[PTQ_MAX_NR];
    k->grid.best(errors, steps, best);
    for (int64_t r = 0; r < k->gemm.nr; r++) {
        errors[best[r] * k->gemm.nr + r] = INFINITY;
        shrink[r] = factors[best[r]];
    }
}

/* The range of a group, and the search's candidates. */
typedef struct {
    float low[PTQ_MAX_NR], high[PTQ_MAX_NR], factors[PTQ_GRID_MAX_STEPS];
    float *scales, *zeros, *errors; /* (steps, nr) */
} candidates;

/* Factor i of a search. */
static float shrink_factor(const ptq_grid *grid, int i) {
    const double step = grid->steps > 1 ? (double)i / (grid->steps - 1) : 0.0;
    return (float)(1.0 - step * (1.0 - (double)grid->min_shrink));
}

/* Errors of all candidates under the diagonal of H, or |d|^norm. */
static void rank_candidates(const ptq_kernels *k, const ptq_grid *grid, int64_t G, const float *U,
                            const float *diagonal, candidates *c) {
    const int64_t nr = k->gemm.nr;
    float shrink[PTQ_MAX_NR];
    k->grid.range(G, U, c->low, c->high);
    for (int i = 0; i < grid->steps; i++) {
        c->factors[i] = shrink_factor(grid, i);
        for (int64_t r = 0; r < nr; r++) shrink[r] = c->factors[i];
        k->grid.from_range(grid, c->low, c->high, shrink, c->scales + i * nr, c->zeros + i * nr);
    }
    memset(c->errors, 0, sizeof(float) * (size_t)(grid->steps * nr));
    for (int64_t at = 0; at < G; at += PTQ_GRID_BLOCK) {
        const int64_t width = ptq_min64(PTQ_GRID_BLOCK, G - at);
        for (int i = 0; i < grid->steps; i++)
            k->grid.error(grid, width, U + at * nr, c->scales + i * nr, c->zeros + i * nr,
                          diagonal ? diagonal + at : NULL, c->errors + i * nr);
    }
}

static void fit_search(const ptq_kernels *k, const ptq_grid *grid, int64_t G, const float *U,
                       const ptq_grid_blocks *blocks, int64_t g, float *work, float *s, float *z) {
    const int64_t nr = k->gemm.nr;
    const int hessian = grid->method == PTQ_GRID_HESSIAN;
    float *D = work, shrink[PTQ_MAX_NR], best[PTQ_MAX_NR], error[PTQ_MAX_NR], scale[PTQ_MAX_NR],
          zero[PTQ_MAX_NR];
    candidates c = {.scales = work + PTQ_GRID_BLOCK * PTQ_MAX_NR};
    c.zeros = c.scales + grid->steps * PTQ_MAX_NR;
    c.errors = c.zeros + grid->steps * PTQ_MAX_NR;
    rank_candidates(k, grid, G, U, hessian ? blocks->diagonal + g * G : NULL, &c);
    for (int64_t r = 0; r < nr; r++) best[r] = INFINITY;
    const int rounds = !hessian                         ? 1
                       : grid->candidates < grid->steps ? grid->candidates
                                                        : grid->steps;
    for (int i = 0; i < rounds; i++) {
        take_best(k, c.factors, c.errors, grid->steps, shrink);
        k->grid.from_range(grid, c.low, c.high, shrink, scale, zero);
        if (rounds > 1) hessian_error(k, grid, G, U, blocks, g, scale, zero, D, error);
        for (int64_t r = 0; r < nr; r++) {
            /* the first one is the fallback if every error overflows */
            if (i > 0 && !(error[r] < best[r])) continue;
            if (rounds > 1 && error[r] < best[r]) best[r] = error[r];
            s[r] = scale[r];
            z[r] = zero[r];
        }
    }
}

void ptq_grid_fit_all(const ptq_kernels *k, const ptq_grid *grid, int64_t G, const float *U,
                      ptq_grid_error error, void *ctx, float *s, float *z) {
    const int64_t nr = k->gemm.nr;
    float low[PTQ_MAX_NR], high[PTQ_MAX_NR], shrink[PTQ_MAX_NR], scale[PTQ_MAX_NR],
        zero[PTQ_MAX_NR], found[PTQ_MAX_NR], best[PTQ_MAX_NR];
    k->grid.range(G, U, low, high);
    for (int i = 0; i < grid->steps; i++) {
        for (int64_t r = 0; r < nr; r++) shrink[r] = shrink_factor(grid, i);
        k->grid.from_range(grid, low, high, shrink, scale, zero);
        error(ctx, scale, zero, found);
        for (int64_t r = 0; r < nr; r++) {
            /* the first one is the fallback if every error overflows */
            if (i > 0 && !(found[r] < best[r])) continue;
            best[r] = found[r];
            s[r] = scale[r];
            z[r] = zero[r];
        }
    }
}

void ptq_grid_fit(const ptq_kernels *k, const ptq_grid *grid, int64_t G, const float *U,
                  const ptq_grid_blocks *blocks, int64_t g, float *work, float *s, float *z) {
    if (grid->method != PTQ_GRID_MINMAX) {
        fit_search(k, grid, G, U, blocks, g, work, s, z);
        return;
    }
    float low[PTQ_MAX_NR], high[PTQ_MAX_NR], shrink[PTQ_MAX_NR];
    k->grid.range(G, U, low, high);
    for (int64_t r = 0; r < k->gemm.nr; r++) shrink[r] = 1.0f;
    k->grid.from_range(grid, low, high, shrink, s, z);
}
