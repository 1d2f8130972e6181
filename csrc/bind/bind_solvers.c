/* bind_solvers.c - rtn, gptq, obq, objective. */
#include "bind.h"

enum { MAX_THREADS = 1024 };

/* Outputs codes (rows, n), scales and zeros (rows, groups). */
typedef struct {
    PyArrayObject *codes, *scales, *zeros;
} outputs;

static int outputs_parse(PyObject *const *args, npy_intp rows, npy_intp n, npy_intp groups,
                         outputs *out) {
    out->codes = args_array(args[0], "codes", NPY_UINT8, 2, 1);
    out->scales = out->codes ? args_array(args[1], "scales", NPY_FLOAT32, 2, 1) : NULL;
    out->zeros = out->scales ? args_array(args[2], "zeros", NPY_UINT8, 2, 1) : NULL;
    if (!out->zeros) return -1;
    return args_dim(out->codes, "codes", 0, rows) || args_dim(out->codes, "codes", 1, n) ||
           args_dim(out->scales, "scales", 0, rows) || args_dim(out->scales, "scales", 1, groups) ||
           args_dim(out->zeros, "zeros", 0, rows) || args_dim(out->zeros, "zeros", 1, groups);
}

static int square(PyArrayObject *H, const char *name, npy_intp n) {
    return args_dim(H, name, 0, n) || args_dim(H, name, 1, n);
}

/* The group size, which must divide n. */
static long long group_size(PyObject *o, npy_intp n) {
    const long long G = args_int(o, "group_size", 1, n > 0 ? n : 1);
    if (G > 0 && n % G) {
        PyErr_Format(PyExc_ValueError, "group_size %lld does not divide %zd inputs", G,
                     (Py_ssize_t)n);
        return -1;
    }
    return G;
}

/* rtn(W, group_size, grid, H or None, codes, scales, zeros, threads) */
PTQ_BIND(bind_rtn) {
    (void)self;
    if (args_count("rtn", nargs, 8)) return NULL;
    PyArrayObject *W = args_array(args[0], "W", NPY_FLOAT32, 2, 0), *H;
    if (!W || args_array_or_none(args[3], "H", NPY_FLOAT32, 2, &H)) return NULL;
    const npy_intp rows = PyArray_DIM(W, 0), n = PyArray_DIM(W, 1);
    const long long G = group_size(args[1], n);
    const long long threads = args_int(args[7], "threads", 0, MAX_THREADS);
    ptq_grid grid;
    outputs out;
    if (G < 0 || threads < 0 || args_grid(args[2], &grid) || (H && square(H, "H", n)) ||
        outputs_parse(args + 4, rows, n, n / G, &out))
        return NULL;
    if (grid.method == PTQ_GRID_HESSIAN && !H) {
        PyErr_SetString(PyExc_ValueError, "the Hessian grid needs H");
        return NULL;
    }
    ptq_status status;
    PTQ_WITHOUT_GIL(status,
                    ptq_rtn(PyArray_DATA(W), rows, n, G, &grid, H ? PyArray_DATA(H) : NULL,
                            PyArray_DATA(out.codes), PyArray_DATA(out.scales),
                            PyArray_DATA(out.zeros), (int)threads));
    return args_result(status);
}

/* gptq(W, H, R, order, (group_size, block, static, runs, feedback, sweeps, damping), grid,
 *      codes, scales, zeros, g_idx, history, threads) */
PTQ_BIND(bind_gptq) {
    (void)self;
    if (args_count("gptq", nargs, 12)) return NULL;
    PyArrayObject *W = args_array(args[0], "W", NPY_FLOAT32, 2, 0);
    PyArrayObject *H = W ? args_array(args[1], "H", NPY_FLOAT32, 2, 0) : NULL;
    PyArrayObject *R = H ? args_array(args[2], "R", NPY_FLOAT32, 2, 0) : NULL;
    PyArrayObject *order = R ? args_array(args[3], "order", NPY_INT64, 1, 0) : NULL;
    PyArrayObject *g_idx = order ? args_array(args[9], "g_idx", NPY_INT32, 1, 1) : NULL;
    PyArrayObject *history = g_idx ? args_array(args[10], "history", NPY_FLOAT64, 2, 1) : NULL;
    if (!history) return NULL;
    const npy_intp rows = PyArray_DIM(W, 0), n = PyArray_DIM(W, 1);
    long long G, block;
    ptq_gptq_args a = {.rows = rows, .n = n};
    outputs out;
    if (!PyTuple_Check(args[4])) {
        PyErr_SetString(PyExc_TypeError, "options must be a tuple");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[4], "LLiiiid:options", &G, &block, &a.static_groups, &a.groups_follow_order,
                          &a.feedback, &a.sweeps, &a.shift))
        return NULL;
    const long long threads = args_int(args[11], "threads", 0, MAX_THREADS);
    if (threads < 0 || args_grid(args[5], &a.grid) || square(H, "H", n) || square(R, "R", n) ||
        args_dim(order, "order", 0, n) || args_dim(g_idx, "g_idx", 0, n) ||
        args_permutation(order, "order"))
        return NULL;
    if (G < 1 || n < 1 || n % G || block < 1 || a.sweeps < 0 || a.sweeps > 1000) {
        PyErr_SetString(PyExc_ValueError, "group_size, block or sweeps are out of range");
        return NULL;
    }
    if (outputs_parse(args + 6, rows, n, n / G, &out) ||
        args_dim(history, "history", 0, a.sweeps + 1) || args_dim(history, "history", 1, rows))
        return NULL;
    a.W = PyArray_DATA(W);
    a.H = PyArray_DATA(H);
    a.R = PyArray_DATA(R);
    a.perm = PyArray_DATA(order);
    a.G = G;
    a.block = block;
    a.codes = PyArray_DATA(out.codes);
    a.scales = PyArray_DATA(out.scales);
    a.zeros = PyArray_DATA(out.zeros);
    a.g_idx = PyArray_DATA(g_idx);
    a.history = PyArray_DATA(history);
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_gptq(&a, (int)threads));
    return args_result(status);
}

/* obq(W, inverse, scale, zero, max_code, codes, threads) */
PTQ_BIND(bind_obq) {
    (void)self;
    if (args_count("obq", nargs, 7)) return NULL;
    PyArrayObject *W = args_array(args[0], "W", NPY_FLOAT64, 2, 0);
    PyArrayObject *inverse = W ? args_array(args[1], "inverse", NPY_FLOAT64, 2, 0) : NULL;
    PyArrayObject *scale = inverse ? args_array(args[2], "scale", NPY_FLOAT64, 2, 0) : NULL;
    PyArrayObject *zero = scale ? args_array(args[3], "zero", NPY_FLOAT64, 2, 0) : NULL;
    PyArrayObject *codes = zero ? args_array(args[5], "codes", NPY_UINT8, 2, 1) : NULL;
    const long long top = codes ? args_int(args[4], "max_code", 1, 255) : -1;
    const long long threads = top > 0 ? args_int(args[6], "threads", 0, MAX_THREADS) : -1;
    if (threads < 0) return NULL;
    const npy_intp rows = PyArray_DIM(W, 0), n = PyArray_DIM(W, 1);
    if (square(inverse, "inverse", n) || args_dim(scale, "scale", 0, rows) ||
        args_dim(scale, "scale", 1, n) || args_dim(zero, "zero", 0, rows) ||
        args_dim(zero, "zero", 1, n) || args_dim(codes, "codes", 0, rows) ||
        args_dim(codes, "codes", 1, n))
        return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status,
                    ptq_obq(PyArray_DATA(W), rows, n, PyArray_DATA(inverse), PyArray_DATA(scale),
                            PyArray_DATA(zero), (int)top, PyArray_DATA(codes), (int)threads));
    return args_result(status);
}

/* objective(E, H, out, threads) */
PTQ_BIND(bind_objective) {
    (void)self;
    if (args_count("objective", nargs, 4)) return NULL;
    PyArrayObject *E = args_array(args[0], "E", NPY_FLOAT32, 2, 0);
    PyArrayObject *H = E ? args_array(args[1], "H", NPY_FLOAT32, 2, 0) : NULL;
    PyArrayObject *out = H ? args_array(args[2], "out", NPY_FLOAT64, 1, 1) : NULL;
    const long long threads = out ? args_int(args[3], "threads", 0, MAX_THREADS) : -1;
    if (threads < 0) return NULL;
    const npy_intp rows = PyArray_DIM(E, 0), n = PyArray_DIM(E, 1);
    if (square(H, "H", n) || args_dim(out, "out", 0, rows)) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_objective(PyArray_DATA(E), rows, n, PyArray_DATA(H),
                                          PyArray_DATA(out), (int)threads));
    return args_result(status);
}
