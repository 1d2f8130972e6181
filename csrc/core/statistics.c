/* statistics.c - how hard a batch of activations is to quantize, in one reading of each token. */
#include <math.h>
#include <stdatomic.h>

#include "internal.h"

enum { ROWS = 16 }; /* tokens per task, whatever the number of threads */

/* Largest magnitudes in falling order; of equal ones the first token's and channel's. */
typedef struct {
    float value[PTQ_LARGEST];
    int64_t token[PTQ_LARGEST], channel[PTQ_LARGEST];
} largest_magnitudes;

typedef struct {
    const ptq_kernels *k;
    const ptq_statistics_args *a;
    float *work;                 /* (threads, n) */
    float *most;                 /* (threads, n) */
    int64_t *counts;             /* (threads, n) */
    int64_t *histograms;         /* (threads, PTQ_MAGNITUDE_BINS) */
    double *sums;                /* (tasks, PTQ_STATISTICS_SUMS) */
    largest_magnitudes *largest; /* (tasks) */
    float scale;                 /* of the tensor's grid, for the second loop */
    atomic_int nonfinite;
} statistics_scan;

static int64_t row_of(const ptq_statistics_args *a, int64_t t) { return a->rows ? a->rows[t] : t; }

static const float *read_row(const statistics_scan *s, int64_t t, int thread) {
    const ptq_statistics_args *a = s->a;
    const int64_t size = a->dtype == PTQ_F32 ? 4 : 2;
    const char *x = (const char *)a->X + row_of(a, t) * a->ldx * size;
    if (a->dtype == PTQ_F32) return (const float *)x;
    float *out = s->work + thread * a->n;
    s->k->tokens.widen(a->dtype, x, NULL, a->n, out);
    return out;
}

static void insert_magnitude(largest_magnitudes *l, float value, int64_t token, int64_t channel) {
    int at = PTQ_LARGEST;
    while (at > 0 && value > l->value[at - 1]) at--;
    for (int i = PTQ_LARGEST - 1; i > at; i--) {
        l->value[i] = l->value[i - 1];
        l->token[i] = l->token[i - 1];
        l->channel[i] = l->channel[i - 1];
    }
    if (at == PTQ_LARGEST) return;
    l->value[at] = value;
    l->token[at] = token;
    l->channel[at] = channel;
}

static float grid_scale(int bits, float absmax) {
    const ptq_signed_grid grid = {.bits = bits, .symmetric = 1, .narrow = 1};
    float scale;
    int zero;
    ptq_signed_grid_fit(&grid, -absmax, absmax, &scale, &zero);
    return scale;
}

static float top_code(int bits) { return (float)((1 << (bits - 1)) - 1); }

static int all_equal(const float *x, int64_t n) {
    int64_t c = 1;
    while (c < n && x[c] == x[0]) c++;
    return c >= n;
}

static void add_token(const statistics_scan *s, const float *x, int64_t token, int thread,
                      double *sums, largest_magnitudes *largest) {
    const int64_t n = s->a->n;
    float low, high;
    s->k->activations.range(x, n, &low, &high);
    const float absmax = -low > high ? -low : high;
    double moments[3]; /* sum of squares; sums of squares and fourth powers about the mean */
    s->k->statistics.moments(x, n, moments);
    sums[PTQ_SUM_ENERGY] += moments[0];
    sums[PTQ_SUM_STD] += sqrt(moments[1] / (double)n);
    if (!all_equal(x, n) && moments[1] > 0.0) {
        sums[PTQ_SUM_KURTOSIS] += (double)n * moments[2] / (moments[1] * moments[1]) - 3.0;
        sums[PTQ_SUM_VARIED] += 1.0;
    }
    if (absmax > 0.0f)
        sums[PTQ_SUM_TOKEN_ERROR] +=
            s->k->statistics.error(x, n, grid_scale(s->a->bits, absmax), top_code(s->a->bits));
    s->k->statistics.magnitudes(x, n, s->a->threshold, s->most + thread * n, s->counts + thread * n,
                                s->histograms + thread * PTQ_MAGNITUDE_BINS);
    if (absmax <= largest->value[PTQ_LARGEST - 1]) return;
    for (int64_t c = 0; c < n; c++)
        if (fabsf(x[c]) > largest->value[PTQ_LARGEST - 1])
            insert_magnitude(largest, fabsf(x[c]), token, c);
}

static void statistics_task(void *ctx, int64_t task, int thread) {
    statistics_scan *s = ctx;
    const ptq_statistics_args *a = s->a;
    const int64_t size = a->dtype == PTQ_F32 ? 4 : 2;
    double *sums = s->sums + task * PTQ_STATISTICS_SUMS;
    memset(sums, 0, PTQ_STATISTICS_SUMS * sizeof *sums);
    memset(s->largest + task, 0, sizeof *s->largest);
    for (int64_t t = task * ROWS; t < ptq_min64((task + 1) * ROWS, a->tokens); t++) {
        const char *x = (const char *)a->X + row_of(a, t) * a->ldx * size;
        if (!s->k->tokens.all_below(a->dtype, x, a->n, INFINITY)) {
            s->nonfinite = 1;
            return;
        }
        add_token(s, read_row(s, t, thread), t, thread, sums, s->largest + task);
    }
}

static void tensor_task(void *ctx, int64_t task, int thread) {
    const statistics_scan *s = ctx;
    double sum = 0.0;
    for (int64_t t = task * ROWS; t < ptq_min64((task + 1) * ROWS, s->a->tokens); t++)
        sum +=
            s->k->statistics.error(read_row(s, t, thread), s->a->n, s->scale, top_code(s->a->bits));
    s->sums[task * PTQ_STATISTICS_SUMS + PTQ_SUM_TENSOR_ERROR] = sum;
}

/* Add the parts up in their order; integers and extremes have none. */
static void combine(const statistics_scan *s, int64_t tasks, int threads, ptq_statistics *out) {
    const int64_t n = s->a->n;
    memset(out->sums, 0, PTQ_STATISTICS_SUMS * sizeof *out->sums);
    largest_magnitudes all = {0};
    for (int64_t task = 0; task < tasks; task++) {
        for (int i = 0; i < PTQ_STATISTICS_SUMS; i++)
            out->sums[i] += s->sums[task * PTQ_STATISTICS_SUMS + i];
        const largest_magnitudes *l = s->largest + task;
        for (int i = 0; i < PTQ_LARGEST; i++)
            insert_magnitude(&all, l->value[i], l->token[i], l->channel[i]);
    }
    for (int i = 0; i < PTQ_LARGEST; i++) {
        out->largest[i] = all.value[i];
        out->places[2 * i] = all.token[i];
        out->places[2 * i + 1] = all.channel[i];
    }
    memset(out->most, 0, (size_t)n * sizeof *out->most);
    memset(out->counts, 0, (size_t)n * sizeof *out->counts);
    memset(out->histogram, 0, PTQ_MAGNITUDE_BINS * sizeof *out->histogram);
    for (int thread = 0; thread < threads; thread++) {
        for (int64_t c = 0; c < n; c++) {
            const float m = s->most[thread * n + c];
            out->most[c] = m > out->most[c] ? m : out->most[c];
            out->counts[c] += s->counts[thread * n + c];
        }
        for (int64_t i = 0; i < PTQ_MAGNITUDE_BINS; i++)
            out->histogram[i] += s->histograms[thread * PTQ_MAGNITUDE_BINS + i];
    }
}

static ptq_status scan(statistics_scan *s, int64_t tasks, int threads, ptq_statistics *out) {
    ptq_status status = ptq_parallel_for(tasks, threads, statistics_task, s);
    if (status) return status;
    if (s->nonfinite) return PTQ_NONFINITE;
    float absmax = s->a->absmax;
    for (int64_t task = 0; task < tasks && !(s->a->absmax > 0.0f); task++)
        absmax = s->largest[task].value[0] > absmax ? s->largest[task].value[0] : absmax;
    if (absmax > 0.0f) {
        s->scale = grid_scale(s->a->bits, absmax);
        status = ptq_parallel_for(tasks, threads, tensor_task, s);
    }
    if (!status) combine(s, tasks, threads, out);
    return status;
}

ptq_status ptq_activation_statistics(const ptq_statistics_args *a, ptq_statistics *out,
                                     int threads) {
    if (a->n < 1 || a->tokens < 1 || a->ldx < 0 || a->bits < 2 || a->bits > 16) return PTQ_INVALID;
    threads = ptq_threads_for_work(threads, 8.0 * (double)a->tokens * (double)a->n);
    const int64_t tasks = ptq_ceil_div(a->tokens, ROWS), columns = threads * a->n;
    statistics_scan s = {.k = ptq_kernels_get(), .a = a};
    s.work = ptq_alloc(a->dtype == PTQ_F32 ? 1 : columns, sizeof *s.work);
    s.most = calloc((size_t)columns, sizeof *s.most);
    s.counts = calloc((size_t)columns, sizeof *s.counts);
    s.histograms = calloc((size_t)threads * PTQ_MAGNITUDE_BINS, sizeof *s.histograms);
    s.sums = ptq_alloc(tasks * PTQ_STATISTICS_SUMS, sizeof *s.sums);
    s.largest = ptq_alloc(tasks, sizeof *s.largest);
    ptq_status status = PTQ_NOMEM;
    if (s.work && s.most && s.counts && s.histograms && s.sums && s.largest)
        status = scan(&s, tasks, threads, out);
    free(s.work);
    free(s.most);
    free(s.counts);
    free(s.histograms);
    free(s.sums);
    free(s.largest);
    return status;
}
