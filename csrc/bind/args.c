/* args.c - argument checks, holds on arrays, and the exceptions of the core's statuses. */
#include "args.h"

enum { MAX_THREADS = 1024, MAX_FIELDS = 16, MOST_NESTED = 3 };

/* ---- calls ----------------------------------------------------------------------------- */

/* NumPy never resizes an array that has weak references, whatever its reference count. Tuples are
 * looked into as deep as any function does. */
static int hold(PyObject *holds, PyObject *o, int depth) {
    if (PyTuple_Check(o)) {
        for (Py_ssize_t i = 0; depth && i < PyTuple_Size(o); i++)
            if (hold(holds, PyTuple_GetItem(o, i), depth - 1)) return -1;
        return 0;
    }
    if (!PyArray_Check(o)) return 0;
    PyObject *reference = PyWeakref_NewRef(o, NULL);
    if (!reference) return -1;
    const int status = PyList_Append(holds, reference);
    Py_DECREF(reference);
    return status;
}

PyObject *args_call(const char *signature, args_function function, PyObject *const *args,
                    Py_ssize_t given, Py_ssize_t expected) {
    if (given != expected)
        return PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, not %zd", signature, expected,
                            given);
    PyObject *holds = PyList_New(0);
    int held = holds ? 0 : -1;
    for (Py_ssize_t i = 0; !held && i < given; i++) held = hold(holds, args[i], MOST_NESTED);
    PyObject *result = held ? NULL : function(args);
    Py_XDECREF(holds);
    return result;
}

/* ---- arrays ---------------------------------------------------------------------------- */

/* "int" of 5; a new reference. */
static PyObject *type_name(PyObject *o) {
    return PyObject_GetAttrString((PyObject *)Py_TYPE(o), "__name__");
}

static int raise_type(PyObject *o, const char *name, const char *wanted) {
    PyObject *type = type_name(o);
    if (type) PyErr_Format(PyExc_TypeError, "%s must be %s, not %U", name, wanted, type);
    Py_XDECREF(type);
    return -1;
}

static int raise_dtype(PyArrayObject *a, const char *name, int type) {
    PyArray_Descr *want = PyArray_DescrFromType(type);
    PyErr_Format(PyExc_TypeError, "%s must have dtype %S, not %S: convert it with astype", name,
                 (PyObject *)want, (PyObject *)PyArray_DESCR(a));
    Py_XDECREF(want);
    return -1;
}

static int is_of_type(PyArrayObject *a, int type) {
    return PyArray_TYPE(a) == type && PyArray_ISNOTSWAPPED(a);
}

int args_array(PyArrayObject **out, PyObject *o, const char *name, int type, int ndim) {
    if (!PyArray_Check(o)) return raise_type(o, name, "a NumPy array");
    PyArrayObject *a = (PyArrayObject *)o;
    if (!is_of_type(a, type)) return raise_dtype(a, name, type);
    if (PyArray_NDIM(a) != ndim) {
        PyErr_Format(PyExc_ValueError, "%s must have %d dimension(s), not %d", name, ndim,
                     PyArray_NDIM(a));
        return -1;
    }
    if (!PyArray_IS_C_CONTIGUOUS(a) || !PyArray_ISALIGNED(a)) {
        PyErr_Format(PyExc_ValueError,
                     "%s must be C-contiguous and aligned: copy it with numpy.array(%s, order='C')",
                     name, name);
        return -1;
    }
    *out = a;
    return 0;
}

int args_output(PyArrayObject **out, PyObject *o, const char *name, int type, int ndim) {
    if (args_array(out, o, name, type, ndim)) return -1;
    return PyArray_FailUnlessWriteable(*out, name);
}

int args_optional(PyArrayObject **out, PyObject *o, const char *name, int type, int ndim) {
    *out = NULL;
    return o == Py_None ? 0 : args_array(out, o, name, type, ndim);
}

int args_float_type(PyObject *o) {
    const int wide = PyArray_Check(o) && PyArray_TYPE((PyArrayObject *)o) == NPY_FLOAT64;
    return wide ? NPY_FLOAT64 : NPY_FLOAT32;
}

int args_dim(PyArrayObject *a, const char *name, int axis, npy_intp expected) {
    if (PyArray_DIM(a, axis) == expected) return 0;
    PyErr_Format(PyExc_ValueError,
                 "%s has size %zd along axis %d, but the other arguments need %zd", name,
                 (Py_ssize_t)PyArray_DIM(a, axis), axis, (Py_ssize_t)expected);
    return -1;
}

int args_shape(PyArrayObject *a, const char *name, npy_intp rows, npy_intp columns) {
    return args_dim(a, name, 0, rows) ? -1 : args_dim(a, name, 1, columns);
}

/* ---- tokens and indices ---------------------------------------------------------------- */

int args_dtype(PyObject *o, ptq_dtype *dtype) {
    const long long value = args_int(o, "dtype", PTQ_F32, PTQ_BF16);
    *dtype = value < 0 ? PTQ_F32 : (ptq_dtype)value;
    return value < 0 ? -1 : 0;
}

int args_tokens(PyArrayObject **out, PyObject *o, const char *name, ptq_dtype dtype, int64_t *ldx) {
    const int type = dtype == PTQ_F32 ? NPY_FLOAT32 : dtype == PTQ_F16 ? NPY_HALF : NPY_UINT16;
    if (!PyArray_Check(o)) return raise_type(o, name, "a NumPy array");
    PyArrayObject *X = (PyArrayObject *)o;
    if (!is_of_type(X, type)) return raise_dtype(X, name, type);
    const npy_intp size = (npy_intp)PyArray_ITEMSIZE(X);
    if (PyArray_NDIM(X) != 2 || (PyArray_DIM(X, 1) > 1 && PyArray_STRIDE(X, 1) != size) ||
        PyArray_STRIDE(X, 0) % size || !PyArray_ISALIGNED(X) ||
        (PyArray_DIM(X, 0) > 1 && PyArray_STRIDE(X, 0) < PyArray_DIM(X, 1) * size)) {
        PyErr_Format(PyExc_ValueError,
                     "%s must be 2-D, (tokens, n), with contiguous rows that do not overlap", name);
        return -1;
    }
    *ldx = PyArray_DIM(X, 0) > 1 ? PyArray_STRIDE(X, 0) / size : PyArray_DIM(X, 1);
    *out = X;
    return 0;
}

/* Memory for `count` items of `size` bytes, filled from `data`. */
static int copy_items(void **copy, const void *data, size_t count, size_t size) {
    *copy = PyMem_Calloc(count ? count : 1, size);
    if (!*copy) {
        PyErr_NoMemory();
        return -1;
    }
    if (data && count) memcpy(*copy, data, count * size);
    return 0;
}

/* Index of the first item that is out of range or was there before, or -1. */
static npy_intp first_misplaced(const int64_t *p, npy_intp n, char *seen) {
    for (npy_intp i = 0; i < n; i++)
        if (p[i] < 0 || p[i] >= n || seen[p[i]]++) return i;
    return -1;
}

int args_permutation(int64_t **copy, PyObject *o, const char *name, npy_intp n) {
    PyArrayObject *a;
    void *items, *seen;
    if (args_array(&a, o, name, NPY_INT64, 1) || args_dim(a, name, 0, n)) return -1;
    if (copy_items(&items, PyArray_DATA(a), (size_t)n, sizeof(int64_t))) return -1;
    if (copy_items(&seen, NULL, (size_t)n, 1)) {
        PyMem_Free(items);
        return -1;
    }
    const int64_t *p = items;
    const npy_intp at = first_misplaced(p, n, seen);
    PyMem_Free(seen);
    if (at < 0) {
        *copy = items;
        return 0;
    }
    PyErr_Format(PyExc_ValueError,
                 "%s must be a permutation of the indices from 0 to %zd, but %s[%zd] is %lld%s",
                 name, (Py_ssize_t)n - 1, name, (Py_ssize_t)at, (long long)p[at],
                 p[at] >= 0 && p[at] < n ? " for the second time" : "");
    PyMem_Free(items);
    return -1;
}

int args_groups(int32_t **copy, PyArrayObject *g_idx, npy_intp n, npy_intp groups) {
    *copy = PyMem_Malloc(sizeof(int32_t) * (size_t)n);
    if (!*copy) {
        PyErr_NoMemory();
        return -1;
    }
    memcpy(*copy, PyArray_DATA(g_idx), sizeof(int32_t) * (size_t)n);
    for (npy_intp j = 0; j < n; j++)
        if ((*copy)[j] < 0 || (*copy)[j] >= groups) {
            PyErr_Format(PyExc_ValueError, "g_idx must lie in [0, %zd], not %d at %zd",
                         (Py_ssize_t)groups - 1, (int)(*copy)[j], (Py_ssize_t)j);
            return -1;
        }
    return 0;
}

int args_rows(int64_t **copy, PyObject *o, npy_intp tokens, int64_t *count) {
    PyArrayObject *a;
    void *items;
    *copy = NULL;
    *count = tokens;
    if (args_optional(&a, o, "rows", NPY_INT64, 1)) return -1;
    if (!a) return 0;
    *count = PyArray_DIM(a, 0);
    if (copy_items(&items, PyArray_DATA(a), (size_t)*count, sizeof(int64_t))) return -1;
    const int64_t *row = items;
    for (int64_t i = 0; i < *count; i++)
        if (row[i] < 0 || row[i] >= tokens) {
            PyErr_Format(PyExc_IndexError, "rows[%lld] is %lld, but X has %zd tokens", (long long)i,
                         (long long)row[i], (Py_ssize_t)tokens);
            PyMem_Free(items);
            return -1;
        }
    *copy = items;
    return 0;
}

/* ---- numbers --------------------------------------------------------------------------- */

long long args_int(PyObject *o, const char *name, long long lowest, long long highest) {
    if (!PyLong_Check(o) && !PyArray_IsScalar(o, Integer)) return raise_type(o, name, "an integer");
    const long long value = PyLong_AsLongLong(o);
    const int beyond = value == -1 && PyErr_Occurred();
    if (beyond && !PyErr_ExceptionMatches(PyExc_OverflowError)) return -1;
    if (!beyond && value >= lowest && value <= highest) return value;
    PyErr_Clear();
    PyErr_Format(PyExc_ValueError, "%s must lie in [%lld, %lld], not %R", name, lowest, highest, o);
    return -1;
}

int args_real(double *out, PyObject *o, const char *name) {
    if (!PyFloat_Check(o) && !PyLong_Check(o) && !PyArray_IsScalar(o, Floating) &&
        !PyArray_IsScalar(o, Integer))
        return raise_type(o, name, "a number");
    *out = PyFloat_AsDouble(o);
    return *out == -1.0 && PyErr_Occurred() ? -1 : 0;
}

int args_threads(PyObject *o, int *threads) {
    const long long value = args_int(o, "threads", 0, MAX_THREADS);
    *threads = (int)value;
    return value < 0 ? -1 : 0;
}

static int raise_fields(PyObject *tuple, const char *name, const args_field *fields, int count) {
    PyObject *names = PyUnicode_FromString(fields[0].name), *type = type_name(tuple);
    for (int i = 1; names && i < count; i++) {
        PyObject *longer = PyUnicode_FromFormat("%U, %s", names, fields[i].name);
        Py_DECREF(names);
        names = longer;
    }
    if (names && type && PyTuple_Check(tuple))
        PyErr_Format(PyExc_TypeError, "%s must be the tuple (%U), not one of %zd items", name,
                     names, PyTuple_Size(tuple));
    else if (names && type)
        PyErr_Format(PyExc_TypeError, "%s must be the tuple (%U), not %U", name, names, type);
    Py_XDECREF(names);
    Py_XDECREF(type);
    return -1;
}

static int field_value(PyObject *o, const char *tuple, const args_field *field, double *value) {
    char name[64], limits[64];
    PyOS_snprintf(name, sizeof name, "%s.%s", tuple, field->name);
    if (!field->real) {
        const long long n = args_int(o, name, (long long)field->lowest, (long long)field->highest);
        *value = (double)n;
        return n < 0 ? -1 : 0;
    }
    if (args_real(value, o, name)) return -1;
    if (*value > field->lowest && *value <= field->highest) return 0;
    PyOS_snprintf(limits, sizeof limits, "(%g, %g]", field->lowest, field->highest);
    PyErr_Format(PyExc_ValueError, "%s must lie in %s, not %R", name, limits, o);
    return -1;
}

int args_fields(PyObject *tuple, const char *name, const args_field *fields, int count,
                double *values) {
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != count)
        return raise_fields(tuple, name, fields, count);
    for (int i = 0; i < count; i++)
        if (field_value(PyTuple_GetItem(tuple, i), name, &fields[i], &values[i])) return -1;
    return 0;
}

int args_grid(PyObject *tuple, ptq_grid *grid) {
    static const args_field fields[] = {
        {"max_code", 0, 1, 255},
        {"symmetric", 0, 0, 1},
        {"method", 0, 0, PTQ_GRID_FEEDBACK},
        {"steps", 0, 1, PTQ_GRID_MAX_STEPS},
        {"candidates", 0, 1, INT32_MAX},
        {"scale_type", 0, 0, PTQ_BF16},
        {"min_zero", 0, 0, 255},
        {"min_shrink", 1, 0, 1},
        {"norm", 1, 0, 100},
    };
    double v[MAX_FIELDS];
    if (args_fields(tuple, "grid", fields, (int)(sizeof fields / sizeof *fields), v)) return -1;
    *grid = (ptq_grid){(int)v[0], (int)v[1], (int)v[2],   (int)v[3],  (int)v[4],
                       (int)v[5], (int)v[6], (float)v[7], (float)v[8]};
    if (grid->min_zero <= grid->max_code) return 0;
    PyErr_Format(PyExc_ValueError, "grid.min_zero %d must not exceed grid.max_code %d",
                 grid->min_zero, grid->max_code);
    return -1;
}

int args_signed_grid(PyObject *tuple, ptq_signed_grid *grid) {
    static const args_field fields[] = {
        {"bits", 0, 2, 16}, {"symmetric", 0, 0, 1}, {"narrow", 0, 0, 1}, {"bf16", 0, 0, 1}};
    double v[4];
    if (args_fields(tuple, "grid", fields, 4, v)) return -1;
    *grid = (ptq_signed_grid){(int)v[0], (int)v[1], (int)v[2], (int)v[3]};
    const char *wrong = !grid->symmetric && grid->narrow
                            ? "grid.narrow must be 0 if grid.symmetric is 0"
                        : grid->bf16 && (grid->narrow || grid->bits > 8)
                            ? "grid.bf16 must be 0 if grid.narrow is 1 or grid.bits is above 8"
                            : NULL;
    if (!wrong) return 0;
    PyErr_SetString(PyExc_ValueError, wrong);
    return -1;
}

/* ---- results --------------------------------------------------------------------------- */

int args_raise(ptq_status status) {
    switch (status) {
        case PTQ_OK: return 0;
        case PTQ_NOMEM: PyErr_NoMemory(); return -1;
        case PTQ_INTERRUPTED:
            if (!PyErr_Occurred()) PyErr_SetNone(PyExc_KeyboardInterrupt);
            return -1;
        case PTQ_NONFINITE:
            PyErr_SetString(PyExc_FloatingPointError,
                            "an input holds NaN or Inf, or the result overflows float32");
            return -1;
        case PTQ_OVERFLOW:
            PyErr_SetString(PyExc_OverflowError, "a sum overflows float32");
            return -1;
        case PTQ_NOT_PD:
            PyErr_SetString(PyExc_ArithmeticError,
                            "H is not positive definite: add more to its diagonal");
            return -1;
        case PTQ_BLAS:
            PyErr_SetString(PyExc_RuntimeError,
                            "a BLAS call failed: use the built-in one (PTQKIT_BLAS=builtin)");
            return -1;
        case PTQ_NOT_SYMMETRIC:
        case PTQ_ROW_REFUSED: /* the binding answers these itself */
        case PTQ_INVALID: break;
    }
    PyErr_SetString(PyExc_ValueError,
                    "sizes or options are out of range: empty, too large for the function, or not "
                    "belonging together");
    return -1;
}

PyObject *args_result(ptq_status status) {
    if (args_raise(status)) return NULL;
    Py_RETURN_NONE;
}
