/* bind_coupled.c - couple_rows, couple_block. */
#include "bind.h"

static int pass_options(PyObject *tuple, ptq_coupled_args *a) {
    static const args_field fields[] = {{"max_code", 0, 1, 255}, {"passes", 0, 0, 1000}};
    double v[2];
    if (args_fields(tuple, "options", fields, 2, v)) return -1;
    a->max_code = (int)v[0];
    a->passes = (int)v[1];
    return 0;
}

PTQ_BIND(
    couple_rows, 11, "W, H, B, order, g_idx, scales, zeros, options, codes, objective, threads",
    "Descend over the codes of all rows under tr(B E H E^T), on the grids they have.\n\n"
    "W (rows, n) float32; H (n, n) float32, undamped; B (rows, rows) float64, symmetric; order\n"
    "(n,) int64, a permutation; g_idx (n,) int32; scales (rows, groups) float32; zeros (rows,\n"
    "groups) uint8; options (max_code, passes); codes (rows, n) uint8, read and written;\n"
    "objective (rows,) float64, written: e H e^T.") {
    PyArrayObject *W, *H, *B, *g_idx, *scales, *zeros, *codes, *objective;
    int threads;
    if (args_array(&W, args[0], "W", NPY_FLOAT32, 2) ||
        args_array(&H, args[1], "H", NPY_FLOAT32, 2) ||
        args_array(&B, args[2], "B", NPY_FLOAT64, 2) ||
        args_array(&g_idx, args[4], "g_idx", NPY_INT32, 1) ||
        args_array(&scales, args[5], "scales", NPY_FLOAT32, 2) ||
        args_array(&zeros, args[6], "zeros", NPY_UINT8, 2) ||
        args_output(&codes, args[8], "codes", NPY_UINT8, 2) ||
        args_output(&objective, args[9], "objective", NPY_FLOAT64, 1) ||
        args_threads(args[10], &threads))
        return NULL;
    const npy_intp rows = PyArray_DIM(W, 0), n = PyArray_DIM(W, 1), groups = PyArray_DIM(scales, 1);
    ptq_coupled_args a = {.rows = rows, .n = n, .groups = groups};
    if (pass_options(args[7], &a) || args_shape(H, "H", n, n) || args_shape(B, "B", rows, rows) ||
        args_dim(g_idx, "g_idx", 0, n) || args_shape(scales, "scales", rows, groups) ||
        args_shape(zeros, "zeros", rows, groups) || args_shape(codes, "codes", rows, n) ||
        args_dim(objective, "objective", 0, rows))
        return NULL;
    int64_t *perm;
    int32_t *group = NULL;
    if (args_permutation(&perm, args[3], "order", n)) return NULL;
    PyObject *result = NULL;
    if (!args_groups(&group, g_idx, n, groups)) {
        a.W = PyArray_DATA(W);
        a.H = PyArray_DATA(H);
        a.B = PyArray_DATA(B);
        a.perm = perm;
        a.g_idx = group;
        a.scales = PyArray_DATA(scales);
        a.zeros = PyArray_DATA(zeros);
        a.codes = PyArray_DATA(codes);
        a.objective = PyArray_DATA(objective);
        ptq_status status;
        PTQ_WITHOUT_GIL(status, ptq_couple_rows(&a, threads));
        result = args_result(status);
    }
    PyMem_Free(perm);
    PyMem_Free(group);
    return result;
}

PTQ_BIND(
    couple_block, 8, "S, B, H, scales, max_code, codes, moved, threads",
    "Descend over a block of columns of the codes of runs of rows.\n\n"
    "B (runs * rows, rows) float32, a symmetric matrix per run, or None: rows alone; H (columns, "
    "columns) float32;\n"
    "S = B E H, scales (runs * columns, rows) float32; codes as large, uint8, from 0 to max_code,\n"
    "read and written; moved as large, float32, written: the change of E.") {
    PyArrayObject *S, *B, *H, *scales, *codes, *moved;
    int threads;
    if (args_array(&S, args[0], "S", NPY_FLOAT32, 2) ||
        args_optional(&B, args[1], "B", NPY_FLOAT32, 2) ||
        args_array(&H, args[2], "H", NPY_FLOAT32, 2) ||
        args_array(&scales, args[3], "scales", NPY_FLOAT32, 2) ||
        args_output(&codes, args[5], "codes", NPY_UINT8, 2) ||
        args_output(&moved, args[6], "moved", NPY_FLOAT32, 2) || args_threads(args[7], &threads))
        return NULL;
    const npy_intp all = PyArray_DIM(S, 0), rows = PyArray_DIM(S, 1), columns = PyArray_DIM(H, 0);
    const npy_intp runs = columns > 0 ? all / columns : 0;
    const long long max_code = args_int(args[4], "max_code", 1, 255);
    if (max_code < 0 || args_shape(S, "S", runs * columns, rows) ||
        (B && args_shape(B, "B", runs * rows, rows)) || args_shape(H, "H", columns, columns) ||
        args_shape(scales, "scales", all, rows) || args_shape(codes, "codes", all, rows) ||
        args_shape(moved, "moved", all, rows))
        return NULL;
    const ptq_couple_block_args a = {.S = PyArray_DATA(S),
                                     .B = B ? PyArray_DATA(B) : NULL,
                                     .H = PyArray_DATA(H),
                                     .scales = PyArray_DATA(scales),
                                     .runs = runs,
                                     .columns = columns,
                                     .rows = rows,
                                     .max_code = (int)max_code,
                                     .codes = PyArray_DATA(codes),
                                     .moved = PyArray_DATA(moved)};
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_couple_block(&a, threads));
    return args_result(status);
}
