/* strips.c - matrices repacked as left operands of the GEMM kernel. */
#include "internal.h"

typedef struct {
    ptq_strips *strips;
    const float *M;
    int64_t ld, n;
    const int64_t *index;
    ptq_strips_kind kind;
    int mr;
} packing;

static void pack_strip(void *ctx, int64_t s, int thread) {
    (void)thread;
    const packing *p = ctx;
    const int64_t start = p->strips->start[s], mr = p->mr;
    const int width = p->strips->width[s];
    const int64_t depth = p->kind == PTQ_STRIPS_FULL ? p->n : start + width;
    float *out = p->strips->data + p->strips->offset[s];
    for (int64_t k = 0; k < depth; k++, out += mr) {
        const float *row = p->M + (p->index ? p->index[k] : k) * p->ld;
        for (int j = 0; j < width; j++) out[j] = row[p->index ? p->index[start + j] : start + j];
        for (int64_t j = width; j < mr; j++) out[j] = 0.0f;
        if (p->kind == PTQ_STRIPS_FULL || k < start) continue;
        for (int64_t j = 0; j < k - start; j++) out[j] = 0.0f;
        if (p->kind == PTQ_STRIPS_HALF_DIAGONAL) out[k - start] *= 0.5f;
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

ptq_status ptq_strips_make(ptq_strips *s, const float *M, int64_t ld, const int64_t *index,
                           int64_t n, int64_t align, ptq_strips_kind kind, int threads) {
    const int mr = ptq_kernels_get()->mr;
    memset(s, 0, sizeof *s);
    const int64_t floats = lay_out(s, n, align, mr, kind, 0);
    s->start = ptq_alloc(s->count, sizeof *s->start);
    s->offset = ptq_alloc(s->count, sizeof *s->offset);
    s->width = ptq_alloc(s->count, sizeof *s->width);
    s->data = ptq_alloc(floats, sizeof *s->data);
    if (!s->start || !s->offset || !s->width || !s->data) {
        ptq_strips_free(s);
        return PTQ_NOMEM;
    }
    lay_out(s, n, align, mr, kind, 1);
    packing p = {s, M, ld, n, index, kind, mr};
    const ptq_status status = ptq_parallel_for(s->count, threads, pack_strip, &p);
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
