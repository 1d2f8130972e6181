/* softmax.c - softmax, rounded and corrected, row by row; statistics of rounded probabilities. */
#include <math.h>
#include <stdatomic.h>

#include "internal.h"

enum {
    TASK = 1 << 15,      /* entries of a task, about: enough to be worth one */
    LONG_TASK = 1 << 18, /* if there are many: memory is read in long streams */
    MANY_TASKS = 16,     /* tasks per thread, so that all end together */
};

/* Outputs of more bytes than this bypass the caches. */
static const int64_t STREAM = (int64_t)1 << 25;

static int64_t rows_of_a_task(int64_t rows, int64_t k, int threads) {
    const int64_t share = rows / ptq_max64(1, (int64_t)threads * MANY_TASKS);
    return ptq_max64(ptq_max64(1, TASK / k), ptq_min64(share, LONG_TASK / k));
}

/* Keep the first row that was refused, in the order of rows: threads do not change the answer. */
static void refuse(atomic_llong *bad, int64_t row) {
    long long seen = atomic_load(bad);
    while ((seen < 0 || row < seen) && !atomic_compare_exchange_weak(bad, &seen, row)) continue;
}

static int attention_valid(const ptq_attention *a) {
    if (a->batch < 0 || a->heads < 1 || a->q < 0 || a->k < 1) return 0;
    return !a->allowed || ((a->allowed_batch == 1 || a->allowed_batch == a->batch) &&
                           (a->allowed_heads == 1 || a->allowed_heads == a->heads) &&
                           (a->allowed_q == 1 || a->allowed_q == a->q));
}

static int64_t attention_rows(const ptq_attention *a) { return a->batch * a->heads * a->q; }

/* Where a row is, and how far its keys reach. */
typedef struct {
    int64_t batch, head, query, prefix;
    const uint8_t *allowed;
} row_view;

static row_view locate_row(const ptq_attention *a, int64_t row) {
    row_view p = {row / a->q / a->heads, row / a->q % a->heads, row % a->q, a->k, a->allowed};
    if (a->causal) p.prefix = ptq_min64(a->k, ptq_max64(0, a->k - a->q + 1 + p.query));
    if (p.allowed) {
        const int64_t b = a->allowed_batch > 1 ? p.batch : 0;
        const int64_t h = a->allowed_heads > 1 ? p.head : 0, i = a->allowed_q > 1 ? p.query : 0;
        p.allowed += ((b * a->allowed_heads + h) * a->allowed_q + i) * a->k;
    }
    return p;
}

typedef struct {
    const ptq_kernels *k;
    const ptq_softmax_args *args;
    int64_t rows, block, padded;
    int stream;
    float *scratch; /* two padded rows per thread */
    atomic_llong bad, empty;
    atomic_int nonfinite; /* some row was refused for that */
} quantization;

static int has_nan(const float *x, int64_t n) {
    int found = 0;
    for (int64_t i = 0; i < n; i++) found |= x[i] != x[i];
    return found;
}

/* scale: value of a step of this row. */
static float correction_of(const ptq_softmax_args *a, int64_t head, int64_t allowed, double scale,
                           int64_t code) {
    if (a->correction == PTQ_CORRECT_ROW_SUM)
        return (float)((1.0 - scale * (double)code) / (double)allowed);
    if (a->correction != PTQ_CORRECT_TABLE) return 0.0f;
    const int64_t h = a->table_heads > 1 ? head : 0, n = a->table_lengths > 1 ? allowed : 0;
    return (float)a->table[h * a->table_lengths + n];
}

/* Entries [from, k) of a row of out: not allowed. */
static void clear(const ptq_softmax_args *a, int64_t row, int64_t from) {
    const int64_t at = row * a->attention.k + from, n = a->attention.k - from;
    const int zero = a->grid.zero;
    if (!a->codes) memset((float *)a->out + at, 0, (size_t)n * sizeof(float));
    else if (a->grid.max_code <= 255) memset((uint8_t *)a->out + at, zero, (size_t)n);
    else
        for (int64_t i = 0; i < n; i++) ((uint16_t *)a->out)[at + i] = (uint16_t)zero;
}

static void empty_row(quantization *s, int64_t row) {
    clear(s->args, row, 0);
    if (s->args->corrections) s->args->corrections[row] = 0.0f;
    if (s->args->scales) s->args->scales[row] = s->args->grid.scale;
    atomic_fetch_add(&s->empty, 1);
}

/* PTQ_NONFINITE, or PTQ_ROW_REFUSED for a -Inf that codes cannot mark. */
static ptq_status quantize_row(quantization *s, int64_t row, float *e, float *masked) {
    const ptq_softmax_args *a = s->args;
    const row_view p = locate_row(&a->attention, row);
    const int64_t n = p.prefix;
    const float *x = a->scores + row * a->attention.k;
    const float *next = row + 1 < s->rows ? x + a->attention.k : x;
    int64_t allowed = n;
    if (p.allowed) {
        allowed = s->k->softmax.mask(n, x, p.allowed, -INFINITY, masked);
        x = masked;
    }
    float low, high;
    s->k->softmax.range(n, x, &low, &high);
    if (!(high > -INFINITY)) { /* NaN among nothing but -Inf is seen here only */
        if (has_nan(x, n)) return PTQ_NONFINITE;
        empty_row(s, row);
        return PTQ_OK;
    }
    if (!(low > -INFINITY)) {
        int64_t seen = 0;
        for (int64_t i = 0; i < n; i++) seen += x[i] != -INFINITY;
        const int adds = a->correction && a->correction != PTQ_CORRECT_CODE_SUM;
        if (seen < allowed && a->codes && adds) return PTQ_ROW_REFUSED;
        allowed = seen;
    }
    const double sum = s->k->softmax.exp(n, x, high, next, e);
    if (!(sum < INFINITY)) return PTQ_NONFINITE;
    const int squares = a->of == PTQ_OF_SQUARES;
    if (squares) s->k->softmax.root(n, e);
    const double step = a->grid.scale;
    const float factor = (float)(1.0 / (a->of ? step : sum * step));
    const float top = (float)(a->grid.max_code - a->grid.zero);
    const int by_row = a->correction >= PTQ_CORRECT_ROW_SUM;
    const int64_t code = by_row ? s->k->softmax.code_sum(n, e, factor, top, squares) : 0;
    double scale = squares ? step * step / sum : a->of ? step / sum : step;
    if (a->correction == PTQ_CORRECT_CODE_SUM) scale = 1.0 / (double)code;
    const float shift = correction_of(a, p.head, allowed, scale, code);
    if (a->corrections) a->corrections[row] = shift;
    if (a->scales) a->scales[row] = (float)scale;
    const int code_bytes = a->grid.max_code > 255 ? 2 : 1;
    char *out = (char *)a->out + row * a->attention.k * (a->codes ? code_bytes : 4);
    const float *holes = low > -INFINITY ? NULL : x;
    if (a->codes) {
        s->k->softmax.codes(n, e, factor, top, a->grid.zero, code_bytes, out);
        clear(a, row, n);
    } else
        s->k->softmax.values(n, a->attention.k, e, factor, top, holes, (float)scale, shift, squares,
                             s->stream, (float *)out);
    return PTQ_OK;
}

static void quantize_task(void *ctx, int64_t task, int thread) {
    quantization *s = ctx;
    float *e = s->scratch + 2 * thread * s->padded, *masked = e + s->padded;
    const int64_t end = ptq_min64((task + 1) * s->block, s->rows);
    for (int64_t row = task * s->block; row < end; row++) {
        const ptq_status status = quantize_row(s, row, e, masked);
        if (!status) continue;
        if (status == PTQ_NONFINITE) s->nonfinite = 1;
        refuse(&s->bad, row);
    }
    if (s->stream) PTQ_STORE_FENCE();
}

ptq_status ptq_softmax_quantize(const ptq_softmax_args *args, ptq_rows_info *info, int threads) {
    const ptq_attention *a = &args->attention;
    const ptq_softmax_grid *g = &args->grid;
    *info = (ptq_rows_info){-1, 0};
    if (!attention_valid(a) || !(g->scale > 0) || g->zero < 0 || g->max_code > 65535 ||
        g->zero > g->max_code)
        return PTQ_INVALID;
    if (args->of ? g->zero || g->scale > 1 : args->correction == PTQ_CORRECT_CODE_SUM)
        return PTQ_INVALID;
    if (args->correction == PTQ_CORRECT_TABLE &&
        ((args->table_heads != 1 && args->table_heads != a->heads) || args->table_lengths < 1 ||
         (args->table_lengths > 1 && args->table_lengths <= a->k)))
        return PTQ_INVALID;
    quantization s = {.k = ptq_kernels_get(), .args = args, .rows = attention_rows(a), .bad = -1};
    s.padded = ptq_ceil_div(a->k, PTQ_ROW_LANES) * PTQ_ROW_LANES;
    threads = ptq_threads_for_work(threads, 8.0 * (double)s.rows * (double)a->k);
    s.block = rows_of_a_task(s.rows, a->k, threads);
    s.stream = args->out != (const void *)args->scores && s.rows * a->k > STREAM / 4;
    s.scratch = ptq_alloc(2 * threads * s.padded, sizeof(float));
    if (!s.scratch) return PTQ_NOMEM;
    ptq_status status = ptq_parallel_for(ptq_ceil_div(s.rows, s.block), threads, quantize_task, &s);
    free(s.scratch);
    *info = (ptq_rows_info){s.bad, s.empty};
    if (!status && s.bad >= 0) status = s.nonfinite ? PTQ_NONFINITE : PTQ_ROW_REFUSED;
    return status;
}

int ptq_length_class(int64_t length) {
    if (length < 16) return length < 0 ? 0 : (int)length;
    const int octave = (int)ptq_min64(31, 63 - __builtin_clzll((unsigned long long)length));
    const int64_t eighth = ptq_min64(7, (length >> (octave - 3)) - 8);
    return (int)(16 + 8 * (octave - 4) + eighth);
}

typedef struct {
    const ptq_kernels *k;
    const ptq_attention *attention;
    const float *P;
    const ptq_softmax_grid *grid;
    double tolerance;
    int64_t rows, block;
    float *scratch; /* a row per thread, if there is a mask */
    int64_t *sums;  /* (heads, classes, 4) per thread */
    atomic_llong bad, empty;
} statistics;

static void statistics_row(statistics *s, int64_t row, float *masked, int64_t *sums) {
    const ptq_attention *a = s->attention;
    const row_view p = locate_row(a, row);
    if (a->queries && !a->queries[p.batch * a->q + p.query]) return;
    const float *x = s->P + row * a->k;
    const float *next = row + 1 < s->rows ? x + a->k : x;
    int64_t allowed = p.prefix;
    if (p.allowed) {
        allowed = s->k->softmax.mask(p.prefix, x, p.allowed, 0.0f, masked);
        x = masked;
    }
    if (allowed == 0) {
        atomic_fetch_add(&s->empty, 1);
        return;
    }
    ptq_row_statistics r;
    s->k->softmax.statistics(p.prefix, x, next, s->grid, &r);
    if (r.low < 0 || !(fabs(r.sum - 1.0) <= s->tolerance)) {
        refuse(&s->bad, row);
        return;
    }
    int64_t *to = sums + (p.head * PTQ_LENGTH_CLASSES + ptq_length_class(allowed)) * 4;
    to[0] += 1;
    to[1] += allowed;
    to[2] += r.code;
    to[3] += r.zeros - (p.prefix - allowed); /* masked entries were read as zeros */
}

static void statistics_task(void *ctx, int64_t task, int thread) {
    statistics *s = ctx;
    const int64_t end = ptq_min64((task + 1) * s->block, s->rows);
    float *masked = s->scratch + (s->attention->allowed ? thread * s->attention->k : 0);
    int64_t *sums = s->sums + thread * s->attention->heads * PTQ_LENGTH_CLASSES * 4;
    for (int64_t row = task * s->block; row < end; row++) statistics_row(s, row, masked, sums);
}

ptq_status ptq_softmax_statistics(const ptq_attention *attention, const float *P,
                                  const ptq_softmax_grid *grid, double tolerance, int64_t *sums,
                                  ptq_rows_info *info, int threads) {
    *info = (ptq_rows_info){-1, 0};
    if (!attention_valid(attention) || !(grid->scale > 0) || grid->zero < 0 ||
        grid->max_code > 65535 || grid->zero > grid->max_code)
        return PTQ_INVALID;
    const int64_t rows = attention_rows(attention), k = attention->k;
    statistics s = {ptq_kernels_get(), attention, P, grid, tolerance, rows, 0, NULL, NULL, -1, 0};
    threads = ptq_threads_for_work(threads, 2.0 * (double)rows * (double)k);
    s.block = rows_of_a_task(rows, k, threads);
    const int64_t size = attention->heads * PTQ_LENGTH_CLASSES * 4;
    s.scratch = ptq_alloc(attention->allowed ? threads * k : 0, sizeof(float));
    s.sums = ptq_alloc(threads * size, sizeof(int64_t));
    ptq_status status = PTQ_NOMEM;
    if (s.scratch && s.sums) {
        memset(s.sums, 0, (size_t)(threads * size) * sizeof(int64_t));
        status = ptq_parallel_for(ptq_ceil_div(rows, s.block), threads, statistics_task, &s);
    }
    if (!status && s.bad >= 0) status = PTQ_ROW_REFUSED;
    *info = (ptq_rows_info){s.bad, s.empty};
    if (!status) {
        memcpy(sums, s.sums, (size_t)size * sizeof(int64_t));
        for (int t = 1; t < threads; t++)
            for (int64_t i = 0; i < size; i++) sums[i] += s.sums[t * size + i];
    }
    free(s.scratch);
    free(s.sums);
    return status;
}

typedef struct {
    const ptq_kernels *k;
    const float *x;
    float *out;
    int64_t n;
} exponential;

static void exp_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const exponential *s = ctx;
    float e[1024];
    const int64_t end = ptq_min64((task + 1) * TASK, s->n);
    for (int64_t i = task * TASK; i < end; i += 1024) {
        const int64_t count = ptq_min64(1024, end - i);
        s->k->softmax.exp(count, s->x + i, 0.0f, s->x + i, e);
        memcpy(s->out + i, e, (size_t)count * sizeof(float));
    }
}

ptq_status ptq_softmax_exp(const float *x, int64_t n, float *out, int threads) {
    exponential s = {ptq_kernels_get(), x, out, n};
    threads = ptq_threads_for_work(threads, (double)n);
    return ptq_parallel_for(ptq_ceil_div(n, TASK), threads, exp_task, &s);
}
