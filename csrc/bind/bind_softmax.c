/* bind_softmax.c - softmax_quantize, softmax_statistics, softmax_exp. */
#include "bind.h"

static int parse_grid(PyObject *tuple, ptq_softmax_grid *grid) {
    static const args_field fields[] = {
        {"scale", 1, 0, 1e30}, {"zero", 0, 0, 65535}, {"max_code", 0, 1, 65535}};
    double v[3];
    if (args_fields(tuple, "grid", fields, 3, v)) return -1;
    *grid = (ptq_softmax_grid){(float)v[0], (int)v[1], (int)v[2]};
    if (!(grid->scale > 0)) {
        PyErr_SetString(PyExc_ValueError, "grid.scale is too small for float32");
        return -1;
    }
    if (grid->zero <= grid->max_code) return 0;
    PyErr_Format(PyExc_ValueError, "grid.zero %d must not exceed grid.max_code %d", grid->zero,
                 grid->max_code);
    return -1;
}

/* Sizes of x (batch, heads, q, k), the mask or None, and causal. */
static int parse_attention(PyArrayObject *x, const char *name, PyObject *mask, PyObject *causal,
                           ptq_attention *a) {
    PyArrayObject *allowed;
    const long long is_causal = args_int(causal, "causal", 0, 1);
    if (is_causal < 0 || args_optional(&allowed, mask, "allowed", NPY_BOOL, 4)) return -1;
    const npy_intp *sizes = PyArray_DIMS(x);
    *a = (ptq_attention){.batch = sizes[0],
                         .heads = sizes[1],
                         .q = sizes[2],
                         .k = sizes[3],
                         .causal = (int)is_causal};
    if (sizes[1] < 1 || sizes[3] < 1) {
        PyErr_Format(PyExc_ValueError,
                     "%s must have shape (batch, heads, q, k) with at least one head and one key",
                     name);
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
    if (!refused && args_raise(status)) return NULL;
    return Py_BuildValue("LL", (long long)info->bad, (long long)info->empty);
}

/* out for `scores`: float32 values, or codes of uint8 or uint16. */
static int quantized_array(PyArrayObject **out, PyObject *o, PyArrayObject *scores, int max_code,
                           int *codes) {
    const int type = max_code > 255 ? NPY_UINT16 : NPY_UINT8;
    *codes = PyArray_Check(o) && PyArray_TYPE((PyArrayObject *)o) == type;
    if (args_output(out, o, "out", *codes ? type : NPY_FLOAT32, 4)) return -1;
    for (int axis = 0; axis < 4; axis++)
        if (args_dim(*out, "out", axis, PyArray_DIM(scores, axis))) return -1;
    return 0;
}

/* Additive corrections by head and number of allowed keys. */
static int correction_table(PyObject *kind, PyObject *o, ptq_softmax_args *a) {
    PyArrayObject *table;
    const long long correction = args_int(kind, "correction", 0, PTQ_CORRECT_CODE_SUM);
    if (correction < 0 || args_array(&table, o, "table", NPY_FLOAT64, 2)) return -1;
    a->correction = (int)correction;
    a->table = PyArray_DATA(table);
    a->table_heads = PyArray_DIM(table, 0);
    a->table_lengths = PyArray_DIM(table, 1);
    return (a->table_heads != 1 && args_dim(table, "table", 0, a->attention.heads)) ||
           (a->table_lengths != 1 && args_dim(table, "table", 1, a->attention.k + 1));
}

/* float32, one per row of attention, to be written, or None. */
static int row_values(PyArrayObject **out, PyObject *o, const char *name, const ptq_attention *a) {
    if (args_optional(out, o, name, NPY_FLOAT32, 1)) return -1;
    return *out && (PyArray_FailUnlessWriteable(*out, name) < 0 ||
                    args_dim(*out, name, 0, a->batch * a->heads * a->q));
}

/* What the grid is of; every correction but the code sum exists for all. */
static int placement(PyObject *o, ptq_softmax_args *a) {
    const long long of = args_int(o, "of", 0, PTQ_OF_SQUARES);
    if (of < 0) return -1;
    a->of = (int)of;
    if (of && (a->grid.zero || a->grid.scale > 1)) {
        PyErr_SetString(PyExc_ValueError,
                        "a grid of exponentials must have grid.zero 0 and grid.scale at most 1");
        return -1;
    }
    if (of || a->correction != PTQ_CORRECT_CODE_SUM) return 0;
    PyErr_SetString(PyExc_ValueError, "correction 3 (code sum) needs of 1 or 2");
    return -1;
}

PTQ_BIND(
    softmax_quantize, 11,
    "scores, allowed, causal, grid, correction, table, out, corrections, scales, of, "
    "threads",
    "Write the softmax of scores over the allowed keys, rounded to a grid and corrected;\n"
    "return the first row that was refused or -1, and the number of rows without a key.\n\n"
    "scores (batch, heads, q, k) float32; allowed bool, of the same shape or 1 along any of\n"
    "the first three axes, or None; grid (scale, zero, max_code); correction 0 none, 1 table,\n"
    "2 row sum or 3 code sum; table (heads or 1, k + 1 or 1) float64; out as scores, written:\n"
    "values, or codes of uint8 (uint16 if max_code exceeds 255); corrections and scales\n"
    "(batch * heads * q,) float32, written, or None; of 0 if the grid is that of the softmax,\n"
    "1 of e = exp(x - the row's largest x) and 2 of sqrt(e), whose values are squares of steps:\n"
    "both with zero 0 and scale at most 1.") {
    PyArrayObject *scores, *out, *corrections, *scales;
    ptq_softmax_args a = {0};
    int threads;
    if (args_array(&scores, args[0], "scores", NPY_FLOAT32, 4) ||
        parse_attention(scores, "scores", args[1], args[2], &a.attention) ||
        parse_grid(args[3], &a.grid) || correction_table(args[4], args[5], &a) ||
        quantized_array(&out, args[6], scores, a.grid.max_code, &a.codes) ||
        row_values(&corrections, args[7], "corrections", &a.attention) ||
        row_values(&scales, args[8], "scales", &a.attention) || placement(args[9], &a) ||
        args_threads(args[10], &threads))
        return NULL;
    a.scores = PyArray_DATA(scores);
    a.out = PyArray_DATA(out);
    a.corrections = corrections ? PyArray_DATA(corrections) : NULL;
    a.scales = scales ? PyArray_DATA(scales) : NULL;
    ptq_rows_info info;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_softmax_quantize(&a, &info, threads));
    return rows_result(status, &info);
}

PTQ_BIND(softmax_statistics, 8, "P, allowed, queries, causal, grid, tolerance, sums, threads",
         "Write what rounding does to rows of probabilities, by head and class of row length;\n"
         "return the first row that was refused or -1, and the number of rows without a key.\n\n"
         "P (batch, heads, q, k) float32; allowed bool, of the same shape or 1 along any of the\n"
         "first three axes, or None; queries (batch, q) bool, the rows that count, or None; grid\n"
         "(scale, zero, max_code); tolerance of the sum of a row; sums (heads, 240, 4) int64,\n"
         "written.") {
    PyArrayObject *P, *queries, *sums;
    ptq_attention a;
    ptq_softmax_grid grid;
    double tolerance;
    int threads;
    if (args_array(&P, args[0], "P", NPY_FLOAT32, 4) ||
        parse_attention(P, "P", args[1], args[3], &a) ||
        args_optional(&queries, args[2], "queries", NPY_BOOL, 2) || parse_grid(args[4], &grid) ||
        args_real(&tolerance, args[5], "tolerance") ||
        args_output(&sums, args[6], "sums", NPY_INT64, 3) || args_threads(args[7], &threads))
        return NULL;
    if ((queries && args_shape(queries, "queries", a.batch, a.q)) ||
        args_shape(sums, "sums", a.heads, PTQ_LENGTH_CLASSES) || args_dim(sums, "sums", 2, 4))
        return NULL;
    a.queries = queries ? PyArray_DATA(queries) : NULL;
    ptq_rows_info info;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_softmax_statistics(&a, PyArray_DATA(P), &grid, tolerance,
                                                   PyArray_DATA(sums), &info, threads));
    return rows_result(status, &info);
}

PTQ_BIND(softmax_exp, 3, "x, out, threads",
         "Write exp(x) as the softmax computes it.\n\n"
         "x (n,) float32, not above 0; out (n,) float32, written.") {
    PyArrayObject *x, *out;
    int threads;
    if (args_array(&x, args[0], "x", NPY_FLOAT32, 1) ||
        args_output(&out, args[1], "out", NPY_FLOAT32, 1) || args_threads(args[2], &threads))
        return NULL;
    const npy_intp n = PyArray_DIM(x, 0);
    if (args_dim(out, "out", 0, n)) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_softmax_exp(PyArray_DATA(x), n, PyArray_DATA(out), threads));
    return args_result(status);
}
