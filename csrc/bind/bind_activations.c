/* bind_activations.c - signed_grid, activation_range, activations_quantize, outlier_columns. */
#include "bind.h"

/* X (tokens, n) of the given type, n at least 1. */
static int channels_array(PyArrayObject **X, PyObject *o, PyObject *type, ptq_dtype *dtype) {
    static const int types[] = {NPY_FLOAT32, NPY_HALF, NPY_UINT16};
    if (args_dtype(type, dtype) || args_array(X, o, "X", types[*dtype], 2)) return -1;
    if (PyArray_DIM(*X, 1) > 0) return 0;
    PyErr_SetString(PyExc_ValueError, "X must have shape (tokens, n) with n at least 1");
    return -1;
}

/* The columns left out of X, or *skip = NULL for None. */
static int skip_array(const uint8_t **skip, PyObject *o, npy_intp n) {
    PyArrayObject *a;
    if (args_optional(&a, o, "skip", NPY_BOOL, 1)) return -1;
    *skip = a ? PyArray_DATA(a) : NULL;
    return a ? args_dim(a, "skip", 0, n) : 0;
}

PTQ_BIND(signed_grid, 3, "low, high, grid",
         "Return (scale, zero) of the grid that covers 0 and the range from low to high.\n\n"
         "grid is (bits, symmetric, narrow, bf16), bits from 2 to 16; x = scale * (code - zero).") {
    ptq_signed_grid grid;
    double low, high;
    if (args_real(&low, args[0], "low") || args_real(&high, args[1], "high") ||
        args_signed_grid(args[2], &grid))
        return NULL;
    float scale;
    int zero;
    if (args_raise(ptq_signed_grid_fit(&grid, (float)low, (float)high, &scale, &zero))) return NULL;
    return Py_BuildValue("di", (double)scale, zero);
}

PTQ_BIND(activation_range, 4, "X, dtype, skip, threads",
         "Return the minimum and maximum (low, high) of X and 0.\n\n"
         "X (tokens, n) of dtype 0 float32, 1 float16 or 2 bfloat16 (bits as uint16); skip (n,)\n"
         "bool, the columns that count as zeros, or None.") {
    PyArrayObject *X;
    ptq_dtype dtype;
    const uint8_t *skip;
    int threads;
    if (channels_array(&X, args[0], args[1], &dtype) || args_threads(args[3], &threads))
        return NULL;
    const npy_intp tokens = PyArray_DIM(X, 0), n = PyArray_DIM(X, 1);
    if (skip_array(&skip, args[2], n)) return NULL;
    float low, high;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_activation_range(PyArray_DATA(X), n, dtype, skip, tokens, &low,
                                                 &high, threads));
    return args_raise(status) ? NULL : Py_BuildValue("dd", (double)low, (double)high);
}

/* A scale that is read must be usable; scales that are written need not be. */
static int given_scale(PyArrayObject *scales) {
    if (*(const float *)PyArray_DATA(scales) > 0.0f) return 0;
    PyErr_SetString(PyExc_ValueError, "scales[0] must be positive if per_token is 0");
    return -1;
}

PTQ_BIND(activations_quantize, 9, "X, dtype, skip, grid, per_token, codes, scales, zeros, threads",
         "Write the codes of X on a grid fitted to each token, or on the one that is given.\n\n"
         "X (tokens, n) of dtype 0 float32, 1 float16 or 2 bfloat16 (bits as uint16); skip (n,)\n"
         "bool, the columns that count as zeros, or None; grid (bits, symmetric, narrow); codes\n"
         "(tokens, n) int8, or int16 above 8 bits, written; scales float32 and zeros int16:\n"
         "(tokens,) written if per_token is 1, (1,) read if it is 0.") {
    PyArrayObject *X, *codes, *scales, *zeros;
    ptq_dtype dtype;
    const uint8_t *skip;
    ptq_signed_grid grid;
    int threads;
    if (channels_array(&X, args[0], args[1], &dtype) || args_signed_grid(args[3], &grid))
        return NULL;
    const long long per_token = args_int(args[4], "per_token", 0, 1);
    if (per_token < 0 ||
        args_output(&codes, args[5], "codes", grid.bits > 8 ? NPY_INT16 : NPY_INT8, 2) ||
        args_output(&scales, args[6], "scales", NPY_FLOAT32, 1) ||
        args_output(&zeros, args[7], "zeros", NPY_INT16, 1) || args_threads(args[8], &threads))
        return NULL;
    const npy_intp tokens = PyArray_DIM(X, 0), n = PyArray_DIM(X, 1);
    const npy_intp grids = per_token ? tokens : 1;
    if (skip_array(&skip, args[2], n) || args_shape(codes, "codes", tokens, n) ||
        args_dim(scales, "scales", 0, grids) || args_dim(zeros, "zeros", 0, grids) ||
        (!per_token && given_scale(scales)))
        return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(
        status, ptq_activations_quantize(PyArray_DATA(X), n, dtype, skip, tokens, &grid,
                                         (int)per_token, PyArray_DATA(codes), PyArray_DATA(scales),
                                         PyArray_DATA(zeros), threads));
    return args_result(status);
}

PTQ_BIND(outlier_columns, 5, "X, dtype, threshold, outliers, threads",
         "Mark the columns of X that hold an |x| of at least the threshold.\n\n"
         "X (tokens, n) of dtype 0 float32, 1 float16 or 2 bfloat16 (bits as uint16); outliers\n"
         "(n,) bool, written.") {
    PyArrayObject *X, *outliers;
    ptq_dtype dtype;
    double threshold;
    int threads;
    if (channels_array(&X, args[0], args[1], &dtype) ||
        args_real(&threshold, args[2], "threshold") ||
        args_output(&outliers, args[3], "outliers", NPY_BOOL, 1) || args_threads(args[4], &threads))
        return NULL;
    const npy_intp tokens = PyArray_DIM(X, 0), n = PyArray_DIM(X, 1);
    if (args_dim(outliers, "outliers", 0, n)) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_outlier_columns(PyArray_DATA(X), n, dtype, tokens, (float)threshold,
                                                PyArray_DATA(outliers), threads));
    return args_result(status);
}
