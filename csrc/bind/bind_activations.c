/* bind_activations.c - grids and codes of activations, int8 products, bias correction. */
#include "bind.h"

enum { MAX_THREADS = 1024 };

/* X (tokens, n) of the given type; bf16 travels as uint16. */
static PyArrayObject *activations_array(PyObject *o, PyObject *type, ptq_dtype *dtype) {
    const int types[] = {NPY_FLOAT32, NPY_HALF, NPY_UINT16};
    const long long d = args_int(type, "dtype", PTQ_F32, PTQ_BF16);
    if (d < 0) return NULL;
    *dtype = (ptq_dtype)d;
    PyArrayObject *X = args_array(o, "X", types[d], 2, 0);
    if (X && PyArray_DIM(X, 1) < 1) {
        PyErr_SetString(PyExc_ValueError, "X has no channels");
        return NULL;
    }
    return X;
}

/* The columns left out of X, or *skip = NULL for None. */
static int skip_array(PyObject *o, PyArrayObject *X, const uint8_t **skip) {
    PyArrayObject *a;
    *skip = NULL;
    if (args_array_or_none(o, "skip", NPY_BOOL, 1, &a)) return -1;
    if (!a) return 0;
    if (args_dim(a, "skip", 0, PyArray_DIM(X, 1))) return -1;
    *skip = PyArray_DATA(a);
    return 0;
}

/* (bits, symmetric, narrow) */
static int signed_grid(PyObject *tuple, ptq_signed_grid *grid) {
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "grid must be a tuple");
        return -1;
    }
    if (!PyArg_ParseTuple(tuple, "ipp:grid", &grid->bits, &grid->symmetric, &grid->narrow))
        return -1;
    if (grid->bits >= 2 && grid->bits <= 16 && (grid->symmetric || !grid->narrow)) return 0;
    PyErr_SetString(PyExc_ValueError, "grid options are out of range");
    return -1;
}

/* signed_grid(low, high, grid) -> (scale, zero) */
PTQ_BIND(bind_signed_grid) {
    (void)self;
    if (args_count("signed_grid", nargs, 3)) return NULL;
    ptq_signed_grid grid;
    if (signed_grid(args[2], &grid)) return NULL;
    const double low = PyFloat_AsDouble(args[0]);
    if (low == -1.0 && PyErr_Occurred()) return NULL;
    const double high = PyFloat_AsDouble(args[1]);
    if (high == -1.0 && PyErr_Occurred()) return NULL;
    float scale;
    int zero;
    PyObject *none = args_result(ptq_signed_grid_fit(&grid, (float)low, (float)high, &scale, &zero));
    if (!none) return NULL;
    Py_DECREF(none);
    return Py_BuildValue("di", (double)scale, zero);
}

/* activation_range(X, dtype, skip or None, threads) -> (low, high) */
PTQ_BIND(bind_activation_range) {
    (void)self;
    if (args_count("activation_range", nargs, 4)) return NULL;
    ptq_dtype dtype;
    const uint8_t *skip;
    PyArrayObject *X = activations_array(args[0], args[1], &dtype);
    if (!X || skip_array(args[2], X, &skip)) return NULL;
    const long long threads = args_int(args[3], "threads", 0, MAX_THREADS);
    if (threads < 0) return NULL;
    float low, high;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_activation_range(PyArray_DATA(X), PyArray_DIM(X, 1), dtype, skip,
                                                 PyArray_DIM(X, 0), &low, &high, (int)threads));
    PyObject *none = args_result(status);
    if (!none) return NULL;
    Py_DECREF(none);
    return Py_BuildValue("dd", (double)low, (double)high);
}

/* activations_quantize(X, dtype, skip or None, grid, per_token, codes, scales, zeros, threads) */
PTQ_BIND(bind_activations_quantize) {
    (void)self;
    if (args_count("activations_quantize", nargs, 9)) return NULL;
    ptq_dtype dtype;
    const uint8_t *skip;
    ptq_signed_grid grid;
    PyArrayObject *X = activations_array(args[0], args[1], &dtype);
    if (!X || skip_array(args[2], X, &skip) || signed_grid(args[3], &grid)) return NULL;
    const long long per_token = args_int(args[4], "per_token", 0, 1);
    if (per_token < 0) return NULL;
    const int type = grid.bits > 8 ? NPY_INT16 : NPY_INT8;
    PyArrayObject *codes = args_array(args[5], "codes", type, 2, 1);
    PyArrayObject *scales = codes ? args_array(args[6], "scales", NPY_FLOAT32, 1, 1) : NULL;
    PyArrayObject *zeros = scales ? args_array(args[7], "zeros", NPY_INT16, 1, 1) : NULL;
    const long long threads = zeros ? args_int(args[8], "threads", 0, MAX_THREADS) : -1;
    if (threads < 0) return NULL;
    const npy_intp tokens = PyArray_DIM(X, 0), n = PyArray_DIM(X, 1), grids = per_token ? tokens : 1;
    if (args_dim(codes, "codes", 0, tokens) || args_dim(codes, "codes", 1, n) ||
        args_dim(scales, "scales", 0, grids) || args_dim(zeros, "zeros", 0, grids))
        return NULL;
    if (!per_token && !(*(const float *)PyArray_DATA(scales) > 0.0f)) {
        PyErr_SetString(PyExc_ValueError, "a given scale must be positive");
        return NULL;
    }
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_activations_quantize(PyArray_DATA(X), n, dtype, skip, tokens, &grid,
                                                     (int)per_token, PyArray_DATA(codes),
                                                     PyArray_DATA(scales), PyArray_DATA(zeros),
                                                     (int)threads));
    return args_result(status);
}

/* outlier_columns(X, dtype, threshold, outliers, threads) */
PTQ_BIND(bind_outlier_columns) {
    (void)self;
    if (args_count("outlier_columns", nargs, 5)) return NULL;
    ptq_dtype dtype;
    PyArrayObject *X = activations_array(args[0], args[1], &dtype);
    if (!X) return NULL;
    const double threshold = PyFloat_AsDouble(args[2]);
    if (threshold == -1.0 && PyErr_Occurred()) return NULL;
    PyArrayObject *outliers = args_array(args[3], "outliers", NPY_BOOL, 1, 1);
    const long long threads = outliers ? args_int(args[4], "threads", 0, MAX_THREADS) : -1;
    if (threads < 0 || args_dim(outliers, "outliers", 0, PyArray_DIM(X, 1))) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_outlier_columns(PyArray_DATA(X), PyArray_DIM(X, 1), dtype,
                                                PyArray_DIM(X, 0), (float)threshold,
                                                PyArray_DATA(outliers), (int)threads));
    return args_result(status);
}

/* bias_correction(W, W_hat, mean, out, threads): W, W_hat both float32 or both float64 */
PTQ_BIND(bind_bias_correction) {
    (void)self;
    if (args_count("bias_correction", nargs, 5)) return NULL;
    const int wide = PyArray_Check(args[0]) && PyArray_TYPE((PyArrayObject *)args[0]) == NPY_FLOAT64;
    const int type = wide ? NPY_FLOAT64 : NPY_FLOAT32;
    PyArrayObject *W = args_array(args[0], "W", type, 2, 0);
    PyArrayObject *W_hat = W ? args_array(args[1], "W_hat", type, 2, 0) : NULL;
    PyArrayObject *mean = W_hat ? args_array(args[2], "mean", NPY_FLOAT64, 1, 0) : NULL;
    PyArrayObject *out = mean ? args_array(args[3], "out", NPY_FLOAT64, 1, 1) : NULL;
    const long long threads = out ? args_int(args[4], "threads", 0, MAX_THREADS) : -1;
    if (threads < 0) return NULL;
    const npy_intp rows = PyArray_DIM(W, 0), n = PyArray_DIM(W, 1);
    if (args_dim(W_hat, "W_hat", 0, rows) || args_dim(W_hat, "W_hat", 1, n) ||
        args_dim(mean, "mean", 0, n) || args_dim(out, "out", 0, rows))
        return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_bias_correction(PyArray_DATA(W), PyArray_DATA(W_hat),
                                                wide ? PTQ_F64 : PTQ_F32, rows, n,
                                                PyArray_DATA(mean), PyArray_DATA(out),
                                                (int)threads));
    return args_result(status);
}

/* Codes (rows, n) int8 with scales and zeros, (rows) or (1). Returns the grids, or -1. */
static npy_intp int8_operand(PyObject *const *args, const char *name, PyArrayObject **codes,
                             const float **scales, const int8_t **zeros) {
    *codes = args_array(args[0], name, NPY_INT8, 2, 0);
    PyArrayObject *s = *codes ? args_array(args[1], "scales", NPY_FLOAT32, 1, 0) : NULL;
    PyArrayObject *z = s ? args_array(args[2], "zeros", NPY_INT8, 1, 0) : NULL;
    if (!z) return -1;
    const npy_intp grids = PyArray_DIM(s, 0);
    if (args_dim(z, "zeros", 0, grids) ||
        (grids != 1 && args_dim(s, "scales", 0, PyArray_DIM(*codes, 0))))
        return -1;
    *scales = PyArray_DATA(s);
    *zeros = PyArray_DATA(z);
    return grids;
}

/* int8_matmul(x, scales, zeros, w, scales, zeros, x_float or None, w_float or None, y, threads):
 * x_float (tokens, columns), w_float (columns, outputs) */
PTQ_BIND(bind_int8_matmul) {
    (void)self;
    if (args_count("int8_matmul", nargs, 10)) return NULL;
    ptq_int8_args a = {0};
    PyArrayObject *x, *w, *xf, *wf;
    a.x_grids = int8_operand(args, "x", &x, &a.x_scales, &a.x_zeros);
    if (a.x_grids < 0) return NULL;
    a.w_grids = int8_operand(args + 3, "w", &w, &a.w_scales, &a.w_zeros);
    if (a.w_grids < 0 || args_array_or_none(args[6], "x_float", NPY_FLOAT32, 2, &xf) ||
        args_array_or_none(args[7], "w_float", NPY_FLOAT32, 2, &wf))
        return NULL;
    PyArrayObject *y = args_array(args[8], "y", NPY_FLOAT32, 2, 1);
    const long long threads = y ? args_int(args[9], "threads", 0, MAX_THREADS) : -1;
    if (threads < 0) return NULL;
    a.tokens = PyArray_DIM(x, 0);
    a.n = PyArray_DIM(x, 1);
    a.outputs = PyArray_DIM(w, 0);
    if (args_dim(w, "w", 1, a.n) || args_dim(y, "y", 0, a.tokens) || args_dim(y, "y", 1, a.outputs))
        return NULL;
    if (!xf != !wf) {
        PyErr_SetString(PyExc_TypeError, "x_float and w_float go together");
        return NULL;
    }
    if (xf) {
        a.columns = PyArray_DIM(xf, 1);
        if (args_dim(xf, "x_float", 0, a.tokens) || args_dim(wf, "w_float", 0, a.columns) ||
            args_dim(wf, "w_float", 1, a.outputs))
            return NULL;
        a.x_float = PyArray_DATA(xf);
        a.w_float = PyArray_DATA(wf);
    }
    a.x = PyArray_DATA(x);
    a.w = PyArray_DATA(w);
    a.y = PyArray_DATA(y);
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_int8_matmul(&a, (int)threads));
    return args_result(status);
}

/* codes_on_grid(W, scales, zeros, max_code, codes, threads): one grid per row */
PTQ_BIND(bind_codes_on_grid) {
    (void)self;
    if (args_count("codes_on_grid", nargs, 6)) return NULL;
    PyArrayObject *W = args_array(args[0], "W", NPY_FLOAT32, 2, 0);
    PyArrayObject *scales = W ? args_array(args[1], "scales", NPY_FLOAT32, 1, 0) : NULL;
    PyArrayObject *zeros = scales ? args_array(args[2], "zeros", NPY_UINT8, 1, 0) : NULL;
    const long long top = zeros ? args_int(args[3], "max_code", 1, 255) : -1;
    PyArrayObject *codes = top > 0 ? args_array(args[4], "codes", NPY_UINT8, 2, 1) : NULL;
    const long long threads = codes ? args_int(args[5], "threads", 0, MAX_THREADS) : -1;
    if (threads < 0) return NULL;
    const npy_intp rows = PyArray_DIM(W, 0), n = PyArray_DIM(W, 1);
    if (args_dim(scales, "scales", 0, rows) || args_dim(zeros, "zeros", 0, rows) ||
        args_dim(codes, "codes", 0, rows) || args_dim(codes, "codes", 1, n))
        return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_codes_on_grid(PyArray_DATA(W), rows, n, PyArray_DATA(scales),
                                              PyArray_DATA(zeros), (int)top, PyArray_DATA(codes),
                                              (int)threads));
    return args_result(status);
}
