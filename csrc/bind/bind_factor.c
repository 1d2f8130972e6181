/* bind_factor.c - factor. */
#include "bind.h"

PTQ_BIND(factor, 5, "H, order, shift, R, threads",
         "Write the upper triangle of R, R R^T = P H P^T + diag(shift); return -1, or the\n"
         "original index of the pivot that failed.\n\n"
         "H (n, n) float32; order (n,) int64, a permutation: row i of P H is row order[i] of H;\n"
         "shift (n,) float64, in the original order; R (n, n) float32, written.") {
    PyArrayObject *H, *shift, *R;
    int64_t *order;
    int threads;
    if (args_array(&H, args[0], "H", NPY_FLOAT32, 2) ||
        args_array(&shift, args[2], "shift", NPY_FLOAT64, 1) ||
        args_output(&R, args[3], "R", NPY_FLOAT32, 2) || args_threads(args[4], &threads))
        return NULL;
    const npy_intp n = PyArray_DIM(H, 0);
    if (args_shape(H, "H", n, n) || args_dim(shift, "shift", 0, n) || args_shape(R, "R", n, n) ||
        args_permutation(&order, args[1], "order", n))
        return NULL;
    ptq_status status;
    int64_t failed = -1;
    PTQ_WITHOUT_GIL(status, ptq_factor(PyArray_DATA(H), n, order, PyArray_DATA(shift),
                                       PyArray_DATA(R), &failed, threads));
    PyMem_Free(order);
    if (status == PTQ_NOT_PD) return PyLong_FromLongLong(failed);
    return args_raise(status) ? NULL : PyLong_FromLong(-1);
}
