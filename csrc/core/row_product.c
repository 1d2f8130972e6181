/* row_product.c - one token times packed weights, a stripe of panels at a time. */
#include <math.h>

#include "row_product.h"

enum { MIDDLE = 128 /* of the codes of 8-bit weights */ };

static int uses_digits(const ptq_kernels *k, const ptq_packed *w) {
    if (!k->lowbit.fixed || w->bits > k->lowbit.fixed_bits || k->lowbit.fixed_tokens < 1) return 0;
    return ptq_packed_valid(w, PTQ_FIXED_GROUP);
}

int ptq_row_valid(const ptq_row_layer *layer, ptq_dtype dtype) {
    const ptq_packed *w = &layer->w;
    if (dtype != PTQ_F32 && dtype != PTQ_BF16) return 0;
    if (layer->mode != PTQ_ROW_SIMULATED)
        return ptq_packed_valid(w, layer->mode == PTQ_ROW_INT8 ? PTQ_INT8_GROUP : w->places);
    return w->bits == 8 && !w->order && w->groups == 1 && w->places <= PTQ_DOTS_PLACES &&
           ptq_packed_valid(w, w->places) && layer->grid.bits >= 2 && layer->grid.bits <= 8 &&
           !layer->grid.narrow && (!layer->grid.bf16 || dtype == PTQ_BF16);
}

static int64_t floats_of(const ptq_kernels *k, const ptq_packed *w) {
    return w->places / ptq_step_places(w->bits) * k->lowbit.floats(w->bits, 1);
}

/* Parts of the memory, each a multiple of 64 bytes. */
static int64_t take(char **memory, int64_t bytes, void **part) {
    bytes = ptq_round_up(bytes, 64);
    if (part) *part = *memory;
    if (memory) *memory += bytes;
    return bytes;
}

/* The same walk tells how much is needed (memory NULL) and hands it out. */
static int64_t walk(ptq_row_product *p, const ptq_kernels *k, const ptq_row_layer *layer,
                    char **memory) {
    const ptq_packed *w = &layer->w;
    const int floats = layer->mode == PTQ_ROW_FLOAT && !uses_digits(k, w);
    const int64_t places = w->places * (int64_t)sizeof(float);
    const int64_t groups = w->groups * (int64_t)sizeof(float);
#define PART(field) (memory ? (void **)&p->field : NULL)
    int64_t bytes = take(memory, (w->outputs + PTQ_LANES) * (int64_t)sizeof(float), PART(y));
    bytes += take(memory, places, PART(row));
    bytes += take(memory, w->inputs * (int64_t)sizeof(float), PART(spare));
    bytes += take(memory, floats ? 4 * floats_of(k, w) : 0, PART(values));
    bytes += take(memory, groups, PART(sums));
    bytes += take(memory, groups, PART(code_scales));
    bytes += take(memory, groups, PART(code_sums));
    bytes += take(memory, floats ? 0 : PTQ_DIGITS * 2 * w->places, PART(codes));
#undef PART
    return bytes;
}

int64_t ptq_row_memory(const ptq_kernels *k, const ptq_row_layer *layer) {
    return walk(NULL, k, layer, NULL);
}

void ptq_row_make(ptq_row_product *p, const ptq_kernels *k, const ptq_row_layer *layer,
                  char **memory) {
    *p = (ptq_row_product){.k = k, .layer = layer};
    p->fixed = layer->mode == PTQ_ROW_FLOAT && uses_digits(k, &layer->w);
    walk(p, k, layer, memory);
}

int ptq_row_same(const ptq_row_product *p, const ptq_row_product *other) {
    const ptq_row_layer *a = p->layer, *b = other->layer;
    const ptq_packed *v = &a->w, *w = &b->w;
    if (a->mode != b->mode || v->order || w->order || v->bits != w->bits ||
        p->fixed != other->fixed)
        return 0;
    if (v->inputs != w->inputs || v->places != w->places || v->groups != w->groups) return 0;
    if (a->mode == PTQ_ROW_SIMULATED)
        return a->grid.bits == b->grid.bits && a->grid.symmetric == b->grid.symmetric &&
               a->grid.bf16 == b->grid.bf16 && a->x_grids == b->x_grids &&
               (!a->x_grids || (a->x_scale == b->x_scale && a->x_zero == b->x_zero));
    return !memcmp(v->starts, w->starts, sizeof *v->starts * (size_t)(v->groups + 1));
}

void ptq_row_share(ptq_row_product *p, const ptq_row_product *other) {
    float *const y = p->y;
    const ptq_row_layer *const layer = p->layer;
    *p = *other;
    p->y = y;
    p->layer = layer;
}

/* ---- the token ------------------------------------------------------------------------- */

static int simulate(ptq_row_product *p, const float *x) {
    const ptq_row_layer *layer = p->layer;
    const int64_t n = layer->w.inputs;
    float low, high, scale = layer->x_scale;
    int zero = layer->x_zero;
    if (!p->k->tokens.all_below(PTQ_F32, x, n, INFINITY)) return 0;
    if (!layer->x_grids) {
        p->k->activations.range(x, n, &low, &high);
        ptq_signed_grid_fit(&layer->grid, low, high, &scale, &zero);
        if (isinf(scale)) return 0;
    }
    ptq_signed_grid_codes(p->k, &layer->grid, x, n, scale, zero, p->codes);
    memset(p->codes + n, 0, (size_t)(layer->w.places - n));
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += p->codes[i];
    p->simulated =
        (ptq_int8_row){(double)scale, (double)zero, (double)(sum - (int64_t)zero * n), sum};
    return 1;
}

static const float *in_order(ptq_row_product *p, const float *x) {
    const ptq_packed *w = &p->layer->w;
    if (!w->order && w->places == w->inputs) return x;
    for (int64_t i = 0; i < w->places; i++) {
        const int64_t input = w->order ? w->order[i] : i;
        p->row[i] = input >= 0 && input < w->inputs ? x[input] : 0.0f;
    }
    return p->row;
}

static void digits(ptq_row_product *p, const float *row) {
    const ptq_packed *w = &p->layer->w;
    int8_t *const apart = p->codes + PTQ_DIGITS * w->places;
    for (int64_t g = 0; g < w->groups; g++)
        p->k->lowbit.digits(row + w->starts[g], w->starts[g + 1] - w->starts[g],
                            apart + w->starts[g], w->places, &p->code_scales[g], &p->sums[g]);
    for (int64_t j = 0; j < w->places; j += PTQ_QUAD)
        for (int d = 0; d < PTQ_DIGITS; d++)
            memcpy(p->codes + PTQ_DIGITS * j + d * PTQ_QUAD, apart + d * w->places + j, PTQ_QUAD);
}

int ptq_row_prepare(ptq_row_product *p, const float *x) {
    const ptq_packed *w = &p->layer->w;
    if (p->layer->mode == PTQ_ROW_SIMULATED) return simulate(p, x);
    const float *row = in_order(p, x);
    if (p->fixed) {
        digits(p, row);
        return 1;
    }
    int finite = 1;
    for (int64_t g = 0; g < w->groups; g++) {
        const int64_t start = w->starts[g], places = w->starts[g + 1] - start;
        if (p->layer->mode == PTQ_ROW_INT8)
            finite &= p->k->lowbit.quantize(row + start, places, p->codes + start,
                                            &p->code_scales[g], &p->code_sums[g]);
        else p->sums[g] = p->k->lowbit.sum(row + start, places);
    }
    if (p->layer->mode == PTQ_ROW_FLOAT)
        p->k->lowbit.arrange(w->bits, 1, w->places, row, p->values);
    return finite;
}

/* ---- the weights ----------------------------------------------------------------------- */

/* From integer sums to the outputs of some panels. */
static void finish(const ptq_row_product *p, int64_t panel, int32_t *dots, int64_t width) {
    const ptq_row_layer *layer = p->layer;
    double sum[PTQ_LOWBIT_PANELS * PTQ_LANES], zero[PTQ_LOWBIT_PANELS * PTQ_LANES];
    double scale[PTQ_LOWBIT_PANELS * PTQ_LANES];
    const int64_t first = panel * PTQ_LANES;
    for (int64_t j = 0; j < width; j++) {
        dots[j] = (int32_t)((uint32_t)dots[j] - MIDDLE * (uint32_t)p->simulated.codes);
        sum[j] = (double)layer->w_sums[first + j];
        zero[j] = (double)layer->w_zeros[first + j] - MIDDLE;
        scale[j] = (double)layer->w_scales[first + j];
    }
    p->k->int8.finish(&p->simulated, width, dots, sum, zero, scale, NULL, p->y + first);
}

static void multiply_few(const ptq_row_product *p, int64_t panel, int panels) {
    const ptq_packed *w = &p->layer->w;
    const int64_t words = ptq_lane_words(w->bits, w->places) * PTQ_ROW_WORDS;
    const int64_t grids = panel * w->groups * PTQ_LANES, size = w->scale_dtype == PTQ_F32 ? 4 : 2;
    const int64_t width = ptq_min64(panels * PTQ_LANES, w->outputs - panel * PTQ_LANES);
    float out[PTQ_LOWBIT_PANELS * PTQ_LANES];
    ptq_lowbit_args a = {.bits = w->bits,
                         .panels = panels,
                         .tokens = 1,
                         .groups = w->groups,
                         .starts = w->starts,
                         .words = w->words + panel * words,
                         .word_step = words,
                         .scale_dtype = w->scale_dtype,
                         .x = p->values,
                         .sums = p->sums,
                         .codes = p->codes,
                         .code_sums = p->code_sums,
                         .code_scales = p->code_scales,
                         .y = out};
    if (p->layer->mode == PTQ_ROW_SIMULATED) {
        int32_t dots[PTQ_LOWBIT_PANELS * PTQ_LANES];
        p->k->lowbit.dots(&a, dots);
        finish(p, panel, dots, width);
        return;
    }
    a.scales = (const char *)w->scales + grids * size;
    a.zeros = w->zeros + grids;
    if (p->layer->mode == PTQ_ROW_INT8) p->k->lowbit.int8(&a);
    else if (p->fixed) p->k->lowbit.fixed(&a);
    else p->k->lowbit.f32(&a);
    memcpy(p->y + panel * PTQ_LANES, out, sizeof(float) * (size_t)width);
}

void ptq_row_multiply(const ptq_row_product *p, int64_t panel, int64_t panels) {
    for (const int64_t end = panel + panels; panel < end;) {
        const int some = (int)ptq_min64(p->k->lowbit.panels, end - panel);
        multiply_few(p, panel, some);
        panel += some;
    }
}
