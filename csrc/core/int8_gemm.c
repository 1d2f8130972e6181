/* int8_gemm.c - X W^T from int8 codes: int32 sums of tiles widened to int16, then the scales. */
#include "internal.h"

enum {
    TOKENS = PTQ_INT8_BLOCK,      /* of a task: its codes are read once per OUTPUTS */
    OUTPUTS = 2 * PTQ_INT8_BLOCK, /* of a task */
    DEPTH = 1024, /* inputs widened at a time, so that a task stays in the second cache */
};

typedef struct {
    const ptq_kernels *k;
    const ptq_int8_args *a;
    int64_t blocks; /* of outputs */
    char *work;
    size_t workspace;
} product;

typedef struct {
    int16_t x[TOKENS * DEPTH], w[OUTPUTS * DEPTH];
    int32_t C[TOKENS * OUTPUTS], xsum[TOKENS], wsum[OUTPUTS];
    float F[OUTPUTS];
} scratch;

/* Codes of `count` rows from k0 widened to int16; rows up to `padded` are zero. */
static void widen_rows(const ptq_kernels *k, const int8_t *codes, int64_t n, int64_t count,
                       int64_t padded, int64_t k0, int64_t depth, int16_t *out, int32_t *sum) {
    for (int64_t r = 0; r < count; r++)
        sum[r] += k->int8.widen(codes + r * n + k0, depth, out + r * DEPTH);
    for (int64_t r = count; r < padded; r++)
        memset(out + r * DEPTH, 0, sizeof(int16_t) * (size_t)depth);
}

/* One row of the result: zero-points off the sums (exactly), the scales, the float columns. */
static void finish_row(const ptq_int8_args *a, scratch *s, int64_t i, int64_t t, int64_t o,
                       int64_t width) {
    const int64_t gx = a->x_grids > 1 ? t : 0, xsum = s->xsum[i], n = a->n;
    const int64_t zx = a->x_zeros[gx];
    const double sx = (double)a->x_scales[gx];
    float *y = a->y + t * a->outputs + o;
    for (int64_t j = 0; j < width; j++) {
        const int64_t gw = a->w_grids > 1 ? o + j : 0, zw = a->w_zeros[gw];
        const int64_t sum = s->C[i * OUTPUTS + j] - zx * s->wsum[j] - zw * xsum + n * zx * zw;
        y[j] = (float)((double)sum * sx * (double)a->w_scales[gw]);
    }
    if (!a->columns) return;
    memset(s->F, 0, sizeof(float) * (size_t)width);
    for (int64_t c = 0; c < a->columns; c++) {
        const float x = a->x_float[t * a->columns + c];
        const float *w = a->w_float + c * a->outputs + o;
        for (int64_t j = 0; j < width; j++) s->F[j] += x * w[j];
    }
    for (int64_t j = 0; j < width; j++) y[j] += s->F[j];
}

static void product_task(void *ctx, int64_t task, int thread) {
    const product *p = ctx;
    const ptq_int8_args *a = p->a;
    scratch *s = (scratch *)(void *)(p->work + (size_t)thread * p->workspace);
    const int64_t t = task / p->blocks * TOKENS, o = task % p->blocks * OUTPUTS;
    const int64_t height = ptq_min64(TOKENS, a->tokens - t),
                  width = ptq_min64(OUTPUTS, a->outputs - o);
    const int64_t tile_x = p->k->int8.tokens, tile_w = p->k->int8.outputs;
    const int64_t tall = ptq_ceil_div(height, tile_x) * tile_x;
    const int64_t broad = ptq_ceil_div(width, tile_w) * tile_w;
    memset(s->C, 0, sizeof s->C);
    memset(s->xsum, 0, sizeof s->xsum);
    memset(s->wsum, 0, sizeof s->wsum);
    for (int64_t k0 = 0; k0 < a->n; k0 += DEPTH) {
        if (ptq_should_stop()) return;
        const int64_t depth = ptq_min64(DEPTH, a->n - k0);
        widen_rows(p->k, a->x + t * a->n, a->n, height, tall, k0, depth, s->x, s->xsum);
        widen_rows(p->k, a->w + o * a->n, a->n, width, broad, k0, depth, s->w, s->wsum);
        for (int64_t i = 0; i < tall; i += tile_x)
            for (int64_t j = 0; j < broad; j += tile_w)
                p->k->int8.dots(s->x + i * DEPTH, s->w + j * DEPTH, DEPTH, depth,
                                s->C + i * OUTPUTS + j, OUTPUTS);
    }
    for (int64_t i = 0; i < height; i++) finish_row(a, s, i, t + i, o, width);
}

ptq_status ptq_int8_matmul(const ptq_int8_args *a, int threads) {
    /* 2^14 per product: more of them could leave int32 */
    if (a->tokens < 0 || a->outputs < 0 || a->n < 1 || a->n > PTQ_INT8_INPUTS) return PTQ_INVALID;
    threads =
        ptq_threads_for_work(threads, (double)a->tokens * (double)a->outputs * (double)a->n / 8);
    product p = {.k = ptq_kernels_get(),
                 .a = a,
                 .blocks = ptq_ceil_div(a->outputs, OUTPUTS),
                 .workspace = (sizeof(scratch) + 63) / 64 * 64};
    p.work = ptq_alloc(threads, p.workspace);
    if (!p.work) return PTQ_NOMEM;
    const int64_t tasks = ptq_ceil_div(a->tokens, TOKENS) * p.blocks;
    const ptq_status status = ptq_parallel_for(tasks, threads, product_task, &p);
    free(p.work);
    return status;
}
