/* decoder.c - one token through a decoder block of LLaMA's kind, from packed weights.
 *
 * A block is two regions of phases, as the cache of keys and values lies between them and is the
 * model's own. Phases are the products, and the heads of attention: what lies between them is small
 * and is done by the thread that ends a phase. */
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

static ptq_phase product_phase(products *s, int threads, ptq_task task, void (*after)(void *)) {
    const int64_t few = s->p[0].k->lowbit.panels;
    int64_t panels = 0, tasks = 0;
    for (int i = 0; i < s->count; i++) panels += ptq_panels(s->p[i].layer->w.outputs);
    s->stripe = ptq_round_up(ptq_ceil_div(panels, (int64_t)STRIPES * threads), few);
    for (int i = 0; i < s->count; i++) tasks += stripes_of(s, i);
    return (ptq_phase){tasks, task, after};
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
        for (int64_t i = 0; i < n; i++)
            p->y[i] += dtype == PTQ_BF16 ? ptq_from_bf16(((const uint16_t *)layer->bias)[i])
                                         : ((const float *)layer->bias)[i];
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

/* Memory of floats (n) behind *memory. */
static float *take_floats(char **memory, int64_t n) {
    float *const part = (float *)(void *)*memory;
    *memory += ptq_round_up(n * (int64_t)sizeof(float), 64);
    return part;
}

static int64_t float_bytes(int64_t n) { return ptq_round_up(n * (int64_t)sizeof(float), 64); }

/* ---- before the cache ------------------------------------------------------------------ */

typedef struct {
    const ptq_block_begin *a;
    products qkv;
} beginning;

static void begin_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    multiply_stripe(&((beginning *)ctx)->qkv, task);
}

/* Norm and rotation of the heads of one projection. */
static void turn_heads(const ptq_kernels *k, const ptq_block *b, const ptq_norm *norm,
                       int64_t heads, const float *cos, const float *sin, float *wide, float *y) {
    for (int64_t h = 0; h < heads; h++) {
        float *const x = y + h * b->head_dim;
        if (norm->weight) {
            normalize(k, b->dtype, norm, b->head_dim, x, wide, wide + b->head_dim);
            memcpy(x, wide + b->head_dim, sizeof *x * (size_t)b->head_dim);
        }
        k->decoder.rotate(b->dtype, b->head_dim / 2, cos, sin, x);
    }
}

static void begin_results(const beginning *s, const ptq_kernels *k, const float *cos,
                          const float *sin, float *wide) {
    const ptq_block_begin *a = s->a;
    const ptq_block *b = &a->block;
    float *const q = layer_output(&s->qkv.p[0], b->dtype);
    float *const key = layer_output(&s->qkv.p[1], b->dtype);
    turn_heads(k, b, &a->q_norm, b->heads, cos, sin, wide, q);
    turn_heads(k, b, &a->k_norm, b->kv_heads, cos, sin, wide, key);
    memcpy(a->query, q, sizeof *q * (size_t)(b->heads * b->head_dim));
    k->decoder.narrow(b->dtype, b->kv_heads * b->head_dim, key, a->key);
    k->decoder.narrow(b->dtype, b->kv_heads * b->head_dim, layer_output(&s->qkv.p[2], b->dtype),
                      a->value);
}

ptq_status ptq_decoder_begin(const ptq_block_begin *a, int threads) {
    const ptq_block *b = &a->block;
    const ptq_row_layer *const layers[] = {&a->q, &a->k, &a->v};
    if (!valid_block(b)) return PTQ_INVALID;
    for (int i = 0; i < 3; i++)
        if (!valid_layer(layers[i], b->dtype, b->hidden,
                         (i ? b->kv_heads : b->heads) * b->head_dim))
            return PTQ_INVALID;
    const ptq_kernels *k = ptq_kernels_get();
    const int64_t most = ptq_max64(b->hidden, 2 * b->head_dim);
    int64_t bytes = 2 * float_bytes(b->head_dim) + 3 * float_bytes(most), work = 0;
    for (int i = 0; i < 3; i++) {
        bytes += ptq_row_memory(k, layers[i]);
        work += layers[i]->w.outputs * layers[i]->w.places;
    }
    char *const memory = ptq_alloc(bytes, 1), *at = memory;
    if (!memory) return PTQ_NOMEM;
    float *const cos = take_floats(&at, b->head_dim), *const sin = take_floats(&at, b->head_dim);
    float *const x = take_floats(&at, most), *const wide = take_floats(&at, most);
    float *const normed = take_floats(&at, most);
    beginning s = {.a = a, .qkv = {.count = 3}};
    for (int i = 0; i < 3; i++) ptq_row_make(&s.qkv.p[i], k, layers[i], &at);
    k->tokens.widen(b->dtype, a->x, NULL, b->hidden, x);
    k->tokens.widen(b->dtype, a->cos, NULL, b->head_dim, cos);
    k->tokens.widen(b->dtype, a->sin, NULL, b->head_dim, sin);
    normalize(k, b->dtype, &a->norm, b->hidden, x, wide, normed);
    ptq_status status = prepare(&s.qkv, normed) ? PTQ_OK : PTQ_NONFINITE;
    if (!status) {
        threads = ptq_threads_for_work(threads, (double)work / 8);
        const ptq_phase phase = product_phase(&s.qkv, threads, begin_task, NULL);
        status = ptq_parallel_phases(&phase, 1, threads, &s);
    }
    if (!status) begin_results(&s, k, cos, sin, wide);
    free(memory);
    return status;
}

/* ---- after the cache ------------------------------------------------------------------- */

typedef struct {
    const ptq_kernels *k;
    const ptq_block_end *a;
    products o, gated, down;
    int64_t width;   /* floats of a row of scores */
    float *scores;   /* (threads, 2, width) */
    float *attended; /* (heads, head_dim) */
    float *x, *wide, *normed, *gate;
    atomic_int nonfinite, refused;
} ending;

static void head_task(void *ctx, int64_t head, int thread) {
    ending *s = ctx;
    const ptq_block_end *a = s->a;
    const ptq_block *b = &a->block;
    const int64_t size = b->dtype == PTQ_BF16 ? 2 : 4, group = head / (b->heads / b->kv_heads);
    float *const scores = s->scores + thread * 2 * s->width, *const e = scores + s->width;
    float *const out = s->attended + head * b->head_dim;
    float least, most;
    s->k->decoder.scores(b->dtype, a->tokens, b->head_dim, a->query + head * b->head_dim,
                         (const char *)a->keys + group * a->key_head * size, a->key_token * size,
                         a->scaling, a->allowed ? e : scores);
    if (a->allowed && !s->k->softmax.mask(a->tokens, e, a->allowed, -INFINITY, scores)) {
        s->refused = 1;
        return;
    }
    s->k->softmax.range(a->tokens, scores, &least, &most);
    const double sum = s->k->softmax.exp(a->tokens, scores, most, scores, e);
    s->k->decoder.mix(b->dtype, a->tokens, b->head_dim, e,
                      (const char *)a->values + group * a->value_head * size, a->value_token * size,
                      (float)(1.0 / sum), out);
    s->k->decoder.round(b->dtype, b->head_dim, out);
}

static void after_heads(void *ctx) {
    ending *s = ctx;
    if (!prepare(&s->o, s->attended)) s->nonfinite = 1;
}

static void o_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    multiply_stripe(&((ending *)ctx)->o, task);
}

static void after_o(void *ctx) {
    ending *s = ctx;
    const ptq_block_end *a = s->a;
    const ptq_block *b = &a->block;
    s->k->decoder.add(b->dtype, b->hidden, layer_output(&s->o.p[0], b->dtype), s->x);
    normalize(s->k, b->dtype, &a->norm, b->hidden, s->x, s->wide, s->normed);
    if (!prepare(&s->gated, s->normed)) s->nonfinite = 1;
}

static void gated_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    multiply_stripe(&((ending *)ctx)->gated, task);
}

static void after_gated(void *ctx) {
    ending *s = ctx;
    const ptq_dtype dtype = s->a->block.dtype;
    const float *const gate = layer_output(&s->gated.p[0], dtype);
    const float *const up = layer_output(&s->gated.p[1], dtype);
    s->k->decoder.swish(dtype, s->a->block.inner, gate, up, s->gate);
    if (!prepare(&s->down, s->gate)) s->nonfinite = 1;
}

static void down_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    multiply_stripe(&((ending *)ctx)->down, task);
}

static int valid_end(const ptq_block_end *a) {
    const ptq_block *b = &a->block;
    return valid_block(b) && a->tokens >= 1 && a->tokens <= PTQ_MOST_PLACES &&
           valid_layer(&a->o, b->dtype, b->heads * b->head_dim, b->hidden) &&
           valid_layer(&a->gate, b->dtype, b->hidden, b->inner) &&
           valid_layer(&a->up, b->dtype, b->hidden, b->inner) &&
           valid_layer(&a->down, b->dtype, b->inner, b->hidden);
}

static ptq_status run_end(ending *s, int threads) {
    const ptq_block *b = &s->a->block;
    const ptq_phase phases[] = {
        {b->heads, head_task, after_heads},
        product_phase(&s->o, threads, o_task, after_o),
        product_phase(&s->gated, threads, gated_task, after_gated),
        product_phase(&s->down, threads, down_task, NULL),
    };
    const ptq_status status = ptq_parallel_phases(phases, 4, threads, s);
    if (status) return status;
    if (s->refused) return PTQ_ROW_REFUSED;
    if (s->nonfinite) return PTQ_NONFINITE;
    s->k->decoder.add(b->dtype, b->hidden, layer_output(&s->down.p[0], b->dtype), s->x);
    s->k->decoder.narrow(b->dtype, b->hidden, s->x, s->a->y);
    return PTQ_OK;
}

ptq_status ptq_decoder_end(const ptq_block_end *a, int threads) {
    if (!valid_end(a)) return PTQ_INVALID;
    const ptq_block *b = &a->block;
    const ptq_row_layer *const layers[] = {&a->o, &a->gate, &a->up, &a->down};
    ending s = {.k = ptq_kernels_get(),
                .a = a,
                .o = {.count = 1},
                .gated = {.count = 2},
                .down = {.count = 1}};
    int64_t work = 2 * a->tokens * b->heads * b->head_dim;
    for (int i = 0; i < 4; i++) work += layers[i]->w.outputs * layers[i]->w.places;
    threads = ptq_threads_for_work(threads, (double)work / 8);
    s.width = ptq_round_up(a->tokens, PTQ_ROW_LANES);
    int64_t bytes = float_bytes(2 * threads * s.width) + float_bytes(b->heads * b->head_dim) +
                    3 * float_bytes(b->hidden) + float_bytes(b->inner);
    for (int i = 0; i < 4; i++) bytes += ptq_row_memory(s.k, layers[i]);
    char *const memory = ptq_alloc(bytes, 1), *at = memory;
    if (!memory) return PTQ_NOMEM;
    s.scores = take_floats(&at, 2 * threads * s.width);
    s.attended = take_floats(&at, b->heads * b->head_dim);
    s.x = take_floats(&at, b->hidden);
    s.wide = take_floats(&at, b->hidden);
    s.normed = take_floats(&at, b->hidden);
    s.gate = take_floats(&at, b->inner);
    ptq_row_product *const made[] = {&s.o.p[0], &s.gated.p[0], &s.gated.p[1], &s.down.p[0]};
    for (int i = 0; i < 4; i++) ptq_row_make(made[i], s.k, layers[i], &at);
    s.k->tokens.widen(b->dtype, a->x, NULL, b->hidden, s.x);
    const ptq_status status = run_end(&s, threads);
    free(memory);
    return status;
}
