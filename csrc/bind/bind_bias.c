/* bind_bias.c - bias_correction. */
#include "bind.h"

PTQ_BIND(bias_correction, 5, "W, W_hat, mean, out, threads",
         "Write (W_hat - W) mean, the shift of the mean output, summed in float64.\n\n"
         "W, W_hat (rows, n), both float32 or both float64; mean (n,) float64; out (rows,)\n"
         "float64, written.") {
    const int type = args_float_type(args[0]);
    const ptq_dtype dtype = type == NPY_FLOAT64 ? PTQ_F64 : PTQ_F32;
    PyArrayObject *W, *W_hat, *mean, *out;
    int threads;
    if (args_array(&W, args[0], "W", type, 2) || args_array(&W_hat, args[1], "W_hat", type, 2) ||
        args_array(&mean, args[2], "mean", NPY_FLOAT64, 1) ||
        args_output(&out, args[3], "out", NPY_FLOAT64, 1) || args_threads(args[4], &threads))
        return NULL;
    const npy_intp rows = PyArray_DIM(W, 0), n = PyArray_DIM(W, 1);
    if (args_shape(W_hat, "W_hat", rows, n) || args_dim(mean, "mean", 0, n) ||
        args_dim(out, "out", 0, rows))
        return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_bias_correction(PyArray_DATA(W), PyArray_DATA(W_hat), dtype, rows,
                                                n, PyArray_DATA(mean), PyArray_DATA(out), threads));
    return args_result(status);
}
