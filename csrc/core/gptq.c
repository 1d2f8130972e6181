/* gptq.c - the solver, left-looking over panels of rows.
 *
 * [GPTQ] Algorithm 1 works on U with H^-1 = U^T U and spreads each column's error over the later
 * ones. With H = R R^T instead, R upper triangular, and the error so far in the original weights,
 * E = W - Q, the same codes are, for column j in quantization order,
 *     q_j = Q(w_j + (sum_{k<j} E_k R_kj) / R_jj)
 * (Babai's nearest plane): one factorization and no inverse, and sums over earlier columns only.
 * A task owns a few panels of rows from start to end, so no task waits for another. Columns go in
 * blocks: first the sums over all earlier blocks as GEMMs, then strip by strip inside the block. */
#include <math.h>
#include <stdatomic.h>

#include "internal.h"

enum {
    PANELS = 4,  /* panels per task: R is read from memory once for all of them */
    SWEEP = 128, /* columns per block of a sweep; fixed, because its sums depend on it */
    DEPTH = 256, /* rows of R per GEMM call, so that a chunk stays in the second cache */
};

typedef struct {
    const ptq_gptq_args *a;
    const ptq_kernels *k;
    ptq_strips R, H; /* H: FULL, for sweeps */
    ptq_grid_blocks blocks;
    ptq_refit refit;
    const float *hdiag;   /* (n) diagonal of H in quantization order, 0 for dead inputs */
    const int32_t *group; /* (n) group of the i-th quantized column */
    const int64_t *first, *sweep_first; /* (blocks + 1) first strip of each column block */
    int64_t block_count, sweep_count;
    int64_t panels, per_task;
    int64_t block_columns; /* widest block */
    int64_t workspace;     /* floats per thread */
    float *work;
    atomic_int nonfinite;
} solver;

/* One panel's state inside a task. */
typedef struct {
    float *W, *E;          /* (n, nr) in quantization order */
    float *scales, *zeros; /* (groups, nr) */
    uint8_t *codes;        /* (n, nr) */
    float *T;              /* (block columns rounded up, nr) */
    double objective[PTQ_MAX_NR], error2[PTQ_MAX_NR];
} panel;

static int dynamic(const ptq_gptq_args *a) { return !a->static_groups; }

/* Sweeps, and entries of the history after the first. */
static int sweeps(const ptq_gptq_args *a) { return a->refine_passes + a->refit_rounds; }
static int passes(const ptq_gptq_args *a) { return a->refine_passes + 2 * a->refit_rounds; }

/* Where strip s of a block that starts at strip s0 keeps its T: strips are mr columns apart. */
static float *strip_T(const solver *v, const panel *p, int64_t s, int64_t s0) {
    return p->T + (s - s0) * v->k->gemm.mr * v->k->gemm.nr;
}

/* T of strips [s0, s1) += M[k0:k1, strip]^T X[k0:k1]. */
static void accumulate(const solver *v, const ptq_strips *M, const panel *p, const float *X,
                       int64_t s0, int64_t s1, int64_t base, int64_t k0, int64_t k1) {
    const int64_t nr = v->k->gemm.nr, mr = v->k->gemm.mr;
    for (int64_t s = s0; s < s1 && k1 > k0; s++)
        v->k->gemm.f32(strip_T(v, p, s, base), M->data + M->offset[s] + k0 * mr, mr, X + k0 * nr,
                       k1 - k0);
}

static ptq_strip_args strip_args(const solver *v, panel *p, const ptq_strips *M, int64_t s,
                                 int64_t s0) {
    const int64_t nr = v->k->gemm.nr, start = M->start[s];
    return (ptq_strip_args){
        .width = M->width[s],
        .feedback = v->a->feedback,
        .diag = M->data + M->offset[s] + start * v->k->gemm.mr,
        .W = p->W + start * nr,
        .scales = p->scales,
        .zeros = p->zeros,
        .group = v->group + start,
        .max_code = v->a->grid.max_code,
        .T = strip_T(v, p, s, s0),
        .E = p->E + start * nr,
        .codes = p->codes + start * nr,
        .objective = p->objective,
        .error2 = p->error2,
    };
}

/* A group's strips [s0, s1), to be solved with a grid that is tried. */
typedef struct {
    const solver *v;
    panel *p;
    int64_t s0, s1;
    /* Of the strips' T, which holds the sums over earlier groups; -1: there is none. */
    int64_t base;
} trial;

/* error = what the solve itself would add to the objective, its columns fed back; in a channel each
 * run of PTQ_GRID_BLOCK columns without the others. E and codes of the group are overwritten. */
static void fed_back_error(void *ctx, const float *scale, const float *zero, float *error) {
    const trial *t = ctx;
    const solver *v = t->v;
    const ptq_strips *R = &v->R;
    const int64_t nr = v->k->gemm.nr, mr = v->k->gemm.mr, start = R->start[t->s0];
    const int64_t run = t->base < 0 ? PTQ_GRID_BLOCK : v->a->G;
    float T[PTQ_MAX_TILE];
    double objective[PTQ_MAX_NR] = {0}, error2[PTQ_MAX_NR] = {0};
    memcpy(t->p->scales + v->group[start] * nr, scale, sizeof(float) * (size_t)nr);
    memcpy(t->p->zeros + v->group[start] * nr, zero, sizeof(float) * (size_t)nr);
    for (int64_t s = t->s0; s < t->s1; s++) {
        const int64_t column = R->start[s], from = start + (column - start) / run * run;
        if (t->base < 0) memset(T, 0, sizeof(float) * (size_t)(mr * nr));
        else memcpy(T, strip_T(v, t->p, s, t->base), sizeof(float) * (size_t)(mr * nr));
        v->k->gemm.f32(T, R->data + R->offset[s] + from * mr, mr, t->p->E + from * nr,
                       column - from);
        ptq_strip_args args = strip_args(v, t->p, R, s, s);
        args.T = T;
        args.objective = objective;
        args.error2 = error2;
        v->k->solve.quantize(&args);
    }
    for (int64_t r = 0; r < nr; r++) error[r] = (float)objective[r];
}

/* Fit the grid of U, the weights of strips [s0, s1), as the options say; base as in a trial. */
static void fit_strips(const solver *v, panel *p, const float *U, int64_t s0, int64_t s1,
                       int64_t base, float *scratch) {
    const int64_t nr = v->k->gemm.nr, start = v->R.start[s0], G = v->a->G, g = v->group[start];
    if (v->a->grid.method != PTQ_GRID_FEEDBACK) {
        ptq_grid_fit(v->k, &v->a->grid, G, U, &v->blocks, start / G, scratch, p->scales + g * nr,
                     p->zeros + g * nr);
        return;
    }
    trial t = {v, p, s0, s1, base};
    float scale[PTQ_MAX_NR], zero[PTQ_MAX_NR];
    ptq_grid_fit_all(v->k, &v->a->grid, G, U, fed_back_error, &t, scale, zero);
    memcpy(p->scales + g * nr, scale, sizeof(float) * (size_t)nr);
    memcpy(p->zeros + g * nr, zero, sizeof(float) * (size_t)nr);
}

/* Fit the grid of the group whose strips are [s0, s1) to its updated weights
 * U = W_g + D with D R_gg = E[:, :g] R[:g, g]; T already holds the right side. */
static void fit_updated(const solver *v, panel *p, int64_t s0, int64_t s1, int64_t base,
                        float *scratch) {
    const ptq_strips *R = &v->R;
    const int64_t nr = v->k->gemm.nr, mr = v->k->gemm.mr, start = R->start[s0];
    const int64_t G = v->a->G;
    const float *U = p->W + start * nr;
    if (v->a->feedback && start > 0) {
        float *N = scratch, *V = N + G * nr, *fit = V + G * nr, T[PTQ_MAX_TILE];
        for (int64_t s = s0; s < s1; s++) {
            const int64_t at = R->start[s] - start;
            const float *column = R->data + R->offset[s];
            memcpy(T, strip_T(v, p, s, base), sizeof(float) * (size_t)(mr * nr));
            v->k->gemm.f32(T, column + start * mr, mr, N, at);
            v->k->solve.trisolve(R->width[s], column + R->start[s] * mr, T, N + at * nr);
        }
        for (int64_t i = 0; i < G * nr; i++) V[i] = U[i] - N[i];
        fit_strips(v, p, V, s0, s1, base, fit);
        return;
    }
    fit_strips(v, p, U, s0, s1, base, scratch);
}

/* All that happens inside a block once T holds the sums over earlier blocks. */
static void solve_block(const solver *v, panel *p, int64_t s0, int64_t s1, float *scratch) {
    const ptq_strips *R = &v->R;
    const int64_t start = R->start[s0];
    int64_t from = s0; /* first strip of the current group */
    for (int64_t s = s0; s < s1; s++) {
        const int64_t column = R->start[s];
        int64_t done = start; /* T of this strip already covers k < done */
        if (dynamic(v->a) && column % v->a->G == 0) {
            int64_t end = s;
            while (end < R->count && R->start[end] < column + v->a->G) end++;
            if (end > s1) end = s1; /* a per-channel group: its first block is all it needs */
            if (v->a->feedback) accumulate(v, R, p, p->E, s, end, s0, start, column);
            fit_updated(v, p, s, end, s0, scratch);
            from = s;
        }
        if (dynamic(v->a)) done = R->start[from];
        if (v->a->feedback) accumulate(v, R, p, p->E, s, s + 1, s0, done, column);
        const ptq_strip_args args = strip_args(v, p, R, s, s0);
        v->k->solve.quantize(&args);
    }
}

/* Sums over earlier columns [0, end) for a block of all panels, in chunks of k. */
static void block_sums(const solver *v, const ptq_strips *M, panel *p, int64_t panels, int64_t s0,
                       int64_t s1, int64_t end) {
    const int64_t nr = v->k->gemm.nr;
    for (int64_t q = 0; q < panels; q++)
        memset(p[q].T, 0, sizeof(float) * (size_t)((s1 - s0) * v->k->gemm.mr * nr));
    for (int64_t k0 = 0; k0 < end; k0 += DEPTH)
        for (int64_t q = 0; q < panels; q++)
            accumulate(v, M, &p[q], p[q].E, s0, s1, s0, k0, ptq_min64(k0 + DEPTH, end));
}

static void sweep_block(const solver *v, panel *p, int64_t s0, int64_t s1, float *dE) {
    const ptq_strips *H = &v->H;
    const int64_t nr = v->k->gemm.nr, mr = v->k->gemm.mr, start = H->start[s0];
    for (int64_t s = s0; s < s1; s++) {
        const int64_t at = H->start[s] - start;
        v->k->gemm.f32(strip_T(v, p, s, s0), H->data + H->offset[s] + start * mr, mr, dE, at);
        ptq_strip_args args = strip_args(v, p, H, s, s0);
        args.hdiag = v->hdiag + H->start[s];
        args.dE = dE + at * nr;
        v->k->solve.sweep(&args);
    }
}

static void load_task_panel(const solver *v, panel *p, int64_t row, float *scratch) {
    const ptq_gptq_args *a = v->a;
    const int64_t nr = v->k->gemm.nr;
    float *natural = p->E; /* E is not needed yet */
    ptq_panel_load(v->k, a->W, a->rows, a->n, row, natural);
    for (int64_t j = 0; j < a->n; j++)
        memcpy(p->W + j * nr, natural + a->perm[j] * nr, sizeof(float) * (size_t)nr);
    const int fed_back = a->grid.method == PTQ_GRID_FEEDBACK;
    if (a->static_groups && fed_back) fit_strips(v, p, p->W, 0, v->R.count, -1, scratch);
    for (int64_t g = 0; a->static_groups && !fed_back && g < a->n / a->G; g++)
        ptq_grid_fit(v->k, &a->grid, a->G, natural + g * a->G * nr, &v->blocks, g, scratch,
                     p->scales + g * nr, p->zeros + g * nr);
    memset(p->objective, 0, sizeof p->objective);
    memset(p->error2, 0, sizeof p->error2);
}

static void store_history(solver *v, const panel *p, int64_t row, int pass) {
    const ptq_gptq_args *a = v->a;
    for (int64_t r = 0; r < v->k->gemm.nr && row + r < a->rows; r++) {
        if (!isfinite(p->objective[r])) v->nonfinite = 1;
        a->history[pass * a->rows + row + r] = p->objective[r];
    }
}

/* The last objective anew if its terms have cancelled, and with it the ones before: what a pass
 * gains comes from H itself. */
static void repair_history(const solver *v, const panel *p, int64_t row) {
    const ptq_gptq_args *a = v->a;
    double least[PTQ_MAX_NR], objective[PTQ_MAX_NR];
    for (int64_t r = 0; r < v->k->gemm.nr; r++) {
        least[r] = 1e-3 * a->shift * p->error2[r]; /* was taken off */
        objective[r] = p->objective[r];
    }
    ptq_objective_repair(a->H, a->n, a->perm, p->E, v->k->gemm.nr, least, objective);
    for (int64_t r = 0; r < v->k->gemm.nr && row + r < a->rows; r++) {
        const double change = objective[r] - p->objective[r];
        for (int pass = 0; pass <= passes(a) && change != 0.0; pass++)
            a->history[pass * a->rows + row + r] += change;
    }
}

static void store_panel(const solver *v, const panel *p, int64_t row) {
    const ptq_gptq_args *a = v->a;
    const int64_t nr = v->k->gemm.nr, present = ptq_min64(nr, a->rows - row), groups = a->n / a->G;
    enum { BLOCK = 256 }; /* columns whose codes stay in the first cache */
    for (int64_t j0 = 0; j0 < a->n; j0 += BLOCK)
        for (int64_t r = 0; r < present; r++) {
            uint8_t *out = a->codes + (row + r) * a->n;
            for (int64_t j = j0; j < ptq_min64(j0 + BLOCK, a->n); j++)
                out[a->perm[j]] = p->codes[j * nr + r];
        }
    for (int64_t r = 0; r < present; r++)
        for (int64_t g = 0; g < groups; g++) {
            a->scales[(row + r) * groups + g] = p->scales[g * nr + r];
            a->zeros[(row + r) * groups + g] = (uint8_t)(int)p->zeros[g * nr + r];
        }
}

static int64_t panel_floats(const solver *v) {
    const int64_t n = v->a->n, groups = n / v->a->G;
    return v->k->gemm.nr * (2 * n + 2 * groups + v->block_columns) +
           ptq_ceil_div(n * v->k->gemm.nr, 64) * 16;
}

static float *carve_panel(const solver *v, panel *p, float *at) {
    const int64_t nr = v->k->gemm.nr, n = v->a->n, groups = n / v->a->G;
    p->W = at;
    p->E = p->W + n * nr;
    p->scales = p->E + n * nr;
    p->zeros = p->scales + groups * nr;
    p->T = p->zeros + groups * nr;
    p->codes = (uint8_t *)(p->T + v->block_columns * nr);
    return at + panel_floats(v);
}

/* One sweep over the codes of all panels of a task. */
static void sweep_panels(const solver *v, panel *p, int64_t count, float *scratch) {
    for (int64_t b = 0; b < v->sweep_count; b++) {
        if (ptq_should_stop()) return;
        const int64_t s0 = v->sweep_first[b], s1 = v->sweep_first[b + 1];
        block_sums(v, &v->H, p, count, s0, s1, v->a->n);
        for (int64_t q = 0; q < count; q++) sweep_block(v, &p[q], s0, s1, scratch);
    }
}

static void refit_panels(const solver *v, panel *p, int64_t count, float *scratch) {
    for (int64_t q = 0; q < count; q++) {
        const ptq_refit_panel fitted = {.grid = &v->a->grid,
                                        .W = p[q].W,
                                        .zeros = p[q].zeros,
                                        .codes = p[q].codes,
                                        .E = p[q].E,
                                        .scales = p[q].scales,
                                        .objective = p[q].objective};
        ptq_refit_scales(&v->refit, v->k, &fitted, scratch);
    }
}

static void solve_task(void *ctx, int64_t task, int thread) {
    solver *v = ctx;
    const ptq_gptq_args *a = v->a;
    const int64_t first = task * v->per_task, count = ptq_min64(v->per_task, v->panels - first);
    panel p[PANELS];
    float *at = v->work + thread * v->workspace;
    for (int64_t q = 0; q < count; q++) at = carve_panel(v, &p[q], at);
    for (int64_t q = 0; q < count; q++) load_task_panel(v, &p[q], (first + q) * v->k->gemm.nr, at);
    for (int64_t b = 0; b < v->block_count; b++) {
        if (ptq_should_stop()) return;
        const int64_t s0 = v->first[b], s1 = v->first[b + 1];
        block_sums(v, &v->R, p, count, s0, s1, a->feedback ? v->R.start[s0] : 0);
        for (int64_t q = 0; q < count; q++) solve_block(v, &p[q], s0, s1, at);
    }
    for (int64_t q = 0; q < count; q++) {
        for (int64_t r = 0; r < v->k->gemm.nr; r++) /* ||E R||^2 = e (H + damping) e^T */
            p[q].objective[r] -= a->shift * p[q].error2[r];
        store_history(v, &p[q], (first + q) * v->k->gemm.nr, 0);
    }
    for (int pass = 1; pass <= passes(a); pass++) {
        /* every round after the first sweeps is a refit and a sweep */
        const int refit = pass > a->refine_passes && (pass - a->refine_passes) % 2 == 1;
        if (refit) refit_panels(v, p, count, at);
        else sweep_panels(v, p, count, at);
        if (ptq_should_stop()) return;
        for (int64_t q = 0; q < count; q++)
            store_history(v, &p[q], (first + q) * v->k->gemm.nr, pass);
    }
    for (int64_t q = 0; q < count; q++) {
        if (a->feedback) repair_history(v, &p[q], (first + q) * v->k->gemm.nr);
        store_panel(v, &p[q], (first + q) * v->k->gemm.nr);
    }
}

/* Cut the strips into blocks of whole groups (dynamic grids) of about `block` columns. */
static int64_t cut_blocks(solver *v, int64_t block, int64_t *first) {
    const ptq_gptq_args *a = v->a;
    int64_t width = ptq_max64(block, v->k->gemm.mr);
    if (dynamic(a) && a->G < a->n) width = ptq_max64(1, width / a->G) * a->G;
    int64_t count = 0;
    for (int64_t s = 0; s < v->R.count; s++)
        if (s == 0 || v->R.start[s] / width != v->R.start[s - 1] / width) first[count++] = s;
    first[count] = v->R.count;
    for (int64_t b = 0; b < count; b++)
        v->block_columns = ptq_max64(v->block_columns, (first[b + 1] - first[b]) * v->k->gemm.mr);
    return count;
}

typedef struct {
    int32_t *group;
    int64_t *first, *sweep_first;
    float *hdiag;
} index_tables;

static ptq_status prepare(solver *v, index_tables *t, int threads) {
    const ptq_gptq_args *a = v->a;
    /* Dynamic groups need strips that end with the group; strips of H must match those of R. */
    const int fed_back = a->grid.method == PTQ_GRID_FEEDBACK;
    const int64_t align = dynamic(a) ? a->G : fed_back ? PTQ_GRID_BLOCK : a->n;
    ptq_status status =
        ptq_strips_make(v->k, &v->R, a->R, a->n, NULL, a->n, align, PTQ_STRIPS_UPPER, threads);
    if (!status && sweeps(a))
        status = ptq_strips_make(v->k, &v->H, a->H, a->n, a->perm, a->n, align, PTQ_STRIPS_FULL,
                                 threads);
    if (!status && a->grid.method == PTQ_GRID_HESSIAN)
        status = ptq_grid_blocks_make(v->k, &v->blocks, a->H, a->n, a->G,
                                      a->static_groups ? NULL : a->perm, threads);
    if (status) return status;
    t->group = ptq_alloc(a->n, sizeof *t->group);
    t->hdiag = ptq_alloc(a->n, sizeof *t->hdiag);
    t->first = ptq_alloc(v->R.count + 1, sizeof *t->first);
    t->sweep_first = ptq_alloc(v->R.count + 1, sizeof *t->sweep_first);
    if (!t->group || !t->hdiag || !t->first || !t->sweep_first) return PTQ_NOMEM;
    for (int64_t j = 0; j < a->n; j++) {
        t->group[j] = (int32_t)((a->groups_follow_order ? j : a->perm[j]) / a->G);
        t->hdiag[j] = a->H[a->perm[j] * a->n + a->perm[j]];
        a->g_idx[a->perm[j]] = t->group[j];
    }
    v->group = t->group;
    v->hdiag = t->hdiag;
    v->first = t->first;
    v->sweep_first = t->sweep_first;
    v->block_count = cut_blocks(v, a->block, t->first);
    if (sweeps(a)) v->sweep_count = cut_blocks(v, SWEEP, t->sweep_first);
    if (!a->refit_rounds) return PTQ_OK;
    return ptq_refit_make(v->k, &v->refit, a->H, a->n, a->G, a->perm, t->group, threads);
}

static ptq_status solve(solver *v, int threads) {
    const ptq_gptq_args *a = v->a;
    const int64_t nr = v->k->gemm.nr;
    v->panels = ptq_ceil_div(a->rows, nr);
    v->per_task = ptq_max64(1, ptq_min64(PANELS, v->panels / (2 * threads)));
    /* scratch: N and V of fit_updated, then the grid search's own; or dE of a sweep; or a refit's
     */
    const int64_t fit = 2 * a->G * nr + ptq_grid_fit_work(&a->grid);
    int64_t scratch = ptq_max64(fit, v->block_columns * nr);
    if (a->refit_rounds) scratch = ptq_max64(scratch, ptq_refit_work(&v->refit, v->k));
    v->workspace = ptq_ceil_div(v->per_task * panel_floats(v) + scratch, 16) * 16;
    v->work = ptq_alloc_large(v->workspace * threads, sizeof *v->work);
    if (!v->work) return PTQ_NOMEM;
    const ptq_status status =
        ptq_parallel_for(ptq_ceil_div(v->panels, v->per_task), threads, solve_task, v);
    return status ? status : v->nonfinite ? PTQ_NONFINITE : PTQ_OK;
}

ptq_status ptq_gptq(const ptq_gptq_args *a, int threads) {
    if (a->rows < 1 || a->n < 1 || a->G < 1 || a->n % a->G || a->block < 1) return PTQ_INVALID;
    /* Only groups that are solved as a whole can be tried. */
    if (a->grid.method == PTQ_GRID_FEEDBACK && (!a->feedback || a->static_groups != (a->G == a->n)))
        return PTQ_INVALID;
    solver v = {.a = a, .k = ptq_kernels_get()};
    index_tables t = {0};
    threads = ptq_thread_count(threads);
    ptq_status status = prepare(&v, &t, threads);
    if (!status) status = solve(&v, threads);
    ptq_strips_free(&v.R);
    ptq_strips_free(&v.H);
    ptq_grid_blocks_free(&v.blocks);
    ptq_refit_free(&v.refit);
    free(t.group);
    free(t.hdiag);
    free(t.first);
    free(t.sweep_first);
    free(v.work);
    return status;
}
