/* bind_solvers.c - rtn, codes_on_grid, gptq, obq, objective. */
#include "bind.h"

/* Outputs codes (rows, n), scales and zeros (rows, groups). */
typedef struct {
    PyArrayObject *codes, *scales, *zeros;
} outputs;

static int outputs_parse(PyObject *const *args, npy_intp rows, npy_intp n, npy_intp groups,
                         outputs *out) {
    return args_output(&out->codes, args[0], "codes", NPY_UINT8, 2) ||
           args_output(&out->scales, args[1], "scales", NPY_FLOAT32, 2) ||
           args_output(&out->zeros, args[2], "zeros", NPY_UINT8, 2) ||
           args_shape(out->codes, "codes", rows, n) ||
           args_shape(out->scales, "scales", rows, groups) ||
           args_shape(out->zeros, "zeros", rows, groups);
}

static int check_group_size(long long G, npy_intp n, const char *name) {
    if (G >= 1 && n >= 1 && n % G == 0) return 0;
    PyErr_Format(PyExc_ValueError, "%s %lld must divide the %zd inputs", name, G, (Py_ssize_t)n);
    return -1;
}

PTQ_BIND(rtn, 8, "W, group_size, grid, H, codes, scales, zeros, threads",
         "Fit a grid to every group of W and round to nearest.\n\n"
         "W (rows, n) float32; group_size divides n, groups = n / group_size; grid (max_code,\n"
         "symmetric, method, steps, candidates, scale_type, min_zero, min_shrink, norm), method 0\n"
         "min-max, 1 MSE, 2 Hessian; H (n, n) float32, needed by method 2, or None; codes\n"
         "(rows, n) uint8, scales (rows, groups) float32, zeros (rows, groups) uint8, written.") {
    PyArrayObject *W, *H;
    ptq_grid grid;
    outputs out;
    int threads;
    if (args_array(&W, args[0], "W", NPY_FLOAT32, 2) ||
        args_optional(&H, args[3], "H", NPY_FLOAT32, 2) || args_grid(args[2], &grid) ||
        args_threads(args[7], &threads))
        return NULL;
    const npy_intp rows = PyArray_DIM(W, 0), n = PyArray_DIM(W, 1);
    const long long G = args_int(args[1], "group_size", 1, INT32_MAX);
    if (G < 0 || check_group_size(G, n, "group_size") || (H && args_shape(H, "H", n, n)) ||
        outputs_parse(args + 4, rows, n, (npy_intp)(n / G), &out))
        return NULL;
    if (grid.method == PTQ_GRID_HESSIAN && !H) {
        PyErr_SetString(PyExc_ValueError, "H must be given if grid.method is 2, Hessian");
        return NULL;
    }
    if (grid.method == PTQ_GRID_FEEDBACK) {
        PyErr_SetString(PyExc_ValueError, "grid.method 3, feedback, is of gptq() alone");
        return NULL;
    }
    const float *hessian = H ? PyArray_DATA(H) : NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status,
                    ptq_rtn(PyArray_DATA(W), rows, n, G, &grid, hessian, PyArray_DATA(out.codes),
                            PyArray_DATA(out.scales), PyArray_DATA(out.zeros), threads));
    return args_result(status);
}

PTQ_BIND(codes_on_grid, 6, "W, scales, zeros, max_code, codes, threads",
         "Round W to given grids, one per row.\n\n"
         "W (rows, n) float32; scales (rows,) float32; zeros (rows,) uint8; max_code from 1 to\n"
         "255; codes (rows, n) uint8, written.") {
    PyArrayObject *W, *scales, *zeros, *codes;
    int threads;
    if (args_array(&W, args[0], "W", NPY_FLOAT32, 2) ||
        args_array(&scales, args[1], "scales", NPY_FLOAT32, 1) ||
        args_array(&zeros, args[2], "zeros", NPY_UINT8, 1) ||
        args_output(&codes, args[4], "codes", NPY_UINT8, 2) || args_threads(args[5], &threads))
        return NULL;
    const long long max_code = args_int(args[3], "max_code", 1, 255);
    const npy_intp rows = PyArray_DIM(W, 0), n = PyArray_DIM(W, 1);
    if (max_code < 0 || args_dim(scales, "scales", 0, rows) || args_dim(zeros, "zeros", 0, rows) ||
        args_shape(codes, "codes", rows, n))
        return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_codes_on_grid(PyArray_DATA(W), rows, n, PyArray_DATA(scales),
                                              PyArray_DATA(zeros), (int)max_code,
                                              PyArray_DATA(codes), threads));
    return args_result(status);
}

static int gptq_options(PyObject *tuple, ptq_gptq_args *a) {
    static const args_field fields[] = {
        {"group_size", 0, 1, INT32_MAX}, {"block_size", 0, 1, INT32_MAX},
        {"static_groups", 0, 0, 1},      {"groups_follow_order", 0, 0, 1},
        {"feedback", 0, 0, 1},           {"refine_passes", 0, 0, 1000},
        {"refit_rounds", 0, 0, 1000},    {"shift", 1, -Py_HUGE_VAL, Py_HUGE_VAL},
    };
    double v[8];
    if (args_fields(tuple, "options", fields, 8, v)) return -1;
    a->G = (int64_t)v[0];
    a->block = (int64_t)v[1];
    a->static_groups = (int)v[2];
    a->groups_follow_order = (int)v[3];
    a->feedback = (int)v[4];
    a->refine_passes = (int)v[5];
    a->refit_rounds = (int)v[6];
    a->shift = v[7];
    return check_group_size(a->G, (npy_intp)a->n, "options.group_size");
}

/* A grid is fitted when the order reaches its group, unless it is fitted beforehand: then the order
 * must take the inputs of a group one after the other. */
static int check_groups(const ptq_gptq_args *a, const int64_t *perm) {
    if (a->static_groups || a->groups_follow_order) return 0;
    for (int64_t j = 0; j < a->n; j++)
        if (perm[j] / a->G != perm[j - j % a->G] / a->G) {
            PyErr_SetString(PyExc_ValueError,
                            "order must keep the groups together, unless options.static_groups or "
                            "options.groups_follow_order is 1");
            return -1;
        }
    return 0;
}

/* Solve with copies of the two index arrays: whatever else shares their memory is written too. */
static PyObject *gptq_solve(ptq_gptq_args *a, PyObject *order, PyArrayObject *g_idx, int threads) {
    int64_t *perm;
    if (args_permutation(&perm, order, "order", (npy_intp)a->n)) return NULL;
    if (check_groups(a, perm)) {
        PyMem_Free(perm);
        return NULL;
    }
    const size_t bytes = sizeof(int32_t) * (size_t)a->n;
    a->perm = perm;
    a->g_idx = PyMem_Malloc(bytes);
    ptq_status status = PTQ_NOMEM;
    if (a->g_idx) PTQ_WITHOUT_GIL(status, ptq_gptq(a, threads));
    if (!status) memcpy(PyArray_DATA(g_idx), a->g_idx, bytes);
    PyMem_Free(a->g_idx);
    PyMem_Free(perm);
    return args_result(status);
}

PTQ_BIND(gptq, 12, "W, H, R, order, options, grid, codes, scales, zeros, g_idx, history, threads",
         "Quantize W column by column with error feedback, then by coordinate descent.\n\n"
         "W (rows, n) float32; H (n, n) float32, undamped; R (n, n) float32, of factor() with the\n"
         "same order; order (n,) int64, a permutation; options (group_size, block_size,\n"
         "static_groups, groups_follow_order, feedback, refine_passes, refit_rounds, shift); grid "
         "as in\n"
         "rtn(); codes (rows, n) uint8, scales (rows, groups) float32, zeros (rows, groups) uint8, "
         "g_idx\n"
         "(n,) int32 and history (1 + refine_passes + 2 * refit_rounds, rows) float64, written.") {
    PyArrayObject *W, *H, *R, *g_idx, *history;
    outputs out;
    int threads;
    if (args_array(&W, args[0], "W", NPY_FLOAT32, 2) ||
        args_array(&H, args[1], "H", NPY_FLOAT32, 2) ||
        args_array(&R, args[2], "R", NPY_FLOAT32, 2) ||
        args_output(&g_idx, args[9], "g_idx", NPY_INT32, 1) ||
        args_output(&history, args[10], "history", NPY_FLOAT64, 2) ||
        args_threads(args[11], &threads))
        return NULL;
    ptq_gptq_args a = {.rows = PyArray_DIM(W, 0), .n = PyArray_DIM(W, 1)};
    const npy_intp rows = PyArray_DIM(W, 0), n = PyArray_DIM(W, 1);
    if (gptq_options(args[4], &a) || args_grid(args[5], &a.grid) || args_shape(H, "H", n, n) ||
        args_shape(R, "R", n, n) || args_dim(g_idx, "g_idx", 0, n) ||
        args_shape(history, "history", 1 + a.refine_passes + 2 * a.refit_rounds, rows) ||
        outputs_parse(args + 6, rows, n, (npy_intp)(n / a.G), &out))
        return NULL;
    if (a.grid.method == PTQ_GRID_FEEDBACK && (!a.feedback || a.static_groups != (a.G == n))) {
        PyErr_SetString(PyExc_ValueError,
                        "grid.method 3, feedback, needs feedback, and static_groups for a channel "
                        "alone");
        return NULL;
    }
    a.W = PyArray_DATA(W);
    a.H = PyArray_DATA(H);
    a.R = PyArray_DATA(R);
    a.codes = PyArray_DATA(out.codes);
    a.scales = PyArray_DATA(out.scales);
    a.zeros = PyArray_DATA(out.zeros);
    a.history = PyArray_DATA(history);
    return gptq_solve(&a, args[3], g_idx, threads);
}

PTQ_BIND(obq, 7, "W, inverse, scale, zero, max_code, codes, threads",
         "Quantize each row of W by Optimal Brain Quantization on given grids.\n\n"
         "W (rows, n) float64; inverse (n, n) float64, of the damped Hessian; scale, zero\n"
         "(rows, n) float64; max_code from 1 to 255; codes (rows, n) uint8, written.") {
    PyArrayObject *W, *inverse, *scale, *zero, *codes;
    int threads;
    if (args_array(&W, args[0], "W", NPY_FLOAT64, 2) ||
        args_array(&inverse, args[1], "inverse", NPY_FLOAT64, 2) ||
        args_array(&scale, args[2], "scale", NPY_FLOAT64, 2) ||
        args_array(&zero, args[3], "zero", NPY_FLOAT64, 2) ||
        args_output(&codes, args[5], "codes", NPY_UINT8, 2) || args_threads(args[6], &threads))
        return NULL;
    const long long max_code = args_int(args[4], "max_code", 1, 255);
    const npy_intp rows = PyArray_DIM(W, 0), n = PyArray_DIM(W, 1);
    if (max_code < 0 || args_shape(inverse, "inverse", n, n) ||
        args_shape(scale, "scale", rows, n) || args_shape(zero, "zero", rows, n) ||
        args_shape(codes, "codes", rows, n))
        return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status,
                    ptq_obq(PyArray_DATA(W), rows, n, PyArray_DATA(inverse), PyArray_DATA(scale),
                            PyArray_DATA(zero), (int)max_code, PyArray_DATA(codes), threads));
    return args_result(status);
}

PTQ_BIND(objective, 4, "E, H, out, threads",
         "Write e H e^T of every row e of E.\n\n"
         "E (rows, n) float32; H (n, n) float32; out (rows,) float64, written.") {
    PyArrayObject *E, *H, *out;
    int threads;
    if (args_array(&E, args[0], "E", NPY_FLOAT32, 2) ||
        args_array(&H, args[1], "H", NPY_FLOAT32, 2) ||
        args_output(&out, args[2], "out", NPY_FLOAT64, 1) || args_threads(args[3], &threads))
        return NULL;
    const npy_intp rows = PyArray_DIM(E, 0), n = PyArray_DIM(E, 1);
    if (args_shape(H, "H", n, n) || args_dim(out, "out", 0, rows)) return NULL;
    ptq_status status;
    PTQ_WITHOUT_GIL(status, ptq_objective(PyArray_DATA(E), rows, n, PyArray_DATA(H),
                                          PyArray_DATA(out), threads));
    return args_result(status);
}
