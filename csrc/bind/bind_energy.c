/* bind_energy.c - energy, energy_columns. */
#include "bind.h"

/* (reference, quantized, out, threads), where out is (rows, 2), or (2, n) for the columns. */
static PyObject *energies(PyObject *const *args, int columns) {
    const int type = args_float_type(args[0]);
    const ptq_dtype dtype = type == NPY_FLOAT64 ? PTQ_F64 : PTQ_F32;
    PyArrayObject *x, *y, *out;
    int threads;
    if (args_array(&x, args[0], "reference", type, 2) ||
        args_array(&y, args[1], "quantized", type, 2) ||
        args_output(&out, args[2], "out", NPY_FLOAT64, 2) || args_threads(args[3], &threads))
        return NULL;
    const npy_intp rows = PyArray_DIM(x, 0), n = PyArray_DIM(x, 1);
    if (args_shape(y, "quantized", rows, n) ||
        args_shape(out, "out", columns ? 2 : rows, columns ? n : 2))
        return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(
        status, (columns ? ptq_energy_columns : ptq_energy)(PyArray_DATA(x), PyArray_DATA(y), dtype,
                                                            rows, n, PyArray_DATA(out), threads));
    return args_result(status);
}

PTQ_BIND(energy, 4, "reference, quantized, out, threads",
         "Write the sums of reference^2 and of (quantized - reference)^2 of every row.\n\n"
         "reference, quantized (rows, n), both float32 or both float64; out (rows, 2) float64,\n"
         "written.") {
    return energies(args, 0);
}

PTQ_BIND(energy_columns, 4, "reference, quantized, out, threads",
         "Write the sums of reference^2 and of (quantized - reference)^2 of every column.\n\n"
         "reference, quantized (rows, n), both float32 or both float64; out (2, n) float64,\n"
         "written.") {
    return energies(args, 1);
}
