/* bind_decoder.c - decoder_begin, decoder_end, decoder_blocks. */
#include <string.h>

#include "../core/words.h"
#include "bind.h"

enum { PARTS = 9, MOST_LAYERS = 4 };

static int value_type(const ptq_block *b) {
    return b->dtype == PTQ_BF16 ? NPY_UINT16 : NPY_FLOAT32;
}

/* (dtype, hidden, inner, heads, kv_heads, head_dim, eps, head_eps) */
static int parse_block(PyObject *tuple, ptq_block *b, double *eps) {
    static const args_field fields[] = {{"dtype", 0, 0, 2},          {"hidden", 0, 1, 1 << 28},
                                        {"inner", 0, 1, 1 << 28},    {"heads", 0, 1, 1 << 28},
                                        {"kv_heads", 0, 1, 1 << 28}, {"head_dim", 0, 2, 1 << 28},
                                        {"eps", 1, -1, 1},           {"head_eps", 1, -1, 1}};
    double v[8];
    if (args_fields(tuple, "block", fields, 8, v)) return -1;
    *b = (ptq_block){(ptq_dtype)(int)v[0], (int64_t)v[1], (int64_t)v[2],
                     (int64_t)v[3],        (int64_t)v[4], (int64_t)v[5]};
    eps[0] = v[6];
    eps[1] = v[7];
    const char *wrong = b->dtype == PTQ_F16 ? "block.dtype must be 0 (float32) or 2 (bfloat16)"
                        : b->head_dim % 2   ? "block.head_dim must be even"
                        : b->heads % b->kv_heads
                            ? "block.heads must be a multiple of block.kv_heads"
                            : NULL;
    if (!wrong) return 0;
    PyErr_SetString(PyExc_ValueError, wrong);
    return -1;
}

/* (n,) of the block's dtype, or NULL if `optional` and None. */
static int vector(const void **out, PyObject *o, const char *name, const ptq_block *b, int64_t n,
                  int optional) {
    PyArrayObject *a;
    if ((optional ? args_optional : args_array)(&a, o, name, value_type(b), 1) ||
        (a && args_dim(a, name, 0, (npy_intp)n)))
        return -1;
    *out = a ? PyArray_DATA(a) : NULL;
    return 0;
}

/* (rows, columns), written. */
static int written(void **out, PyObject *o, const char *name, int type, int64_t rows,
                   int64_t columns) {
    PyArrayObject *a;
    if (args_output(&a, o, name, type, 2) || args_shape(a, name, (npy_intp)rows, (npy_intp)columns))
        return -1;
    *out = PyArray_DATA(a);
    return 0;
}

/* (words, scales, zeros, sums, grid, x_scale, x_zero) */
static int parse_simulated(PyObject *const *args, ptq_row_layer *layer) {
    ptq_packed *w = &layer->w;
    const npy_intp outputs = (npy_intp)w->outputs;
    PyArrayObject *words, *scales, *zeros, *sums;
    double scale;
    if (args_array(&words, args[0], "words", NPY_UINT32, 3) ||
        args_words(words, outputs, (npy_intp)w->inputs) ||
        args_array(&scales, args[1], "w_scales", NPY_FLOAT32, 1) ||
        args_array(&zeros, args[2], "w_zeros", NPY_FLOAT32, 1) ||
        args_array(&sums, args[3], "w_sums", NPY_INT32, 1) ||
        args_dim(scales, "w_scales", 0, outputs) || args_dim(zeros, "w_zeros", 0, outputs) ||
        args_dim(sums, "w_sums", 0, outputs) || args_signed_grid(args[4], &layer->grid))
        return -1;
    layer->x_grids = args[5] != Py_None;
    if (layer->x_grids) {
        if (args_real(&scale, args[5], "x_scale")) return -1;
        layer->x_scale = (float)scale;
        const long long zero = args_int(args[6], "x_zero + 128", 0, 255);
        if (zero < 0) return -1;
        layer->x_zero = (int)zero - 128;
        if (!(layer->x_scale > 0.0f)) {
            PyErr_SetString(PyExc_ValueError, "x_scale must be positive");
            return -1;
        }
    }
    int32_t *starts = PyMem_Calloc(2, sizeof *starts);
    if (!starts) {
        PyErr_NoMemory();
        return -1;
    }
    w->bits = 8;
    w->groups = 1;
    w->places = (w->inputs + PTQ_QUAD - 1) / PTQ_QUAD * PTQ_QUAD;
    starts[1] = (int32_t)w->places;
    w->starts = starts;
    w->words = PyArray_DATA(words);
    layer->w_scales = PyArray_DATA(scales);
    layer->w_zeros = PyArray_DATA(zeros);
    layer->w_sums = PyArray_DATA(sums);
    return 0;
}

/* (mode, bias, ...); layer->w.starts is to be freed, after an error too. */
static int parse_layer(PyObject *tuple, const char *name, const ptq_block *b, int64_t inputs,
                       int64_t outputs, ptq_row_layer *layer) {
    PyObject *parts[PARTS];
    const Py_ssize_t count = PyTuple_Check(tuple) ? PyTuple_Size(tuple) : 0;
    if (count != PARTS && count != PARTS - 1) {
        PyErr_Format(PyExc_TypeError, "%s must be a tuple of %d or %d parts", name, PARTS - 1,
                     PARTS);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) parts[i] = PyTuple_GetItem(tuple, i);
    const int simulated = count == PARTS;
    const long long mode = args_int(parts[0], "mode", simulated ? 2 : 0, simulated ? 2 : 1);
    if (mode < 0) return -1;
    layer->mode = (ptq_row_mode)mode;
    layer->w.inputs = inputs;
    layer->w.outputs = outputs;
    if (vector(&layer->bias, parts[1], "bias", b, outputs, 1)) return -1;
    return simulated ? parse_simulated(parts + 2, layer) : args_packed(parts + 2, &layer->w);
}

static void free_layers(ptq_row_layer *const *layers, int count) {
    for (int i = 0; i < count; i++) PyMem_Free((void *)(uintptr_t)layers[i]->w.starts);
}

PTQ_BIND(decoder_begin, 14,
         "block, x, cos, sin, norm, q_norm, k_norm, q, k, v, query, key, value, threads",
         "One token through a decoder block, up to its keys and values.\n\n"
         "block (dtype, hidden, inner, heads, kv_heads, head_dim, eps, head_eps), dtype 0 float32\n"
         "or 2 bfloat16 (bits as uint16); of that dtype: x and norm (hidden,), cos and sin "
         "(head_dim,),\n"
         "q_norm and k_norm (head_dim,) or None, key and value (kv_heads, head_dim), written;\n"
         "query (heads, head_dim) float32, written. A layer is (mode, bias, words, order, bits,\n"
         "scales, zeros, starts) as of packed_matmul, mode 1 with its int8, or (2, bias, words,\n"
         "w_scales, w_zeros, w_sums, grid, x_scale, x_zero + 128) as of int8_linear, x_scale a\n"
         "number, or None: fitted; bias (outputs,) of the dtype or None.") {
    ptq_block_begin a = {0};
    ptq_row_layer *const layers[] = {&a.q, &a.k, &a.v};
    static const char *const names[] = {"q", "k", "v"};
    ptq_block *const b = &a.block;
    double eps[2];
    int threads;
    if (parse_block(args[0], b, eps)) return NULL;
    const int64_t kv = b->kv_heads * b->head_dim;
    void *query;
    if (vector(&a.x, args[1], "x", b, b->hidden, 0) ||
        vector(&a.cos, args[2], "cos", b, b->head_dim, 0) ||
        vector(&a.sin, args[3], "sin", b, b->head_dim, 0) ||
        vector(&a.norm.weight, args[4], "norm", b, b->hidden, 0) ||
        vector(&a.q_norm.weight, args[5], "q_norm", b, b->head_dim, 1) ||
        vector(&a.k_norm.weight, args[6], "k_norm", b, b->head_dim, 1) ||
        written(&query, args[10], "query", NPY_FLOAT32, b->heads, b->head_dim) ||
        written(&a.key, args[11], "key", value_type(b), b->kv_heads, b->head_dim) ||
        written(&a.value, args[12], "value", value_type(b), b->kv_heads, b->head_dim) ||
        args_threads(args[13], &threads))
        return NULL;
    a.query = query;
    a.norm.eps = (float)eps[0];
    a.q_norm.eps = a.k_norm.eps = (float)eps[1];
    int wrong = 0;
    for (int i = 0; i < 3 && !wrong; i++)
        wrong = parse_layer(args[7 + i], names[i], b, b->hidden, i ? kv : b->heads * b->head_dim,
                            layers[i]);
    ptq_status status = PTQ_OK;
    if (!wrong) PTQ_WITHOUT_GIL(status, ptq_decoder_begin(&a, threads));
    free_layers(layers, 3);
    return wrong ? NULL : args_result(status);
}

/* Keys or values: steps between heads and between tokens in elements. */
static int parse_heads(PyObject *o, const char *name, const ptq_block *b, const void **data,
                       int64_t *tokens, int64_t *head, int64_t *token) {
    if (!PyArray_Check(o) || PyArray_TYPE((PyArrayObject *)o) != value_type(b) ||
        !PyArray_ISNOTSWAPPED((PyArrayObject *)o)) {
        PyErr_Format(PyExc_TypeError, "%s must be an array of the block's dtype", name);
        return -1;
    }
    PyArrayObject *a = (PyArrayObject *)o;
    const npy_intp size = (npy_intp)PyArray_ITEMSIZE(a);
    const int empty = PyArray_NDIM(a) == 3 && PyArray_SIZE(a) == 0; /* of any strides */
    if (PyArray_NDIM(a) != 3 ||
        (!empty && (!PyArray_ISALIGNED(a) || PyArray_STRIDE(a, 2) != size ||
                    PyArray_STRIDE(a, 0) < 0 || PyArray_STRIDE(a, 1) < 0 ||
                    PyArray_STRIDE(a, 0) % size || PyArray_STRIDE(a, 1) % size))) {
        PyErr_Format(PyExc_ValueError,
                     "%s must be (kv_heads, tokens, head_dim) with contiguous channels", name);
        return -1;
    }
    if (args_dim(a, name, 0, (npy_intp)b->kv_heads) || args_dim(a, name, 2, (npy_intp)b->head_dim))
        return -1;
    *data = PyArray_DATA(a);
    *tokens = PyArray_DIM(a, 1);
    *head = empty ? 0 : PyArray_STRIDE(a, 0) / size;
    *token = empty ? 0 : PyArray_STRIDE(a, 1) / size;
    return 0;
}

PTQ_BIND(
    decoder_end, 14,
    "block, query, keys, values, allowed, scaling, x, norm, o, gate, up, down, y, threads",
    "One token through a decoder block, from all keys and values on.\n\n"
    "block and the layers o, gate, up and down as of decoder_begin, whose query this takes; of\n"
    "the block's dtype: keys and values (kv_heads, tokens, head_dim), the channels contiguous,\n"
    "x and norm (hidden,), y (hidden,), written; allowed (tokens,) uint8, 0 where a key is\n"
    "hidden, or None; scaling is the factor of the scores.") {
    ptq_block_end a = {0};
    ptq_row_layer *const layers[] = {&a.o, &a.gate, &a.up, &a.down};
    ptq_block *const b = &a.block;
    PyArrayObject *query, *allowed, *y;
    double eps[2], scaling;
    int64_t tokens;
    int threads;
    if (parse_block(args[0], b, eps) || args_array(&query, args[1], "query", NPY_FLOAT32, 2) ||
        args_shape(query, "query", (npy_intp)b->heads, (npy_intp)b->head_dim) ||
        parse_heads(args[2], "keys", b, &a.keys, &a.tokens, &a.key_head, &a.key_token) ||
        parse_heads(args[3], "values", b, &a.values, &tokens, &a.value_head, &a.value_token) ||
        args_optional(&allowed, args[4], "allowed", NPY_UINT8, 1) ||
        (allowed && args_dim(allowed, "allowed", 0, (npy_intp)a.tokens)) ||
        args_real(&scaling, args[5], "scaling") || vector(&a.x, args[6], "x", b, b->hidden, 0) ||
        vector(&a.norm.weight, args[7], "norm", b, b->hidden, 0) ||
        args_output(&y, args[12], "y", value_type(b), 1) ||
        args_dim(y, "y", 0, (npy_intp)b->hidden) || args_threads(args[13], &threads))
        return NULL;
    if (tokens != a.tokens || tokens < 1) {
        PyErr_SetString(PyExc_ValueError, "keys and values must hold as many tokens, at least one");
        return NULL;
    }
    a.query = PyArray_DATA(query);
    a.allowed = allowed ? PyArray_DATA(allowed) : NULL;
    a.scaling = (float)scaling;
    a.norm.eps = (float)eps[0];
    a.y = PyArray_DATA(y);
    int wrong = 0;
    static const char *const names[] = {"o", "gate", "up", "down"};
    const int64_t inputs[] = {b->heads * b->head_dim, b->hidden, b->hidden, b->inner};
    const int64_t outputs[] = {b->hidden, b->inner, b->inner, b->hidden};
    for (int i = 0; i < 4 && !wrong; i++)
        wrong = parse_layer(args[8 + i], names[i], b, inputs[i], outputs[i], layers[i]);
    ptq_status status = PTQ_OK;
    if (!wrong) PTQ_WITHOUT_GIL(status, ptq_decoder_end(&a, threads));
    free_layers(layers, 4);
    if (!wrong && status == PTQ_ROW_REFUSED) {
        PyErr_SetString(PyExc_ValueError, "allowed hides every key");
        return NULL;
    }
    return wrong ? NULL : args_result(status);
}

enum { BLOCK_PARTS = 14, BLOCK_LAYERS = 7 };

/* The layers of a block in the order of its tuple; starts of all are to be freed, after an error
 * too. */
static void layers_of(ptq_whole_block *w, ptq_row_layer **layers) {
    ptq_row_layer *const all[] = {&w->begin.q,  &w->begin.k, &w->begin.v, &w->end.o,
                                  &w->end.gate, &w->end.up,  &w->end.down};
    memcpy(layers, all, sizeof all);
}

/* (norm, q_norm, k_norm, last_norm, scaling, q, k, v, o, gate, up, down, keys, values) */
static int parse_whole(PyObject *tuple, const ptq_block *b, const double *eps, ptq_whole_block *w) {
    static const char *const names[] = {"q", "k", "v", "o", "gate", "up", "down"};
    const int64_t q = b->heads * b->head_dim, kv = b->kv_heads * b->head_dim;
    const int64_t inputs[] = {b->hidden, b->hidden, b->hidden, q, b->hidden, b->hidden, b->inner};
    const int64_t outputs[] = {q, kv, kv, b->hidden, b->inner, b->inner, b->hidden};
    ptq_row_layer *layers[BLOCK_LAYERS];
    PyObject *parts[BLOCK_PARTS];
    double scaling;
    int64_t tokens;
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != BLOCK_PARTS) {
        PyErr_Format(PyExc_TypeError, "blocks must be tuples of %d parts each", BLOCK_PARTS);
        return -1;
    }
    for (int i = 0; i < BLOCK_PARTS; i++) parts[i] = PyTuple_GetItem(tuple, i);
    ptq_block_begin *const begin = &w->begin;
    ptq_block_end *const end = &w->end;
    begin->block = end->block = *b;
    if (vector(&begin->norm.weight, parts[0], "norm", b, b->hidden, 0) ||
        vector(&begin->q_norm.weight, parts[1], "q_norm", b, b->head_dim, 1) ||
        vector(&begin->k_norm.weight, parts[2], "k_norm", b, b->head_dim, 1) ||
        vector(&end->norm.weight, parts[3], "last_norm", b, b->hidden, 0) ||
        args_real(&scaling, parts[4], "scaling") ||
        parse_heads(parts[12], "keys", b, &end->keys, &end->tokens, &end->key_head,
                    &end->key_token) ||
        parse_heads(parts[13], "values", b, &end->values, &tokens, &end->value_head,
                    &end->value_token))
        return -1;
    if (tokens != end->tokens) {
        PyErr_SetString(PyExc_ValueError, "keys and values must hold as many tokens");
        return -1;
    }
    begin->norm.eps = end->norm.eps = (float)eps[0];
    begin->q_norm.eps = begin->k_norm.eps = (float)eps[1];
    end->scaling = (float)scaling;
    layers_of(w, layers);
    for (int i = 0; i < BLOCK_LAYERS; i++)
        if (parse_layer(parts[5 + i], names[i], b, inputs[i], outputs[i], layers[i])) return -1;
    return 0;
}

/* What blocks share, and what they write; tokens must be the same in all. */
static int connect(ptq_whole_block *w, Py_ssize_t count, const ptq_block_begin *first,
                   PyObject *const *args, float *query) {
    const ptq_block *b = &first->block;
    const npy_intp kv = (npy_intp)(b->kv_heads * b->head_dim);
    PyArrayObject *allowed, *key_value;
    void *y;
    if (args_optional(&allowed, args[0], "allowed", NPY_UINT8, 1) ||
        args_output(&key_value, args[1], "new", value_type(b), 3) ||
        args_shape(key_value, "new", count, 2) || args_dim(key_value, "new", 2, kv) ||
        written(&y, args[2], "y", value_type(b), count, b->hidden))
        return -1;
    const int64_t size = b->dtype == PTQ_BF16 ? 2 : 4;
    for (Py_ssize_t i = 0; i < count; i++) {
        ptq_block_begin *const begin = &w[i].begin;
        ptq_block_end *const end = &w[i].end;
        if (allowed && args_dim(allowed, "allowed", 0, (npy_intp)end->tokens + 1)) return -1;
        begin->x = first->x;
        begin->cos = first->cos;
        begin->sin = first->sin;
        begin->query = query;
        end->query = query;
        end->allowed = allowed ? PyArray_DATA(allowed) : NULL;
        begin->key = (char *)PyArray_DATA(key_value) + 2 * i * kv * size;
        begin->value = (char *)begin->key + kv * size;
        end->y = (char *)y + i * b->hidden * size;
    }
    return 0;
}

PTQ_BIND(
    decoder_blocks, 9, "block, x, cos, sin, blocks, allowed, new, y, threads",
    "One token through decoder blocks, one after the other.\n\n"
    "block, x, cos, sin and layers as of decoder_begin; blocks a tuple of tuples (norm, q_norm,\n"
    "k_norm, last_norm, scaling, q, k, v, o, gate, up, down, keys, values) as of that and of\n"
    "decoder_end, but keys and values without this token's, which may be none; allowed\n"
    "(tokens + 1,) uint8 or None; of the block's dtype and written: new (blocks, 2, kv_heads *\n"
    "head_dim), each block's key and value, and y (blocks, hidden), each block's output.") {
    ptq_block_begin first = {0};
    ptq_block *const b = &first.block;
    double eps[2];
    int threads;
    if (parse_block(args[0], b, eps) || vector(&first.x, args[1], "x", b, b->hidden, 0) ||
        vector(&first.cos, args[2], "cos", b, b->head_dim, 0) ||
        vector(&first.sin, args[3], "sin", b, b->head_dim, 0) || args_threads(args[8], &threads))
        return NULL;
    const Py_ssize_t count = PyTuple_Check(args[4]) ? PyTuple_Size(args[4]) : 0;
    if (count < 1 || count > PTQ_MOST_BLOCKS) {
        PyErr_Format(PyExc_TypeError, "blocks must be a tuple of 1 to %d tuples", PTQ_MOST_BLOCKS);
        return NULL;
    }
    ptq_whole_block *const w = PyMem_Calloc((size_t)count, sizeof *w);
    float *const query = PyMem_Calloc((size_t)(b->heads * b->head_dim), sizeof *query);
    int wrong = !w || !query;
    if (wrong) PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count && !wrong; i++)
        wrong = parse_whole(PyTuple_GetItem(args[4], i), b, eps, &w[i]);
    wrong = wrong || connect(w, count, &first, args + 5, query);
    ptq_status status = PTQ_OK;
    if (!wrong) PTQ_WITHOUT_GIL(status, ptq_decoder_blocks(w, count, threads));
    for (Py_ssize_t i = 0; w && i < count; i++) {
        ptq_row_layer *layers[BLOCK_LAYERS];
        layers_of(&w[i], layers);
        free_layers(layers, BLOCK_LAYERS);
    }
    PyMem_Free(w);
    PyMem_Free(query);
    if (!wrong && status == PTQ_ROW_REFUSED) {
        PyErr_SetString(PyExc_ValueError, "allowed hides every key");
        return NULL;
    }
    return wrong ? NULL : args_result(status);
}
