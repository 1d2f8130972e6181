/* bind_equalize.c - equalization_scales, equalization_errors. */
#include "bind.h"

enum { MAX_LAYERS = 64 };

PTQ_BIND(equalization_scales, 6, "rx, rw, alpha, lowest, highest, scales",
         "Write rx^alpha / rw^(1 - alpha) within [lowest, highest], and 1 if either is 0.\n\n"
         "rx, rw (n,) float64, not negative: max - min of the channels of X and of the columns of\n"
         "W; alpha in [0, 1]; scales (n,) float32, written.") {
    PyArrayObject *rx, *rw, *scales;
    double alpha, lowest, highest;
    if (args_array(&rx, args[0], "rx", NPY_FLOAT64, 1) ||
        args_array(&rw, args[1], "rw", NPY_FLOAT64, 1) || args_real(&alpha, args[2], "alpha") ||
        args_real(&lowest, args[3], "lowest") || args_real(&highest, args[4], "highest") ||
        args_output(&scales, args[5], "scales", NPY_FLOAT32, 1))
        return NULL;
    const npy_intp n = PyArray_DIM(rx, 0);
    if (args_dim(rw, "rw", 0, n) || args_dim(scales, "scales", 0, n)) return NULL;
    return args_result(ptq_equalization_scales(PyArray_DATA(rx), PyArray_DATA(rw), n, alpha, lowest,
                                               highest, PyArray_DATA(scales)));
}

/* The layers of a tuple of (rows, n) matrices; their number, or -1 after raising. */
static Py_ssize_t parse_layers(PyObject *tuple, npy_intp n, const float **W, int64_t *rows) {
    const Py_ssize_t layers = PyTuple_Check(tuple) ? PyTuple_Size(tuple) : -1;
    if (layers < 0) {
        PyErr_SetString(PyExc_TypeError, "weights must be a tuple of NumPy arrays");
        return -1;
    }
    if (layers < 1 || layers > MAX_LAYERS) {
        PyErr_Format(PyExc_ValueError, "weights must hold 1 to %d layers, not %zd", MAX_LAYERS,
                     layers);
        return -1;
    }
    for (Py_ssize_t i = 0; i < layers; i++) {
        char name[32];
        PyArrayObject *a;
        PyOS_snprintf(name, sizeof name, "weights[%d]", (int)i);
        if (args_array(&a, PyTuple_GetItem(tuple, i), name, NPY_FLOAT32, 2) ||
            args_dim(a, name, 1, n))
            return -1;
        if (PyArray_DIM(a, 0) < 1) {
            PyErr_Format(PyExc_ValueError, "%s must have shape (rows, n) with rows at least 1",
                         name);
            return -1;
        }
        W[i] = PyArray_DATA(a);
        rows[i] = PyArray_DIM(a, 0);
    }
    return layers;
}

static int parse_options(PyObject *tuple, PyObject *grid, ptq_equalization_args *a) {
    static const args_field fields[] = {
        {"group_size", 0, 1, INT32_MAX},      {"per_tensor", 0, 0, 1},
        {"activation_max_code", 0, 0, 65535}, {"activation_symmetric", 0, 0, 1},
        {"activation_per_tensor", 0, 0, 1},
    };
    double v[5];
    if (args_fields(tuple, "options", fields, 5, v) || args_grid(grid, &a->grid)) return -1;
    a->G = (int64_t)v[0];
    a->per_tensor = (int)v[1];
    a->act_max_code = (int)v[2];
    a->act_symmetric = (int)v[3];
    a->act_per_tensor = (int)v[4];
    if (a->n % a->G || (a->per_tensor && a->G != a->n)) {
        PyErr_Format(PyExc_ValueError, "options.group_size %lld must %s the %lld inputs",
                     (long long)a->G, a->per_tensor ? "equal" : "divide", (long long)a->n);
        return -1;
    }
    if (a->grid.method == PTQ_GRID_MINMAX) return 0;
    PyErr_SetString(PyExc_ValueError, "grid.method must be 0, min-max");
    return -1;
}

PTQ_BIND(equalization_errors, 9,
         "X, weights, scales, options, grid, minimum, maximum, errors, threads",
         "Write the output error of every candidate: the sum of (Q(X / s) Q(W s)^T - X W^T)^2.\n\n"
         "X (tokens, n) float32; weights, a tuple of (rows, n) float32; scales (candidates, n)\n"
         "float32, positive; options (group_size, per_tensor, activation_max_code,\n"
         "activation_symmetric, activation_per_tensor); grid as in rtn(), min-max only; minimum,\n"
         "maximum (n,) float32 of the channels of X; errors (candidates,) float64, written.") {
    PyArrayObject *X, *scales, *low, *high, *errors;
    int threads;
    if (args_array(&X, args[0], "X", NPY_FLOAT32, 2) ||
        args_array(&scales, args[2], "scales", NPY_FLOAT32, 2) ||
        args_array(&low, args[5], "minimum", NPY_FLOAT32, 1) ||
        args_array(&high, args[6], "maximum", NPY_FLOAT32, 1) ||
        args_output(&errors, args[7], "errors", NPY_FLOAT64, 1) || args_threads(args[8], &threads))
        return NULL;
    const float *W[MAX_LAYERS];
    int64_t rows[MAX_LAYERS];
    ptq_equalization_args a = {.X = PyArray_DATA(X),
                               .tokens = PyArray_DIM(X, 0),
                               .n = PyArray_DIM(X, 1),
                               .W = W,
                               .rows = rows,
                               .scales = PyArray_DATA(scales),
                               .candidates = PyArray_DIM(scales, 0),
                               .minimum = PyArray_DATA(low),
                               .maximum = PyArray_DATA(high),
                               .errors = PyArray_DATA(errors)};
    a.layers = parse_layers(args[1], a.n, W, rows);
    if (a.layers < 0 || parse_options(args[3], args[4], &a) || args_dim(scales, "scales", 1, a.n) ||
        args_dim(low, "minimum", 0, a.n) || args_dim(high, "maximum", 0, a.n) ||
        args_dim(errors, "errors", 0, a.candidates))
        return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_equalization_errors(&a, threads));
    return args_result(status);
}
