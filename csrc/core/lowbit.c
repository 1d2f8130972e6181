/* lowbit.c - packed weights of 2 to 8 bits: packing, dequantizing, products. */
#include <math.h>
#include <stdatomic.h>

#include "internal.h"
#include "round.h"
#include "words.h"

enum {
    CHUNK = 256, /* tokens prepared at a time */
    PANELS = 4,  /* of a task that packs or unpacks */
};

static int valid(const ptq_packed *w) {
    return ptq_has_words(w->bits) && w->outputs >= 1 && w->inputs >= 1 && w->places >= 1 &&
           w->outputs <= PTQ_MOST_PLACES && w->places <= PTQ_MOST_PLACES &&
           w->places % ptq_step_places(w->bits) == 0 && w->places >= w->inputs;
}

static int valid_groups(const ptq_packed *w, int64_t longest) {
    if (!valid(w) || w->groups < 1 || w->starts[0] || w->starts[w->groups] != w->places) return 0;
    for (int64_t g = 0; g < w->groups; g++) {
        const int64_t places = (int64_t)w->starts[g + 1] - w->starts[g];
        if (places < 0 || places > longest || places % ptq_step_places(w->bits)) return 0;
    }
    return 1;
}

/* The input at a place, or -1. */
static inline int64_t input_at(const ptq_packed *w, int64_t place) {
    const int64_t i = w->order ? w->order[place] : place;
    return i >= 0 && i < w->inputs ? i : -1;
}

static inline int64_t panel_words(const ptq_packed *w) {
    return ptq_lane_words(w->bits, w->places) * PTQ_ROW_WORDS;
}

/* ---- packing --------------------------------------------------------------------------- */

typedef struct {
    const ptq_packed *w;
    const uint8_t *codes;
    uint32_t *words;
    uint8_t *unpacked;
    float *values;
} conversion;

static void pack_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const conversion *c = ctx;
    const ptq_packed *w = c->w;
    const int64_t end = ptq_min64((task + 1) * PANELS, ptq_panels(w->outputs));
    for (int64_t p = task * PANELS; p < end && !ptq_should_stop(); p++) {
        uint32_t *words = c->words + p * panel_words(w);
        memset(words, 0, sizeof *words * (size_t)panel_words(w));
        for (int64_t r = 0; r < ptq_min64(PTQ_LANES, w->outputs - p * PTQ_LANES); r++)
            for (int64_t i = 0; i < w->places; i++) {
                const int64_t input = input_at(w, i);
                if (input < 0) continue;
                const uint32_t code = c->codes[(p * PTQ_LANES + r) * w->inputs + input];
                ptq_word_put(words + r, w->bits, i, code & ((1u << w->bits) - 1));
            }
    }
}

static void unpack_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const conversion *c = ctx;
    const ptq_packed *w = c->w;
    const int64_t end = ptq_min64((task + 1) * PANELS, ptq_panels(w->outputs));
    for (int64_t p = task * PANELS; p < end && !ptq_should_stop(); p++) {
        const uint32_t *words = w->words + p * panel_words(w);
        for (int64_t r = 0; r < ptq_min64(PTQ_LANES, w->outputs - p * PTQ_LANES); r++)
            for (int64_t i = 0; i < w->places; i++) {
                const int64_t input = input_at(w, i);
                if (input < 0) continue;
                c->unpacked[(p * PTQ_LANES + r) * w->inputs + input] =
                    (uint8_t)ptq_word_code(words + r, w->bits, i);
            }
    }
}

static float scale_at(const ptq_packed *w, int64_t at) {
    if (w->scale_dtype == PTQ_F32) return ((const float *)w->scales)[at];
    const uint16_t half = ((const uint16_t *)w->scales)[at];
    return w->scale_dtype == PTQ_F16 ? ptq_from_half(half) : ptq_from_bf16(half);
}

static void dequantize_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const conversion *c = ctx;
    const ptq_packed *w = c->w;
    const int64_t end = ptq_min64((task + 1) * PANELS, ptq_panels(w->outputs));
    for (int64_t p = task * PANELS; p < end && !ptq_should_stop(); p++) {
        const uint32_t *words = w->words + p * panel_words(w);
        for (int64_t r = 0; r < ptq_min64(PTQ_LANES, w->outputs - p * PTQ_LANES); r++)
            for (int64_t g = 0; g < w->groups; g++) {
                const int64_t at = (p * w->groups + g) * PTQ_LANES + r;
                const float scale = scale_at(w, at);
                const int zero = w->zeros[at];
                for (int64_t i = w->starts[g]; i < w->starts[g + 1]; i++) {
                    const int64_t input = input_at(w, i);
                    if (input < 0) continue;
                    const int code = (int)ptq_word_code(words + r, w->bits, i);
                    c->values[(p * PTQ_LANES + r) * w->inputs + input] =
                        scale * (float)(code - zero);
                }
            }
    }
}

static ptq_status convert(conversion *c, ptq_task task, int threads) {
    const int64_t tasks = ptq_ceil_div(ptq_panels(c->w->outputs), PANELS);
    threads = ptq_threads_for_work(threads, (double)c->w->outputs * (double)c->w->places);
    return ptq_parallel_for(tasks, threads, task, c);
}

ptq_status ptq_words_pack(const ptq_packed *w, const uint8_t *codes, uint32_t *words, int threads) {
    conversion c = {.w = w, .codes = codes, .words = words};
    return valid(w) ? convert(&c, pack_task, threads) : PTQ_INVALID;
}

ptq_status ptq_words_unpack(const ptq_packed *w, uint8_t *codes, int threads) {
    conversion c = {.w = w, .unpacked = codes};
    return valid(w) ? convert(&c, unpack_task, threads) : PTQ_INVALID;
}

ptq_status ptq_packed_dequantize(const ptq_packed *w, float *out, int threads) {
    conversion c = {.w = w, .values = out};
    return valid_groups(w, w->places) ? convert(&c, dequantize_task, threads) : PTQ_INVALID;
}

/* ---- products -------------------------------------------------------------------------- */

typedef struct {
    const ptq_kernels *k;
    const ptq_packed *w;
    const void *x;
    int64_t ldx;
    ptq_dtype dtype;
    int int8;
    float *y;
    int64_t first, count; /* tokens of this chunk */
    int64_t stripe;       /* panels of a task */
    /* Of this chunk, tile after tile as the kernels take them: */
    float *values, *sums;
    int8_t *codes;
    int32_t *code_sums;
    float *code_scales;
    float *rows; /* (threads, tokens of a tile and 1, places) scratch */
    atomic_int bad;
} product;

/* Tokens of the tile that starts at token t of the chunk: powers of two. */
static int tile_tokens(const product *p, int64_t t) {
    int tokens = p->k->lowbit.tokens;
    while (tokens > p->count - t) tokens /= 2;
    return tokens;
}

/* One token of a tile as codes; the quads of its tokens take turns. */
static void quantize_row(product *p, const float *row, int8_t *codes, int64_t t, int tokens,
                         int i) {
    const ptq_packed *w = p->w;
    int8_t *const quads = p->codes + t * w->places;
    int8_t *const out = tokens > 1 ? codes : quads;
    for (int64_t g = 0; g < w->groups; g++) {
        const int64_t start = w->starts[g], at = t * w->groups + g * tokens + i;
        if (!p->k->lowbit.quantize(row + start, w->starts[g + 1] - start, out + start,
                                   &p->code_scales[at], &p->code_sums[at]))
            p->bad = 1;
    }
    if (tokens > 1)
        for (int64_t j = 0; j < w->places; j += PTQ_QUAD)
            memcpy(quads + j * tokens + i * PTQ_QUAD, codes + j, PTQ_QUAD);
}

static void sum_row(product *p, const float *row, int64_t t, int tokens, int i) {
    const int32_t *starts = p->w->starts;
    for (int64_t g = 0; g < p->w->groups; g++)
        p->sums[t * p->w->groups + g * tokens + i] =
            p->k->lowbit.sum(row + starts[g], starts[g + 1] - starts[g]);
}

/* Token t of the chunk as floats in the order of the places. */
static void gather_row(const product *p, int64_t t, float *scratch, float *row) {
    const ptq_packed *w = p->w;
    const int64_t size = p->dtype == PTQ_F32 ? 4 : 2;
    const char *x = (const char *)p->x + (p->first + t) * p->ldx * size;
    p->k->tokens.widen(p->dtype, x, NULL, w->inputs, w->order ? scratch : row);
    if (!w->order) {
        memset(row + w->inputs, 0, sizeof *row * (size_t)(w->places - w->inputs));
        return;
    }
    for (int64_t i = 0; i < w->places; i++) {
        const int64_t input = input_at(w, i);
        row[i] = input < 0 ? 0.0f : scratch[input];
    }
}

/* Tiles of the tokens of a whole one. */
static void prepare_task(void *ctx, int64_t task, int thread) {
    product *p = ctx;
    const ptq_packed *w = p->w;
    const int64_t most = p->k->lowbit.tokens;
    const int64_t end = ptq_min64((task + 1) * most, p->count);
    float *const scratch = p->rows + thread * (most + 1) * w->places;
    float *const rows = scratch + w->places;
    for (int64_t t = task * most; t < end;) {
        const int tokens = tile_tokens(p, t);
        for (int i = 0; i < tokens; i++) {
            float *const row = rows + i * w->places;
            gather_row(p, t + i, scratch, row);
            if (p->int8) quantize_row(p, row, (int8_t *)scratch, t, tokens, i);
            else sum_row(p, row, t, tokens, i);
        }
        if (!p->int8)
            p->k->lowbit.arrange(w->bits, tokens, w->places, rows, p->values + t * w->places);
        t += tokens;
    }
}

static void multiply(const product *p, int64_t panel, int panels, int64_t t, int tokens) {
    const ptq_packed *w = p->w;
    const int64_t grids = panel * w->groups * PTQ_LANES, size = w->scale_dtype == PTQ_F32 ? 4 : 2;
    float out[PTQ_LOWBIT_TOKENS * PTQ_LOWBIT_PANELS * PTQ_LANES];
    ptq_lowbit_args a = {.bits = w->bits,
                         .panels = panels,
                         .tokens = tokens,
                         .groups = w->groups,
                         .starts = w->starts,
                         .words = w->words + panel * panel_words(w),
                         .word_step = panel_words(w),
                         .scales = (const char *)w->scales + grids * size,
                         .scale_dtype = w->scale_dtype,
                         .zeros = w->zeros + grids,
                         .y = out};
    if (p->int8) {
        a.codes = p->codes + t * w->places;
        a.code_sums = p->code_sums + t * w->groups;
        a.code_scales = p->code_scales + t * w->groups;
        p->k->lowbit.int8(&a);
    } else {
        a.x = p->values + t * w->places;
        a.sums = p->sums + t * w->groups;
        p->k->lowbit.f32(&a);
    }
    const int64_t width = ptq_min64(panels * PTQ_LANES, w->outputs - panel * PTQ_LANES);
    for (int i = 0; i < tokens; i++)
        memcpy(p->y + (p->first + t + i) * w->outputs + panel * PTQ_LANES,
               out + i * panels * PTQ_LANES, sizeof(float) * (size_t)width);
}

/* A stripe of panels, all tokens of the chunk. */
static void product_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const product *p = ctx;
    const int64_t end = ptq_min64((task + 1) * p->stripe, ptq_panels(p->w->outputs));
    for (int64_t panel = task * p->stripe; panel < end && !ptq_should_stop();) {
        const int panels = (int)ptq_min64(p->k->lowbit.panels, end - panel);
        for (int64_t t = 0; t < p->count;) {
            const int tokens = tile_tokens(p, t);
            multiply(p, panel, panels, t, tokens);
            t += tokens;
        }
        panel += panels;
    }
}

static ptq_status multiply_chunks(product *p, int64_t tokens, int threads) {
    const int64_t panels = ptq_panels(p->w->outputs);
    ptq_status status = PTQ_OK;
    /* a few tasks for each thread, each of whole blocks of panels */
    p->stripe =
        ptq_ceil_div(ptq_ceil_div(panels, 4 * threads), p->k->lowbit.panels) * p->k->lowbit.panels;
    for (p->first = 0; p->first < tokens && !status; p->first += CHUNK) {
        p->count = ptq_min64(CHUNK, tokens - p->first);
        status =
            ptq_parallel_for(ptq_ceil_div(p->count, p->k->lowbit.tokens), threads, prepare_task, p);
        if (!status && p->bad) status = PTQ_NONFINITE;
        if (!status)
            status = ptq_parallel_for(ptq_ceil_div(panels, p->stripe), threads, product_task, p);
    }
    return status;
}

ptq_status ptq_packed_matmul(const ptq_packed *w, const void *x, int64_t ldx, ptq_dtype dtype,
                             int64_t tokens, int int8, float *y, int threads) {
    if (tokens < 0 || ldx < 0 || !valid_groups(w, int8 ? PTQ_INT8_GROUP : w->places))
        return PTQ_INVALID;
    product p = {.k = ptq_kernels_get(),
                 .w = w,
                 .x = x,
                 .ldx = ldx,
                 .dtype = dtype,
                 .int8 = int8 != 0,
                 .y = y};
    threads =
        ptq_threads_for_work(threads, (double)tokens * (double)w->outputs * (double)w->places / 8);
    const int64_t rows = ptq_min64(CHUNK, tokens);
    /* the last tile may be a single token, which may take more */
    const int64_t single =
        w->places / ptq_step_places(w->bits) * p.k->lowbit.floats(w->bits, 1) - w->places;
    p.values = int8 ? NULL : ptq_alloc(rows * w->places + single, sizeof *p.values);
    p.sums = int8 ? NULL : ptq_alloc(rows * w->groups, sizeof *p.sums);
    p.codes = int8 ? ptq_alloc(rows * w->places, 1) : NULL;
    p.code_sums = int8 ? ptq_alloc(rows * w->groups, sizeof *p.code_sums) : NULL;
    p.code_scales = int8 ? ptq_alloc(rows * w->groups, sizeof *p.code_scales) : NULL;
    p.rows = ptq_alloc((p.k->lowbit.tokens + 1) * threads * w->places, sizeof *p.rows);
    const int ready =
        p.rows && (int8 ? p.codes && p.code_sums && p.code_scales : p.values && p.sums);
    const ptq_status status = ready ? multiply_chunks(&p, tokens, threads) : PTQ_NOMEM;
    free(p.values);
    free(p.sums);
    free(p.codes);
    free(p.code_sums);
    free(p.code_scales);
    free(p.rows);
    return status;
}
