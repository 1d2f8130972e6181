/* rtn.c - round to nearest, panel by panel. */
#include "internal.h"

typedef struct {
    const ptq_kernels *k;
    const float *W;
    int64_t rows, n, G;
    const ptq_grid *grid;
    ptq_grid_blocks blocks;
    uint8_t *codes, *zeros;
    float *scales;
    float *work;
    int64_t workspace;
} rounding;

static void round_panel(void *ctx, int64_t p, int thread) {
    const rounding *t = ctx;
    const int64_t nr = t->k->gemm.nr, row = p * nr, groups = t->n / t->G;
    const int64_t present = ptq_min64(nr, t->rows - row);
    float *panel = t->work + thread * t->workspace, *fit = panel + t->n * nr;
    uint8_t *codes = (uint8_t *)(fit + ptq_grid_fit_work(t->grid));
    float scale[PTQ_MAX_NR], zero[PTQ_MAX_NR];
    ptq_panel_load(t->k, t->W, t->rows, t->n, row, panel);
    for (int64_t g = 0; g < groups; g++) {
        const float *U = panel + g * t->G * nr;
        ptq_grid_fit(t->k, t->grid, t->G, U, &t->blocks, g, fit, scale, zero);
        t->k->grid.quantize(t->G, U, scale, zero, t->grid->max_code, codes);
        for (int64_t r = 0; r < present; r++) {
            uint8_t *out = t->codes + (row + r) * t->n + g * t->G;
            for (int64_t j = 0; j < t->G; j++) out[j] = codes[j * nr + r];
            t->scales[(row + r) * groups + g] = scale[r];
            t->zeros[(row + r) * groups + g] = (uint8_t)(int)zero[r];
        }
    }
}

ptq_status ptq_rtn(const float *W, int64_t rows, int64_t n, int64_t G, const ptq_grid *grid,
                   const float *H, uint8_t *codes, float *scales, uint8_t *zeros, int threads) {
    if (rows < 1 || n < 1 || G < 1 || n % G) return PTQ_INVALID;
    if (grid->method == PTQ_GRID_FEEDBACK) return PTQ_INVALID;
    rounding t = {.k = ptq_kernels_get(),
                  .W = W,
                  .rows = rows,
                  .n = n,
                  .G = G,
                  .grid = grid,
                  .codes = codes,
                  .zeros = zeros,
                  .scales = scales};
    const int64_t nr = t.k->gemm.nr;
    ptq_status status = PTQ_OK;
    threads = ptq_thread_count(threads);
    if (grid->method == PTQ_GRID_HESSIAN)
        status = ptq_grid_blocks_make(t.k, &t.blocks, H, n, G, NULL, threads);
    if (status) return status;
    t.workspace = n * nr + ptq_grid_fit_work(grid) + ptq_ceil_div(G * nr, 64) * 16;
    t.workspace = ptq_ceil_div(t.workspace, 16) * 16;
    t.work = ptq_alloc(t.workspace * threads, sizeof *t.work);
    status =
        t.work ? ptq_parallel_for(ptq_ceil_div(rows, nr), threads, round_panel, &t) : PTQ_NOMEM;
    ptq_grid_blocks_free(&t.blocks);
    free(t.work);
    return status;
}

typedef struct {
    const ptq_kernels *k;
    const float *W, *scales;
    const uint8_t *zeros;
    int64_t rows, n;
    int max_code;
    uint8_t *codes;
} fixed_grid;

/* A row on one grid: the lanes of the kernel are consecutive inputs here. */
static void fixed_grid_task(void *ctx, int64_t row, int thread) {
    (void)thread;
    const fixed_grid *t = ctx;
    const int64_t nr = t->k->gemm.nr, whole = t->n / nr * nr;
    const float *w = t->W + row * t->n;
    uint8_t *codes = t->codes + row * t->n, last[PTQ_MAX_NR];
    float scale[PTQ_MAX_NR], zero[PTQ_MAX_NR], rest[PTQ_MAX_NR] = {0};
    for (int64_t r = 0; r < nr; r++) {
        scale[r] = t->scales[row];
        zero[r] = (float)t->zeros[row];
    }
    t->k->grid.quantize(whole / nr, w, scale, zero, t->max_code, codes);
    memcpy(rest, w + whole, sizeof(float) * (size_t)(t->n - whole));
    t->k->grid.quantize(1, rest, scale, zero, t->max_code, last);
    memcpy(codes + whole, last, (size_t)(t->n - whole));
}

ptq_status ptq_codes_on_grid(const float *W, int64_t rows, int64_t n, const float *scales,
                             const uint8_t *zeros, int max_code, uint8_t *codes, int threads) {
    fixed_grid t = {ptq_kernels_get(), W, scales, zeros, rows, n, max_code, codes};
    threads = ptq_threads_for_work(threads, (double)rows * (double)n);
    return ptq_parallel_for(rows, threads, fixed_grid_task, &t);
}
