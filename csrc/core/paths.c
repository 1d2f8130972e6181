/* paths.c - several partial roundings of a row instead of one (K-best, a bounded sphere decoder).
 *
 * gptq.c decides each code once: with y_j = sum_{k<=j} e_k R_kj, the objective under the damped H
 * is the sum of y_j^2, and the nearest code makes each term small, whatever it does to the later
 * ones. Here the `paths` cheapest beginnings are kept; each goes on with the nearest code and the
 * next nearest. The best one is then improved by coordinate descent under the undamped H, and
 * replaces the codes that the row has if its objective is lower.
 *
 * Columns go in blocks: sums over earlier blocks at once, for all paths side by side. Inside a
 * block the paths that survive a column take what belongs to their parents from within the block,
 * and at its end everything before it. */
#include <math.h>

#include "internal.h"
#include "round.h"

enum { LANES = PTQ_PATHS, BLOCK = 32 };

typedef struct {
    const ptq_paths_args *a;
    const ptq_kernels *k;
    ptq_strips R; /* in strips that end with blocks */
    char *work;
    size_t workspace; /* bytes per thread */
} search;

/* One row in quantization order, and the paths' errors and codes, (n, LANES). */
typedef struct {
    float *w, *s, *z, *E;
    double *e, *other, *g, *u; /* original order: errors, those before the search, products */
    uint8_t *C, *codes;
} row_state;

static size_t row_bytes(int64_t n) {
    const size_t each = 3 * sizeof(float) + LANES * (sizeof(float) + 1) + 4 * sizeof(double) + 1;
    return ((size_t)n * each + 63) / 64 * 64;
}

static row_state carve(char *at, int64_t n) {
    row_state r = {.g = (double *)at};
    r.e = r.g + n;
    r.other = r.e + n;
    r.u = r.other + n;
    r.E = (float *)(r.u + n);
    r.w = r.E + n * LANES;
    r.s = r.w + n;
    r.z = r.s + n;
    r.C = (uint8_t *)(r.z + n);
    r.codes = r.C + n * LANES;
    return r;
}

static void load_row(const ptq_paths_args *a, int64_t row, const row_state *r) {
    for (int64_t i = 0; i < a->n; i++) {
        const int64_t j = a->perm[i], g = row * a->groups + a->g_idx[j];
        r->w[i] = a->W[row * a->n + j];
        r->s[i] = a->scales[g];
        r->z[i] = (float)a->zeros[g];
    }
}

typedef struct {
    float cost, error;
    uint8_t code, parent;
} child;

/* Insert into the `count` cheapest so far, in order; of equals the first one stays ahead. */
static int insert(child *kept, int count, int limit, child c) {
    if (count == limit && !(c.cost < kept[count - 1].cost)) return count;
    int at = count < limit ? count : limit - 1;
    for (; at > 0 && c.cost < kept[at - 1].cost; at--) kept[at] = kept[at - 1];
    kept[at] = c;
    return count < limit ? count + 1 : count;
}

/* The cheapest continuations by column i; t (LANES) are its sums. A dead input costs nothing and
 * has one code. */
static int grow(const ptq_paths_args *a, const row_state *r, int64_t i, const float *t,
                const float *cost, int alive, child *kept) {
    const int64_t j = a->perm[i];
    const float rjj = a->R[i * a->n + i], top = (float)a->max_code;
    const float w = r->w[i], s = r->s[i], z = r->z[i];
    const int dead = !(a->H[j * a->n + j] > 0.0f);
    int count = 0;
    for (int p = 0; p < alive; p++) {
        const float wanted = w + t[p] / rjj;
        float code = ptq_code(wanted, s, z, top);
        for (int second = 0; second < (dead ? 1 : 2); second++) {
            const float value = s * (code - z), error = w - value, y = t[p] + error * rjj;
            const child c = {cost[p] + (dead ? 0.0f : y * y), error, (uint8_t)(int)code,
                             (uint8_t)p};
            count = insert(kept, count, a->paths, c);
            const float next = code + (wanted > value ? 1.0f : -1.0f);
            if (next < 0.0f || next > top) break;
            code = next;
        }
    }
    return count;
}

/* Rows [from, to) of the paths' errors and codes, taken from their parents'. */
static void take_from(const row_state *r, int64_t from, int64_t to, const uint8_t *parent) {
    for (int64_t i = from; i < to; i++) {
        float e[LANES];
        uint8_t c[LANES];
        for (int p = 0; p < LANES; p++) e[p] = r->E[i * LANES + parent[p]];
        for (int p = 0; p < LANES; p++) c[p] = r->C[i * LANES + parent[p]];
        memcpy(r->E + i * LANES, e, sizeof e);
        memcpy(r->C + i * LANES, c, sizeof c);
    }
}

/* Search the columns of a block; T holds the sums over earlier ones. Returns the paths alive. */
static int search_block(const ptq_paths_args *a, const row_state *r, int64_t b, int width, float *T,
                        float *cost, int alive) {
    uint8_t origin[LANES];
    int any = 0;
    for (int p = 0; p < LANES; p++) origin[p] = (uint8_t)p;
    for (int64_t i = b; i < b + width; i++) {
        child kept[LANES];
        uint8_t parent[LANES] = {0}, before[LANES];
        float *e = r->E + i * LANES;
        alive = grow(a, r, i, T + (i - b) * LANES, cost, alive, kept);
        int moved = 0;
        for (int p = 0; p < alive; p++) {
            parent[p] = kept[p].parent;
            moved |= parent[p] != p;
            cost[p] = kept[p].cost;
            e[p] = kept[p].error;
            r->C[i * LANES + p] = kept[p].code;
        }
        for (int p = alive; p < LANES; p++) e[p] = 0.0f;
        for (int p = alive; p < LANES; p++) r->C[i * LANES + p] = 0;
        any |= moved;
        if (moved) {
            memcpy(before, origin, sizeof before);
            for (int p = 0; p < LANES; p++) origin[p] = before[parent[p]];
            take_from(r, b, i, parent);
        }
        for (int64_t j = i + 1; j < b + width; j++) {
            float *t = T + (j - b) * LANES, old[LANES];
            const float rij = a->R[i * a->n + j];
            memcpy(old, t, sizeof old);
            for (int p = 0; p < LANES; p++) t[p] = old[parent[p]] + rij * e[p];
        }
    }
    if (any) take_from(r, 0, b, origin);
    return alive;
}

/* g = e H in double; returns e H e^T less that of the other errors, (e - other) H (e + other)^T. */
static double compare(const ptq_paths_args *a, const row_state *r) {
    const int64_t n = a->n;
    double *restrict g = r->g, *restrict u = r->u, change = 0.0;
    memset(g, 0, sizeof(double) * (size_t)n);
    memset(u, 0, sizeof(double) * (size_t)n);
    for (int64_t i = 0; i < n; i++) {
        const float *restrict h = a->H + i * n;
        const double e = r->e[i], d = e - r->other[i];
        for (int64_t j = 0; j < n; j++) g[j] += e * (double)h[j];
        for (int64_t j = 0; d != 0.0 && j < n; j++) u[j] += d * (double)h[j];
    }
    for (int64_t j = 0; j < n; j++) change += u[j] * (r->e[j] + r->other[j]);
    return change;
}

/* One coordinate-descent pass over r->codes; returns what it adds to the objective. */
static double descend(const ptq_paths_args *a, const row_state *r) {
    const int64_t n = a->n;
    double gained = 0.0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t j = a->perm[i];
        const double h = (double)a->H[j * n + j];
        if (!(h > 0.0)) continue;
        const float wanted = (float)((double)r->w[i] + r->g[j] / h - r->e[j]);
        const float code = ptq_code(wanted, r->s[i], r->z[i], (float)a->max_code);
        const double d = (double)(r->w[i] - r->s[i] * (code - r->z[i])) - r->e[j];
        const double gain = d * (2.0 * r->g[j] + d * h);
        if (!(gain < 0.0)) continue;
        gained += gain;
        r->e[j] += d;
        r->codes[j] = (uint8_t)(int)code;
        const float *restrict row = a->H + j * n;
        double *restrict g = r->g;
        for (int64_t c = 0; c < n; c++) g[c] += d * (double)row[c];
    }
    return gained;
}

static void row_task(void *ctx, int64_t task, int thread) {
    const search *v = ctx;
    const ptq_paths_args *a = v->a;
    const int64_t n = a->n, row = a->chosen[task];
    const row_state r = carve(v->work + (size_t)thread * v->workspace, n);
    float T[BLOCK * LANES], cost[LANES] = {0};
    int alive = 1;
    load_row(a, row, &r);
    for (int64_t b = 0, s = 0; b < n; b += BLOCK) {
        const int width = (int)ptq_min64(BLOCK, n - b);
        if (ptq_should_stop()) return;
        for (; s < v->R.count && v->R.start[s] < b + width; s++)
            v->k->paths.sums(v->R.data + v->R.offset[s], v->k->gemm.mr, r.E, b, v->R.width[s],
                             T + (v->R.start[s] - b) * LANES);
        alive = search_block(a, &r, b, width, T, cost, alive);
    }
    for (int64_t i = 0; i < n; i++) { /* path 0 is the cheapest */
        const int64_t j = a->perm[i];
        const uint8_t code = a->codes[row * n + j];
        r.other[j] = (double)(r.w[i] - r.s[i] * ((float)code - r.z[i]));
        r.e[j] = (double)r.E[i * LANES];
        r.codes[j] = r.C[i * LANES];
    }
    double change = compare(a, &r);
    change += descend(a, &r); /* reads and changes what compare left */
    /* What changes less is rounding. */
    if (!(change < -1e-6 * fabs(a->objective[row])) || !isfinite(change)) return;
    memcpy(a->codes + row * n, r.codes, (size_t)n);
    a->objective[row] += change;
}

ptq_status ptq_best_paths(const ptq_paths_args *a, int threads) {
    if (a->rows < 1 || a->n < 1 || a->groups < 1 || a->paths < 1 || a->paths > LANES)
        return PTQ_INVALID;
    for (int64_t i = 0; i < a->count; i++)
        if (a->chosen[i] < 0 || a->chosen[i] >= a->rows) return PTQ_INVALID;
    threads = ptq_thread_count(threads);
    search v = {.a = a, .k = ptq_kernels_get(), .workspace = row_bytes(a->n)};
    ptq_status status =
        ptq_strips_make(v.k, &v.R, a->R, a->n, NULL, a->n, BLOCK, PTQ_STRIPS_UPPER, threads);
    if (status) return status;
    v.work = ptq_alloc(threads, v.workspace);
    status = v.work ? ptq_parallel_for(a->count, threads, row_task, &v) : PTQ_NOMEM;
    ptq_strips_free(&v.R);
    free(v.work);
    return status;
}
