/* strips.c - matrices repacked as left operands of the GEMM kernel. */
#include "internal.h"

typedef struct {
    ptq_strips *strips;
    const float *M;
    int64_t ld, n;
    const int64_t *index;
    ptq_strips_kind kind;
    int mr;
    float *scratch; /* (threads, ROWS, n), with an index only */
} strip_packing;

enum { ROWS = 16 }; /* rows per task: what a strip receives from them is contiguous */

/* Row k of strip s, from the permuted row. */
static void pack_row(const strip_packing *p, int64_t s, int64_t k, const float *row) {
    const int64_t start = p->strips->start[s], mr = p->mr;
    const int width = p->strips->width[s];
    float *out = p->strips->data + p->strips->offset[s] + k * mr;
    for (int j = 0; j < width; j++) out[j] = row[start + j];
    for (int64_t j = width; j < mr; j++) out[j] = 0.0f;
    if (p->kind == PTQ_STRIPS_FULL || k < start) return;
    for (int64_t j = 0; j < k - start; j++) out[j] = 0.0f;
    if (p->kind == PTQ_STRIPS_HALF_DIAGONAL) out[k - start] *= 0.5f;
}

static void pack_rows(void *ctx, int64_t task, int thread) {
    const strip_packing *p = ctx;
    const int64_t first = task * ROWS, end = ptq_min64(first + ROWS, p->n);
    const float *rows[ROWS];
    for (int64_t k = first; k < end; k++) {
        const float *row = p->M + (p->index ? p->index[k] : k) * p->ld;
        rows[k - first] = row;
        if (!p->index) continue;
        float *permuted = p->scratch + (thread * ROWS + k - first) * p->n;
        for (int64_t j = 0; j < p->n; j++) permuted[j] = row[p->index[j]];
        rows[k - first] = permuted;
    }
    for (int64_t s = 0; s < p->strips->count; s++) {
        const int64_t stop = p->strips->start[s] + p->strips->width[s];
        const int64_t depth = p->kind == PTQ_STRIPS_FULL ? end : ptq_min64(end, stop);
        for (int64_t k = first; k < depth; k++) pack_row(p, s, k, rows[k - first]);
    }
}

static int64_t lay_out(ptq_strips *s, int64_t n, int64_t align, int mr, ptq_strips_kind kind,
                       int fill) {
    int64_t count = 0, offset = 0;
    for (int64_t start = 0; start < n; count++) {
        const int64_t edge = ptq_min64((start / align + 1) * align, n);
        const int64_t width = ptq_min64(mr, edge - start);
        if (fill) {
            s->start[count] = start;
            s->width[count] = (int)width;
            s->offset[count] = offset;
        }
        offset += (kind == PTQ_STRIPS_FULL ? n : start + width) * mr;
        start += width;
    }
    s->count = count;
    return offset;
}

ptq_status ptq_strips_make(const ptq_kernels *kernels, ptq_strips *s, const float *M, int64_t ld,
                           const int64_t *index, int64_t n, int64_t align, ptq_strips_kind kind,
                           int threads) {
    const int mr = kernels->gemm.mr;
    memset(s, 0, sizeof *s);
    const int64_t floats = lay_out(s, n, align, mr, kind, 0);
    s->start = ptq_alloc(s->count, sizeof *s->start);
    s->offset = ptq_alloc(s->count, sizeof *s->offset);
    s->width = ptq_alloc(s->count, sizeof *s->width);
    s->data = ptq_alloc_large(floats, sizeof *s->data);
    if (!s->start || !s->offset || !s->width || !s->data) {
        ptq_strips_free(s);
        return PTQ_NOMEM;
    }
    lay_out(s, n, align, mr, kind, 1);
    strip_packing p = {s, M, ld, n, index, kind, mr, NULL};
    if (!ptq_worth_threads((double)n * (double)n)) threads = 1;
    if (index) p.scratch = ptq_alloc(threads * ROWS * n, sizeof *p.scratch);
    ptq_status status = index && !p.scratch ? PTQ_NOMEM : PTQ_OK;
    if (!status) status = ptq_parallel_for(ptq_ceil_div(n, ROWS), threads, pack_rows, &p);
    free(p.scratch);
    if (status) ptq_strips_free(s);
    return status;
}

void ptq_strips_free(ptq_strips *s) {
    free(s->start);
    free(s->offset);
    free(s->width);
    free(s->data);
    memset(s, 0, sizeof *s);
}
