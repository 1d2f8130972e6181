/* bind_equalize.c - channel_ranges, equalization_scales, equalization_errors. */
#include "bind.h"

enum { MAX_THREADS = 1024, MAX_LAYERS = 64 };

/* channel_ranges(X, dtype, rows or None, minimum, maximum, sum, threads) */
PTQ_BIND(bind_channel_ranges) {
    (void)self;
    if (args_count("channel_ranges", nargs, 7)) return NULL;
    const long long dtype = args_int(args[1], "dtype", 0, 2);
    PyArrayObject *X = dtype < 0 ? NULL : args_tokens(args[0], (ptq_dtype)dtype), *rows;
    PyArrayObject *low = X ? args_array(args[3], "minimum", NPY_FLOAT32, 1, 1) : NULL;
    PyArrayObject *high = low ? args_array(args[4], "maximum", NPY_FLOAT32, 1, 1) : NULL;
    PyArrayObject *sum = high ? args_array(args[5], "sum", NPY_FLOAT64, 1, 1) : NULL;
    const long long threads = sum ? args_int(args[6], "threads", 0, MAX_THREADS) : -1;
    if (threads < 0 || args_array_or_none(args[2], "rows", NPY_INT64, 1, &rows)) return NULL;
    const npy_intp n = PyArray_DIM(X, 1);
    if (args_dim(low, "minimum", 0, n) || args_dim(high, "maximum", 0, n) ||
        args_dim(sum, "sum", 0, n) || (rows && args_rows(rows, PyArray_DIM(X, 0))))
        return NULL;
    const int64_t tokens = rows ? PyArray_DIM(rows, 0) : PyArray_DIM(X, 0);
    const int64_t ldx = PyArray_DIM(X, 0) > 1 ? PyArray_STRIDE(X, 0) / PyArray_ITEMSIZE(X) : n;
    ptq_status status;
    PTQ_WITHOUT_GIL(status,
                    ptq_channel_ranges(PyArray_DATA(X), n, ldx, (ptq_dtype)dtype,
                                       rows ? PyArray_DATA(rows) : NULL, tokens, PyArray_DATA(low),
                                       PyArray_DATA(high), PyArray_DATA(sum), (int)threads));
    return args_result(status);
}

/* equalization_scales(rx, rw, alpha, lowest, highest, scales) */
PTQ_BIND(bind_equalization_scales) {
    (void)self;
    if (args_count("equalization_scales", nargs, 6)) return NULL;
    PyArrayObject *rx = args_array(args[0], "rx", NPY_FLOAT64, 1, 0);
    PyArrayObject *rw = rx ? args_array(args[1], "rw", NPY_FLOAT64, 1, 0) : NULL;
    PyArrayObject *out = rw ? args_array(args[5], "scales", NPY_FLOAT32, 1, 1) : NULL;
    if (!out) return NULL;
    const npy_intp n = PyArray_DIM(rx, 0);
    double number[3];
    for (int i = 0; i < 3; i++) {
        number[i] = PyFloat_AsDouble(args[2 + i]);
        if (number[i] == -1.0 && PyErr_Occurred()) return NULL;
    }
    if (args_dim(rw, "rw", 0, n) || args_dim(out, "scales", 0, n)) return NULL;
    return args_result(ptq_equalization_scales(PyArray_DATA(rx), PyArray_DATA(rw), n, number[0],
                                               number[1], number[2], PyArray_DATA(out)));
}

/* The layers of a tuple of (rows, n) matrices; their number, or -1 and an exception. */
static Py_ssize_t parse_layers(PyObject *tuple, npy_intp n, const float **W, int64_t *rows) {
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "weights must be a tuple");
        return -1;
    }
    const Py_ssize_t layers = PyTuple_Size(tuple);
    if (layers < 1 || layers > MAX_LAYERS) {
        PyErr_Format(PyExc_ValueError, "weights must hold 1 to %d layers, not %zd", MAX_LAYERS,
                     layers);
        return -1;
    }
    for (Py_ssize_t i = 0; i < layers; i++) {
        PyArrayObject *a = args_array(PyTuple_GetItem(tuple, i), "a layer", NPY_FLOAT32, 2, 0);
        if (!a || args_dim(a, "a layer", 1, n)) return -1;
        if (PyArray_DIM(a, 0) < 1) {
            PyErr_SetString(PyExc_ValueError, "a layer has no outputs");
            return -1;
        }
        W[i] = PyArray_DATA(a);
        rows[i] = PyArray_DIM(a, 0);
    }
    return layers;
}

static int parse_options(PyObject *tuple, PyObject *grid, ptq_equalization_args *a) {
    long long G;
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "options must be a tuple");
        return -1;
    }
    if (!PyArg_ParseTuple(tuple, "Liiii:options", &G, &a->per_tensor, &a->act_max_code,
                          &a->act_symmetric, &a->act_per_tensor) ||
        args_grid(grid, &a->grid))
        return -1;
    a->G = G;
    if (G >= 1 && a->n % G == 0 && (!a->per_tensor || G == a->n) && a->act_max_code >= 0 &&
        a->act_max_code <= 65535 && a->grid.method == PTQ_GRID_MINMAX)
        return 0;
    PyErr_SetString(PyExc_ValueError, "equalization options are out of range");
    return -1;
}

/* equalization_errors(X, weights, scales, (group_size, per_tensor, activation_max_code,
 *                     activation_symmetric, activation_per_tensor), grid, minimum, maximum,
 *                     errors, threads) */
PTQ_BIND(bind_equalization_errors) {
    (void)self;
    if (args_count("equalization_errors", nargs, 9)) return NULL;
    PyArrayObject *X = args_array(args[0], "X", NPY_FLOAT32, 2, 0);
    PyArrayObject *scales = X ? args_array(args[2], "scales", NPY_FLOAT32, 2, 0) : NULL;
    PyArrayObject *low = scales ? args_array(args[5], "minimum", NPY_FLOAT32, 1, 0) : NULL;
    PyArrayObject *high = low ? args_array(args[6], "maximum", NPY_FLOAT32, 1, 0) : NULL;
    PyArrayObject *errors = high ? args_array(args[7], "errors", NPY_FLOAT64, 1, 1) : NULL;
    const long long threads = errors ? args_int(args[8], "threads", 0, MAX_THREADS) : -1;
    if (threads < 0) return NULL;
    const float *W[MAX_LAYERS];
    int64_t rows[MAX_LAYERS];
    ptq_equalization_args a = {.X = PyArray_DATA(X), .tokens = PyArray_DIM(X, 0),
                               .n = PyArray_DIM(X, 1), .W = W, .rows = rows,
                               .scales = PyArray_DATA(scales),
                               .candidates = PyArray_DIM(scales, 0), .minimum = PyArray_DATA(low),
                               .maximum = PyArray_DATA(high), .errors = PyArray_DATA(errors)};
    a.layers = parse_layers(args[1], a.n, W, rows);
    if (a.layers < 0 || parse_options(args[3], args[4], &a) || args_dim(scales, "scales", 1, a.n) ||
        args_dim(low, "minimum", 0, a.n) || args_dim(high, "maximum", 0, a.n) ||
        args_dim(errors, "errors", 0, a.candidates))
        return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_equalization_errors(&a, (int)threads));
    return args_result(status);
}
