/* moved.c - out += (Y - X) W^T: what a layer's outputs move by if its inputs do, for float32. The
 * differences are multiplied and not the outputs subtracted, whose rounding would be as large. */
#include "internal.h"

enum {
    TOKENS = 128, /* per task: their strips share the second cache with a panel of W */
    DEPTH = 512,  /* inputs per register accumulation: two-level summation */
    TURN = 16,    /* inputs that are turned at a time, so that their lines are written whole */
};

typedef struct {
    const ptq_kernels *k;
    const ptq_moved_args *a;
    int64_t mr, nr;
    float *packed; /* (panels, n, nr) of W^T */
    float *strips; /* (threads, TOKENS, DEPTH) of Y - X, as (DEPTH, mr) each */
} job;

static void pack_task(void *ctx, int64_t panel, int thread) {
    (void)thread;
    const job *t = ctx;
    const int64_t n = t->a->n, nr = t->nr, rows = ptq_min64(nr, t->a->m - panel * nr);
    float *out = t->packed + panel * n * nr;
    if (rows < nr) memset(out, 0, sizeof(float) * (size_t)(n * nr));
    for (int64_t c0 = 0; c0 < n; c0 += TURN)
        for (int64_t r = 0; r < rows; r++) {
            const float *w = t->a->W + (panel * nr + r) * n;
            for (int64_t c = c0; c < ptq_min64(c0 + TURN, n); c++) out[c * nr + r] = w[c];
        }
}

/* Inputs [k0, k0 + depth) of up to mr tokens as (depth, mr); absent ones are zero. */
static void turn(const job *t, int64_t first, int64_t tokens, int64_t k0, int64_t depth,
                 float *restrict out) {
    const int64_t mr = t->mr;
    if (tokens < mr) memset(out, 0, sizeof(float) * (size_t)(depth * mr));
    for (int64_t c0 = 0; c0 < depth; c0 += TURN)
        for (int64_t i = 0; i < tokens; i++) {
            const float *y = t->a->Y + (first + i) * t->a->ldy + k0;
            const float *x = t->a->X + (first + i) * t->a->ldx + k0;
            for (int64_t c = c0; c < ptq_min64(c0 + TURN, depth); c++)
                out[c * mr + i] = y[c] - x[c];
        }
}

static void multiply(const job *t, int64_t first, int64_t tokens, int64_t k0, int64_t depth,
                     int64_t panel, const float *strip) {
    const int64_t m = t->a->m, n = t->a->n, nr = t->nr;
    float C[PTQ_MAX_TILE];
    memset(C, 0, sizeof C);
    t->k->gemm.f32(C, strip, t->mr, t->packed + (panel * n + k0) * nr, depth);
    t->k->gemm.add(t->a->out + first * m + panel * nr, m, C, nr, tokens,
                   ptq_min64(nr, m - panel * nr));
}

static void tokens_task(void *ctx, int64_t task, int thread) {
    const job *t = ctx;
    const int64_t n = t->a->n, mr = t->mr, panels = ptq_ceil_div(t->a->m, t->nr);
    const int64_t begin = task * TOKENS, end = ptq_min64(begin + TOKENS, t->a->tokens);
    float *strips = t->strips + thread * TOKENS * DEPTH;
    for (int64_t k0 = 0; k0 < n && !ptq_should_stop(); k0 += DEPTH) {
        const int64_t depth = ptq_min64(DEPTH, n - k0);
        for (int64_t i = begin; i < end; i += mr)
            turn(t, i, ptq_min64(mr, end - i), k0, depth, strips + (i - begin) * DEPTH);
        for (int64_t p = 0; p < panels; p++)
            for (int64_t i = begin; i < end; i += mr)
                multiply(t, i, ptq_min64(mr, end - i), k0, depth, p, strips + (i - begin) * DEPTH);
    }
}

ptq_status ptq_moved_outputs(const ptq_moved_args *a, int threads) {
    if (a->m < 1 || a->n < 1 || a->tokens < 0 || a->ldx < a->n || a->ldy < a->n) return PTQ_INVALID;
    job t = {.k = ptq_kernels_get(), .a = a};
    t.mr = t.k->gemm.mr;
    t.nr = t.k->gemm.nr;
    threads = ptq_threads_for_work(threads, (double)a->tokens * (double)a->m * (double)a->n / 16.0);
    const int64_t panels = ptq_ceil_div(a->m, t.nr);
    t.packed = ptq_alloc_large(panels * a->n * t.nr, sizeof(float));
    t.strips = ptq_alloc(threads * TOKENS * DEPTH, sizeof(float));
    ptq_status status = t.packed && t.strips ? PTQ_OK : PTQ_NOMEM;
    if (!status) status = ptq_parallel_for(panels, threads, pack_task, &t);
    if (!status)
        status = ptq_parallel_for(ptq_ceil_div(a->tokens, TOKENS), threads, tokens_task, &t);
    free(t.packed);
    free(t.strips);
    return status;
}
