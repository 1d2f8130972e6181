/* bind_checks.c - symmetric_check, finite_check. */
#include "bind.h"

PTQ_BIND(symmetric_check, 3, "H, tolerance, threads",
         "Return 0 if H is finite and symmetric, 1 if it holds NaN or Inf, 2 if some\n"
         "|H[i, j] - H[j, i]| exceeds the tolerance.\n\n"
         "H (n, n) float32.") {
    PyArrayObject *H;
    double tolerance;
    int threads;
    if (args_array(&H, args[0], "H", NPY_FLOAT32, 2) ||
        args_real(&tolerance, args[1], "tolerance") || args_threads(args[2], &threads))
        return NULL;
    const npy_intp n = PyArray_DIM(H, 0);
    if (args_shape(H, "H", n, n)) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_symmetric_check(PyArray_DATA(H), n, (float)tolerance, threads));
    if (status == PTQ_NONFINITE) return PyLong_FromLong(1);
    if (status == PTQ_NOT_SYMMETRIC) return PyLong_FromLong(2);
    return args_raise(status) ? NULL : PyLong_FromLong(0);
}

PTQ_BIND(finite_check, 2, "x, threads",
         "Return True if x holds neither NaN nor Inf.\n\n"
         "x (rows, n) float32.") {
    PyArrayObject *x;
    int threads;
    if (args_array(&x, args[0], "x", NPY_FLOAT32, 2) || args_threads(args[1], &threads))
        return NULL;
    const npy_intp count = PyArray_SIZE(x);
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_finite_check(PyArray_DATA(x), count, threads));
    if (status == PTQ_NONFINITE) Py_RETURN_FALSE;
    if (args_raise(status)) return NULL;
    Py_RETURN_TRUE;
}
