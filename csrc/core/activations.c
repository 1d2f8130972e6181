/* activations.c - signed integer grids of activations, outlier columns, bias correction. */
#include <math.h>
#include <stdatomic.h>

#include "internal.h"

static int lowest_code(const ptq_signed_grid *grid) {
    const int half = 1 << (grid->bits - 1);
    return grid->narrow ? 1 - half : -half;
}

static int grid_valid(const ptq_signed_grid *grid) {
    return grid->bits >= 2 && grid->bits <= 16 && (grid->symmetric || !grid->narrow);
}

ptq_status ptq_signed_grid_fit(const ptq_signed_grid *grid, float low, float high, float *scale,
                               int *zero) {
    if (!grid_valid(grid)) return PTQ_INVALID;
    const float bottom = (float)lowest_code(grid), top = (float)((1 << (grid->bits - 1)) - 1);
    low = low < 0.0f ? low : 0.0f;
    high = high > 0.0f ? high : 0.0f;
    const float reach = -low > high ? -low : high;
    *scale = grid->symmetric ? reach / ((top - bottom) / 2) : (high - low) / (top - bottom);
    *zero = 0;
    if (*scale == 0.0f) { /* also where the range is too small for a float */
        *scale = 0x1p-23f;
    } else if (!grid->symmetric) {
        const float z = bottom - low / *scale;
        *zero = (int)rintf(z < bottom ? bottom : z > top ? top : z);
    }
    return PTQ_OK;
}

enum { ROWS = 16 }; /* tokens per task */

typedef struct {
    const ptq_kernels *k;
    const char *X;
    int64_t n, tokens, bytes; /* bytes per row */
    ptq_dtype dtype;
    const uint8_t *skip;
    float *work; /* (threads, n) */
    atomic_int bad;
    /* range of a tensor */
    float *low, *high; /* (tasks) */
    /* codes */
    const ptq_signed_grid *grid;
    int per_token;
    char *codes;
    float *scales;
    int16_t *zeros;
    /* outlier columns */
    float threshold;
    uint8_t *any; /* (threads, n) */
} job;

static ptq_status job_make(job *j, const void *X, int64_t n, ptq_dtype dtype, const uint8_t *skip,
                           int64_t tokens, int threads) {
    *j = (job){.k = ptq_kernels_get(), .X = X, .n = n, .tokens = tokens, .dtype = dtype,
               .skip = skip, .bytes = n * (dtype == PTQ_F32 ? 4 : 2)};
    if (n < 1 || tokens < 0) return PTQ_INVALID;
    j->work = ptq_alloc(n * ptq_thread_count(threads), sizeof *j->work);
    return j->work ? PTQ_OK : PTQ_NOMEM;
}

/* Row t as floats, or NULL where it is not finite. */
static const float *row_values(job *j, int64_t t, int thread) {
    const char *x = j->X + t * j->bytes;
    if (!j->k->all_finite(j->dtype, x, j->n)) {
        j->bad = 1;
        return NULL;
    }
    if (j->dtype == PTQ_F32 && !j->skip) return (const float *)x;
    float *out = j->work + thread * j->n;
    j->k->row_widen(j->dtype, x, j->skip, j->n, out);
    return out;
}

static void range_task(void *ctx, int64_t task, int thread) {
    job *j = ctx;
    float least = 0.0f, most = 0.0f, low, high;
    for (int64_t t = task * ROWS; t < ptq_min64((task + 1) * ROWS, j->tokens); t++) {
        const float *x = row_values(j, t, thread);
        if (!x) return;
        j->k->row_range(x, j->n, &low, &high);
        least = low < least ? low : least;
        most = high > most ? high : most;
    }
    j->low[task] = least;
    j->high[task] = most;
}

ptq_status ptq_activation_range(const void *X, int64_t n, ptq_dtype dtype, const uint8_t *skip,
                                int64_t tokens, float *low, float *high, int threads) {
    job j;
    threads = ptq_threads_for(threads, (double)tokens * (double)n);
    const int64_t tasks = ptq_ceil_div(tokens, ROWS);
    ptq_status status = job_make(&j, X, n, dtype, skip, tokens, threads);
    if (status) return status;
    j.low = ptq_alloc(2 * tasks, sizeof *j.low);
    if (j.low) j.high = j.low + tasks;
    status = j.low ? ptq_parallel_for(tasks, threads, range_task, &j) : PTQ_NOMEM;
    if (!status && j.bad) status = PTQ_NONFINITE;
    *low = *high = 0.0f;
    for (int64_t i = 0; !status && i < tasks; i++) {
        *low = j.low[i] < *low ? j.low[i] : *low;
        *high = j.high[i] > *high ? j.high[i] : *high;
    }
    free(j.low);
    free(j.work);
    return status;
}

static void codes_task(void *ctx, int64_t task, int thread) {
    job *j = ctx;
    const int wide = j->grid->bits > 8, top = (1 << (j->grid->bits - 1)) - 1;
    for (int64_t t = task * ROWS; t < ptq_min64((task + 1) * ROWS, j->tokens); t++) {
        const float *x = row_values(j, t, thread);
        if (!x) return;
        const int64_t g = j->per_token ? t : 0;
        if (j->per_token) {
            float low, high;
            int zero;
            j->k->row_range(x, j->n, &low, &high);
            ptq_signed_grid_fit(j->grid, low, high, &j->scales[g], &zero);
            j->zeros[g] = (int16_t)zero;
        }
        j->k->row_codes(x, j->n, j->scales[g], (float)j->zeros[g], lowest_code(j->grid), top, wide,
                        j->codes + t * j->n * (wide ? 2 : 1));
    }
}

ptq_status ptq_activations_quantize(const void *X, int64_t n, ptq_dtype dtype, const uint8_t *skip,
                                    int64_t tokens, const ptq_signed_grid *grid, int per_token,
                                    void *codes, float *scales, int16_t *zeros, int threads) {
    job j;
    if (!grid_valid(grid)) return PTQ_INVALID;
    threads = ptq_threads_for(threads, (double)tokens * (double)n);
    ptq_status status = job_make(&j, X, n, dtype, skip, tokens, threads);
    if (status) return status;
    j.grid = grid;
    j.per_token = per_token;
    j.codes = codes;
    j.scales = scales;
    j.zeros = zeros;
    status = ptq_parallel_for(ptq_ceil_div(tokens, ROWS), threads, codes_task, &j);
    free(j.work);
    return status ? status : j.bad ? PTQ_NONFINITE : PTQ_OK;
}

static void reach_task(void *ctx, int64_t task, int thread) {
    job *j = ctx;
    for (int64_t t = task * ROWS; t < ptq_min64((task + 1) * ROWS, j->tokens); t++) {
        const float *x = row_values(j, t, thread);
        if (!x) return;
        j->k->row_reach(x, j->n, j->threshold, j->any + thread * j->n);
    }
}

ptq_status ptq_outlier_columns(const void *X, int64_t n, ptq_dtype dtype, int64_t tokens,
                               float threshold, uint8_t *outliers, int threads) {
    job j;
    threads = ptq_threads_for(threads, (double)tokens * (double)n);
    ptq_status status = job_make(&j, X, n, dtype, NULL, tokens, threads);
    if (status) return status;
    const int team = ptq_thread_count(threads);
    j.threshold = threshold;
    j.any = calloc((size_t)team, (size_t)n);
    status = j.any ? ptq_parallel_for(ptq_ceil_div(tokens, ROWS), threads, reach_task, &j)
                   : PTQ_NOMEM;
    if (!status && j.bad) status = PTQ_NONFINITE;
    if (!status) {
        memset(outliers, 0, (size_t)n);
        for (int i = 0; i < team; i++)
            for (int64_t c = 0; c < n; c++) outliers[c] |= j.any[i * n + c];
    }
    free(j.any);
    free(j.work);
    return status;
}

typedef struct {
    const void *W, *W_hat;
    int64_t rows, n;
    const double *mean;
    double *out;
    int wide; /* double, else float */
} correction;

enum { LANES = 8 };

/* In a fixed order of eight partial sums, so that every CPU and thread count gives the same bits. */
#define CORRECTION_ROW(name, type)                                                            \
    static double name(const type *w, const type *q, const double *mean, int64_t n) {         \
        double sum[LANES] = {0};                                                              \
        int64_t j = 0;                                                                        \
        for (; j + LANES <= n; j += LANES)                                                    \
            for (int i = 0; i < LANES; i++)                                                   \
                sum[i] += ((double)q[j + i] - (double)w[j + i]) * mean[j + i];                \
        for (int i = 0; j < n; i++, j++) sum[i] += ((double)q[j] - (double)w[j]) * mean[j];   \
        return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7])); \
    }
CORRECTION_ROW(correction_f32, float)
CORRECTION_ROW(correction_f64, double)

static void correction_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const correction *c = ctx;
    for (int64_t r = task * ROWS; r < ptq_min64((task + 1) * ROWS, c->rows); r++) {
        const int64_t at = r * c->n;
        c->out[r] = c->wide ? correction_f64((const double *)c->W + at,
                                             (const double *)c->W_hat + at, c->mean, c->n)
                            : correction_f32((const float *)c->W + at,
                                             (const float *)c->W_hat + at, c->mean, c->n);
    }
}

ptq_status ptq_bias_correction(const void *W, const void *W_hat, int wide, int64_t rows, int64_t n,
                               const double *mean, double *out, int threads) {
    correction c = {W, W_hat, rows, n, mean, out, wide};
    threads = ptq_threads_for(threads, (double)rows * (double)n);
    return ptq_parallel_for(ptq_ceil_div(rows, ROWS), threads, correction_task, &c);
}
