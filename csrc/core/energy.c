/* energy.c - energy of a signal and of its error, in double. */
#include "internal.h"

enum { CHUNK = 1 << 16 }; /* elements that one task adds up; whatever the number of threads */

typedef struct {
    const ptq_kernels *k;
    const char *x, *y;
    ptq_dtype dtype;        /* PTQ_F32 or PTQ_F64 */
    int64_t rows, n, block; /* block: rows of a task */
    int64_t pieces;         /* tasks of a row, if it has more than one */
    double *out;
} energies;

static int64_t value_size(ptq_dtype dtype) {
    return dtype == PTQ_F32 ? 4 : dtype == PTQ_F64 ? 8 : 0;
}

/* Task: either several whole rows, or a piece of one. */
static void energy_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const energies *s = ctx;
    const int64_t size = value_size(s->dtype);
    void (*const add)(int64_t, const void *, const void *, double *) =
        s->dtype == PTQ_F64 ? s->k->energy.f64 : s->k->energy.f32;
    const int64_t first = s->pieces > 1 ? task / s->pieces : task * s->block;
    const int64_t from = s->pieces > 1 ? task % s->pieces * CHUNK : 0;
    const int64_t last = s->pieces > 1 ? first + 1 : ptq_min64(first + s->block, s->rows);
    for (int64_t row = first; row < last; row++) {
        const int64_t at = (row * s->n + from) * size;
        double *out = s->out + 2 * (s->pieces > 1 ? task : row);
        out[0] = out[1] = 0.0;
        add(ptq_min64(CHUNK, s->n - from), s->x + at, s->y + at, out);
    }
}

ptq_status ptq_energy(const void *x, const void *y, ptq_dtype dtype, int64_t rows, int64_t n,
                      double *out, int threads) {
    if (rows < 0 || n < 1 || !value_size(dtype)) return PTQ_INVALID;
    energies s = {ptq_kernels_get(), x, y, dtype, rows, n, 1, ptq_ceil_div(n, CHUNK), out};
    threads = ptq_threads_for_work(threads, (double)rows * (double)n);
    if (s.pieces == 1) {
        s.block = ptq_max64(1, CHUNK / n);
        return ptq_parallel_for(ptq_ceil_div(rows, s.block), threads, energy_task, &s);
    }
    s.out = ptq_alloc(2 * rows * s.pieces, sizeof(double));
    if (!s.out) return PTQ_NOMEM;
    const ptq_status status = ptq_parallel_for(rows * s.pieces, threads, energy_task, &s);
    if (!status)
        for (int64_t row = 0; row < rows; row++) {
            out[2 * row] = out[2 * row + 1] = 0.0;
            for (int64_t i = 0; i < 2 * s.pieces; i++)
                out[2 * row + i % 2] += s.out[2 * row * s.pieces + i];
        }
    free(s.out);
    return status;
}

static void columns_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const energies *s = ctx;
    void (*const add)(int64_t, const void *, const void *, double *, double *) =
        s->dtype == PTQ_F64 ? s->k->energy.columns_f64 : s->k->energy.columns_f32;
    const int64_t size = value_size(s->dtype), end = ptq_min64((task + 1) * s->block, s->rows);
    double *signal = s->out + 2 * task * s->n, *noise = signal + s->n;
    memset(signal, 0, 2 * (size_t)s->n * sizeof(double));
    for (int64_t row = task * s->block; row < end && !ptq_should_stop(); row++) {
        const int64_t at = row * s->n * size;
        add(s->n, s->x + at, s->y + at, signal, noise);
    }
}

ptq_status ptq_energy_columns(const void *x, const void *y, ptq_dtype dtype, int64_t rows,
                              int64_t n, double *out, int threads) {
    if (rows < 0 || n < 1 || !value_size(dtype)) return PTQ_INVALID;
    energies s = {.k = ptq_kernels_get(), .x = x, .y = y, .dtype = dtype, .rows = rows, .n = n};
    s.block = ptq_max64(256, CHUNK * 4 / n); /* the results are 16 bytes per column and task */
    const int64_t tasks = ptq_ceil_div(rows, s.block);
    s.out = ptq_alloc(2 * tasks * n, sizeof(double));
    if (!s.out) return PTQ_NOMEM;
    threads = ptq_threads_for_work(threads, (double)rows * (double)n);
    const ptq_status status = ptq_parallel_for(tasks, threads, columns_task, &s);
    if (!status) {
        memset(out, 0, 2 * (size_t)n * sizeof(double));
        for (int64_t t = 0; t < tasks; t++)
            for (int64_t i = 0; i < 2 * n; i++) out[i] += s.out[2 * t * n + i];
    }
    free(s.out);
    return status;
}
