/* bind_paths.c - best_paths. */
#include "bind.h"

/* A copy of what is used as an index: whatever else shares its memory may be written meanwhile.
 */
static int copy_rows(int64_t **copy, PyArrayObject *chosen, npy_intp rows) {
    const npy_intp count = PyArray_DIM(chosen, 0);
    char *seen = PyMem_Calloc((size_t)rows, 1);
    *copy = PyMem_Malloc(sizeof(int64_t) * (size_t)(count ? count : 1));
    if (!*copy || !seen) {
        PyMem_Free(seen);
        PyErr_NoMemory();
        return -1;
    }
    memcpy(*copy, PyArray_DATA(chosen), sizeof(int64_t) * (size_t)count);
    for (npy_intp i = 0; i < count; i++) {
        const int64_t row = (*copy)[i];
        if (row < 0 || row >= rows || seen[row]) {
            PyErr_Format(PyExc_ValueError,
                         "chosen must hold rows from 0 to %zd, each once, not "
                         "%lld at %zd",
                         (Py_ssize_t)rows - 1, (long long)row, (Py_ssize_t)i);
            PyMem_Free(seen);
            return -1;
        }
        seen[row] = 1;
    }
    PyMem_Free(seen);
    return 0;
}

static int path_options(PyObject *tuple, ptq_paths_args *a) {
    static const args_field fields[] = {{"max_code", 0, 1, 255}, {"paths", 0, 1, 16}};
    double v[2];
    if (args_fields(tuple, "options", fields, 2, v)) return -1;
    a->max_code = (int)v[0];
    a->paths = (int)v[1];
    return 0;
}

PTQ_BIND(best_paths, 12,
         "W, H, R, order, g_idx, scales, zeros, chosen, options, codes, objective, threads",
         "Search better codes for some rows on the grids they have, keeping several paths.\n\n"
         "W (rows, n) float32; H (n, n) float32, undamped; R (n, n) float32, of factor() with the\n"
         "same order; order (n,) int64, a permutation; g_idx (n,) int32; scales (rows, groups)\n"
         "float32; zeros (rows, groups) uint8; chosen (count,) int64, rows, each once; options\n"
         "(max_code, paths), paths from 1 to 16; codes (rows, n) uint8 and objective (rows,)\n"
         "float64, read and written.") {
    PyArrayObject *W, *H, *R, *g_idx, *scales, *zeros, *chosen, *codes, *objective;
    int threads;
    if (args_array(&W, args[0], "W", NPY_FLOAT32, 2) ||
        args_array(&H, args[1], "H", NPY_FLOAT32, 2) ||
        args_array(&R, args[2], "R", NPY_FLOAT32, 2) ||
        args_array(&g_idx, args[4], "g_idx", NPY_INT32, 1) ||
        args_array(&scales, args[5], "scales", NPY_FLOAT32, 2) ||
        args_array(&zeros, args[6], "zeros", NPY_UINT8, 2) ||
        args_array(&chosen, args[7], "chosen", NPY_INT64, 1) ||
        args_output(&codes, args[9], "codes", NPY_UINT8, 2) ||
        args_output(&objective, args[10], "objective", NPY_FLOAT64, 1) ||
        args_threads(args[11], &threads))
        return NULL;
    const npy_intp rows = PyArray_DIM(W, 0), n = PyArray_DIM(W, 1), groups = PyArray_DIM(scales, 1);
    ptq_paths_args a = {.rows = rows, .n = n, .groups = groups, .count = PyArray_DIM(chosen, 0)};
    if (path_options(args[8], &a) || args_shape(H, "H", n, n) || args_shape(R, "R", n, n) ||
        args_dim(g_idx, "g_idx", 0, n) || args_shape(scales, "scales", rows, groups) ||
        args_shape(zeros, "zeros", rows, groups) || args_shape(codes, "codes", rows, n) ||
        args_dim(objective, "objective", 0, rows))
        return NULL;
    int64_t *perm, *picked = NULL;
    int32_t *group = NULL;
    if (args_permutation(&perm, args[3], "order", n)) return NULL;
    PyObject *result = NULL;
    if (!args_groups(&group, g_idx, n, groups) && !copy_rows(&picked, chosen, rows)) {
        a.W = PyArray_DATA(W);
        a.H = PyArray_DATA(H);
        a.R = PyArray_DATA(R);
        a.perm = perm;
        a.g_idx = group;
        a.scales = PyArray_DATA(scales);
        a.zeros = PyArray_DATA(zeros);
        a.chosen = picked;
        a.codes = PyArray_DATA(codes);
        a.objective = PyArray_DATA(objective);
        ptq_status status;
        PTQ_WITHOUT_GIL(status, ptq_best_paths(&a, threads));
        result = args_result(status);
    }
    PyMem_Free(perm);
    PyMem_Free(group);
    PyMem_Free(picked);
    return result;
}
