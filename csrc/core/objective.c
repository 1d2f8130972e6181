/* objective.c - e H e^T per row, reading one triangle of H. */
#include "internal.h"

typedef struct {
    const ptq_kernels *k;
    const float *E;
    int64_t rows, n;
    ptq_strips H;
    double *out;
    float *work;
} quadratic_form;

static void panel_task(void *ctx, int64_t p, int thread) {
    const quadratic_form *q = ctx;
    const int64_t nr = q->k->gemm.nr, row = p * nr;
    float *E = q->work + thread * q->n * nr, T[PTQ_MAX_TILE];
    double sum[PTQ_MAX_NR] = {0};
    ptq_panel_load(q->k, q->E, q->rows, q->n, row, E);
    for (int64_t s = 0; s < q->H.count; s++) {
        memset(T, 0, sizeof T);
        q->k->gemm.f32(T, q->H.data + q->H.offset[s], q->k->gemm.mr, E,
                       q->H.start[s] + q->H.width[s]);
        q->k->gemm.dot(q->H.width[s], E + q->H.start[s] * nr, T, sum);
    }
    for (int64_t r = 0; r < nr && row + r < q->rows; r++) q->out[row + r] = 2.0 * sum[r];
}

ptq_status ptq_objective(const float *E, int64_t rows, int64_t n, const float *H, double *out,
                         int threads) {
    if (rows < 1 || n < 1) return PTQ_INVALID;
    quadratic_form q = {.k = ptq_kernels_get(), .E = E, .rows = rows, .n = n, .out = out};
    threads = ptq_thread_count(threads);
    ptq_status status =
        ptq_strips_make(q.k, &q.H, H, n, NULL, n, n, PTQ_STRIPS_HALF_DIAGONAL, threads);
    if (status) return status;
    q.work = ptq_alloc(n * q.k->gemm.nr * threads, sizeof *q.work);
    status = q.work ? ptq_parallel_for(ptq_ceil_div(rows, q.k->gemm.nr), threads, panel_task, &q)
                    : PTQ_NOMEM;
    ptq_strips_free(&q.H);
    free(q.work);
    return status;
}
