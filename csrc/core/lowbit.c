/* lowbit.c - packed weights of 2 to 8 bits: packing, dequantizing, products. */
#include <math.h>
#include <stdatomic.h>

#include "internal.h"
#include "round.h"
#include "words.h"

enum {
    CHUNK = 256, /* tokens prepared at a time */
    DEPTH = 256, /* places of weights decoded at a time */
    WIDTH = 80,  /* most outputs of a block of whole panels of either kind */
    PANELS = 4,  /* of a task that packs or unpacks */
};

static int valid(const ptq_packed *w) {
    return ptq_has_words(w->bits) && w->outputs >= 1 && w->inputs >= 1 && w->places >= 1 &&
           w->outputs <= PTQ_MOST_PLACES && w->places <= PTQ_MOST_PLACES &&
           w->places % ptq_step_places(w->bits) == 0 && w->places >= w->inputs;
}

int ptq_packed_valid(const ptq_packed *w, int64_t longest) {
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

typedef struct conversion {
    const ptq_packed *w;
    /* Converts an output, lane r of panel p. */
    void (*row)(const struct conversion *c, int64_t p, int64_t r);
    const uint8_t *codes;
    uint32_t *words; /* packed: written, all others NULL */
    uint8_t *unpacked;
    float *values;
} conversion;

static void pack_row(const conversion *c, int64_t p, int64_t r) {
    const ptq_packed *w = c->w;
    uint32_t *const lane = c->words + p * panel_words(w) + r;
    for (int64_t i = 0; i < w->places; i++) {
        const int64_t input = input_at(w, i);
        if (input < 0) continue;
        const uint32_t code = c->codes[(p * PTQ_LANES + r) * w->inputs + input];
        ptq_word_put(lane, w->bits, i, code & ((1u << w->bits) - 1));
    }
}

static void unpack_row(const conversion *c, int64_t p, int64_t r) {
    const ptq_packed *w = c->w;
    const uint32_t *const lane = w->words + p * panel_words(w) + r;
    for (int64_t i = 0; i < w->places; i++) {
        const int64_t input = input_at(w, i);
        if (input < 0) continue;
        c->unpacked[(p * PTQ_LANES + r) * w->inputs + input] =
            (uint8_t)ptq_word_code(lane, w->bits, i);
    }
}

static void dequantize_row(const conversion *c, int64_t p, int64_t r) {
    const ptq_packed *w = c->w;
    const uint32_t *const lane = w->words + p * panel_words(w) + r;
    for (int64_t g = 0; g < w->groups; g++) {
        const int64_t at = (p * w->groups + g) * PTQ_LANES + r;
        const float scale = ptq_value(w->scale_dtype, w->scales, at);
        const int zero = w->zeros[at];
        for (int64_t i = w->starts[g]; i < w->starts[g + 1]; i++) {
            const int64_t input = input_at(w, i);
            if (input < 0) continue;
            const int code = (int)ptq_word_code(lane, w->bits, i);
            c->values[(p * PTQ_LANES + r) * w->inputs + input] = scale * (float)(code - zero);
        }
    }
}

static void convert_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const conversion *c = ctx;
    const ptq_packed *w = c->w;
    const int64_t end = ptq_min64((task + 1) * PANELS, ptq_panels(w->outputs));
    for (int64_t p = task * PANELS; p < end && !ptq_should_stop(); p++) {
        if (c->words)
            memset(c->words + p * panel_words(w), 0, sizeof *c->words * (size_t)panel_words(w));
        for (int64_t r = 0; r < ptq_min64(PTQ_LANES, w->outputs - p * PTQ_LANES); r++)
            c->row(c, p, r);
    }
}

static ptq_status convert(conversion *c, int threads) {
    const int64_t tasks = ptq_ceil_div(ptq_panels(c->w->outputs), PANELS);
    threads = ptq_threads_for_work(threads, (double)c->w->outputs * (double)c->w->places);
    return ptq_parallel_for(tasks, threads, convert_task, c);
}

ptq_status ptq_words_pack(const ptq_packed *w, const uint8_t *codes, uint32_t *words, int threads) {
    conversion c = {.w = w, .row = pack_row, .codes = codes, .words = words};
    return valid(w) ? convert(&c, threads) : PTQ_INVALID;
}

ptq_status ptq_words_unpack(const ptq_packed *w, uint8_t *codes, int threads) {
    conversion c = {.w = w, .row = unpack_row, .unpacked = codes};
    return valid(w) ? convert(&c, threads) : PTQ_INVALID;
}

ptq_status ptq_packed_dequantize(const ptq_packed *w, float *out, int threads) {
    conversion c = {.w = w, .row = dequantize_row, .values = out};
    return ptq_packed_valid(w, w->places) ? convert(&c, threads) : PTQ_INVALID;
}

/* ---- products -------------------------------------------------------------------------- */

typedef struct {
    const ptq_kernels *k;
    const ptq_packed *w;
    const void *x;
    int64_t ldx;
    ptq_dtype dtype;
    int int8, fixed; /* what is multiplied: codes of one or of PTQ_DIGITS digits, or floats */
    float *y;
    int64_t first, count; /* tokens of this chunk */
    int64_t stripe;       /* panels of a task */
    /* Of this chunk, tile after tile as the kernels take them: */
    float *values, *sums;
    int8_t *codes;
    int32_t *code_sums;
    float *code_scales;
    float *rows;   /* (threads, tokens of a tile and 1, places) scratch */
    float *blocks; /* (threads, ...) scratch of block_task */
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

static void digits_row(product *p, const float *row, int8_t *digits, int64_t t, int tokens, int i) {
    const ptq_packed *w = p->w;
    int8_t *const quads = p->codes + PTQ_DIGITS * t * w->places;
    for (int64_t g = 0; g < w->groups; g++) {
        const int64_t start = w->starts[g], at = t * w->groups + g * tokens + i;
        p->k->lowbit.digits(row + start, w->starts[g + 1] - start, digits + start, w->places,
                            &p->code_scales[at], &p->sums[at]);
    }
    for (int64_t j = 0; j < w->places; j += PTQ_QUAD)
        for (int d = 0; d < PTQ_DIGITS; d++)
            memcpy(quads + PTQ_DIGITS * (j * tokens + i * PTQ_QUAD) + d * PTQ_QUAD,
                   digits + d * w->places + j, PTQ_QUAD);
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
            else if (p->fixed) digits_row(p, row, (int8_t *)scratch, t, tokens, i);
            else sum_row(p, row, t, tokens, i);
        }
        if (!p->int8 && !p->fixed)
            p->k->lowbit.arrange(w->bits, tokens, w->places, rows, p->values + t * w->places);
        t += tokens;
    }
}

static ptq_lowbit_args panel_args(const product *p, int64_t panel, int panels) {
    const ptq_packed *w = p->w;
    const int64_t grids = panel * w->groups * PTQ_LANES, size = w->scale_dtype == PTQ_F32 ? 4 : 2;
    return (ptq_lowbit_args){.bits = w->bits,
                             .panels = panels,
                             .groups = w->groups,
                             .starts = w->starts,
                             .words = w->words + panel * panel_words(w),
                             .word_step = panel_words(w),
                             .scales = (const char *)w->scales + grids * size,
                             .scale_dtype = w->scale_dtype,
                             .zeros = w->zeros + grids};
}

static void multiply(const product *p, int64_t panel, int panels, int64_t t, int tokens) {
    const ptq_packed *w = p->w;
    float out[PTQ_LOWBIT_TOKENS * PTQ_LOWBIT_PANELS * PTQ_LANES];
    ptq_lowbit_args a = panel_args(p, panel, panels);
    a.tokens = tokens;
    a.y = out;
    if (p->int8) {
        a.codes = p->codes + t * w->places;
        a.code_sums = p->code_sums + t * w->groups;
        a.code_scales = p->code_scales + t * w->groups;
        p->k->lowbit.int8(&a);
    } else if (p->fixed) {
        a.codes = p->codes + PTQ_DIGITS * t * w->places;
        a.sums = p->sums + t * w->groups;
        a.code_scales = p->code_scales + t * w->groups;
        p->k->lowbit.fixed(&a);
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

/* ---- many tokens ----------------------------------------------------------------------- */

/* A strip of mr tokens as the GEMM kernel takes them. */
static void strip_task(void *ctx, int64_t strip, int thread) {
    product *p = ctx;
    const ptq_packed *w = p->w;
    const int64_t mr = p->k->gemm.mr;
    float *const scratch = p->rows + 2 * thread * w->places, *const row = scratch + w->places;
    float *const out = p->values + strip * mr * w->places;
    for (int64_t i = 0; i < mr; i++) {
        const int present = strip * mr + i < p->count;
        if (present) gather_row(p, strip * mr + i, scratch, row);
        for (int64_t k = 0; k < w->places; k++) out[k * mr + i] = present ? row[k] : 0.0f;
    }
}

/* Places [k0, k0 + depth) of a block of panels as floats. */
static void decode_block(const product *p, int64_t panel, int panels, int64_t k0, int64_t depth,
                         float *B) {
    const ptq_packed *w = p->w;
    const ptq_lowbit_args a = panel_args(p, panel, panels);
    for (int64_t g = 0; g < w->groups; g++) {
        const int64_t first = ptq_max64(w->starts[g], k0);
        const int64_t places = ptq_min64(w->starts[g + 1], k0 + depth) - first;
        for (int i = 0; i < panels && places > 0; i++)
            p->k->lowbit.decode(&a, i, g, first, places, B + (first - k0) * p->k->gemm.nr,
                                i * PTQ_LANES, depth);
    }
}

/* A block of outputs, all tokens of the chunk: weights decoded once for all. */
static void block_task(void *ctx, int64_t task, int thread) {
    const product *p = ctx;
    const ptq_packed *w = p->w;
    const int64_t mr = p->k->gemm.mr, nr = p->k->gemm.nr, strips = ptq_ceil_div(p->count, mr);
    const int64_t lanes = p->stripe * PTQ_LANES, panel = task * p->stripe;
    const int panels = (int)ptq_min64(p->stripe, ptq_panels(w->outputs) - panel);
    float *const B = p->blocks + thread * (DEPTH + CHUNK + PTQ_MAX_MR) * WIDTH;
    float *const C = B + DEPTH * WIDTH; /* (lanes / nr, strips, mr, nr) */
    memset(B, 0, sizeof *B * (size_t)(DEPTH * WIDTH));
    memset(C, 0, sizeof *C * (size_t)(strips * mr * lanes));
    for (int64_t k0 = 0; k0 < w->places && !ptq_should_stop(); k0 += DEPTH) {
        const int64_t depth = ptq_min64(DEPTH, w->places - k0);
        decode_block(p, panel, panels, k0, depth, B);
        for (int64_t j = 0; j < lanes / nr; j++)
            for (int64_t i = 0; i < strips; i++)
                p->k->gemm.f32(C + (j * strips + i) * mr * nr,
                               p->values + (i * w->places + k0) * mr, mr, B + j * depth * nr,
                               depth);
    }
    for (int64_t t = 0; t < p->count; t++)
        for (int64_t j = 0; j < ptq_min64(lanes, w->outputs - panel * PTQ_LANES); j++)
            p->y[(p->first + t) * w->outputs + panel * PTQ_LANES + j] =
                C[(j / nr * strips * mr + t) * nr + j % nr];
}

/* Outputs of a block: whole panels of the layout and of the GEMM kernel. */
static int64_t block_panels(const ptq_kernels *k) {
    int64_t panels = 1;
    while (panels * PTQ_LANES % k->gemm.nr) panels++;
    while (2 * panels * PTQ_LANES <= 48) panels *= 2;
    return panels;
}

static ptq_status multiply_blocks(product *p, int64_t tokens, int threads) {
    const int64_t mr = p->k->gemm.mr, panels = ptq_panels(p->w->outputs);
    const int64_t rows = ptq_ceil_div(ptq_min64(CHUNK, tokens), mr) * mr;
    p->stripe = block_panels(p->k);
    p->values = ptq_alloc(rows * p->w->places, sizeof *p->values);
    p->rows = ptq_alloc(2 * threads * p->w->places, sizeof *p->rows);
    p->blocks = ptq_alloc(threads * (DEPTH + CHUNK + PTQ_MAX_MR), sizeof *p->blocks * WIDTH);
    ptq_status status = p->stripe * PTQ_LANES > WIDTH          ? PTQ_INVALID
                        : !p->values || !p->rows || !p->blocks ? PTQ_NOMEM
                                                               : PTQ_OK;
    for (p->first = 0; p->first < tokens && !status; p->first += CHUNK) {
        p->count = ptq_min64(CHUNK, tokens - p->first);
        status = ptq_parallel_for(ptq_ceil_div(p->count, mr), threads, strip_task, p);
        if (!status)
            status = ptq_parallel_for(ptq_ceil_div(panels, p->stripe), threads, block_task, p);
    }
    return status;
}

/* ---- few tokens ------------------------------------------------------------------------ */

static ptq_status multiply_tiles(product *p, int64_t tokens, int threads) {
    const ptq_packed *w = p->w;
    const ptq_lowbit_kernels *k = &p->k->lowbit;
    const int64_t panels = ptq_panels(w->outputs), rows = ptq_min64(CHUNK, tokens);
    /* the last tile may be a single token, which may take more */
    const int64_t step = ptq_step_places(w->bits);
    const int64_t single = w->places / step * k->floats(w->bits, 1) - w->places;
    if (p->int8) {
        p->codes = ptq_alloc(rows * w->places, 1);
        p->code_sums = ptq_alloc(rows * w->groups, sizeof *p->code_sums);
        p->code_scales = ptq_alloc(rows * w->groups, sizeof *p->code_scales);
        if (!p->codes || !p->code_sums || !p->code_scales) return PTQ_NOMEM;
    } else if (p->fixed) {
        p->codes = ptq_alloc(rows * w->places, PTQ_DIGITS);
        p->sums = ptq_alloc(rows * w->groups, sizeof *p->sums);
        p->code_scales = ptq_alloc(rows * w->groups, sizeof *p->code_scales);
        if (!p->codes || !p->sums || !p->code_scales) return PTQ_NOMEM;
    } else {
        p->values = ptq_alloc(rows * w->places + single, sizeof *p->values);
        p->sums = ptq_alloc(rows * w->groups, sizeof *p->sums);
        if (!p->values || !p->sums) return PTQ_NOMEM;
    }
    p->rows = ptq_alloc((k->tokens + 1) * threads * w->places, sizeof *p->rows);
    ptq_status status = p->rows ? PTQ_OK : PTQ_NOMEM;
    /* a few tasks for each thread, each of whole blocks of panels */
    p->stripe = ptq_ceil_div(ptq_ceil_div(panels, 4 * threads), k->panels) * k->panels;
    for (p->first = 0; p->first < tokens && !status; p->first += CHUNK) {
        p->count = ptq_min64(CHUNK, tokens - p->first);
        status = ptq_parallel_for(ptq_ceil_div(p->count, k->tokens), threads, prepare_task, p);
        if (!status && p->bad) status = PTQ_NONFINITE;
        if (!status)
            status = ptq_parallel_for(ptq_ceil_div(panels, p->stripe), threads, product_task, p);
    }
    return status;
}

ptq_status ptq_packed_matmul(const ptq_packed *w, const void *x, int64_t ldx, ptq_dtype dtype,
                             int64_t tokens, int int8, float *y, int threads) {
    if (tokens < 0 || ldx < 0 || !ptq_packed_valid(w, int8 ? PTQ_INT8_GROUP : w->places))
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
    p.fixed = !int8 && p.k->lowbit.fixed && w->bits <= p.k->lowbit.fixed_bits &&
              tokens <= p.k->lowbit.fixed_tokens && ptq_packed_valid(w, PTQ_FIXED_GROUP);
    const int blocks = !int8 && tokens >= p.k->lowbit.block_tokens;
    const ptq_status status =
        blocks ? multiply_blocks(&p, tokens, threads) : multiply_tiles(&p, tokens, threads);
    free(p.values);
    free(p.sums);
    free(p.codes);
    free(p.code_sums);
    free(p.code_scales);
    free(p.rows);
    free(p.blocks);
    return status;
}
