/* args.h - the binding's argument checks and its one status-to-exception map. */
#ifndef PTQ_ARGS_H
#define PTQ_ARGS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL ptqkit_core_ARRAY_API
#ifndef PTQ_IMPORT_ARRAY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "../core/ptq.h"

/* Raise TypeError unless a call has exactly `expected` arguments; 0 on success. */
int args_count(const char *function, Py_ssize_t given, Py_ssize_t expected);
/* A borrowed C-contiguous array of the given type and number of dimensions, or NULL and an
 * exception. writable: also refuse read-only arrays. */
PyArrayObject *args_array(PyObject *o, const char *name, int type, int ndim, int writable);
/* The same, or *out = NULL for None. Returns 0 on success. */
int args_array_or_none(PyObject *o, const char *name, int type, int ndim, PyArrayObject **out);
/* Raise ValueError unless the array's dimension has the expected size; 0 on success. */
int args_dim(PyArrayObject *a, const char *name, int axis, npy_intp expected);
/* Raise ValueError unless a 1-D int64 array is a permutation of its indices; 0 on success. */
int args_permutation(PyArrayObject *a, const char *name);
/* X as (tokens, n) with unit stride along n, or NULL and an exception; bf16 travels as uint16. */
PyArrayObject *args_tokens(PyObject *o, ptq_dtype dtype);
/* Raise IndexError unless every index of a 1-D int64 array is a token of X; 0 on success. */
int args_rows(PyArrayObject *rows, npy_intp tokens);
/* An integer in [lowest, highest]; -1 and an exception otherwise (lowest >= 0). */
long long args_int(PyObject *o, const char *name, long long lowest, long long highest);
/* (max_code, symmetric, method, steps, candidates, scale_type, min_zero, min_shrink, norm). */
int args_grid(PyObject *tuple, ptq_grid *grid);
/* Turn a status into an exception and NULL, or a new reference to None. */
PyObject *args_result(ptq_status status);

#endif
