/* objective.c - e H e^T per row, reading one triangle of H. */
#include <math.h>

#include "internal.h"

static inline int64_t at(const int64_t *index, int64_t i) { return index ? index[i] : i; }

void ptq_objective_repair(const float *H, int64_t n, const int64_t *index, const float *E,
                          int64_t nr, const double *least, double *objective) {
    /* |e H e^T| is at most bound^2 if H is positive semidefinite. Random errors reach some 1 / n of
     * it; at 1e-6 of it, float32 sums are wrong by parts in thousands. */
    const double far = 1e-6;
    double bound[PTQ_MAX_NR] = {0}, sum[PTQ_MAX_NR] = {0};
    for (int64_t i = 0; i < n; i++) {
        const double root = sqrt(fabs((double)H[at(index, i) * (n + 1)]));
        for (int64_t r = 0; r < nr; r++) bound[r] += root * fabs((double)E[i * nr + r]);
    }
    int cancelled = 0;
    for (int64_t r = 0; r < nr; r++) {
        bound[r] *= far * bound[r];
        cancelled |= objective[r] < fmax(bound[r], least[r]);
    }
    if (!cancelled) return;
    for (int64_t i = 0; i < n; i++) {
        if (i % 64 == 63 && ptq_should_stop()) return;
        const float *row = H + at(index, i) * n;
        double part[PTQ_MAX_NR] = {0};
        for (int64_t j = 0; j <= i; j++) {
            const double h = (j < i ? 2.0 : 1.0) * (double)row[at(index, j)];
            for (int64_t r = 0; r < nr; r++) part[r] += h * (double)E[j * nr + r];
        }
        for (int64_t r = 0; r < nr; r++) sum[r] += part[r] * (double)E[i * nr + r];
    }
    for (int64_t r = 0; r < nr; r++)
        if (objective[r] < fmax(bound[r], least[r]))
            objective[r] = sum[r] < 0.0 && sum[r] > -bound[r] ? 0.0 : sum[r];
}

typedef struct {
    const ptq_kernels *k;
    const float *E, *matrix;
    int64_t rows, n;
    ptq_strips H;
    double *out;
    float *work;
} quadratic_form;

static void panel_task(void *ctx, int64_t p, int thread) {
    const quadratic_form *q = ctx;
    const int64_t nr = q->k->gemm.nr, row = p * nr;
    float *E = q->work + thread * q->n * nr, T[PTQ_MAX_TILE];
    double sum[PTQ_MAX_NR] = {0}, least[PTQ_MAX_NR] = {0};
    ptq_panel_load(q->k, q->E, q->rows, q->n, row, E);
    for (int64_t s = 0; s < q->H.count; s++) {
        memset(T, 0, sizeof T);
        q->k->gemm.f32(T, q->H.data + q->H.offset[s], q->k->gemm.mr, E,
                       q->H.start[s] + q->H.width[s]);
        q->k->gemm.dot(q->H.width[s], E + q->H.start[s] * nr, T, sum);
    }
    for (int64_t r = 0; r < nr; r++) sum[r] *= 2.0;
    ptq_objective_repair(q->matrix, q->n, NULL, E, nr, least, sum);
    for (int64_t r = 0; r < nr && row + r < q->rows; r++) q->out[row + r] = sum[r];
}

ptq_status ptq_objective(const float *E, int64_t rows, int64_t n, const float *H, double *out,
                         int threads) {
    if (rows < 1 || n < 1) return PTQ_INVALID;
    quadratic_form q = {
        .k = ptq_kernels_get(), .E = E, .matrix = H, .rows = rows, .n = n, .out = out};
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
