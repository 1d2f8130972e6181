/* module.c - _core: module slots, CPU level, BLAS, interrupts. */
#define PTQ_IMPORT_ARRAY
#include "bind.h"

#include <stdatomic.h>
#include <stddef.h>

/* Called by the thread that entered the core, between its tasks. */
static int poll_signals(void) {
    PyGILState_STATE state = PyGILState_Ensure();
    const int stop = PyErr_CheckSignals();
    PyGILState_Release(state);
    return stop;
}

/* The C signatures of the routines, the names of SciPy's capsules (tested by SciPy as its ABI).
 * An ILP64 SciPy, which takes 64-bit integers behind the same name, has others. */
#define BLAS_S "__pyx_t_5scipy_6linalg_11cython_blas_s *"
#define LAPACK_S "__pyx_t_5scipy_6linalg_13cython_lapack_s *"
static const char SSYRK[] = "void (char *, char *, int *, int *, " BLAS_S ", " BLAS_S
                            ", int *, " BLAS_S ", " BLAS_S ", int *)";
static const char SGEMM[] = "void (char *, char *, int *, int *, int *, " BLAS_S ", " BLAS_S
                            ", int *, " BLAS_S ", int *, " BLAS_S ", " BLAS_S ", int *)";
static const char STRSM[] = "void (char *, char *, char *, char *, int *, int *, " BLAS_S
                            ", " BLAS_S ", int *, " BLAS_S ", int *)";
static const char SPOTRF[] = "void (char *, int *, " LAPACK_S ", int *, int *)";

/* A routine from a SciPy module's capsules, or NULL without an exception if its signature is not
 * the expected one. */
static void *scipy_routine(const char *module_name, const char *name, const char *signature) {
    PyObject *module = PyImport_ImportModule(module_name);
    PyObject *table = module ? PyObject_GetAttrString(module, "__pyx_capi__") : NULL;
    PyObject *capsule = table ? PyMapping_GetItemString(table, name) : NULL;
    void *pointer = capsule ? PyCapsule_GetPointer(capsule, signature) : NULL;
    Py_XDECREF(capsule);
    Py_XDECREF(table);
    Py_XDECREF(module);
    PyErr_Clear();
    return pointer;
}

static PyObject *use_scipy_blas(PyObject *self, PyObject *ignored) {
    (void)self;
    (void)ignored;
    static ptq_blas blas; /* written anew with the same values, if at all */
    static const struct {
        const char *module, *name, *signature;
        size_t field;
    } wanted[] = {
        {"scipy.linalg.cython_blas", "sgemm", SGEMM, offsetof(ptq_blas, sgemm)},
        {"scipy.linalg.cython_blas", "ssyrk", SSYRK, offsetof(ptq_blas, ssyrk)},
        {"scipy.linalg.cython_blas", "strsm", STRSM, offsetof(ptq_blas, strsm)},
        {"scipy.linalg.cython_lapack", "spotrf", SPOTRF, offsetof(ptq_blas, spotrf)},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *routine = scipy_routine(wanted[i].module, wanted[i].name, wanted[i].signature);
        if (!routine) Py_RETURN_FALSE;
        memcpy((char *)&blas + wanted[i].field, &routine, sizeof routine);
    }
    ptq_blas_set(&blas);
    Py_RETURN_TRUE;
}

static PyObject *use_builtin_blas(PyObject *self, PyObject *ignored) {
    (void)self;
    (void)ignored;
    ptq_blas_set(NULL);
    Py_RETURN_NONE;
}

static PyObject *set_cpu_level(PyObject *self, PyObject *name) {
    (void)self;
    const char *level = PyUnicode_AsUTF8AndSize(name, NULL);
    if (!level) return NULL;
    if (ptq_cpu_select(level) != PTQ_OK)
        return PyErr_Format(PyExc_ValueError,
                            "CPU level %R is unknown or not supported by this CPU; use base, "
                            "avx2, avx512 with _vnni, _bf16, _amx in this order, neon or "
                            "neon_dotprod",
                            name);
    return PyUnicode_FromString(ptq_cpu_level());
}

static PyObject *cpu_supports(PyObject *self, PyObject *name) {
    (void)self;
    const char *level = PyUnicode_AsUTF8AndSize(name, NULL);
    return level ? PyBool_FromLong(ptq_cpu_supports(level)) : NULL;
}

static PyObject *config(PyObject *self, PyObject *ignored) {
    (void)self;
    (void)ignored;
    return Py_BuildValue("ssiN", ptq_cpu_level(), ptq_blas_name(), ptq_thread_count(0),
                         PyBool_FromLong(ptq_has_openmp()));
}

#define ROW(name) {#name, (PyCFunction)(void (*)(void))bind_##name, METH_FASTCALL, name##_doc},
static PyMethodDef methods[] = {
    /* clang-format off: it takes the row after a macro for its body */
    PTQ_FUNCTIONS(ROW)
    /* clang-format on */
    {"use_scipy_blas", use_scipy_blas, METH_NOARGS,
     "use_scipy_blas($module, /)\n--\n\n"
     "Take SciPy's BLAS and LAPACK; return False if it offers no routines that fit."},
    {"use_builtin_blas", use_builtin_blas, METH_NOARGS,
     "use_builtin_blas($module, /)\n--\n\nFactorize and multiply with the core's own kernels."},
    {"set_cpu_level", set_cpu_level, METH_O,
     "set_cpu_level($module, name, /)\n--\n\n"
     "Use the kernels of a CPU level, or the best if the name is empty; return its name."},
    {"cpu_supports", cpu_supports, METH_O,
     "cpu_supports($module, name, /)\n--\n\nReturn True if this CPU can run the named level."},
    {"config", config, METH_NOARGS,
     "config($module, /)\n--\n\nReturn (level, blas, threads, openmp) that are in effect."},
    {NULL, NULL, 0, NULL},
};
#undef ROW

static int module_exec(PyObject *module) {
    (void)module;
    /* NumPy's API table is a static of this file: one load per process. Set last, so that an import
     * that failed can be tried again. */
    static atomic_int loaded;
    if (atomic_load(&loaded)) {
        PyErr_SetString(PyExc_ImportError, "ptqkit._core can be loaded once per process");
        return -1;
    }
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    ptq_cpu_select("");
    ptq_set_poll(poll_signals);
    atomic_store(&loaded, 1);
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
