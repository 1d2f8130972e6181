/* checks.c - what is asked of a matrix before it is used. */
#include <math.h>
#include <stdatomic.h>

#include "internal.h"

enum { BLOCK = 64 };

typedef struct {
    const ptq_kernels *k;
    const float *H;
    int64_t n;
    float tolerance;
    atomic_int asymmetric, bad;
} symmetry_scan;

static void symmetry_task(void *ctx, int64_t b, int thread) {
    (void)thread;
    symmetry_scan *c = ctx;
    const int64_t n = c->n, i0 = b * BLOCK, i1 = ptq_min64(i0 + BLOCK, n);
    if (!c->k->tokens.all_below(PTQ_F32, c->H + i0 * n, (i1 - i0) * n, INFINITY)) c->bad = 1;
    for (int64_t j0 = i0; j0 < n; j0 += BLOCK)
        for (int64_t i = i0; i < i1; i++)
            for (int64_t j = j0; j < ptq_min64(j0 + BLOCK, n); j++) {
                const float d = c->H[i * n + j] - c->H[j * n + i];
                if (d > c->tolerance || d < -c->tolerance) c->asymmetric = 1;
            }
}

ptq_status ptq_symmetric_check(const float *H, int64_t n, float tolerance, int threads) {
    symmetry_scan c = {ptq_kernels_get(), H, n, tolerance, 0, 0};
    threads = ptq_threads_for_work(threads, (double)n * (double)n);
    const ptq_status status = ptq_parallel_for(ptq_ceil_div(n, BLOCK), threads, symmetry_task, &c);
    if (status) return status;
    return c.bad ? PTQ_NONFINITE : c.asymmetric ? PTQ_NOT_SYMMETRIC : PTQ_OK;
}

typedef struct {
    const ptq_kernels *k;
    const float *x;
    int64_t count;
    atomic_int bad;
} finite_scan;

static void finite_task(void *ctx, int64_t b, int thread) {
    (void)thread;
    finite_scan *c = ctx;
    const int64_t from = b << 16;
    if (!c->k->tokens.all_below(PTQ_F32, c->x + from, ptq_min64(1 << 16, c->count - from),
                                INFINITY))
        c->bad = 1;
}

ptq_status ptq_finite_check(const float *x, int64_t count, int threads) {
    finite_scan c = {ptq_kernels_get(), x, count, 0};
    threads = ptq_threads_for_work(threads, (double)count);
    const ptq_status status =
        ptq_parallel_for(ptq_ceil_div(count, 1 << 16), threads, finite_task, &c);
    return status ? status : c.bad ? PTQ_NONFINITE : PTQ_OK;
}
