/* int8_gemm.c - X W^T from 8-bit codes: int32 sums of tiles of panels, then zero-points and scales.
 *
 * The weights lie in panels, packed once or here. The tokens are packed in strips, a chunk of them
 * at a time, and quantized on the way if they are values. A task is a block of both: its strips
 * stay in the second cache while its panels pass by, each of which is read once per task. */
#include <math.h>
#include <stdatomic.h>

#include "internal.h"
#include "round.h"

enum {
    CHUNK_BYTES = 16 << 20, /* of packed tokens */
    MOST_TOKENS = 512,      /* of a task */
    MOST_OUTPUTS = 192,     /* of a task, whole tiles of every level */
    DEEPEST = 4096,         /* inputs summed before the next strip's turn */
    MIDDLE = 128,           /* of the codes of weights */
};

_Static_assert(MOST_OUTPUTS % (PTQ_INT8_MAX_PANELS * PTQ_LANES) == 0 &&
                   MOST_OUTPUTS % (2 * PTQ_LANES) == 0,
               "a task has whole tiles");

typedef struct {
    const ptq_kernels *k;
    const ptq_int8_args *a;
    const uint32_t *panels;
    const int32_t *w_sums;        /* NULL: no activation has a zero-point */
    int64_t words, strip_bytes;   /* of one lane; of one strip */
    int64_t height, width, depth; /* of a task: tokens, outputs; words of a sum */
    int64_t first, count;         /* tokens of this chunk */
    int64_t blocks;               /* of tokens in the chunk */
    char *strips;
    ptq_int8_row *rows; /* (count) */
    char *work;         /* of the threads, `workspace` each */
    size_t workspace;
    atomic_int nonfinite;
} product;

/* ---- weights --------------------------------------------------------------------------- */

int64_t ptq_int8_words(int64_t outputs, int64_t n) {
    return ptq_panels(outputs) * ptq_ceil_div(n, PTQ_QUAD) * PTQ_ROW_WORDS;
}

typedef struct {
    const uint8_t *codes;
    int64_t outputs, n, words;
    uint32_t flip, *out;
    int32_t *sums;
} packing;

typedef uint32_t four __attribute__((vector_size(16), aligned(1), may_alias));
#define SHUFFLE __builtin_shufflevector

/* Quads k .. k + 3 of four rows, words of four lanes. */
static inline void pack_four(const uint8_t *codes, int64_t n, four flip, uint32_t *out) {
    const four a = *(const four *)(const void *)codes ^ flip;
    const four b = *(const four *)(const void *)(codes + n) ^ flip;
    const four c = *(const four *)(const void *)(codes + 2 * n) ^ flip;
    const four d = *(const four *)(const void *)(codes + 3 * n) ^ flip;
    const four ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
    const four AB = SHUFFLE(a, b, 2, 6, 3, 7), CD = SHUFFLE(c, d, 2, 6, 3, 7);
    *(four *)out = SHUFFLE(ab, cd, 0, 1, 4, 5);
    *(four *)(out + PTQ_ROW_WORDS) = SHUFFLE(ab, cd, 2, 3, 6, 7);
    *(four *)(out + 2 * PTQ_ROW_WORDS) = SHUFFLE(AB, CD, 0, 1, 4, 5);
    *(four *)(out + 3 * PTQ_ROW_WORDS) = SHUFFLE(AB, CD, 2, 3, 6, 7);
}

static uint32_t one_quad(const uint8_t *codes, int64_t count, uint32_t flip) {
    uint8_t quad[PTQ_QUAD];
    uint32_t word;
    memcpy(quad, &flip, sizeof quad); /* absent codes are 0 in the word */
    memcpy(quad, codes, (size_t)count);
    memcpy(&word, quad, sizeof word);
    return word ^ flip;
}

static int32_t sum_codes(const uint8_t *codes, int64_t n, uint8_t flip) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (int8_t)(codes[i] ^ flip);
    return sum;
}

static void pack_panel_task(void *ctx, int64_t panel, int thread) {
    (void)thread;
    const packing *p = ctx;
    const int64_t n = p->n, row = panel * PTQ_LANES, whole = n / (4 * PTQ_QUAD) * 4;
    const int present = (int)ptq_min64(PTQ_LANES, p->outputs - row), fours = present / 4 * 4;
    const uint8_t *codes = p->codes + row * n;
    uint32_t *out = p->out + panel * p->words * PTQ_ROW_WORDS;
    const four flip = {p->flip, p->flip, p->flip, p->flip};
    if (present < PTQ_LANES) memset(out, 0, sizeof *out * (size_t)(p->words * PTQ_ROW_WORDS));
    for (int64_t k = 0; k < whole; k += 4)
        for (int r = 0; r < fours; r += 4)
            pack_four(codes + r * n + k * PTQ_QUAD, n, flip, out + k * PTQ_ROW_WORDS + r);
    for (int r = 0; r < present; r++)
        for (int64_t k = r < fours ? whole : 0; k < p->words; k++)
            out[k * PTQ_ROW_WORDS + r] = one_quad(codes + r * n + k * PTQ_QUAD,
                                                  ptq_min64(PTQ_QUAD, n - k * PTQ_QUAD), p->flip);
    if (!p->sums) return;
    for (int r = 0; r < present; r++) /* signed codes are less by 128 already */
        p->sums[row + r] = sum_codes(codes + r * n, n, p->flip ? 0 : MIDDLE);
}

ptq_status ptq_int8_pack(const void *codes, int flipped, int64_t outputs, int64_t n,
                         uint32_t *words, int32_t *sums, int threads) {
    if (outputs < 0 || n < 1 || n > PTQ_INT8_INPUTS || outputs > PTQ_MOST_PLACES)
        return PTQ_INVALID;
    packing p = {codes, outputs, n, ptq_ceil_div(n, PTQ_QUAD), flipped ? 0x80808080u : 0,
                 words, sums};
    threads = ptq_threads_for_work(threads, (double)outputs * (double)n / 4);
    return ptq_parallel_for(ptq_panels(outputs), threads, pack_panel_task, &p);
}

static void sum_panel_task(void *ctx, int64_t panel, int thread) {
    (void)thread;
    const packing *p = ctx;
    const uint32_t *in = p->out + panel * p->words * PTQ_ROW_WORDS;
    const int present = (int)ptq_min64(PTQ_LANES, p->outputs - panel * PTQ_LANES);
    int32_t sum[PTQ_LANES] = {0};
    for (int64_t k = 0; k < p->words; k++, in += PTQ_ROW_WORDS)
        for (int r = 0; r < PTQ_LANES; r++) {
            const uint32_t pairs = (in[r] & 0x00ff00ff) + (in[r] >> 8 & 0x00ff00ff);
            sum[r] += (int32_t)((pairs & 0xffff) + (pairs >> 16));
        }
    for (int r = 0; r < present; r++)
        p->sums[panel * PTQ_LANES + r] = sum[r] - (int32_t)(MIDDLE * p->n);
}

/* ---- tokens ---------------------------------------------------------------------------- */

/* Bytes from row to row of codes on their way to a strip; not a power of two. */
static int64_t row_stride(const product *p) { return ptq_round_up(p->a->n, 64) + 64; }

/* Codes of token t, made in `codes` if there are none, and what its results have in common. NULL if
 * it is not finite, or its range. */
static const int8_t *token_codes(product *p, int64_t t, int8_t *codes, float *values,
                                 ptq_int8_row *row) {
    const ptq_int8_args *a = p->a;
    const int64_t n = a->n, g = a->x_grids > 1 ? t : 0;
    float scale = a->x_grids ? a->x_scales[g] : 0.0f;
    int zero = a->x_grids ? a->x_zeros[g] : 0;
    if (a->x) codes = (int8_t *)(uintptr_t)(a->x + t * n);
    else {
        const char *in = (const char *)a->values + t * a->ldx * (a->dtype == PTQ_F32 ? 4 : 2);
        const float *x = a->dtype == PTQ_F32 ? (const float *)(const void *)in : values;
        if (!p->k->tokens.all_below(a->dtype, in, n, INFINITY)) return NULL;
        if (x == values) p->k->tokens.widen(a->dtype, in, NULL, n, values);
        if (!a->x_grids) {
            float low, high;
            p->k->activations.range(x, n, &low, &high);
            ptq_signed_grid_fit(&a->grid, low, high, &scale, &zero);
            if (isinf(scale)) return NULL;
        }
        ptq_signed_grid_codes(p->k, &a->grid, x, n, scale, zero, codes);
    }
    const int32_t sum = sum_codes((const uint8_t *)codes, n, 0);
    *row = (ptq_int8_row){(double)scale, (double)zero, (double)(sum - (int64_t)zero * n), sum};
    return codes;
}

static void strip_task(void *ctx, int64_t strip, int thread) {
    product *p = ctx;
    const ptq_int8_args *a = p->a;
    const int mr = p->k->int8.mr;
    const int64_t stride = a->x ? a->n : row_stride(p), first = strip * mr;
    const int tokens = (int)ptq_min64(mr, p->count - first);
    int8_t *work = (int8_t *)p->work + (size_t)thread * p->workspace;
    float *values = (float *)(void *)(work + row_stride(p) * mr);
    const int8_t *codes = a->x ? a->x + (p->first + first) * a->n : work;
    for (int i = 0; i < tokens; i++)
        if (!token_codes(p, p->first + first + i, work + i * stride, values, p->rows + first + i)) {
            p->nonfinite = 1;
            return;
        }
    p->k->int8.pack(codes, stride, a->n, tokens, p->strips + strip * p->strip_bytes);
}

/* ---- products -------------------------------------------------------------------------- */

typedef struct {
    double sum[MOST_OUTPUTS], zero[MOST_OUTPUTS], scale[MOST_OUTPUTS];
    float F[MOST_OUTPUTS];
    int32_t C[]; /* (height, width) */
} scratch;

static void weight_grids(const product *p, int64_t o, int64_t width, scratch *s) {
    const ptq_int8_args *a = p->a;
    for (int64_t j = 0; j < width; j++) {
        const int64_t g = a->w_grids > 1 ? o + j : 0;
        s->sum[j] = p->w_sums ? (double)p->w_sums[o + j] : 0.0;
        s->zero[j] = a->w_offsets ? (double)a->w_offsets[g] - MIDDLE : (double)a->w_zeros[g];
        s->scale[j] = (double)a->w_scales[g];
    }
}

static void add_columns(const ptq_int8_args *a, int64_t t, int64_t o, int64_t width, float *F,
                        float *y) {
    memset(F, 0, sizeof(float) * (size_t)width);
    for (int64_t c = 0; c < a->columns; c++) {
        const float x = a->x_float[t * a->columns + c];
        const float *w = a->w_float + c * a->outputs + o;
        for (int64_t j = 0; j < width; j++) F[j] += x * w[j];
    }
    for (int64_t j = 0; j < width; j++) y[j] += F[j];
}

/* What of the panels behind those at `at` is to be fetched during the product with the tokens from
 * i on: one panel after the other, in equal shares. Behind the last ones there is nothing, but
 * fetching harms nobody. */
static ptq_ahead next_panels(const product *p, const uint32_t *at, int64_t depth, int64_t i,
                             int64_t height) {
    const ptq_int8_kernels *k = &p->k->int8;
    const int64_t strips = ptq_ceil_div(height, k->mr), strip = i / k->mr;
    const int64_t each = ptq_ceil_div(strips, k->panels), panel = k->panels + strip / each;
    const int64_t share = ptq_ceil_div(depth, each) * PTQ_ROW_WORDS;
    const uint32_t *start = at + panel * p->words * PTQ_ROW_WORDS + strip % each * share;
    return (ptq_ahead){start, start + share};
}

/* The integer sums of a block, from token t of the chunk and output o. */
static void sum_block(const product *p, int64_t t, int64_t height, int64_t o, int64_t width,
                      int32_t *C) {
    const ptq_int8_kernels *k = &p->k->int8;
    const int64_t ldc = p->width, stride = p->words * PTQ_ROW_WORDS, panels = ptq_panels(width);
    for (int64_t i = 0; i < height; i++) {
        /* modulo 2^32, as the products are */
        const uint32_t start = 0u - (uint32_t)k->offset * (uint32_t)p->rows[t + i].codes;
        for (int64_t j = 0; j < panels * PTQ_LANES; j++) C[i * ldc + j] = (int32_t)start;
    }
    for (int64_t k0 = 0; k0 < p->words; k0 += p->depth) {
        const int64_t depth = ptq_min64(p->depth, p->words - k0);
        if (ptq_should_stop()) return; /* may run anything, other products too */
        if (k->enter) k->enter();
        for (int64_t q = 0; q < panels; q += k->panels) {
            const uint32_t *at = p->panels + (o / PTQ_LANES + q) * stride + k0 * PTQ_ROW_WORDS;
            for (int64_t i = 0; i < height; i += k->mr) {
                const ptq_ahead ahead = next_panels(p, at, depth, i, height);
                k->dots((int)ptq_min64(k->mr, height - i), (int)ptq_min64(k->panels, panels - q),
                        p->strips + (t + i) / k->mr * p->strip_bytes + k0 * k->mr * k->token_bytes,
                        at, stride, depth, C + i * ldc + q * PTQ_LANES, ldc, &ahead);
            }
        }
        if (k->leave) k->leave();
    }
}

static void block_task(void *ctx, int64_t task, int thread) {
    const product *p = ctx;
    const ptq_int8_args *a = p->a;
    scratch *s = (scratch *)(void *)(p->work + (size_t)thread * p->workspace);
    const int64_t t = task % p->blocks * p->height, o = task / p->blocks * p->width;
    const int64_t height = ptq_min64(p->height, p->count - t);
    const int64_t width = ptq_min64(p->width, a->outputs - o);
    sum_block(p, t, height, o, width, s->C);
    weight_grids(p, o, width, s);
    for (int64_t i = 0; i < height; i++) {
        float *y = a->y + (p->first + t + i) * a->outputs + o;
        p->k->int8.finish(p->rows + t + i, width, s->C + i * p->width, s->sum, s->zero, s->scale,
                          a->bias ? a->bias + o : NULL, y);
        if (a->columns) add_columns(a, p->first + t + i, o, width, s->F, y);
    }
}

/* Sizes of blocks: strips in half of the second cache, a sum as deep as it is wide for the first.
 */
static void choose_blocks(product *p, int64_t chunk, int threads) {
    const ptq_int8_kernels *k = &p->k->int8;
    const int64_t tile = k->panels * PTQ_LANES, token = p->strip_bytes / k->mr;
    /* a matrix unit needs both sides of its tile in the first cache, and the sums */
    const int64_t deepest =
        k->step > 1 ? ptq_first_cache() / 3 / tile / PTQ_QUAD : DEEPEST / PTQ_QUAD;
    const int64_t parts =
        ptq_ceil_div(p->words, ptq_max64(k->step, ptq_tuned("PTQ_TUNE_WORDS", deepest)));
    p->depth = ptq_round_up(ptq_ceil_div(p->words, parts), k->step);
    const int64_t most = ptq_tuned("PTQ_TUNE_TOKENS", ptq_second_cache() / 2 / token);
    const int64_t fitting = ptq_min64(most, MOST_TOKENS) / k->mr;
    p->height = ptq_min64(ptq_max64(fitting, 4), ptq_ceil_div(chunk, k->mr)) * k->mr;
    p->width = ptq_min64(MOST_OUTPUTS / tile * tile, ptq_round_up(p->a->outputs, tile));
    while (p->width > tile &&
           ptq_ceil_div(chunk, p->height) * ptq_ceil_div(p->a->outputs, p->width) < 4 * threads)
        p->width = ptq_round_up(p->width / 2, tile);
}

static ptq_status multiply_chunks(product *p, int64_t chunk, int threads) {
    const ptq_int8_args *a = p->a;
    const int mr = p->k->int8.mr;
    ptq_status status = PTQ_OK;
    for (p->first = 0; p->first < a->tokens && !status; p->first += chunk) {
        p->count = ptq_min64(chunk, a->tokens - p->first);
        p->blocks = ptq_ceil_div(p->count, p->height);
        status = ptq_parallel_for(ptq_ceil_div(p->count, mr), threads, strip_task, p);
        if (!status && p->nonfinite) status = PTQ_NONFINITE;
        if (!status)
            status = ptq_parallel_for(p->blocks * ptq_ceil_div(a->outputs, p->width), threads,
                                      block_task, p);
    }
    return status;
}

/* Whether the weights' sums matter: a token may have a zero-point. */
static int needs_sums(const ptq_int8_args *a) {
    if (!a->x_grids) return !a->grid.symmetric;
    for (int64_t g = 0; g < a->x_grids; g++)
        if (a->x_zeros[g]) return 1;
    return 0;
}

static ptq_status multiply(product *p, int threads) {
    const ptq_int8_args *a = p->a;
    const ptq_int8_kernels *k = &p->k->int8;
    p->words = ptq_ceil_div(a->n, PTQ_QUAD);
    p->strip_bytes = ptq_round_up(p->words, k->step) * k->mr * k->token_bytes;
    int64_t chunk = ptq_max64(1, CHUNK_BYTES / p->strip_bytes) * k->mr;
    chunk = ptq_min64(chunk, ptq_round_up(ptq_max64(a->tokens, 1), k->mr));
    choose_blocks(p, chunk, threads);
    const size_t sums = sizeof(scratch) + sizeof(int32_t) * (size_t)(p->height * p->width);
    const size_t codes = (size_t)(row_stride(p) * k->mr) + sizeof(float) * (size_t)a->n;
    p->workspace = ((sums > codes ? sums : codes) + 4095) / 4096 * 4096 + 64;
    p->strips = ptq_alloc(chunk / k->mr, (size_t)p->strip_bytes);
    p->rows = ptq_alloc(chunk, sizeof *p->rows);
    p->work = ptq_alloc(threads, p->workspace);
    const ptq_status status =
        p->strips && p->rows && p->work ? multiply_chunks(p, chunk, threads) : PTQ_NOMEM;
    free(p->strips);
    free(p->rows);
    free(p->work);
    return status;
}

/* Panels of the weights' codes if there are none, and the sums of their codes if they matter. */
static ptq_status prepare_weights(product *p, uint32_t **words, int32_t **sums, int threads) {
    const ptq_int8_args *a = p->a;
    const int summed = needs_sums(a) && !a->sums;
    *words = a->words ? NULL : ptq_alloc(ptq_int8_words(a->outputs, a->n), sizeof **words);
    *sums = summed ? ptq_alloc(a->outputs, sizeof **sums) : NULL;
    if ((!a->words && !*words) || (summed && !*sums)) return PTQ_NOMEM;
    p->panels = a->words ? a->words : *words;
    p->w_sums = summed ? *sums : a->sums;
    if (!a->words) return ptq_int8_pack(a->w, 1, a->outputs, a->n, *words, *sums, threads);
    packing sum = {.outputs = a->outputs,
                   .n = a->n,
                   .words = ptq_ceil_div(a->n, PTQ_QUAD),
                   .out = (uint32_t *)(uintptr_t)a->words,
                   .sums = *sums};
    return summed ? ptq_parallel_for(ptq_panels(a->outputs), threads, sum_panel_task, &sum)
                  : PTQ_OK;
}

ptq_status ptq_int8_matmul(const ptq_int8_args *a, int threads) {
    if (a->tokens < 0 || a->outputs < 0 || a->n < 1 || a->n > PTQ_INT8_INPUTS ||
        a->outputs > PTQ_MOST_PLACES || a->tokens > INT64_MAX / PTQ_INT8_INPUTS / 4)
        return PTQ_INVALID;
    if (!a->x && (a->grid.bits < 2 || a->grid.bits > 8)) return PTQ_INVALID;
    if (!a->tokens || !a->outputs) return PTQ_OK;
    threads =
        ptq_threads_for_work(threads, (double)a->tokens * (double)a->outputs * (double)a->n / 8);
    product p = {.k = ptq_kernels_get(), .a = a};
    uint32_t *words;
    int32_t *sums;
    ptq_status status = prepare_weights(&p, &words, &sums, threads);
    if (!status) status = multiply(&p, threads);
    free(words);
    free(sums);
    return status;
}
