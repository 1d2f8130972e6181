/* bias_correction.c - what quantized weights add to the mean of a layer's outputs. */
#include "internal.h"

enum {
    ROWS = 16, /* per task */
    PARTS = 8, /* partial sums of a row, in a fixed order: the same bits on every CPU */
};

typedef struct {
    const void *W, *W_hat;
    ptq_dtype dtype;
    int64_t rows, n;
    const double *mean;
    double *out;
} correction;

static double sum_parts(const double *s) {
    return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

static double row_f32(const float *w, const float *q, const double *mean, int64_t n) {
    double sum[PARTS] = {0};
    int64_t j = 0;
    for (; j + PARTS <= n; j += PARTS)
        for (int i = 0; i < PARTS; i++)
            sum[i] += ((double)q[j + i] - (double)w[j + i]) * mean[j + i];
    for (int i = 0; j < n; i++, j++) sum[i] += ((double)q[j] - (double)w[j]) * mean[j];
    return sum_parts(sum);
}

static double row_f64(const double *w, const double *q, const double *mean, int64_t n) {
    double sum[PARTS] = {0};
    int64_t j = 0;
    for (; j + PARTS <= n; j += PARTS)
        for (int i = 0; i < PARTS; i++) sum[i] += (q[j + i] - w[j + i]) * mean[j + i];
    for (int i = 0; j < n; i++, j++) sum[i] += (q[j] - w[j]) * mean[j];
    return sum_parts(sum);
}

static void correction_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const correction *c = ctx;
    for (int64_t r = task * ROWS; r < ptq_min64((task + 1) * ROWS, c->rows); r++) {
        const int64_t at = r * c->n;
        if (c->dtype == PTQ_F64)
            c->out[r] =
                row_f64((const double *)c->W + at, (const double *)c->W_hat + at, c->mean, c->n);
        else
            c->out[r] =
                row_f32((const float *)c->W + at, (const float *)c->W_hat + at, c->mean, c->n);
    }
}

ptq_status ptq_bias_correction(const void *W, const void *W_hat, ptq_dtype dtype, int64_t rows,
                               int64_t n, const double *mean, double *out, int threads) {
    if (dtype != PTQ_F32 && dtype != PTQ_F64) return PTQ_INVALID;
    correction c = {W, W_hat, dtype, rows, n, mean, out};
    threads = ptq_threads_for_work(threads, (double)rows * (double)n);
    return ptq_parallel_for(ptq_ceil_div(rows, ROWS), threads, correction_task, &c);
}
