/* module.c - _core: module slots, CPU level, BLAS, interrupts. */
#define PTQ_IMPORT_ARRAY
#include "bind.h"

#include <stdatomic.h>

/* Called by the thread that entered the core, between its tasks. */
static int poll_signals(void) {
    PyGILState_STATE state = PyGILState_Ensure();
    const int stop = PyErr_CheckSignals();
    PyGILState_Release(state);
    return stop;
}

/* A routine from a SciPy module's capsules, provided its C signature is the expected one: an
 * ILP64 SciPy takes 64-bit integers behind the same name. NULL without an exception otherwise. */
static void *scipy_routine(PyObject *module, const char *name, const char *types) {
    void *pointer = NULL;
    PyObject *table = NULL, *capsule = NULL, *seen = NULL;
    table = PyObject_GetAttrString(module, "__pyx_capi__");
    capsule = table ? PyMapping_GetItemString(table, name) : NULL;
    const char *signature = capsule ? PyCapsule_GetName(capsule) : NULL;
    if (!signature) goto done;
    /* reduce "void (char *, int *, <typedef of float> *)" to one letter per argument */
    char letters[16] = {0};
    size_t count = 0;
    seen = PyUnicode_FromString(signature);
    if (!seen || strncmp(signature, "void (", 6)) goto done;
    for (const char *at = signature + 6; *at && count < sizeof letters - 1;) {
        const size_t length = strcspn(at, ",)");
        char argument[96] = {0};
        if (length >= sizeof argument) goto done;
        memcpy(argument, at, length);
        if (!strcmp(argument, "char *")) letters[count++] = 'c';
        else if (!strcmp(argument, "int *")) letters[count++] = 'i';
        else if (strstr(argument, "cython_") && length > 3 && !strcmp(argument + length - 3, "s *"))
            letters[count++] = 's';
        else if (!strcmp(argument, "float *")) letters[count++] = 's';
        else goto done;
        at += length;
        at += strspn(at, ",) ");
    }
    if (!strcmp(letters, types)) pointer = PyCapsule_GetPointer(capsule, signature);
done:
    Py_XDECREF(seen);
    Py_XDECREF(capsule);
    Py_XDECREF(table);
    PyErr_Clear();
    return pointer;
}

/* use_scipy_blas() -> bool: take ssyrk and spotrf from SciPy; False where that cannot be. */
static PyObject *use_scipy_blas(PyObject *self, PyObject *ignored) {
    (void)self;
    (void)ignored;
    void *ssyrk = NULL, *spotrf = NULL;
    PyObject *blas = PyImport_ImportModule("scipy.linalg.cython_blas");
    PyObject *lapack = blas ? PyImport_ImportModule("scipy.linalg.cython_lapack") : NULL;
    if (lapack) {
        ssyrk = scipy_routine(blas, "ssyrk", "cciississi");
        spotrf = scipy_routine(lapack, "spotrf", "cisii");
    }
    Py_XDECREF(lapack);
    Py_XDECREF(blas);
    PyErr_Clear();
    if (!ssyrk || !spotrf) Py_RETURN_FALSE;
    ptq_blas_set((ptq_ssyrk_fn)ssyrk, (ptq_spotrf_fn)spotrf);
    Py_RETURN_TRUE;
}

static PyObject *use_builtin_blas(PyObject *self, PyObject *ignored) {
    (void)self;
    (void)ignored;
    ptq_blas_set(NULL, NULL);
    Py_RETURN_NONE;
}

/* set_cpu_level(name or "") -> name of the level that runs */
static PyObject *set_cpu_level(PyObject *self, PyObject *name) {
    (void)self;
    const char *level = PyUnicode_AsUTF8(name);
    if (!level) return NULL;
    if (ptq_cpu_select(level) != PTQ_OK)
        return PyErr_Format(PyExc_ValueError,
                            "CPU level %R is unknown or not supported by this CPU; use base, "
                            "avx2, avx512, avx512_bf16 or neon",
                            name);
    return PyUnicode_FromString(ptq_cpu_level());
}

static PyObject *cpu_supports(PyObject *self, PyObject *name) {
    (void)self;
    const char *level = PyUnicode_AsUTF8(name);
    return level ? PyBool_FromLong(ptq_cpu_supports(level)) : NULL;
}

/* config() -> (level, blas, threads, openmp) */
static PyObject *config(PyObject *self, PyObject *ignored) {
    (void)self;
    (void)ignored;
    return Py_BuildValue("ssiN", ptq_cpu_level(), ptq_blas_name(), ptq_thread_count(0),
                         PyBool_FromLong(ptq_has_openmp()));
}

#define FAST(name, function, doc) \
    {name, (PyCFunction)(void (*)(void))function, METH_FASTCALL, PyDoc_STR(doc)}
static PyMethodDef methods[] = {
    FAST("hessian_update", bind_hessian_update, "hessian_update(S, X, dtype, rows, threads)"),
    FAST("hessian_finish", bind_hessian_finish, "hessian_finish(S, out, factor, threads)"),
    FAST("channel_ranges", bind_channel_ranges,
         "channel_ranges(X, dtype, rows, minimum, maximum, sum, threads)"),
    FAST("equalization_scales", bind_equalization_scales,
         "equalization_scales(rx, rw, alpha, lowest, highest, scales)"),
    FAST("equalization_errors", bind_equalization_errors,
         "equalization_errors(X, weights, scales, options, grid, minimum, maximum, errors, threads)"),
    FAST("symmetric_check", bind_symmetric_check, "symmetric_check(H, tolerance, threads) -> int"),
    FAST("finite_check", bind_finite_check, "finite_check(x, threads) -> bool"),
    FAST("factor", bind_factor, "factor(H, order, shift, R, threads) -> failed pivot or -1"),
    FAST("gptq", bind_gptq,
         "gptq(W, H, R, order, options, grid, codes, scales, zeros, g_idx, history, threads)"),
    FAST("rtn", bind_rtn, "rtn(W, group_size, grid, H, codes, scales, zeros, threads)"),
    FAST("obq", bind_obq, "obq(W, inverse, scale, zero, max_code, codes, threads)"),
    FAST("objective", bind_objective, "objective(E, H, out, threads)"),
    FAST("codes_on_grid", bind_codes_on_grid,
         "codes_on_grid(W, scales, zeros, max_code, codes, threads)"),
    FAST("signed_grid", bind_signed_grid, "signed_grid(low, high, grid) -> (scale, zero)"),
    FAST("activation_range", bind_activation_range,
         "activation_range(X, dtype, skip, threads) -> (low, high)"),
    FAST("activations_quantize", bind_activations_quantize,
         "activations_quantize(X, dtype, skip, grid, per_token, codes, scales, zeros, threads)"),
    FAST("outlier_columns", bind_outlier_columns,
         "outlier_columns(X, dtype, threshold, outliers, threads)"),
    FAST("bias_correction", bind_bias_correction, "bias_correction(W, W_hat, mean, out, threads)"),
    FAST("int8_matmul", bind_int8_matmul,
         "int8_matmul(x, scales, zeros, w, scales, zeros, x_float, w_float, y, threads)"),
    FAST("pack", bind_pack, "pack(codes, bits, words, threads)"),
    FAST("unpack", bind_unpack, "unpack(codes, bits, words, threads)"),
    FAST("softmax_quantize", bind_softmax_quantize,
         "softmax_quantize(scores, allowed, causal, grid, correction, table, out, corrections, "
         "threads) -> (refused row or -1, empty rows)"),
    FAST("softmax_statistics", bind_softmax_statistics,
         "softmax_statistics(P, allowed, queries, causal, grid, tolerance, sums, threads) -> "
         "(refused row or -1, empty rows)"),
    FAST("softmax_exp", bind_softmax_exp, "softmax_exp(x, out, threads)"),
    FAST("energy", bind_energy, "energy(reference, quantized, out, threads)"),
    FAST("energy_columns", bind_energy_columns,
         "energy_columns(reference, quantized, out, threads)"),
    {"use_scipy_blas", use_scipy_blas, METH_NOARGS, PyDoc_STR("use_scipy_blas() -> bool")},
    {"use_builtin_blas", use_builtin_blas, METH_NOARGS, PyDoc_STR("use_builtin_blas()")},
    {"set_cpu_level", set_cpu_level, METH_O, PyDoc_STR("set_cpu_level(name) -> name")},
    {"cpu_supports", cpu_supports, METH_O, PyDoc_STR("cpu_supports(name) -> bool")},
    {"config", config, METH_NOARGS, PyDoc_STR("config() -> (level, blas, threads, openmp)")},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module) {
    (void)module;
    /* NumPy's API table is a static of this file: one load per process. */
    static atomic_int loaded;
    if (atomic_exchange(&loaded, 1)) {
        PyErr_SetString(PyExc_ImportError, "ptqkit._core can be loaded once per process");
        return -1;
    }
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    ptq_cpu_select("");
    ptq_set_poll(poll_signals);
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "ptqkit._core",
    .m_doc = PyDoc_STR("C core of ptqkit; positional arguments only, see ptqkit for the API."),
    .m_size = 0,
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
