/* ranges.c - minimum, maximum and sum of every column, in one pass over whole rows. */
#include <math.h>
#include <stdatomic.h>

#include "internal.h"

enum {
    SLICE = 1024,    /* columns of a task: their accumulators stay in the first cache */
    TASKS = 16,      /* about so many, by blocks of tokens: each costs 16 bytes a column */
    LEAST = 128,     /* tokens of a block */
    PATIENCE = 1024, /* calls of the kernel between two looks for an interrupt */
};

/* A task is a slice of columns of a block of tokens. Blocks do not depend on the number of
 * threads, and their results are added up in order. */
typedef struct {
    const ptq_kernels *k;
    const char *X;
    int64_t ldx, n, tokens, size; /* ldx in bytes, size of an element */
    ptq_dtype dtype;
    const int64_t *rows;
    int64_t slices, block;
    float *low, *high; /* (blocks, n) */
    double *sum;       /* (blocks, n) */
    atomic_int bad;
} column_scan;

typedef struct {
    int64_t first, end; /* tokens */
    int64_t c, columns;
    float *low, *high;
    double *sum;
} piece;

static const void *row_at(const column_scan *s, const piece *p, int64_t t) {
    t = ptq_min64(t, p->end - 1);
    return s->X + (s->rows ? s->rows[t] : t) * s->ldx + p->c * s->size;
}

/* The tokens in turn as PTQ_RANGE_ROWS streams that each run on through memory, which the hardware
 * reads ahead best; streams 1: one token at a time. What is left over comes last. */
static void read_tokens(const column_scan *s, const piece *p, int streams) {
    for (int64_t i = 0; i < p->columns; i++) {
        p->low[i] = INFINITY;
        p->high[i] = -INFINITY;
        p->sum[i] = 0.0;
    }
    const int64_t length = streams > 1 ? (p->end - p->first) / streams : 0;
    const void *now[PTQ_RANGE_ROWS], *next[PTQ_RANGE_ROWS];
    for (int64_t t = 0; t < length; t++) {
        if (t % PATIENCE == PATIENCE - 1 && ptq_should_stop()) return;
        for (int i = 0; i < streams; i++) {
            now[i] = row_at(s, p, p->first + i * length + t);
            next[i] = row_at(s, p, p->first + i * length + t + 1);
        }
        s->k->ranges.add(s->dtype, now, next, p->columns, p->low, p->high, p->sum);
    }
    for (int64_t t = p->first + streams * length; t < p->end; t++) {
        if (t % PATIENCE == PATIENCE - 1 && ptq_should_stop()) return;
        now[0] = row_at(s, p, t);
        s->k->ranges.add(s->dtype, now, NULL, p->columns, p->low, p->high, p->sum);
    }
}

/* Whether all that went into the accumulators was finite; if a partial sum overflowed it says
 * no as well. In float16 nothing overflows, and some kernels read Inf and NaN as numbers. */
static int all_finite(const column_scan *s, const piece *p) {
    int odd = 0;
    for (int64_t i = 0; i < p->columns; i++) odd |= !(fabs(p->sum[i]) < INFINITY);
    if (s->dtype == PTQ_F16)
        for (int64_t i = 0; i < p->columns; i++)
            odd |= !(p->low[i] > -65520.0f && p->high[i] < 65520.0f);
    return !odd;
}

static void scan_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    column_scan *s = ctx;
    const int64_t b = task / s->slices, c = task % s->slices * SLICE, at = b * s->n + c;
    const piece p = {b * s->block,
                     ptq_min64((b + 1) * s->block, s->tokens),
                     c,
                     ptq_min64(SLICE, s->n - c),
                     s->low + at,
                     s->high + at,
                     s->sum + at};
    read_tokens(s, &p, PTQ_RANGE_ROWS);
    if (all_finite(s, &p)) return;
    read_tokens(s, &p, 1); /* one at a time no partial sum overflows */
    if (!all_finite(s, &p)) s->bad = 1;
}

static void combine(const column_scan *s, int64_t blocks, float *low, float *high, double *sum) {
    memcpy(low, s->low, sizeof *low * (size_t)s->n);
    memcpy(high, s->high, sizeof *high * (size_t)s->n);
    memcpy(sum, s->sum, sizeof *sum * (size_t)s->n);
    for (int64_t b = 1; b < blocks; b++) {
        const float *restrict l = s->low + b * s->n, *restrict h = s->high + b * s->n;
        const double *restrict t = s->sum + b * s->n;
        for (int64_t c = 0; c < s->n; c++) low[c] = l[c] < low[c] ? l[c] : low[c];
        for (int64_t c = 0; c < s->n; c++) high[c] = h[c] > high[c] ? h[c] : high[c];
        for (int64_t c = 0; c < s->n; c++) sum[c] += t[c];
    }
}

ptq_status ptq_column_ranges(const ptq_kernels *k, const void *X, int64_t n, int64_t ldx,
                             ptq_dtype dtype, const int64_t *rows, int64_t tokens, float *low,
                             float *high, double *sum, int threads) {
    if (n < 1 || tokens < 1 || ldx < 0) return PTQ_INVALID;
    column_scan s = {.k = k,
                     .X = X,
                     .n = n,
                     .tokens = tokens,
                     .dtype = dtype,
                     .rows = rows,
                     .size = dtype == PTQ_F32 ? 4 : 2};
    s.ldx = ldx * s.size;
    s.slices = ptq_ceil_div(n, SLICE);
    s.block = ptq_ceil_div(tokens, ptq_max64(TASKS / s.slices, 1));
    s.block = ptq_max64(ptq_ceil_div(s.block, PTQ_RANGE_ROWS) * PTQ_RANGE_ROWS, LEAST);
    const int64_t blocks = ptq_ceil_div(tokens, s.block);
    s.low = ptq_alloc(blocks * n, sizeof *s.low);
    s.high = ptq_alloc(blocks * n, sizeof *s.high);
    s.sum = ptq_alloc(blocks * n, sizeof *s.sum);
    ptq_status status = PTQ_NOMEM;
    if (s.low && s.high && s.sum) {
        if (!ptq_worth_threads((double)tokens * (double)n)) threads = 1;
        status = ptq_parallel_for(blocks * s.slices, threads, scan_task, &s);
    }
    if (!status && s.bad) status = PTQ_NONFINITE;
    if (!status) combine(&s, blocks, low, high, sum);
    free(s.low);
    free(s.high);
    free(s.sum);
    return status;
}

ptq_status ptq_channel_ranges(const void *X, int64_t n, int64_t ldx, ptq_dtype dtype,
                              const int64_t *rows, int64_t tokens, float *low, float *high,
                              double *sum, int threads) {
    return ptq_column_ranges(ptq_kernels_get(), X, n, ldx, dtype, rows, tokens, low, high, sum,
                             ptq_thread_count(threads));
}
