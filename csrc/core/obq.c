/* obq.c - Optimal Brain Quantization, the slow reference that GPTQ approximates: in double, one
 * weight at a time, H^-1 downdated after each ([GPTQ] equations 2 and 3). O(n^3) per row. */
#include <math.h>

#include "internal.h"

typedef struct {
    const double *W, *inverse, *scale, *zero;
    int64_t n;
    int max_code;
    uint8_t *codes;
    double *work; /* per thread: H^-1 (n, n), w (n), left (n) */
} elimination;

static double code_of(double w, double s, double z, int top) {
    const double c = nearbyint(w / s) + z;
    return c < 0 ? 0 : c > top ? top : c;
}

/* The column left whose rounding costs least, ties to the first. */
static int64_t cheapest(const elimination *o, const double *H, const double *w, const double *left,
                        const double *s, const double *z) {
    int64_t best = -1;
    double least = INFINITY;
    for (int64_t j = 0; j < o->n; j++) {
        if (left[j] == 0.0) continue;
        const double e = w[j] - s[j] * (code_of(w[j], s[j], z[j], o->max_code) - z[j]);
        const double cost = e * e / H[j * o->n + j];
        if (best < 0 || cost < least) {
            least = cost;
            best = j;
        }
    }
    return best;
}

static void eliminate(int64_t n, double *H, const double *left, int64_t j) {
    const double pivot = H[j * n + j];
    for (int64_t a = 0; a < n; a++) {
        if (left[a] == 0.0) continue;
        const double f = H[a * n + j] / pivot;
        for (int64_t b = 0; b < n; b++) H[a * n + b] -= f * H[j * n + b];
    }
}

static void row_task(void *ctx, int64_t row, int thread) {
    const elimination *o = ctx;
    const int64_t n = o->n;
    double *H = o->work + thread * (n * n + 2 * n), *w = H + n * n, *left = w + n;
    const double *s = o->scale + row * n, *z = o->zero + row * n;
    memcpy(H, o->inverse, sizeof(double) * (size_t)(n * n));
    memcpy(w, o->W + row * n, sizeof(double) * (size_t)n);
    for (int64_t j = 0; j < n; j++) left[j] = 1.0;
    for (int64_t i = 0; i < n && !ptq_should_stop(); i++) {
        const int64_t j = cheapest(o, H, w, left, s, z);
        const double c = code_of(w[j], s[j], z[j], o->max_code), q = s[j] * (c - z[j]);
        const double e = (w[j] - q) / H[j * n + j];
        o->codes[row * n + j] = (uint8_t)c;
        left[j] = 0.0;
        for (int64_t b = 0; b < n; b++) w[b] -= left[b] * e * H[j * n + b];
        eliminate(n, H, left, j);
    }
}

ptq_status ptq_obq(const double *W, int64_t rows, int64_t n, const double *inverse,
                   const double *scale, const double *zero, int max_code, uint8_t *codes,
                   int threads) {
    if (rows < 1 || n < 1) return PTQ_INVALID;
    elimination o = {W, inverse, scale, zero, n, max_code, codes, NULL};
    threads = ptq_thread_count(threads);
    o.work = ptq_alloc((n * n + 2 * n) * threads, sizeof *o.work);
    const ptq_status status = o.work ? ptq_parallel_for(rows, threads, row_task, &o) : PTQ_NOMEM;
    free(o.work);
    return status;
}
