/* bind_hessian.c - hessian_update, hessian_finish, factor. */
#include "bind.h"

enum { MAX_THREADS = 1024 };

/* hessian_update(S, X, dtype, rows or None, threads) */
PTQ_BIND(bind_hessian_update) {
    (void)self;
    if (args_count("hessian_update", nargs, 5)) return NULL;
    PyArrayObject *S = args_array(args[0], "S", NPY_FLOAT32, 2, 1), *rows;
    const long long dtype = args_int(args[2], "dtype", 0, 2);
    if (!S || dtype < 0) return NULL;
    PyArrayObject *X = args_tokens(args[1], (ptq_dtype)dtype);
    const long long threads = args_int(args[4], "threads", 0, MAX_THREADS);
    if (!X || threads < 0 || args_array_or_none(args[3], "rows", NPY_INT64, 1, &rows)) return NULL;
    const npy_intp n = PyArray_DIM(S, 0);
    if (args_dim(S, "S", 1, n) || args_dim(X, "X", 1, n)) return NULL;
    if (rows && args_rows(rows, PyArray_DIM(X, 0))) return NULL;
    const int64_t tokens = rows ? PyArray_DIM(rows, 0) : PyArray_DIM(X, 0);
    const int64_t ldx = PyArray_DIM(X, 0) > 1 ? PyArray_STRIDE(X, 0) / PyArray_ITEMSIZE(X) : n;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_hessian_update(PyArray_DATA(S), n, PyArray_DATA(X), ldx,
                                               (ptq_dtype)dtype, rows ? PyArray_DATA(rows) : NULL,
                                               tokens, (int)threads));
    return args_result(status);
}

/* hessian_finish(S, out, factor, threads) */
PTQ_BIND(bind_hessian_finish) {
    (void)self;
    if (args_count("hessian_finish", nargs, 4)) return NULL;
    PyArrayObject *S = args_array(args[0], "S", NPY_FLOAT32, 2, 0);
    PyArrayObject *out = S ? args_array(args[1], "out", NPY_FLOAT32, 2, 1) : NULL;
    if (!out) return NULL;
    const npy_intp n = PyArray_DIM(S, 0);
    if (args_dim(S, "S", 1, n) || args_dim(out, "out", 0, n) || args_dim(out, "out", 1, n))
        return NULL;
    const double factor = PyFloat_AsDouble(args[2]);
    const long long threads = args_int(args[3], "threads", 0, MAX_THREADS);
    if (threads < 0 || (factor == -1.0 && PyErr_Occurred())) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_hessian_finish(PyArray_DATA(S), PyArray_DATA(out), n, factor,
                                               (int)threads));
    return args_result(status);
}

/* symmetric_check(H, tolerance, threads) -> 0 fine, 1 NaN or Inf, 2 not symmetric */
PTQ_BIND(bind_symmetric_check) {
    (void)self;
    if (args_count("symmetric_check", nargs, 3)) return NULL;
    PyArrayObject *H = args_array(args[0], "H", NPY_FLOAT32, 2, 0);
    const double tolerance = H ? PyFloat_AsDouble(args[1]) : -1.0;
    const long long threads = H ? args_int(args[2], "threads", 0, MAX_THREADS) : -1;
    if (threads < 0 || (tolerance == -1.0 && PyErr_Occurred())) return NULL;
    const npy_intp n = PyArray_DIM(H, 0);
    if (args_dim(H, "H", 1, n)) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_symmetric_check(PyArray_DATA(H), n, (float)tolerance,
                                                (int)threads));
    if (status == PTQ_NONFINITE) return PyLong_FromLong(1);
    if (status == PTQ_NOT_SYMMETRIC) return PyLong_FromLong(2);
    PyObject *none = args_result(status);
    if (!none) return NULL;
    Py_DECREF(none);
    return PyLong_FromLong(0);
}

/* finite_check(x, threads) -> bool, for a 2-D float32 array */
PTQ_BIND(bind_finite_check) {
    (void)self;
    if (args_count("finite_check", nargs, 2)) return NULL;
    PyArrayObject *x = args_array(args[0], "x", NPY_FLOAT32, 2, 0);
    const long long threads = x ? args_int(args[1], "threads", 0, MAX_THREADS) : -1;
    if (threads < 0) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_finite_check(PyArray_DATA(x), PyArray_SIZE(x), (int)threads));
    if (status == PTQ_NONFINITE) Py_RETURN_FALSE;
    PyObject *none = args_result(status);
    if (!none) return NULL;
    Py_DECREF(none);
    Py_RETURN_TRUE;
}

/* factor(H, order, shift, R, threads) -> -1, or the original index of the pivot that failed */
PTQ_BIND(bind_factor) {
    (void)self;
    if (args_count("factor", nargs, 5)) return NULL;
    PyArrayObject *H = args_array(args[0], "H", NPY_FLOAT32, 2, 0);
    PyArrayObject *order = H ? args_array(args[1], "order", NPY_INT64, 1, 0) : NULL;
    PyArrayObject *shift = order ? args_array(args[2], "shift", NPY_FLOAT64, 1, 0) : NULL;
    PyArrayObject *R = shift ? args_array(args[3], "R", NPY_FLOAT32, 2, 1) : NULL;
    const long long threads = R ? args_int(args[4], "threads", 0, MAX_THREADS) : -1;
    if (threads < 0) return NULL;
    const npy_intp n = PyArray_DIM(H, 0);
    if (args_dim(H, "H", 1, n) || args_dim(order, "order", 0, n) || args_dim(R, "R", 0, n) ||
        args_dim(shift, "shift", 0, n) || args_dim(R, "R", 1, n) ||
        args_permutation(order, "order"))
        return NULL;
    ptq_status status;
    int64_t info = -1;
    PTQ_WITHOUT_GIL(status,
                    ptq_factor(PyArray_DATA(H), n, PyArray_DATA(order), PyArray_DATA(shift),
                               PyArray_DATA(R), &info, (int)threads));
    if (status == PTQ_NOT_PD) return PyLong_FromLongLong(info);
    PyObject *none = args_result(status);
    if (!none) return NULL;
    Py_DECREF(none);
    return PyLong_FromLong(-1);
}
