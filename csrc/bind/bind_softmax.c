/* bind_softmax.c - softmax_quantize, softmax_statistics, softmax_exp, energy, energy_columns. */
#include "bind.h"

enum { MAX_THREADS = 1024 };

/* (scale, zero, max_code) */
static int grid_tuple(PyObject *tuple, ptq_softmax_grid *grid) {
    double scale;
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "grid must be a tuple");
        return -1;
    }
    if (!PyArg_ParseTuple(tuple, "dii:grid", &scale, &grid->zero, &grid->max_code)) return -1;
    grid->scale = (float)scale;
    if (grid->scale > 0 && grid->scale < 1e30f && grid->max_code >= 1 && grid->max_code <= 65535 &&
        grid->zero >= 0 && grid->zero <= grid->max_code)
        return 0;
    PyErr_SetString(PyExc_ValueError, "grid options are out of range");
    return -1;
}

/* Sizes of x (batch, heads, q, k), the mask or None, and causal. */
static int attention(PyArrayObject *x, PyObject *mask, PyObject *causal, ptq_attention *a) {
    PyArrayObject *allowed;
    const long long is_causal = args_int(causal, "causal", 0, 1);
    if (is_causal < 0 || args_array_or_none(mask, "allowed", NPY_BOOL, 4, &allowed)) return -1;
    const npy_intp *sizes = PyArray_DIMS(x);
    *a = (ptq_attention){.batch = sizes[0], .heads = sizes[1], .q = sizes[2], .k = sizes[3],
                         .causal = (int)is_causal};
    if (sizes[1] < 1 || sizes[3] < 1) {
        PyErr_SetString(PyExc_ValueError, "there must be a head and a key");
        return -1;
    }
    if (!allowed) return 0;
    for (int axis = 0; axis < 4; axis++) {
        const npy_intp size = PyArray_DIM(allowed, axis);
        if ((axis == 3 || size != 1) && args_dim(allowed, "allowed", axis, sizes[axis])) return -1;
    }
    a->allowed = PyArray_DATA(allowed);
    a->allowed_batch = PyArray_DIM(allowed, 0);
    a->allowed_heads = PyArray_DIM(allowed, 1);
    a->allowed_q = PyArray_DIM(allowed, 2);
    return 0;
}

/* A row that was refused is an answer, not an exception: Python knows how to name it. */
static PyObject *rows_result(ptq_status status, const ptq_rows_info *info) {
    const int refused = status == PTQ_NONFINITE || status == PTQ_ROW_REFUSED;
    if (status && !refused) return args_result(status);
    return Py_BuildValue("LL", (long long)info->bad, (long long)info->empty);
}

/* out for `scores`: float32 values, or codes of uint8 or uint16 */
static PyArrayObject *quantized_array(PyObject *o, PyArrayObject *scores, int max_code,
                                      int *codes) {
    const int narrow = max_code > 255 ? NPY_UINT16 : NPY_UINT8;
    *codes = PyArray_Check(o) && PyArray_TYPE((PyArrayObject *)o) == narrow;
    PyArrayObject *out = args_array(o, "out", *codes ? narrow : NPY_FLOAT32, 4, 1);
    for (int axis = 0; out && axis < 4; axis++)
        if (args_dim(out, "out", axis, PyArray_DIM(scores, axis))) return NULL;
    return out;
}

/* softmax_quantize(scores, allowed, causal, grid, correction, table, out, corrections, threads) */
PTQ_BIND(bind_softmax_quantize) {
    (void)self;
    if (args_count("softmax_quantize", nargs, 9)) return NULL;
    PyArrayObject *scores = args_array(args[0], "scores", NPY_FLOAT32, 4, 0), *corrections;
    ptq_softmax_args a = {0};
    if (!scores || attention(scores, args[1], args[2], &a.attention)) return NULL;
    if (grid_tuple(args[3], &a.grid)) return NULL;
    const long long correction = args_int(args[4], "correction", 0, PTQ_CORRECT_ROW_SUM);
    PyArrayObject *table = correction >= 0 ? args_array(args[5], "table", NPY_FLOAT64, 2, 0) : NULL;
    if (!table) return NULL;
    PyArrayObject *out = quantized_array(args[6], scores, a.grid.max_code, &a.codes);
    if (!out || args_array_or_none(args[7], "corrections", NPY_FLOAT32, 1, &corrections))
        return NULL;
    const int64_t rows = a.attention.batch * a.attention.heads * a.attention.q;
    if (corrections && (PyArray_FailUnlessWriteable(corrections, "corrections") < 0 ||
                        args_dim(corrections, "corrections", 0, rows)))
        return NULL;
    const long long threads = args_int(args[8], "threads", 0, MAX_THREADS);
    if (threads < 0) return NULL;
    a.scores = PyArray_DATA(scores);
    a.correction = (int)correction;
    a.table = PyArray_DATA(table);
    a.table_heads = PyArray_DIM(table, 0);
    a.table_lengths = PyArray_DIM(table, 1);
    a.out = PyArray_DATA(out);
    a.corrections = corrections ? PyArray_DATA(corrections) : NULL;
    if ((a.table_heads != 1 && args_dim(table, "table", 0, a.attention.heads)) ||
        (a.table_lengths != 1 && args_dim(table, "table", 1, a.attention.k + 1)))
        return NULL;
    ptq_rows_info info;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_softmax_quantize(&a, &info, (int)threads));
    return rows_result(status, &info);
}

/* softmax_statistics(P, allowed, queries, causal, grid, tolerance, sums, threads) */
PTQ_BIND(bind_softmax_statistics) {
    (void)self;
    if (args_count("softmax_statistics", nargs, 8)) return NULL;
    PyArrayObject *P = args_array(args[0], "P", NPY_FLOAT32, 4, 0), *queries;
    ptq_attention a;
    ptq_softmax_grid grid;
    if (!P || attention(P, args[1], args[3], &a)) return NULL;
    if (args_array_or_none(args[2], "queries", NPY_BOOL, 2, &queries)) return NULL;
    if (queries &&
        (args_dim(queries, "queries", 0, a.batch) || args_dim(queries, "queries", 1, a.q)))
        return NULL;
    a.queries = queries ? PyArray_DATA(queries) : NULL;
    if (grid_tuple(args[4], &grid)) return NULL;
    const double tolerance = PyFloat_AsDouble(args[5]);
    if (tolerance == -1.0 && PyErr_Occurred()) return NULL;
    PyArrayObject *sums = args_array(args[6], "sums", NPY_INT64, 3, 1);
    const long long threads = sums ? args_int(args[7], "threads", 0, MAX_THREADS) : -1;
    if (threads < 0 || args_dim(sums, "sums", 0, a.heads) ||
        args_dim(sums, "sums", 1, PTQ_LENGTH_CLASSES) || args_dim(sums, "sums", 2, 4))
        return NULL;
    ptq_rows_info info;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_softmax_statistics(&a, PyArray_DATA(P), &grid, tolerance,
                                                   PyArray_DATA(sums), &info, (int)threads));
    return rows_result(status, &info);
}

/* softmax_exp(x, out, threads) */
PTQ_BIND(bind_softmax_exp) {
    (void)self;
    if (args_count("softmax_exp", nargs, 3)) return NULL;
    PyArrayObject *x = args_array(args[0], "x", NPY_FLOAT32, 1, 0);
    PyArrayObject *out = x ? args_array(args[1], "out", NPY_FLOAT32, 1, 1) : NULL;
    const long long threads = out ? args_int(args[2], "threads", 0, MAX_THREADS) : -1;
    if (threads < 0 || args_dim(out, "out", 0, PyArray_DIM(x, 0))) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_softmax_exp(PyArray_DATA(x), PyArray_DIM(x, 0), PyArray_DATA(out),
                                            (int)threads));
    return args_result(status);
}

/* reference, quantized (rows, n), both float32 or both float64; out of two energies */
static PyObject *energy(PyObject *const *args, int columns) {
    const int wide =
        PyArray_Check(args[0]) && PyArray_TYPE((PyArrayObject *)args[0]) == NPY_FLOAT64;
    const int type = wide ? NPY_FLOAT64 : NPY_FLOAT32;
    PyArrayObject *x = args_array(args[0], "reference", type, 2, 0);
    PyArrayObject *y = x ? args_array(args[1], "quantized", type, 2, 0) : NULL;
    PyArrayObject *out = y ? args_array(args[2], "out", NPY_FLOAT64, 2, 1) : NULL;
    const long long threads = out ? args_int(args[3], "threads", 0, MAX_THREADS) : -1;
    if (threads < 0) return NULL;
    const npy_intp rows = PyArray_DIM(x, 0), n = PyArray_DIM(x, 1);
    if (args_dim(y, "quantized", 0, rows) || args_dim(y, "quantized", 1, n) ||
        args_dim(out, "out", 0, columns ? 2 : rows) || args_dim(out, "out", 1, columns ? n : 2))
        return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, (columns ? ptq_energy_columns : ptq_energy)(
                                PyArray_DATA(x), PyArray_DATA(y),
                                wide ? PTQ_F64 : PTQ_F32, rows, n, PyArray_DATA(out),
                                (int)threads));
    return args_result(status);
}

/* energy(reference, quantized, out, threads) */
PTQ_BIND(bind_energy) {
    (void)self;
    return args_count("energy", nargs, 4) ? NULL : energy(args, 0);
}

/* energy_columns(reference, quantized, out, threads) */
PTQ_BIND(bind_energy_columns) {
    (void)self;
    return args_count("energy_columns", nargs, 4) ? NULL : energy(args, 1);
}
