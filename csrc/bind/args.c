/* args.c - argument checks; the only file that raises. */
#include "args.h"

int args_count(const char *function, Py_ssize_t given, Py_ssize_t expected) {
    if (given == expected) return 0;
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, not %zd", function, expected, given);
    return -1;
}

PyArrayObject *args_array(PyObject *o, const char *name, int type, int ndim, int writable) {
    if (!PyArray_Check(o)) {
        PyErr_Format(PyExc_TypeError, "%s must be a NumPy array, not %s", name,
                     Py_TYPE(o)->tp_name);
        return NULL;
    }
    PyArrayObject *a = (PyArrayObject *)o;
    if (PyArray_TYPE(a) != type || !PyArray_ISNOTSWAPPED(a)) {
        PyArray_Descr *want = PyArray_DescrFromType(type);
        PyErr_Format(PyExc_TypeError, "%s must have dtype %S, not %S", name, (PyObject *)want,
                     (PyObject *)PyArray_DESCR(a));
        Py_XDECREF(want);
        return NULL;
    }
    if (PyArray_NDIM(a) != ndim) {
        PyErr_Format(PyExc_ValueError, "%s must have %d dimension(s), not %d", name, ndim,
                     PyArray_NDIM(a));
        return NULL;
    }
    if (!PyArray_IS_C_CONTIGUOUS(a) || !PyArray_ISALIGNED(a)) {
        PyErr_Format(PyExc_ValueError, "%s must be C-contiguous and aligned", name);
        return NULL;
    }
    if (writable && PyArray_FailUnlessWriteable(a, name) < 0) return NULL;
    return a;
}

int args_array_or_none(PyObject *o, const char *name, int type, int ndim, PyArrayObject **out) {
    *out = NULL;
    if (o == Py_None) return 0;
    *out = args_array(o, name, type, ndim, 0);
    return *out ? 0 : -1;
}

int args_dim(PyArrayObject *a, const char *name, int axis, npy_intp expected) {
    if (PyArray_DIM(a, axis) == expected) return 0;
    PyErr_Format(PyExc_ValueError, "%s has size %zd along axis %d, expected %zd", name,
                 (Py_ssize_t)PyArray_DIM(a, axis), axis, (Py_ssize_t)expected);
    return -1;
}

int args_permutation(PyArrayObject *a, const char *name) {
    const npy_intp n = PyArray_DIM(a, 0);
    const int64_t *p = PyArray_DATA(a);
    char *seen = PyMem_Calloc((size_t)(n ? n : 1), 1);
    if (!seen) {
        PyErr_NoMemory();
        return -1;
    }
    int bad = 0;
    for (npy_intp i = 0; i < n && !bad; i++) bad = p[i] < 0 || p[i] >= n || seen[p[i]]++;
    PyMem_Free(seen);
    if (bad) PyErr_Format(PyExc_ValueError, "%s must be a permutation", name);
    return bad ? -1 : 0;
}

PyArrayObject *args_tokens(PyObject *o, ptq_dtype dtype) {
    const int type = dtype == PTQ_F32 ? NPY_FLOAT32 : dtype == PTQ_F16 ? NPY_HALF : NPY_UINT16;
    if (!PyArray_Check(o) || PyArray_TYPE((PyArrayObject *)o) != type ||
        !PyArray_ISNOTSWAPPED((PyArrayObject *)o)) {
        PyErr_SetString(PyExc_TypeError, "X must be an array whose dtype matches `dtype`");
        return NULL;
    }
    PyArrayObject *X = (PyArrayObject *)o;
    const npy_intp size = PyArray_ITEMSIZE(X);
    if (PyArray_NDIM(X) != 2 || (PyArray_DIM(X, 1) > 1 && PyArray_STRIDE(X, 1) != size) ||
        PyArray_STRIDE(X, 0) % size || !PyArray_ISALIGNED(X) ||
        (PyArray_DIM(X, 0) > 1 && PyArray_STRIDE(X, 0) < PyArray_DIM(X, 1) * size)) {
        PyErr_SetString(PyExc_ValueError, "X must be 2-D with contiguous rows");
        return NULL;
    }
    return X;
}

int args_rows(PyArrayObject *rows, npy_intp tokens) {
    const int64_t *r = PyArray_DATA(rows);
    for (npy_intp i = 0; i < PyArray_DIM(rows, 0); i++)
        if (r[i] < 0 || r[i] >= tokens) {
            PyErr_SetString(PyExc_IndexError, "a row index lies outside X");
            return -1;
        }
    return 0;
}

long long args_int(PyObject *o, const char *name, long long lowest, long long highest) {
    const long long value = PyLong_AsLongLong(o);
    if (value == -1 && PyErr_Occurred()) return -1;
    if (value < lowest || value > highest) {
        PyErr_Format(PyExc_ValueError, "%s must lie in [%lld, %lld], not %lld", name, lowest,
                     highest, value);
        return -1;
    }
    return value;
}

int args_grid(PyObject *tuple, ptq_grid *grid) {
    double min_shrink, norm;
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "grid must be a tuple");
        return -1;
    }
    if (!PyArg_ParseTuple(tuple, "iiiiiiidd:grid", &grid->max_code, &grid->symmetric,
                          &grid->method, &grid->steps, &grid->candidates, &grid->scale_type,
                          &grid->min_zero, &min_shrink, &norm))
        return -1;
    grid->min_shrink = (float)min_shrink;
    grid->norm = (float)norm;
    const int ok = grid->max_code >= 1 && grid->max_code <= 255 && grid->method >= 0 &&
                   grid->method <= PTQ_GRID_HESSIAN && grid->steps >= 1 &&
                   grid->steps <= PTQ_GRID_MAX_STEPS && grid->candidates >= 1 &&
                   grid->scale_type >= 0 && grid->scale_type <= PTQ_BF16 && grid->min_zero >= 0 &&
                   grid->min_zero <= grid->max_code && min_shrink > 0 && min_shrink <= 1 &&
                   norm > 0 && norm < 100;
    if (!ok) PyErr_SetString(PyExc_ValueError, "grid options are out of range");
    return ok ? 0 : -1;
}

PyObject *args_result(ptq_status status) {
    switch (status) {
        case PTQ_OK: Py_RETURN_NONE;
        case PTQ_NOMEM: return PyErr_NoMemory();
        case PTQ_INTERRUPTED:
            if (!PyErr_Occurred()) PyErr_SetNone(PyExc_KeyboardInterrupt);
            return NULL;
        case PTQ_NONFINITE:
            PyErr_SetString(PyExc_FloatingPointError, "NaN or Inf met");
            return NULL;
        case PTQ_NOT_PD:
            PyErr_SetString(PyExc_ArithmeticError, "not positive definite");
            return NULL;
        case PTQ_BLAS: PyErr_SetString(PyExc_RuntimeError, "a BLAS call failed"); return NULL;
        case PTQ_NOT_SYMMETRIC:
        case PTQ_ROW_REFUSED:
        case PTQ_INVALID: break;
    }
    PyErr_SetString(PyExc_ValueError, "sizes or options are out of range");
    return NULL;
}
