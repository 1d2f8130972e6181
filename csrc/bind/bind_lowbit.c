/* bind_lowbit.c - words_pack, words_unpack, packed_dequantize, packed_matmul. */
#include <string.h>

#include "../core/words.h"
#include "bind.h"

/* A copy of (count,) int32 that later changes of the caller's array do not reach; PyMem_Free it. */
static int copy_int32(int32_t **copy, PyArrayObject *a) {
    const size_t size = sizeof(int32_t) * (size_t)PyArray_DIM(a, 0);
    *copy = PyMem_Malloc(size ? size : 1);
    if (!*copy) {
        PyErr_NoMemory();
        return -1;
    }
    memcpy(*copy, PyArray_DATA(a), size);
    return 0;
}

/* (words, order, bits) and the places, into w. The core reads an order as it is: numbers that are
 * no inputs are padding. */
static int parse_words(PyObject *const *args, ptq_packed *w, int written) {
    PyArrayObject *words, *order;
    if ((written ? args_output : args_array)(&words, args[0], "words", NPY_UINT32, 3) ||
        args_optional(&order, args[1], "order", NPY_INT32, 1))
        return -1;
    w->bits = (int)args_int(args[2], "bits", 2, 8);
    if (w->bits < 0) return -1;
    if (!ptq_has_words(w->bits)) {
        PyErr_Format(PyExc_ValueError, "bits must be 2, 3, 4 or 8, not %d", w->bits);
        return -1;
    }
    const npy_intp rows = PyArray_DIM(words, 1), row_words = ptq_step_words(w->bits);
    if (rows % row_words || rows > PTQ_MOST_PLACES) {
        PyErr_Format(PyExc_ValueError, "words has size %zd along axis 1, not whole steps of %d",
                     (Py_ssize_t)rows, (int)row_words);
        return -1;
    }
    w->places = rows / row_words * ptq_step_places(w->bits);
    if (args_dim(words, "words", 2, PTQ_LANES) ||
        args_dim(words, "words", 0, (npy_intp)ptq_panels(w->outputs)) ||
        (order && args_dim(order, "order", 0, (npy_intp)w->places)))
        return -1;
    w->words = PyArray_DATA(words);
    w->order = order ? PyArray_DATA(order) : NULL;
    return 0;
}

/* codes (outputs, inputs), (words, order, bits) */
static int parse_conversion(PyObject *const *args, ptq_packed *w, PyArrayObject **codes,
                            int packs) {
    if ((packs ? args_array : args_output)(codes, args[0], "codes", NPY_UINT8, 2)) return -1;
    w->outputs = PyArray_DIM(*codes, 0);
    w->inputs = PyArray_DIM(*codes, 1);
    return parse_words(args + 1, w, packs);
}

PTQ_BIND(words_pack, 5, "codes, words, order, bits, threads",
         "Pack codes into panels of 16 outputs.\n\n"
         "codes (outputs, inputs) uint8; words (panels, lane words, 16) uint32, written; order\n"
         "(places,) int32, the input at each place or -1, or None; bits 2, 3, 4 or 8.") {
    ptq_packed w = {0};
    PyArrayObject *codes;
    int threads;
    if (parse_conversion(args, &w, &codes, 1) || args_threads(args[4], &threads)) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(
        status, ptq_words_pack(&w, PyArray_DATA(codes), (uint32_t *)(uintptr_t)w.words, threads));
    return args_result(status);
}

PTQ_BIND(words_unpack, 5, "codes, words, order, bits, threads",
         "Unpack what words_pack() wrote.\n\n"
         "codes (outputs, inputs) uint8, written where the order has the input; words\n"
         "(panels, lane words, 16) uint32; order (places,) int32 or None; bits 2, 3, 4 or 8.") {
    ptq_packed w = {0};
    PyArrayObject *codes;
    int threads;
    if (parse_conversion(args, &w, &codes, 0) || args_threads(args[4], &threads)) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_words_unpack(&w, PyArray_DATA(codes), threads));
    return args_result(status);
}

int args_packed(PyObject *const *args, ptq_packed *w) {
    PyArrayObject *scales, *zeros, *starts;
    int32_t *copy;
    if (parse_words(args, w, 0)) return -1;
    const int type = PyArray_Check(args[3]) ? PyArray_TYPE((PyArrayObject *)args[3]) : NPY_FLOAT32;
    const int known = type == NPY_HALF || type == NPY_UINT16 ? type : NPY_FLOAT32;
    w->scale_dtype = known == NPY_HALF ? PTQ_F16 : known == NPY_UINT16 ? PTQ_BF16 : PTQ_F32;
    if (args_array(&scales, args[3], "scales", known, 3) ||
        args_array(&zeros, args[4], "zeros", NPY_UINT8, 3) ||
        args_array(&starts, args[5], "starts", NPY_INT32, 1))
        return -1;
    const npy_intp panels = (npy_intp)ptq_panels(w->outputs), groups = PyArray_DIM(scales, 1);
    if (args_shape(scales, "scales", panels, groups) || args_dim(scales, "scales", 2, PTQ_LANES) ||
        args_shape(zeros, "zeros", panels, groups) || args_dim(zeros, "zeros", 2, PTQ_LANES) ||
        args_dim(starts, "starts", 0, groups + 1) || copy_int32(&copy, starts))
        return -1;
    w->groups = groups;
    w->scales = PyArray_DATA(scales);
    w->zeros = PyArray_DATA(zeros);
    w->starts = copy;
    return 0;
}

PTQ_BIND(
    packed_dequantize, 8, "out, words, order, bits, scales, zeros, starts, threads",
    "Write scale * (code - zero).\n\n"
    "out (outputs, inputs) float32, written where the order has the input; words, order, bits,\n"
    "scales, zeros and starts as of packed_matmul.") {
    ptq_packed w = {0};
    PyArrayObject *out;
    int threads;
    if (args_output(&out, args[0], "out", NPY_FLOAT32, 2)) return NULL;
    w.outputs = PyArray_DIM(out, 0);
    w.inputs = PyArray_DIM(out, 1);
    if (args_threads(args[7], &threads) || args_packed(args + 1, &w)) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_packed_dequantize(&w, PyArray_DATA(out), threads));
    PyMem_Free((void *)(uintptr_t)w.starts);
    return args_result(status);
}

PTQ_BIND(
    packed_matmul, 11, "X, dtype, int8, y, words, order, bits, scales, zeros, starts, threads",
    "Write the product of tokens and packed weights.\n\n"
    "X (tokens, inputs) of dtype 0 float32, 1 float16, 2 bfloat16 (bits as uint16), rows may\n"
    "be strided; int8 1: X is quantized to int8 per token and group, 0: it is not; y (tokens,\n"
    "outputs) float32, written; words (panels, lane words, 16) uint32; order (places,) int32\n"
    "or None; bits 2, 3, 4 or 8; scales (panels, groups, 16) float32, float16, or uint16 with\n"
    "the bits of bfloat16; zeros (panels, groups, 16) uint8; starts (groups + 1,) int32, the\n"
    "first place of each group.") {
    ptq_packed w = {0};
    PyArrayObject *X, *y;
    ptq_dtype dtype;
    int64_t ldx;
    int threads;
    if (args_dtype(args[1], &dtype) || args_tokens(&X, args[0], "X", dtype, &ldx)) return NULL;
    const int int8 = (int)args_int(args[2], "int8", 0, 1);
    if (int8 < 0 || args_output(&y, args[3], "y", NPY_FLOAT32, 2)) return NULL;
    const int64_t tokens = PyArray_DIM(X, 0);
    w.inputs = PyArray_DIM(X, 1);
    w.outputs = PyArray_DIM(y, 1);
    if (args_dim(y, "y", 0, PyArray_DIM(X, 0)) || args_threads(args[10], &threads) ||
        args_packed(args + 4, &w))
        return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_packed_matmul(&w, PyArray_DATA(X), ldx, dtype, tokens, int8,
                                              PyArray_DATA(y), threads));
    PyMem_Free((void *)(uintptr_t)w.starts);
    return args_result(status);
}
