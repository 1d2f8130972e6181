/* bind_hessian.c - hessian_update, hessian_finish, cross_update, moved_outputs. */
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
        args_tokens(&X, args[1], "X", dtype, &ldx) || args_threads(args[4], &threads))
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

PTQ_BIND(
    cross_update, 7, "S, A, B, X, dtype, rows, threads",
    "Add the products (a - b) x^T of tokens to S.\n\n"
    "S (m, n) float32, written; A, B (tokens, m) and X (tokens, n) of dtype 0 float32,\n"
    "1 float16 or 2 bfloat16 (bits as uint16); rows int64, the tokens that count, or None for\n"
    "all.") {
    PyArrayObject *S, *A, *B, *X;
    ptq_cross_args a = {0};
    int64_t *rows;
    int threads;
    if (args_output(&S, args[0], "S", NPY_FLOAT32, 2) || args_dtype(args[4], &a.dtype) ||
        args_tokens(&A, args[1], "A", a.dtype, &a.lda) ||
        args_tokens(&B, args[2], "B", a.dtype, &a.ldb) ||
        args_tokens(&X, args[3], "X", a.dtype, &a.ldx) || args_threads(args[6], &threads))
        return NULL;
    const npy_intp m = PyArray_DIM(A, 1), n = PyArray_DIM(X, 1), tokens = PyArray_DIM(X, 0);
    if (args_shape(S, "S", m, n) || args_dim(A, "A", 0, tokens) || args_shape(B, "B", tokens, m) ||
        args_rows(&rows, args[5], tokens, &a.tokens))
        return NULL;
    a.S = PyArray_DATA(S);
    a.m = m;
    a.n = n;
    a.A = PyArray_DATA(A);
    a.B = PyArray_DATA(B);
    a.X = PyArray_DATA(X);
    a.rows = rows;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_cross_update(&a, threads));
    PyMem_Free(rows);
    return args_result(status);
}

PTQ_BIND(moved_outputs, 5, "Y, X, W, out, threads",
         "Add (Y - X) W^T to out, all float32.\n\n"
         "Y, X (tokens, n); W (m, n); out (tokens, m), written.") {
    PyArrayObject *Y, *X, *W, *out;
    ptq_moved_args a = {0};
    int threads;
    if (args_tokens(&Y, args[0], "Y", PTQ_F32, &a.ldy) ||
        args_tokens(&X, args[1], "X", PTQ_F32, &a.ldx) ||
        args_array(&W, args[2], "W", NPY_FLOAT32, 2) ||
        args_output(&out, args[3], "out", NPY_FLOAT32, 2) || args_threads(args[4], &threads))
        return NULL;
    const npy_intp tokens = PyArray_DIM(Y, 0), n = PyArray_DIM(Y, 1), m = PyArray_DIM(W, 0);
    if (args_shape(X, "X", tokens, n) || args_dim(W, "W", 1, n) ||
        args_shape(out, "out", tokens, m))
        return NULL;
    a.out = PyArray_DATA(out);
    a.tokens = tokens;
    a.m = m;
    a.n = n;
    a.Y = PyArray_DATA(Y);
    a.X = PyArray_DATA(X);
    a.W = PyArray_DATA(W);
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_moved_outputs(&a, threads));
    return args_result(status);
}
