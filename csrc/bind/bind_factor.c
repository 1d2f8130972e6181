/* bind_factor.c - factor, target_correction. */
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

PTQ_BIND(target_correction, 8, "W, F, D, H, shift, below, out, threads",
         "Write (W F + D) (H + diag(shift))^-1; return -1, or the pivot that failed.\n\n"
         "W (rows, n) float32 and F (n, n) float64, or both None; D (rows, n) float64 or None;\n"
         "H (n, n) float32; shift (n,) float64; below 1, for rows = n: with L L^T = H + shift,\n"
         "D L^-T keeps what is below its diagonal; out (rows, n) float64, written.") {
    PyArrayObject *W, *F, *D, *H, *shift, *out;
    int threads;
    if (args_optional(&W, args[0], "W", NPY_FLOAT32, 2) ||
        args_optional(&F, args[1], "F", NPY_FLOAT64, 2) ||
        args_optional(&D, args[2], "D", NPY_FLOAT64, 2) ||
        args_array(&H, args[3], "H", NPY_FLOAT32, 2) ||
        args_array(&shift, args[4], "shift", NPY_FLOAT64, 1) ||
        args_output(&out, args[6], "out", NPY_FLOAT64, 2) || args_threads(args[7], &threads))
        return NULL;
    const npy_intp rows = PyArray_DIM(out, 0), n = PyArray_DIM(out, 1);
    const long long below = args_int(args[5], "below", 0, 1);
    if (below < 0 || (W && args_shape(W, "W", rows, n)) || (F && args_shape(F, "F", n, n)) ||
        (D && args_shape(D, "D", rows, n)) || args_shape(H, "H", n, n) ||
        args_dim(shift, "shift", 0, n))
        return NULL;
    if (!W != !F) {
        PyErr_SetString(PyExc_ValueError, "W and F must be given together");
        return NULL;
    }
    const ptq_target_args a = {.W = W ? PyArray_DATA(W) : NULL,
                               .F = F ? PyArray_DATA(F) : NULL,
                               .D = D ? PyArray_DATA(D) : NULL,
                               .H = PyArray_DATA(H),
                               .shift = PyArray_DATA(shift),
                               .rows = rows,
                               .n = n,
                               .below = (int)below,
                               .out = PyArray_DATA(out)};
    ptq_status status;
    int64_t failed = -1;
    PTQ_WITHOUT_GIL(status, ptq_target_correction(&a, &failed, threads));
    if (status == PTQ_NOT_PD) return PyLong_FromLongLong(failed);
    return args_raise(status) ? NULL : PyLong_FromLong(-1);
}
