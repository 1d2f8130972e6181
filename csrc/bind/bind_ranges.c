/* bind_ranges.c - channel_ranges. */
#include "bind.h"

PTQ_BIND(channel_ranges, 7, "X, dtype, rows, minimum, maximum, sum, threads",
         "Write the minimum, maximum and sum of every channel over tokens.\n\n"
         "X (tokens, n) of dtype 0 float32, 1 float16 or 2 bfloat16 (bits as uint16); rows int64,\n"
         "the tokens that count (at least one), or None for all; minimum, maximum (n,) float32\n"
         "and sum (n,) float64, written.") {
    PyArrayObject *X, *low, *high, *sum;
    ptq_dtype dtype;
    int64_t ldx, tokens, *rows;
    int threads;
    if (args_dtype(args[1], &dtype) || args_tokens(&X, args[0], "X", dtype, &ldx) ||
        args_output(&low, args[3], "minimum", NPY_FLOAT32, 1) ||
        args_output(&high, args[4], "maximum", NPY_FLOAT32, 1) ||
        args_output(&sum, args[5], "sum", NPY_FLOAT64, 1) || args_threads(args[6], &threads))
        return NULL;
    const npy_intp n = PyArray_DIM(X, 1);
    if (args_dim(low, "minimum", 0, n) || args_dim(high, "maximum", 0, n) ||
        args_dim(sum, "sum", 0, n) || args_rows(&rows, args[2], PyArray_DIM(X, 0), &tokens))
        return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(
        status, ptq_channel_ranges(PyArray_DATA(X), n, ldx, dtype, rows, tokens, PyArray_DATA(low),
                                   PyArray_DATA(high), PyArray_DATA(sum), threads));
    PyMem_Free(rows);
    return args_result(status);
}
