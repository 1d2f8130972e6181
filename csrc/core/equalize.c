/* equalize.c - activation-weight equalization: scales, and the error that candidates cost. */
#include <math.h>

#include "internal.h"
#include "round.h"

ptq_status ptq_equalization_scales(const double *rx, const double *rw, int64_t n, double alpha,
                                   double lowest, double highest, float *scales) {
    if (n < 1 || !(alpha >= 0.0 && alpha <= 1.0)) return PTQ_INVALID;
    for (int64_t i = 0; i < n; i++) {
        const int live = rx[i] > 0.0 && rw[i] > 0.0;
        const double s = !live          ? 1.0
                         : alpha == 0.5 ? sqrt(rx[i] / rw[i])
                                        : pow(rx[i], alpha) / pow(rw[i], 1.0 - alpha);
        scales[i] = (float)(!live ? 1.0 : s < lowest ? lowest : s > highest ? highest : s);
    }
    return PTQ_OK;
}

typedef struct {
    const ptq_kernels *k;
    const ptq_equalization_args *a;
    const float *scales;     /* (n) of this candidate; NULL while the float outputs are computed */
    int64_t strips, panels;  /* of mr tokens; of nr outputs, no panel in two layers */
    int64_t *first;          /* (layers + 1) first panel of each layer */
    float *A;                /* (strips, n, mr) activations of this candidate */
    float *Y;                /* (panels, strips, mr, nr) float outputs */
    float *low, *high;       /* (layers, n) of the columns, with per_tensor */
    float *grid;             /* (2, layers) low and high of this candidate, with per_tensor */
    float act_low, act_high; /* of this candidate, static activations */
    double *part;            /* (panels) squared error */
    float *work;             /* (threads, workspace) */
    int64_t workspace;
} search;

/* The min-max grid of [low, high] and 0. */
static ptq_affine fit_affine(const ptq_grid *grid, float low, float high) {
    return ptq_minmax_grid(grid, low < 0.0f ? low : 0.0f, high > 0.0f ? high : 0.0f);
}

static float quantize_dequantize(float x, ptq_affine p, float top) {
    return p.scale * (ptq_code(x, p.scale, p.zero, top) - p.zero);
}

/* Strip t: mr tokens divided by the scales and quantized; missing tokens are zero. */
static void strip_task(void *ctx, int64_t t, int thread) {
    const search *s = ctx;
    const ptq_equalization_args *a = s->a;
    const int64_t mr = s->k->gemm.mr, n = a->n;
    const int top = a->act_max_code;
    const ptq_grid grid = {
        .max_code = top, .symmetric = a->act_symmetric, .scale_type = PTQ_F32, .min_zero = 0};
    float *row = s->work + thread * s->workspace, *out = s->A + t * n * mr;
    for (int64_t i = 0; i < mr; i++) {
        if (t * mr + i >= a->tokens) {
            for (int64_t j = 0; j < n; j++) out[j * mr + i] = 0.0f;
            continue;
        }
        const float *x = a->X + (t * mr + i) * n;
        float low = s->act_low, high = s->act_high;
        for (int64_t j = 0; j < n; j++) row[j] = s->scales ? x[j] / s->scales[j] : x[j];
        if (s->scales && top && !a->act_per_tensor) {
            low = high = 0.0f;
            for (int64_t j = 0; j < n; j++) {
                low = row[j] < low ? row[j] : low;
                high = row[j] > high ? row[j] : high;
            }
        }
        if (s->scales && top) {
            const ptq_affine p = fit_affine(&grid, low, high);
            for (int64_t j = 0; j < n; j++) row[j] = quantize_dequantize(row[j], p, (float)top);
        }
        for (int64_t j = 0; j < n; j++) out[j * mr + i] = row[j];
    }
}

/* Scale a panel (n, nr) of layer `layer`'s weights and round it to nearest, in place. */
static void quantize_panel(const search *s, int64_t layer, float *panel, uint8_t *codes) {
    const ptq_equalization_args *a = s->a;
    const int64_t nr = s->k->gemm.nr, n = a->n;
    float low[PTQ_MAX_NR], high[PTQ_MAX_NR], scale[PTQ_MAX_NR], zero[PTQ_MAX_NR],
        shrink[PTQ_MAX_NR];
    for (int64_t j = 0; j < n; j++)
        for (int64_t r = 0; r < nr; r++) panel[j * nr + r] *= s->scales[j];
    for (int64_t r = 0; r < nr; r++) {
        shrink[r] = 1.0f;
        low[r] = a->per_tensor ? s->grid[layer] : 0.0f;
        high[r] = a->per_tensor ? s->grid[a->layers + layer] : 0.0f;
    }
    for (int64_t g = 0; g < n; g += a->G) {
        float *U = panel + g * nr;
        if (!a->per_tensor) s->k->grid.range(a->G, U, low, high);
        s->k->grid.from_range(&a->grid, low, high, shrink, scale, zero);
        s->k->grid.quantize(a->G, U, scale, zero, a->grid.max_code, codes);
        for (int64_t j = 0; j < a->G; j++)
            for (int64_t r = 0; r < nr; r++)
                U[j * nr + r] = scale[r] * ((float)codes[j * nr + r] - zero[r]);
    }
}

/* Panel p: the float outputs Y, or the squared distance of this candidate's outputs from them. */
static void panel_task(void *ctx, int64_t p, int thread) {
    const search *s = ctx;
    const ptq_equalization_args *a = s->a;
    const int64_t nr = s->k->gemm.nr, mr = s->k->gemm.mr, n = a->n;
    float *panel = s->work + thread * s->workspace, *C = panel + n * nr;
    int64_t layer = 0;
    while (p >= s->first[layer + 1]) layer++;
    const int64_t row = (p - s->first[layer]) * nr;
    ptq_panel_load(s->k, a->W[layer], a->rows[layer], n, row, panel);
    if (s->scales) quantize_panel(s, layer, panel, (uint8_t *)(C + PTQ_MAX_TILE));
    double sum[PTQ_MAX_NR] = {0}, total = 0.0;
    for (int64_t t = 0; t < s->strips; t++) {
        if (ptq_should_stop()) return;
        float *y = s->Y + (p * s->strips + t) * mr * nr, *out = s->scales ? C : y;
        memset(out, 0, sizeof(float) * (size_t)(mr * nr));
        s->k->gemm.f32(out, s->A + t * n * mr, mr, panel, n);
        if (!s->scales) continue;
        for (int64_t i = 0; i < mr * nr; i++) C[i] -= y[i];
        s->k->gemm.dot(mr, C, C, sum);
    }
    for (int64_t r = 0; r < nr; r++) total += sum[r];
    s->part[p] = total;
}

/* Extremes of every column of every layer: with per_tensor, those of W s follow from them. */
static ptq_status column_ranges(search *s, int threads) {
    const ptq_equalization_args *a = s->a;
    double *unused = ptq_alloc(a->n, sizeof *unused);
    ptq_status status = unused ? PTQ_OK : PTQ_NOMEM;
    for (int64_t l = 0; l < a->layers && !status; l++)
        status = ptq_column_ranges(s->k, a->W[l], a->n, a->n, PTQ_F32, NULL, a->rows[l],
                                   s->low + l * a->n, s->high + l * a->n, unused, threads);
    free(unused);
    return status;
}

/* Grids of this candidate that span a whole tensor. */
static void tensor_grids(search *s) {
    const ptq_equalization_args *a = s->a;
    for (int64_t l = 0; l < a->layers && a->per_tensor; l++) {
        float low = 0.0f, high = 0.0f;
        for (int64_t j = 0; j < a->n; j++) {
            low = fminf(low, s->low[l * a->n + j] * s->scales[j]);
            high = fmaxf(high, s->high[l * a->n + j] * s->scales[j]);
        }
        s->grid[l] = low;
        s->grid[a->layers + l] = high;
    }
    s->act_low = s->act_high = 0.0f;
    for (int64_t j = 0; j < a->n && a->act_per_tensor; j++) {
        s->act_low = fminf(s->act_low, a->minimum[j] / s->scales[j]);
        s->act_high = fmaxf(s->act_high, a->maximum[j] / s->scales[j]);
    }
}

static ptq_status allocate(search *s, int threads) {
    const ptq_equalization_args *a = s->a;
    const int64_t mr = s->k->gemm.mr, nr = s->k->gemm.nr;
    s->first = ptq_alloc(a->layers + 1, sizeof *s->first);
    if (!s->first) return PTQ_NOMEM;
    s->first[0] = 0;
    for (int64_t l = 0; l < a->layers; l++)
        s->first[l + 1] = s->first[l] + ptq_ceil_div(a->rows[l], nr);
    s->panels = s->first[a->layers];
    s->strips = ptq_ceil_div(a->tokens, mr);
    s->workspace = a->n * nr + PTQ_MAX_TILE + ptq_ceil_div(a->G * nr, 64) * 16;
    s->workspace = ptq_ceil_div(s->workspace, 16) * 16;
    s->work = ptq_alloc(s->workspace * threads, sizeof *s->work);
    s->A = ptq_alloc(s->strips * a->n * mr, sizeof *s->A);
    s->Y = ptq_alloc(s->panels * s->strips * mr * nr, sizeof *s->Y);
    s->low = ptq_alloc(a->layers * a->n, sizeof *s->low);
    s->high = ptq_alloc(a->layers * a->n, sizeof *s->high);
    s->grid = ptq_alloc(2 * a->layers, sizeof *s->grid);
    s->part = ptq_alloc(s->panels, sizeof *s->part);
    const int all = s->work && s->A && s->Y && s->low && s->high && s->grid && s->part;
    return all ? PTQ_OK : PTQ_NOMEM;
}

ptq_status ptq_equalization_errors(const ptq_equalization_args *a, int threads) {
    if (a->tokens < 1 || a->n < 1 || a->layers < 1 || a->G < 1 || a->n % a->G) return PTQ_INVALID;
    search s = {.k = ptq_kernels_get(), .a = a};
    threads = ptq_thread_count(threads);
    ptq_status status = allocate(&s, threads);
    if (!status && a->per_tensor) status = column_ranges(&s, threads);
    for (int64_t c = -1; c < a->candidates && !status; c++) {
        if (c >= 0) {
            s.scales = a->scales + c * a->n;
            tensor_grids(&s);
        }
        status = ptq_parallel_for(s.strips, threads, strip_task, &s);
        if (!status) status = ptq_parallel_for(s.panels, threads, panel_task, &s);
        if (status || c < 0) continue;
        a->errors[c] = 0.0;
        for (int64_t p = 0; p < s.panels; p++) a->errors[c] += s.part[p];
    }
    free(s.first);
    free(s.work);
    free(s.A);
    free(s.Y);
    free(s.low);
    free(s.high);
    free(s.grid);
    free(s.part);
    return status;
}
