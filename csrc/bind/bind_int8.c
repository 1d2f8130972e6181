/* bind_int8.c - int8_matmul. */
#include "bind.h"

/* Codes (rows, n) int8 with scales and zero-points (rows,) or (1,). */
typedef struct {
    const char *codes, *scales, *zeros; /* names */
} operand_names;

/* Returns the number of grids, or -1. */
static npy_intp operand(PyObject *const *args, const operand_names *name, PyArrayObject **codes,
                        const float **scales, const int8_t **zeros) {
    PyArrayObject *s, *z;
    if (args_array(codes, args[0], name->codes, NPY_INT8, 2) ||
        args_array(&s, args[1], name->scales, NPY_FLOAT32, 1) ||
        args_array(&z, args[2], name->zeros, NPY_INT8, 1))
        return -1;
    const npy_intp grids = PyArray_DIM(s, 0);
    if (args_dim(z, name->zeros, 0, grids) ||
        (grids != 1 && args_dim(s, name->scales, 0, PyArray_DIM(*codes, 0))))
        return -1;
    *scales = PyArray_DATA(s);
    *zeros = PyArray_DATA(z);
    return grids;
}

/* The factors in float32, both or neither; the sizes of `a` are set. */
static int float_columns(PyObject *const *args, ptq_int8_args *a) {
    PyArrayObject *x, *w;
    if (args_optional(&x, args[0], "x_float", NPY_FLOAT32, 2) ||
        args_optional(&w, args[1], "w_float", NPY_FLOAT32, 2))
        return -1;
    if (!x && !w) return 0;
    if (!x || !w) {
        PyErr_SetString(PyExc_TypeError,
                        "x_float and w_float go together: pass both, or None twice");
        return -1;
    }
    a->columns = PyArray_DIM(x, 1);
    a->x_float = PyArray_DATA(x);
    a->w_float = PyArray_DATA(w);
    return args_dim(x, "x_float", 0, a->tokens) || args_shape(w, "w_float", a->columns, a->outputs);
}

PTQ_BIND(int8_matmul, 10,
         "x, x_scales, x_zeros, w, w_scales, w_zeros, x_float, w_float, y, threads",
         "Write the product of two int8 matrices with exact integer sums, plus x_float w_float.\n\n"
         "x (tokens, n), w (outputs, n) int8; x_scales, w_scales float32 and x_zeros, w_zeros\n"
         "int8: (1,), or one per row of x or w; x_float (tokens, columns) and w_float\n"
         "(columns, outputs) float32, or None; y (tokens, outputs) float32, written.") {
    static const operand_names x_names = {"x", "x_scales", "x_zeros"};
    static const operand_names w_names = {"w", "w_scales", "w_zeros"};
    ptq_int8_args a = {0};
    PyArrayObject *x, *w, *y;
    int threads;
    a.x_grids = operand(args, &x_names, &x, &a.x_scales, &a.x_zeros);
    if (a.x_grids < 0) return NULL;
    a.w_grids = operand(args + 3, &w_names, &w, &a.w_scales, &a.w_zeros);
    if (a.w_grids < 0 || args_output(&y, args[8], "y", NPY_FLOAT32, 2) ||
        args_threads(args[9], &threads))
        return NULL;
    a.tokens = PyArray_DIM(x, 0);
    a.n = PyArray_DIM(x, 1);
    a.outputs = PyArray_DIM(w, 0);
    if (args_dim(w, "w", 1, a.n) || args_shape(y, "y", a.tokens, a.outputs) ||
        float_columns(args + 6, &a))
        return NULL;
    a.x = PyArray_DATA(x);
    a.w = PyArray_DATA(w);
    a.y = PyArray_DATA(y);
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_int8_matmul(&a, threads));
    return args_result(status);
}
