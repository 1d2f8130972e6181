/* decoder.c - one token through decoder blocks of LLaMA's kind, from packed weights.
 *
 * A block is two regions of phases, if the cache of keys and values lies between them and is the
 * model's own; or all blocks are one region, if what the cache holds is known. Phases are the
 * products, and the heads of attention: what lies between them is small and is done by the thread
 * that ends a phase. */
#include <math.h>
#include <stdatomic.h>

#include "round.h"
#include "row_product.h"

enum {
    MOST_PRODUCTS = 3, /* that take the same token */
    STRIPES = 16,      /* of a phase for each thread: it waits for the last one */
};

/* Products of one token, stripe after stripe. */
typedef struct {
    int count;
    int64_t stripe; /* panels of a task */
    ptq_row_product p[MOST_PRODUCTS];
} products;

static int64_t stripes_of(const products *s, int i) {
    return ptq_ceil_div(ptq_panels(s->p[i].layer->w.outputs), s->stripe);
}

static ptq_phase product_phase(products *s, int threads, ptq_task task, void (*after)(void *),
                               void *ctx) {
    const int64_t few = s->p[0].k->lowbit.panels;
    int64_t panels = 0, tasks = 0;
    for (int i = 0; i < s->count; i++) panels += ptq_panels(s->p[i].layer->w.outputs);
    s->stripe = ptq_round_up(ptq_ceil_div(panels, (int64_t)STRIPES * threads), few);
    for (int i = 0; i < s->count; i++) tasks += stripes_of(s, i);
    return (ptq_phase){tasks, task, after, ctx};
}

static void multiply_stripe(const products *s, int64_t task) {
    int i = 0;
    for (; task >= stripes_of(s, i); i++) task -= stripes_of(s, i);
    const int64_t first = task * s->stripe;
    ptq_row_multiply(&s->p[i], first,
                     ptq_min64(s->stripe, ptq_panels(s->p[i].layer->w.outputs) - first));
}

/* Make of the token what the products need, once for those that need the same. */
static int prepare(products *s, const float *x) {
    int finite = 1;
    for (int i = 0; i < s->count; i++) {
        int known = 0;
        while (known < i && !ptq_row_same(&s->p[i], &s->p[known])) known++;
        if (known < i) ptq_row_share(&s->p[i], &s->p[known]);
        else finite &= ptq_row_prepare(&s->p[i], x);
    }
    return finite;
}

/* Add the bias and round: the output of the layer. */
static float *layer_output(const ptq_row_product *p, ptq_dtype dtype) {
    const ptq_row_layer *layer = p->layer;
    const int64_t n = layer->w.outputs;
    if (layer->bias)
        for (int64_t i = 0; i < n; i++) p->y[i] += ptq_value(dtype, layer->bias, i);
    p->k->decoder.round(dtype, n, p->y);
    return p->y;
}

/* `wide` is scratch (n). */
static void normalize(const ptq_kernels *k, ptq_dtype dtype, const ptq_norm *norm, int64_t n,
                      const float *x, float *wide, float *out) {
    const float mean = (float)(k->decoder.squares(x, n) / (double)n);
    k->tokens.widen(dtype, norm->weight, NULL, n, wide);
    k->decoder.norm(dtype, n, x, 1.0f / sqrtf(mean + norm->eps), wide, out);
}

static int valid_block(const ptq_block *b) {
    return (b->dtype == PTQ_F32 || b->dtype == PTQ_BF16) && b->hidden >= 1 && b->heads >= 1 &&
           b->inner >= 1 && b->kv_heads >= 1 && b->head_dim >= 2 && b->inner <= PTQ_MOST_PLACES &&
           b->hidden <= PTQ_MOST_PLACES && b->heads <= PTQ_MOST_PLACES &&
           b->head_dim <= PTQ_MOST_PLACES && b->head_dim % 2 == 0 && b->heads % b->kv_heads == 0 &&
           b->heads * b->head_dim <= PTQ_MOST_PLACES;
}

static int valid_layer(const ptq_row_layer *layer, ptq_dtype dtype, int64_t inputs,
                       int64_t outputs) {
    return layer->w.inputs == inputs && layer->w.outputs == outputs && ptq_row_valid(layer, dtype);
}

/* Part of memory for n floats, from *memory on; memory NULL: how many bytes it takes. */
static int64_t take_floats(char **memory, int64_t n, float **part) {
    const int64_t bytes = ptq_round_up(n * (int64_t)sizeof(float), 64);
    if (!memory) return bytes;
    *part = (float *)(void *)*memory;
    *memory += bytes;
    return bytes;
}

static int64_t take_products(char **memory, const ptq_kernels *k, products *s,
                             const ptq_row_layer *const *layers) {
    int64_t bytes = 0;
    for (int i = 0; i < s->count; i++) {
        bytes += ptq_row_memory(k, layers[i]);
        if (memory) ptq_row_make(&s->p[i], k, layers[i], memory);
    }
    return bytes;
}

/* Why a step did not succeed. */
typedef struct {
    atomic_int nonfinite, refused;
} failures;

static ptq_status status_of(failures *f) {
    return f->refused ? PTQ_ROW_REFUSED : f->nonfinite ? PTQ_NONFINITE : PTQ_OK;
}

static double work_of(const ptq_row_layer *const *layers, int count) {
    double work = 0;
    for (int i = 0; i < count; i++)
        work += (double)layers[i]->w.outputs * (double)layers[i]->w.places / 8;
    return work;
}

/* ---- before the cache ------------------------------------------------------------------ */

typedef struct {
    const ptq_kernels *k;
    const ptq_block_begin *a;
    const void *x;
    failures *failed;
    products qkv;
    float *cos, *sin, *values, *wide, *normed;
} beginning;

static int valid_begin(const ptq_block_begin *a) {
    const ptq_block *b = &a->block;
    return valid_block(b) && valid_layer(&a->q, b->dtype, b->hidden, b->heads * b->head_dim) &&
           valid_layer(&a->k, b->dtype, b->hidden, b->kv_heads * b->head_dim) &&
           valid_layer(&a->v, b->dtype, b->hidden, b->kv_heads * b->head_dim);
}

static int64_t lay_out_begin(char **memory, beginning *s) {
    const ptq_block *b = &s->a->block;
    const ptq_row_layer *const layers[] = {&s->a->q, &s->a->k, &s->a->v};
    const int64_t most = ptq_max64(b->hidden, 2 * b->head_dim);
    s->qkv.count = 3;
    int64_t bytes = take_products(memory, s->k, &s->qkv, layers);
    bytes += take_floats(memory, b->head_dim, &s->cos) + take_floats(memory, b->head_dim, &s->sin);
    bytes += take_floats(memory, most, &s->values) + take_floats(memory, most, &s->wide);
    return bytes + take_floats(memory, most, &s->normed);
}

static void begin_start(beginning *s) {
    const ptq_block_begin *a = s->a;
    const ptq_block *b = &a->block;
    s->k->tokens.widen(b->dtype, s->x, NULL, b->hidden, s->values);
    s->k->tokens.widen(b->dtype, a->cos, NULL, b->head_dim, s->cos);
    s->k->tokens.widen(b->dtype, a->sin, NULL, b->head_dim, s->sin);
    normalize(s->k, b->dtype, &a->norm, b->hidden, s->values, s->wide, s->normed);
    if (!prepare(&s->qkv, s->normed)) s->failed->nonfinite = 1;
}

static void begin_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    multiply_stripe(&((beginning *)ctx)->qkv, task);
}

/* Norm and rotation of the heads of one projection. */
static void turn_heads(beginning *s, const ptq_norm *norm, int64_t heads, float *y) {
    const ptq_block *b = &s->a->block;
    for (int64_t h = 0; h < heads; h++) {
        float *const x = y + h * b->head_dim;
        if (norm->weight) {
            normalize(s->k, b->dtype, norm, b->head_dim, x, s->wide, s->wide + b->head_dim);
            memcpy(x, s->wide + b->head_dim, sizeof *x * (size_t)b->head_dim);
        }
        s->k->decoder.rotate(b->dtype, b->head_dim / 2, s->cos, s->sin, x);
    }
}

static void begin_results(void *ctx) {
    beginning *s = ctx;
    const ptq_block_begin *a = s->a;
    const ptq_block *b = &a->block;
    const int64_t n = b->kv_heads * b->head_dim;
    float *const q = layer_output(&s->qkv.p[0], b->dtype);
    float *const key = layer_output(&s->qkv.p[1], b->dtype);
    turn_heads(s, &a->q_norm, b->heads, q);
    turn_heads(s, &a->k_norm, b->kv_heads, key);
    memcpy(a->query, q, sizeof *q * (size_t)(b->heads * b->head_dim));
    s->k->decoder.narrow(b->dtype, n, key, a->key);
    s->k->decoder.narrow(b->dtype, n, layer_output(&s->qkv.p[2], b->dtype), a->value);
}

static ptq_phase begin_phase(beginning *s, int threads) {
    return product_phase(&s->qkv, threads, begin_task, begin_results, s);
}

ptq_status ptq_decoder_begin(const ptq_block_begin *a, int threads) {
    if (!valid_begin(a)) return PTQ_INVALID;
    const ptq_row_layer *const layers[] = {&a->q, &a->k, &a->v};
    failures failed = {0};
    beginning s = {.k = ptq_kernels_get(), .a = a, .x = a->x, .failed = &failed};
    char *const memory = ptq_alloc(lay_out_begin(NULL, &s), 1), *at = memory;
    if (!memory) return PTQ_NOMEM;
    lay_out_begin(&at, &s);
    begin_start(&s);
    ptq_status status = status_of(&failed);
    if (!status) {
        threads = ptq_threads_for_work(threads, work_of(layers, 3));
        const ptq_phase phase = begin_phase(&s, threads);
        status = ptq_parallel_phases(&phase, 1, threads);
    }
    free(memory);
    return status;
}

/* ---- after the cache ------------------------------------------------------------------- */

typedef struct {
    const ptq_kernels *k;
    const ptq_block_end *a;
    const void *input;
    failures *failed;
    const void *key, *value; /* of the token itself, if they are not among the keys and values */
    beginning *next;         /* block, or NULL */
    products o, gated, down;
    int64_t tokens, width; /* attended to; floats of a row of scores */
    float *scores;         /* (threads, 2, width) */
    float *attended;       /* (heads, head_dim) */
    float *x, *wide, *normed, *gate;
} ending;

static int valid_end(const ptq_block_end *a, int64_t fewest) {
    const ptq_block *b = &a->block;
    return valid_block(b) && a->tokens >= fewest && a->tokens < PTQ_MOST_PLACES &&
           valid_layer(&a->o, b->dtype, b->heads * b->head_dim, b->hidden) &&
           valid_layer(&a->gate, b->dtype, b->hidden, b->inner) &&
           valid_layer(&a->up, b->dtype, b->hidden, b->inner) &&
           valid_layer(&a->down, b->dtype, b->inner, b->hidden);
}

static int64_t lay_out_end(char **memory, ending *s, int threads) {
    const ptq_block_end *a = s->a;
    const ptq_block *b = &a->block;
    const ptq_row_layer *const o[] = {&a->o}, *const gated[] = {&a->gate, &a->up};
    const ptq_row_layer *const down[] = {&a->down};
    s->tokens = a->tokens + (s->key != NULL);
    s->width = ptq_round_up(s->tokens, PTQ_ROW_LANES);
    s->o.count = s->down.count = 1;
    s->gated.count = 2;
    int64_t bytes = take_products(memory, s->k, &s->o, o);
    bytes += take_products(memory, s->k, &s->gated, gated);
    bytes += take_products(memory, s->k, &s->down, down);
    bytes += take_floats(memory, 2 * threads * s->width, &s->scores);
    bytes += take_floats(memory, b->heads * b->head_dim, &s->attended);
    bytes += take_floats(memory, b->hidden, &s->x) + take_floats(memory, b->hidden, &s->wide);
    return bytes + take_floats(memory, b->hidden, &s->normed) +
           take_floats(memory, b->inner, &s->gate);
}

/* The token's own value, the last. */
static void add_value(const ending *s, int64_t group, float p, float factor, float *out) {
    const ptq_block *b = &s->a->block;
    for (int64_t i = 0; i < b->head_dim; i++) {
        const float v = ptq_value(b->dtype, s->value, group * b->head_dim + i);
        out[i] = (out[i] + p * v) * factor;
    }
}

static void head_task(void *ctx, int64_t head, int thread) {
    ending *s = ctx;
    const ptq_decoder_kernels *k = &s->k->decoder;
    const ptq_block_end *a = s->a;
    const ptq_block *b = &a->block;
    const int64_t size = b->dtype == PTQ_BF16 ? 2 : 4, group = head / (b->heads / b->kv_heads);
    float *const scores = s->scores + thread * 2 * s->width, *const e = scores + s->width;
    float *const out = s->attended + head * b->head_dim, *const raw = a->allowed ? e : scores;
    const float *const q = a->query + head * b->head_dim;
    float least, most;
    k->scores(b->dtype, a->tokens, b->head_dim, q,
              (const char *)a->keys + group * a->key_head * size, a->key_token * size, a->scaling,
              raw);
    if (s->key)
        k->scores(b->dtype, 1, b->head_dim, q, (const char *)s->key + group * b->head_dim * size, 0,
                  a->scaling, raw + a->tokens);
    if (a->allowed && !s->k->softmax.mask(s->tokens, e, a->allowed, -INFINITY, scores)) {
        s->failed->refused = 1;
        return;
    }
    s->k->softmax.range(s->tokens, scores, &least, &most);
    const float factor = (float)(1.0 / s->k->softmax.exp(s->tokens, scores, most, scores, e));
    k->mix(b->dtype, a->tokens, b->head_dim, e,
           (const char *)a->values + group * a->value_head * size, a->value_token * size,
           s->key ? 1.0f : factor, out);
    if (s->key) add_value(s, group, e[a->tokens], factor, out);
    k->round(b->dtype, b->head_dim, out);
}

static void after_heads(void *ctx) {
    ending *s = ctx;
    if (!prepare(&s->o, s->attended)) s->failed->nonfinite = 1;
}

static void o_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    multiply_stripe(&((ending *)ctx)->o, task);
}

static void after_o(void *ctx) {
    ending *s = ctx;
    const ptq_block_end *a = s->a;
    const ptq_block *b = &a->block;
    s->k->tokens.widen(b->dtype, s->input, NULL, b->hidden, s->x);
    s->k->decoder.add(b->dtype, b->hidden, layer_output(&s->o.p[0], b->dtype), s->x);
    normalize(s->k, b->dtype, &a->norm, b->hidden, s->x, s->wide, s->normed);
    if (!prepare(&s->gated, s->normed)) s->failed->nonfinite = 1;
}

static void gated_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    multiply_stripe(&((ending *)ctx)->gated, task);
}

static void after_gated(void *ctx) {
    ending *s = ctx;
    const ptq_block *b = &s->a->block;
    const float *const gate = layer_output(&s->gated.p[0], b->dtype);
    const float *const up = layer_output(&s->gated.p[1], b->dtype);
    s->k->decoder.swish(b->dtype, b->inner, gate, up, s->gate);
    if (!prepare(&s->down, s->gate)) s->failed->nonfinite = 1;
}

static void down_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    multiply_stripe(&((ending *)ctx)->down, task);
}

static void after_down(void *ctx) {
    ending *s = ctx;
    const ptq_block *b = &s->a->block;
    s->k->decoder.add(b->dtype, b->hidden, layer_output(&s->down.p[0], b->dtype), s->x);
    s->k->decoder.narrow(b->dtype, b->hidden, s->x, s->a->y);
    if (s->next) begin_start(s->next);
}

enum { END_PHASES = 4 };

static void end_phases(ending *s, int threads, ptq_phase *phases) {
    phases[0] = (ptq_phase){s->a->block.heads, head_task, after_heads, s};
    phases[1] = product_phase(&s->o, threads, o_task, after_o, s);
    phases[2] = product_phase(&s->gated, threads, gated_task, after_gated, s);
    phases[3] = product_phase(&s->down, threads, down_task, after_down, s);
}

ptq_status ptq_decoder_end(const ptq_block_end *a, int threads) {
    if (!valid_end(a, 1)) return PTQ_INVALID;
    const ptq_row_layer *const layers[] = {&a->o, &a->gate, &a->up, &a->down};
    failures failed = {0};
    ending s = {.k = ptq_kernels_get(), .a = a, .input = a->x, .failed = &failed};
    threads = ptq_threads_for_work(threads, work_of(layers, 4));
    char *const memory = ptq_alloc(lay_out_end(NULL, &s, threads), 1), *at = memory;
    if (!memory) return PTQ_NOMEM;
    lay_out_end(&at, &s, threads);
    ptq_phase phases[END_PHASES];
    end_phases(&s, threads, phases);
    const ptq_status status = ptq_parallel_phases(phases, END_PHASES, threads);
    free(memory);
    return status ? status : status_of(&failed);
}

/* ---- whole blocks ---------------------------------------------------------------------- */

enum { BLOCK_PHASES = 1 + END_PHASES };

typedef struct {
    beginning begin;
    ending end;
} whole;

static int same_block(const ptq_block *a, const ptq_block *b) {
    return a->dtype == b->dtype && a->hidden == b->hidden && a->inner == b->inner &&
           a->heads == b->heads && a->kv_heads == b->kv_heads && a->head_dim == b->head_dim;
}

static int valid_whole(const ptq_whole_block *w, const ptq_block *first) {
    return valid_begin(&w->begin) && valid_end(&w->end, 0) && same_block(&w->begin.block, first) &&
           same_block(&w->end.block, first);
}

/* Blocks take turns in the same two parts of memory: the next one's beginning is prepared when the
 * end of the one before is done. */
static ptq_status run_blocks(const ptq_whole_block *blocks, whole *s, ptq_phase *phases,
                             int64_t count, int threads) {
    failures failed = {0};
    const ptq_kernels *k = ptq_kernels_get();
    int64_t first = 0, second = 0;
    for (int64_t i = 0; i < count; i++) {
        const ptq_block_begin *a = &blocks[i].begin;
        const void *const x = i ? blocks[i - 1].end.y : a->x;
        s[i].begin = (beginning){.k = k, .a = a, .x = x, .failed = &failed};
        s[i].end = (ending){.k = k,
                            .a = &blocks[i].end,
                            .input = x,
                            .failed = &failed,
                            .key = a->key,
                            .value = a->value,
                            .next = i + 1 < count ? &s[i + 1].begin : NULL};
        first = ptq_max64(first, lay_out_begin(NULL, &s[i].begin));
        second = ptq_max64(second, lay_out_end(NULL, &s[i].end, threads));
    }
    char *const memory = ptq_alloc(first + second, 1);
    if (!memory) return PTQ_NOMEM;
    for (int64_t i = 0; i < count; i++) {
        char *begin = memory, *end = memory + first;
        lay_out_begin(&begin, &s[i].begin);
        lay_out_end(&end, &s[i].end, threads);
        phases[i * BLOCK_PHASES] = begin_phase(&s[i].begin, threads);
        end_phases(&s[i].end, threads, phases + i * BLOCK_PHASES + 1);
    }
    begin_start(&s[0].begin);
    ptq_status status = ptq_parallel_phases(phases, (int)(count * BLOCK_PHASES), threads);
    if (!status) status = status_of(&failed);
    free(memory);
    return status;
}

ptq_status ptq_decoder_blocks(const ptq_whole_block *blocks, int64_t count, int threads) {
    if (count < 1 || count > PTQ_MOST_BLOCKS) return PTQ_INVALID;
    for (int64_t i = 0; i < count; i++)
        if (!valid_whole(&blocks[i], &blocks[0].begin.block)) return PTQ_INVALID;
    const ptq_block_end *a = &blocks[0].end;
    const ptq_row_layer *const layers[] = {&a->o, &a->gate, &a->up, &a->down};
    threads = ptq_threads_for_work(threads, work_of(layers, 4));
    whole *const s = ptq_alloc(count, sizeof *s);
    ptq_phase *const phases = ptq_alloc(count * BLOCK_PHASES, sizeof *phases);
    const ptq_status status =
        s && phases ? run_blocks(blocks, s, phases, count, threads) : PTQ_NOMEM;
    free(s);
    free(phases);
    return status;
}
