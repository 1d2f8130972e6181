/* bind_statistics.c - activation_statistics. */
#include "bind.h"

PTQ_BIND(
    activation_statistics, 13,
    "X, dtype, rows, bits, threshold, absmax, sums, most, counts, histogram, largest, places, "
    "threads",
    "Write how hard tokens are to quantize: sums over tokens, values of every channel, a\n"
    "histogram of the magnitudes and the largest three.\n\n"
    "X (tokens, n) of dtype 0 float32, 1 float16 or 2 bfloat16 (bits as uint16); rows int64,\n"
    "the tokens that count (at least one), or None for all; absmax of the tensor's grid, or 0\n"
    "for that of X. Written: sums (6,) float64; most (n,) float32, largest magnitude of each\n"
    "channel; counts (n,) int64, tokens with |x| >= threshold; histogram (8192,) int64 by the\n"
    "upper 13 bits of |x|; largest (3,) float32; places (3, 2) int64, token and channel.") {
    PyArrayObject *X, *sums, *most, *counts, *histogram, *largest, *places;
    ptq_statistics_args a = {0};
    int64_t *rows;
    double threshold, absmax;
    int threads;
    if (args_dtype(args[1], &a.dtype) || args_tokens(&X, args[0], "X", a.dtype, &a.ldx) ||
        args_real(&threshold, args[4], "threshold") || args_real(&absmax, args[5], "absmax") ||
        args_output(&sums, args[6], "sums", NPY_FLOAT64, 1) ||
        args_output(&most, args[7], "most", NPY_FLOAT32, 1) ||
        args_output(&counts, args[8], "counts", NPY_INT64, 1) ||
        args_output(&histogram, args[9], "histogram", NPY_INT64, 1) ||
        args_output(&largest, args[10], "largest", NPY_FLOAT32, 1) ||
        args_output(&places, args[11], "places", NPY_INT64, 2) || args_threads(args[12], &threads))
        return NULL;
    const long long bits = args_int(args[3], "bits", 2, 16);
    const npy_intp n = PyArray_DIM(X, 1);
    if (bits < 0 || args_dim(sums, "sums", 0, PTQ_STATISTICS_SUMS) ||
        args_dim(most, "most", 0, n) || args_dim(counts, "counts", 0, n) ||
        args_dim(histogram, "histogram", 0, PTQ_MAGNITUDE_BINS) ||
        args_dim(largest, "largest", 0, PTQ_LARGEST) ||
        args_shape(places, "places", PTQ_LARGEST, 2) ||
        args_rows(&rows, args[2], PyArray_DIM(X, 0), &a.tokens))
        return NULL;
    a.X = PyArray_DATA(X);
    a.n = n;
    a.rows = rows;
    a.bits = (int)bits;
    a.threshold = (float)threshold;
    a.absmax = (float)absmax;
    ptq_statistics out = {PyArray_DATA(sums),      PyArray_DATA(most),    PyArray_DATA(counts),
                          PyArray_DATA(histogram), PyArray_DATA(largest), PyArray_DATA(places)};
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_activation_statistics(&a, &out, threads));
    PyMem_Free(rows);
    return args_result(status);
}
