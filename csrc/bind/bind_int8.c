/* bind_int8.c - int8_matmul, int8_pack, int8_linear. */
#include "../core/words.h"
#include "bind.h"

/* Codes (rows, n) int8 with scales and zero-points (rows,) or (1,). */
typedef struct {
    const char *codes, *scales, *zeros; /* names */
} operand_names;

/* Returns the number of grids, or -1. */
static npy_intp operand(PyObject *const *args, const operand_names *name, PyArrayObject **codes,
                        const float **scales, const int8_t **zeros) {
    PyArrayObject *s, *z;
    if (args_array(codes, args[0], name->codes, NPY_INT8, 2) ||
        args_array(&s, args[1], name->scales, NPY_FLOAT32, 1) ||
        args_array(&z, args[2], name->zeros, NPY_INT8, 1))
        return -1;
    const npy_intp grids = PyArray_DIM(s, 0);
    if (args_dim(z, name->zeros, 0, grids) ||
        (grids != 1 && args_dim(s, name->scales, 0, PyArray_DIM(*codes, 0))))
        return -1;
    *scales = PyArray_DATA(s);
    *zeros = PyArray_DATA(z);
    return grids;
}

/* The factors in float32, both or neither; the sizes of `a` are set. */
static int float_columns(PyObject *const *args, ptq_int8_args *a) {
    PyArrayObject *x, *w;
    if (args_optional(&x, args[0], "x_float", NPY_FLOAT32, 2) ||
        args_optional(&w, args[1], "w_float", NPY_FLOAT32, 2))
        return -1;
    if (!x && !w) return 0;
    if (!x || !w) {
        PyErr_SetString(PyExc_TypeError,
                        "x_float and w_float go together: pass both, or None twice");
        return -1;
    }
    a->columns = PyArray_DIM(x, 1);
    a->x_float = PyArray_DATA(x);
    a->w_float = PyArray_DATA(w);
    return args_dim(x, "x_float", 0, a->tokens) || args_shape(w, "w_float", a->columns, a->outputs);
}

PTQ_BIND(int8_matmul, 10,
         "x, x_scales, x_zeros, w, w_scales, w_zeros, x_float, w_float, y, threads",
         "Write the product of two int8 matrices with exact integer sums, plus x_float w_float.\n\n"
         "x (tokens, n), w (outputs, n) int8; x_scales, w_scales float32 and x_zeros, w_zeros\n"
         "int8: (1,), or one per row of x or w; x_float (tokens, columns) and w_float\n"
         "(columns, outputs) float32, or None; y (tokens, outputs) float32, written.") {
    static const operand_names x_names = {"x", "x_scales", "x_zeros"};
    static const operand_names w_names = {"w", "w_scales", "w_zeros"};
    ptq_int8_args a = {0};
    PyArrayObject *x, *w, *y;
    int threads;
    a.x_grids = operand(args, &x_names, &x, &a.x_scales, &a.x_zeros);
    if (a.x_grids < 0) return NULL;
    a.w_grids = operand(args + 3, &w_names, &w, &a.w_scales, &a.w_zeros);
    if (a.w_grids < 0 || args_output(&y, args[8], "y", NPY_FLOAT32, 2) ||
        args_threads(args[9], &threads))
        return NULL;
    a.tokens = PyArray_DIM(x, 0);
    a.n = PyArray_DIM(x, 1);
    a.outputs = PyArray_DIM(w, 0);
    if (args_dim(w, "w", 1, a.n) || args_shape(y, "y", a.tokens, a.outputs) ||
        float_columns(args + 6, &a))
        return NULL;
    a.x = PyArray_DATA(x);
    a.w = PyArray_DATA(w);
    a.y = PyArray_DATA(y);
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_int8_matmul(&a, threads));
    return args_result(status);
}

int args_words(PyArrayObject *words, npy_intp outputs, npy_intp n) {
    return args_shape(words, "words", (npy_intp)ptq_panels(outputs),
                      (n + PTQ_QUAD - 1) / PTQ_QUAD) ||
           args_dim(words, "words", 2, PTQ_ROW_WORDS);
}

PTQ_BIND(int8_pack, 4, "codes, words, sums, threads",
         "Write panels of 8-bit codes of weights, in the order in which products read them.\n\n"
         "codes (outputs, n) uint8, or int8, to which 128 is added; words (ceil(outputs / 16),\n"
         "ceil(n / 4), 16) uint32, written; sums (outputs,) int32, written: of each row's codes\n"
         "less 128.") {
    const int flipped =
        PyArray_Check(args[0]) && PyArray_TYPE((PyArrayObject *)args[0]) == NPY_INT8;
    PyArrayObject *codes, *words, *sums;
    int threads;
    if (args_array(&codes, args[0], "codes", flipped ? NPY_INT8 : NPY_UINT8, 2) ||
        args_output(&words, args[1], "words", NPY_UINT32, 3) ||
        args_output(&sums, args[2], "sums", NPY_INT32, 1) || args_threads(args[3], &threads))
        return NULL;
    const npy_intp outputs = PyArray_DIM(codes, 0), n = PyArray_DIM(codes, 1);
    if (args_words(words, outputs, n) || args_dim(sums, "sums", 0, outputs)) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_int8_pack(PyArray_DATA(codes), flipped, outputs, n,
                                          PyArray_DATA(words), PyArray_DATA(sums), threads));
    return args_result(status);
}

/* The grid of the tokens, one or fitted to each; the sizes of `a` are set. */
static int token_grid(PyObject *const *args, ptq_int8_args *a) {
    PyArrayObject *scales, *zeros;
    if (args_signed_grid(args[0], &a->grid) ||
        args_optional(&scales, args[1], "x_scales", NPY_FLOAT32, 1) ||
        args_optional(&zeros, args[2], "x_zeros", NPY_INT8, 1))
        return -1;
    if (!scales && !zeros) return 0;
    if (!scales || !zeros) {
        PyErr_SetString(PyExc_TypeError,
                        "x_scales and x_zeros go together: pass both, or None twice");
        return -1;
    }
    if (args_dim(scales, "x_scales", 0, 1) || args_dim(zeros, "x_zeros", 0, 1)) return -1;
    a->x_grids = 1;
    a->x_scales = PyArray_DATA(scales);
    a->x_zeros = PyArray_DATA(zeros);
    if (*a->x_scales > 0.0f) return 0;
    PyErr_SetString(PyExc_ValueError, "x_scales[0] must be positive");
    return -1;
}

/* The packed weights; the sizes of `a` are set. */
static int packed_weights(PyObject *const *args, ptq_int8_args *a) {
    PyArrayObject *words, *sums, *scales, *zeros;
    if (args_array(&words, args[0], "words", NPY_UINT32, 3) ||
        args_optional(&sums, args[1], "sums", NPY_INT32, 1) ||
        args_array(&scales, args[2], "w_scales", NPY_FLOAT32, 1) ||
        args_array(&zeros, args[3], "w_zeros", NPY_FLOAT32, 1))
        return -1;
    a->w_grids = PyArray_DIM(scales, 0);
    if (args_words(words, (npy_intp)a->outputs, (npy_intp)a->n) ||
        (sums && args_dim(sums, "sums", 0, (npy_intp)a->outputs)) ||
        (a->w_grids != 1 && args_dim(scales, "w_scales", 0, (npy_intp)a->outputs)) ||
        args_dim(zeros, "w_zeros", 0, (npy_intp)a->w_grids))
        return -1;
    a->words = PyArray_DATA(words);
    a->sums = sums ? PyArray_DATA(sums) : NULL;
    a->w_scales = PyArray_DATA(scales);
    a->w_offsets = PyArray_DATA(zeros);
    return 0;
}

PTQ_BIND(int8_linear, 12,
         "X, dtype, grid, x_scales, x_zeros, words, sums, w_scales, w_zeros, bias, y, threads",
         "Write X W^T + bias with X quantized on the way, and exact integer sums.\n\n"
         "X (tokens, n) of dtype 0 float32, 1 float16 or 2 bfloat16 (bits as uint16); grid (bits,\n"
         "symmetric, narrow) of at most 8 bits; x_scales float32 and x_zeros int8 (1,), or None\n"
         "twice: fitted to each token; words of int8_pack; sums of int8_pack or None; w_scales,\n"
         "w_zeros float32 (outputs,) or (1,), of codes from 0 to 255; bias float32 (outputs,) or\n"
         "None; y (tokens, outputs) float32, written.") {
    ptq_int8_args a = {0};
    PyArrayObject *X, *bias, *y;
    int threads;
    if (args_dtype(args[1], &a.dtype) || args_tokens(&X, args[0], "X", a.dtype, &a.ldx) ||
        args_output(&y, args[10], "y", NPY_FLOAT32, 2) ||
        args_optional(&bias, args[9], "bias", NPY_FLOAT32, 1) || args_threads(args[11], &threads))
        return NULL;
    a.tokens = PyArray_DIM(X, 0);
    a.n = PyArray_DIM(X, 1);
    a.outputs = PyArray_DIM(y, 1);
    if (args_dim(y, "y", 0, (npy_intp)a.tokens) || token_grid(args + 2, &a) ||
        packed_weights(args + 5, &a) || (bias && args_dim(bias, "bias", 0, (npy_intp)a.outputs)))
        return NULL;
    a.values = PyArray_DATA(X);
    a.bias = bias ? PyArray_DATA(bias) : NULL;
    a.y = PyArray_DATA(y);
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_int8_matmul(&a, threads));
    return args_result(status);
}
