/* bind_hessian.c - hessian_update, hessian_finish. */
#include "bind.h"

PTQ_BIND(hessian_update, 5, "S, X, dtype, rows, threads",
         "Add the products x x^T of tokens to the upper triangle of S.\n\n"
         "S (n, n) float32, written; X (tokens, n) of dtype 0 float32, 1 float16 or 2 bfloat16\n"
         "(bits as uint16); rows int64, the tokens that count, or None for all.") {
    PyArrayObject *S, *X;
    ptq_dtype dtype;
    int64_t ldx, tokens, *rows;
    int threads;
    if (args_output(&S, args[0], "S", NPY_FLOAT32, 2) || args_dtype(args[2], &dtype) ||
        args_tokens(&X, args[1], dtype, &ldx) || args_threads(args[4], &threads))
        return NULL;
    const npy_intp n = PyArray_DIM(X, 1);
    if (args_shape(S, "S", n, n) || args_rows(&rows, args[3], PyArray_DIM(X, 0), &tokens))
        return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_hessian_update(PyArray_DATA(S), n, PyArray_DATA(X), ldx, dtype,
                                               rows, tokens, threads));
    PyMem_Free(rows);
    return args_result(status);
}

PTQ_BIND(hessian_finish, 4, "S, out, factor, threads",
         "Write the whole symmetric matrix factor * S from the upper triangle of S.\n\n"
         "S (n, n) float32; out (n, n) float32, written, may be S.") {
    PyArrayObject *S, *out;
    double factor;
    int threads;
    if (args_array(&S, args[0], "S", NPY_FLOAT32, 2) ||
        args_output(&out, args[1], "out", NPY_FLOAT32, 2) ||
        args_real(&factor, args[2], "factor") || args_threads(args[3], &threads))
        return NULL;
    const npy_intp n = PyArray_DIM(S, 0);
    if (args_shape(S, "S", n, n) || args_shape(out, "out", n, n)) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status,
                    ptq_hessian_finish(PyArray_DATA(S), PyArray_DATA(out), n, factor, threads));
    return args_result(status);
}
