/* activations.c - signed integer grids of activations, their codes, and outlier columns. */
#include <math.h>
#include <stdatomic.h>

#include "internal.h"
#include "round.h"

static int lowest_code(const ptq_signed_grid *grid) {
    const int half = 1 << (grid->bits - 1);
    return grid->narrow ? 1 - half : -half;
}

static int highest_code(const ptq_signed_grid *grid) { return (1 << (grid->bits - 1)) - 1; }

static int code_bytes(const ptq_signed_grid *grid) { return grid->bits > 8 ? 2 : 1; }

static int grid_valid(const ptq_signed_grid *grid) {
    return grid->bits >= 2 && grid->bits <= 16 && (grid->symmetric || !grid->narrow) &&
           (!grid->bf16 || (grid->bits <= 8 && !grid->narrow));
}

/* As PyTorch computes it in that dtype: each operation in float32, its result rounded. */
static void fit_bf16(const ptq_signed_grid *grid, float low, float high, float *scale, int *zero) {
    const float bottom = (float)lowest_code(grid), top = (float)highest_code(grid);
    const float most = -low > high ? -low : high;
    *scale = grid->symmetric ? ptq_to_bf16(most / ((top - bottom) / 2.0f))
                             : ptq_to_bf16(ptq_to_bf16(high - low) / (top - bottom));
    *zero = 0;
    if (!grid->symmetric && low < 0.0f) {
        const float steps = *scale > 0.0f ? ptq_to_bf16(low / *scale) : -INFINITY;
        *zero = (int)ptq_rne(ptq_clamp(ptq_to_bf16(bottom - steps), bottom, top));
    } else if (!grid->symmetric && *scale > 0.0f) *zero = (int)bottom;
    if (*scale == 0.0f) *scale = 0x1p-7f;
}

ptq_status ptq_signed_grid_fit(const ptq_signed_grid *grid, float low, float high, float *scale,
                               int *zero) {
    if (!grid_valid(grid)) return PTQ_INVALID;
    const float bottom = (float)lowest_code(grid), top = (float)highest_code(grid);
    low = low < 0.0f ? low : 0.0f;
    high = high > 0.0f ? high : 0.0f;
    if (grid->bf16) {
        fit_bf16(grid, low, high, scale, zero);
        return PTQ_OK;
    }
    *scale = ptq_minmax_scale(low, high, top - bottom, grid->symmetric, 0.0f);
    *zero = 0;
    if (*scale == 0.0f) /* also if the range is too small for a float */
        *scale = 0x1p-23f;
    else if (!grid->symmetric) *zero = (int)ptq_rne(ptq_clamp(bottom - low / *scale, bottom, top));
    return PTQ_OK;
}

void ptq_signed_grid_codes(const ptq_kernels *k, const ptq_signed_grid *grid, const float *x,
                           int64_t n, float scale, int zero, void *codes) {
    const int low = lowest_code(grid), high = highest_code(grid);
    if (grid->bf16) k->activations.codes_bf16(x, n, scale, (float)zero, low, high, codes);
    else k->activations.codes(x, n, scale, (float)zero, low, high, code_bytes(grid), codes);
}

enum { ROWS = 16 }; /* tokens per task */

/* The tokens, for each of the operations below. */
typedef struct {
    const ptq_kernels *k;
    const char *X;
    int64_t n, tokens, row_bytes;
    ptq_dtype dtype;
    const uint8_t *skip;
    float *work; /* (threads, n) */
    atomic_int nonfinite;
} token_reader;

static ptq_status reader_make(token_reader *r, const void *X, int64_t n, ptq_dtype dtype,
                              const uint8_t *skip, int64_t tokens, int threads) {
    *r = (token_reader){.k = ptq_kernels_get(),
                        .X = X,
                        .n = n,
                        .tokens = tokens,
                        .row_bytes = n * (dtype == PTQ_F32 ? 4 : 2),
                        .dtype = dtype,
                        .skip = skip};
    if (n < 1 || tokens < 0) return PTQ_INVALID;
    r->work = ptq_alloc(n * threads, sizeof *r->work);
    return r->work ? PTQ_OK : PTQ_NOMEM;
}

/* Row t as floats, or NULL if it is not finite. */
static const float *reader_row(token_reader *r, int64_t t, int thread) {
    const char *x = r->X + t * r->row_bytes;
    if (!r->k->tokens.all_below(r->dtype, x, r->n, INFINITY)) {
        r->nonfinite = 1;
        return NULL;
    }
    if (r->dtype == PTQ_F32 && !r->skip) return (const float *)x;
    float *out = r->work + thread * r->n;
    r->k->tokens.widen(r->dtype, x, r->skip, r->n, out);
    return out;
}

typedef struct {
    token_reader reader;
    float *low, *high; /* (tasks) */
} range_operation;

static void range_task(void *ctx, int64_t task, int thread) {
    range_operation *o = ctx;
    token_reader *r = &o->reader;
    float least = 0.0f, most = 0.0f, low, high;
    for (int64_t t = task * ROWS; t < ptq_min64((task + 1) * ROWS, r->tokens); t++) {
        const float *x = reader_row(r, t, thread);
        if (!x) return;
        r->k->activations.range(x, r->n, &low, &high);
        least = low < least ? low : least;
        most = high > most ? high : most;
    }
    o->low[task] = least;
    o->high[task] = most;
}

ptq_status ptq_activation_range(const void *X, int64_t n, ptq_dtype dtype, const uint8_t *skip,
                                int64_t tokens, float *low, float *high, int threads) {
    range_operation o = {0};
    threads = ptq_threads_for_work(threads, (double)tokens * (double)n);
    const int64_t tasks = ptq_ceil_div(tokens, ROWS);
    ptq_status status = reader_make(&o.reader, X, n, dtype, skip, tokens, threads);
    if (status) return status;
    o.low = ptq_alloc(2 * tasks, sizeof *o.low);
    if (o.low) o.high = o.low + tasks;
    status = o.low ? ptq_parallel_for(tasks, threads, range_task, &o) : PTQ_NOMEM;
    if (!status && o.reader.nonfinite) status = PTQ_NONFINITE;
    *low = *high = 0.0f;
    for (int64_t i = 0; !status && i < tasks; i++) {
        *low = o.low[i] < *low ? o.low[i] : *low;
        *high = o.high[i] > *high ? o.high[i] : *high;
    }
    free(o.low);
    free(o.reader.work);
    return status;
}

typedef struct {
    token_reader reader;
    const ptq_signed_grid *grid;
    int per_token;
    char *codes;
    float *scales;
    int16_t *zeros;
} codes_operation;

static void codes_task(void *ctx, int64_t task, int thread) {
    codes_operation *o = ctx;
    token_reader *r = &o->reader;
    for (int64_t t = task * ROWS; t < ptq_min64((task + 1) * ROWS, r->tokens); t++) {
        const float *x = reader_row(r, t, thread);
        if (!x) return;
        const int64_t g = o->per_token ? t : 0;
        if (o->per_token) {
            float low, high;
            int zero;
            r->k->activations.range(x, r->n, &low, &high);
            ptq_signed_grid_fit(o->grid, low, high, &o->scales[g], &zero);
            o->zeros[g] = (int16_t)zero;
        }
        ptq_signed_grid_codes(r->k, o->grid, x, r->n, o->scales[g], o->zeros[g],
                              o->codes + t * r->n * code_bytes(o->grid));
    }
}

ptq_status ptq_activations_quantize(const void *X, int64_t n, ptq_dtype dtype, const uint8_t *skip,
                                    int64_t tokens, const ptq_signed_grid *grid, int per_token,
                                    void *codes, float *scales, int16_t *zeros, int threads) {
    if (!grid_valid(grid)) return PTQ_INVALID;
    codes_operation o = {
        .grid = grid, .per_token = per_token, .codes = codes, .scales = scales, .zeros = zeros};
    threads = ptq_threads_for_work(threads, (double)tokens * (double)n);
    ptq_status status = reader_make(&o.reader, X, n, dtype, skip, tokens, threads);
    if (status) return status;
    status = ptq_parallel_for(ptq_ceil_div(tokens, ROWS), threads, codes_task, &o);
    free(o.reader.work);
    return status ? status : o.reader.nonfinite ? PTQ_NONFINITE : PTQ_OK;
}

typedef struct {
    token_reader reader;
    float threshold;
    uint8_t *any; /* (threads, n) */
} outliers_operation;

static void outliers_task(void *ctx, int64_t task, int thread) {
    outliers_operation *o = ctx;
    token_reader *r = &o->reader;
    for (int64_t t = task * ROWS; t < ptq_min64((task + 1) * ROWS, r->tokens); t++) {
        const float *x = reader_row(r, t, thread);
        if (!x) return;
        r->k->activations.outliers(x, r->n, o->threshold, o->any + thread * r->n);
    }
}

ptq_status ptq_outlier_columns(const void *X, int64_t n, ptq_dtype dtype, int64_t tokens,
                               float threshold, uint8_t *outliers, int threads) {
    outliers_operation o = {.threshold = threshold};
    threads = ptq_threads_for_work(threads, (double)tokens * (double)n);
    ptq_status status = reader_make(&o.reader, X, n, dtype, NULL, tokens, threads);
    if (status) return status;
    o.any = calloc((size_t)threads, (size_t)n);
    status = o.any ? ptq_parallel_for(ptq_ceil_div(tokens, ROWS), threads, outliers_task, &o)
                   : PTQ_NOMEM;
    if (!status && o.reader.nonfinite) status = PTQ_NONFINITE;
    if (!status) {
        memset(outliers, 0, (size_t)n);
        for (int i = 0; i < threads; i++)
            for (int64_t c = 0; c < n; c++) outliers[c] |= o.any[i * n + c];
    }
    free(o.any);
    free(o.reader.work);
    return status;
}
