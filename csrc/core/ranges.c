/* ranges.c - minimum, maximum and sum of every column, in one pass. */
#include <math.h>
#include <stdatomic.h>

#include "internal.h"

enum {
    MOST = 1024,     /* columns of a task: their accumulators stay in the first cache */
    UNIT = 64,       /* whole cache lines, also of the accumulators */
    PATIENCE = 1024, /* calls of the kernel between two looks for an interrupt */
};

/* A task is a slice of columns over all tokens. A column's sum is computed in the same order
 * whatever the slice, so these may follow the number of threads. */
typedef struct {
    const ptq_kernels *k;
    const char *X;
    int64_t ldx, n, tokens, size, slice; /* ldx in bytes, size of an element */
    ptq_dtype dtype;
    const int64_t *rows;
    float *low, *high; /* (n) */
    double *sum;       /* (n) */
    atomic_int bad;
} scan;

/* All tokens of columns [c, c + columns), added up in float32 `step` at a time. */
static void read_tokens(const scan *s, int step, int64_t c, int64_t columns) {
    float *low = s->low + c, *high = s->high + c;
    double *sum = s->sum + c;
    for (int64_t i = 0; i < columns; i++) {
        low[i] = INFINITY;
        high[i] = -INFINITY;
        sum[i] = 0.0;
    }
    const void *at[2 * PTQ_RANGE_ROWS];
    for (int64_t t = 0, calls = 0; t < s->tokens; calls++) {
        if (calls % PATIENCE == PATIENCE - 1 && ptq_should_stop()) return;
        const int count = s->tokens - t < step ? 1 : step;
        for (int64_t i = 0; i < 2 * count; i++) {
            const int64_t next = ptq_min64(t + i, s->tokens - 1);
            at[i] = s->X + (s->rows ? s->rows[next] : next) * s->ldx + c * s->size;
        }
        s->k->ranges(s->dtype, at, count > 1 ? at + count : NULL, columns, low, high, sum);
        t += count;
    }
}

/* Whether all that went into the accumulators was finite; where a partial sum overflowed it says
 * no as well. In float16 nothing overflows, and some kernels read Inf and NaN as numbers. */
static int all_finite(const scan *s, int64_t c, int64_t columns) {
    int odd = 0;
    for (int64_t i = c; i < c + columns; i++) odd |= !(fabs(s->sum[i]) < INFINITY);
    if (s->dtype == PTQ_F16)
        for (int64_t i = c; i < c + columns; i++)
            odd |= !(s->low[i] > -65520.0f && s->high[i] < 65520.0f);
    return !odd;
}

static void scan_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    scan *s = ctx;
    const int64_t c = task * s->slice, columns = ptq_min64(s->slice, s->n - c);
    read_tokens(s, PTQ_RANGE_ROWS, c, columns);
    if (all_finite(s, c, columns)) return;
    read_tokens(s, 1, c, columns); /* one at a time no partial sum overflows */
    if (!all_finite(s, c, columns)) s->bad = 1;
}

ptq_status ptq_channel_ranges(const void *X, int64_t n, int64_t ldx, ptq_dtype dtype,
                              const int64_t *rows, int64_t tokens, float *low, float *high,
                              double *sum, int threads) {
    if (n < 1 || tokens < 1 || ldx < 0) return PTQ_INVALID;
    scan s = {.k = ptq_kernels_get(), .X = X, .n = n, .tokens = tokens, .dtype = dtype,
              .rows = rows, .size = dtype == PTQ_F32 ? 4 : 2, .low = low, .high = high,
              .sum = sum};
    s.ldx = ldx * s.size;
    threads = ptq_threads_for(threads, (double)tokens * (double)n);
    s.slice = ptq_min64(ptq_ceil_div(ptq_ceil_div(n, ptq_thread_count(threads)), UNIT) * UNIT, MOST);
    const ptq_status status =
        ptq_parallel_for(ptq_ceil_div(n, s.slice), threads, scan_task, &s);
    return status ? status : s.bad ? PTQ_NONFINITE : PTQ_OK;
}
