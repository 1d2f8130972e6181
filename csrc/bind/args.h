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

/* All functions that return int return 0 on success, or -1 after raising. Arrays that they hand
 * out are borrowed. No check runs code of the caller's: numbers are ints, floats or NumPy scalars
 * and never objects with methods, so nothing that was checked can change before it is used. */

/* Call `function` if exactly `expected` arguments were given. Until it returns, NumPy refuses to
 * resize the arrays among them, and those in tuples. signature: "name(a, b)". */
typedef PyObject *(*args_function)(PyObject *const *args);
PyObject *args_call(const char *signature, args_function function, PyObject *const *args,
                    Py_ssize_t given, Py_ssize_t expected);

/* A C-contiguous, aligned array of the given type and number of dimensions. */
int args_array(PyArrayObject **out, PyObject *o, const char *name, int type, int ndim);
/* The same, and it must be writable. */
int args_output(PyArrayObject **out, PyObject *o, const char *name, int type, int ndim);
/* The same as args_array, or *out = NULL if o is None. */
int args_optional(PyArrayObject **out, PyObject *o, const char *name, int type, int ndim);
/* NPY_FLOAT64 if o is an array of that type, else NPY_FLOAT32: for functions that take either. */
int args_float_type(PyObject *o);

/* Refuse an array whose size along an axis is not the expected one. */
int args_dim(PyArrayObject *a, const char *name, int axis, npy_intp expected);
/* Refuse an array whose first two axes do not have the expected sizes. */
int args_shape(PyArrayObject *a, const char *name, npy_intp rows, npy_intp columns);

/* ptq_dtype of tokens: 0 float32, 1 float16, 2 bfloat16, whose bits travel as uint16. */
int args_dtype(PyObject *o, ptq_dtype *dtype);
/* Tokens (tokens, n) with unit stride along n; *ldx is the number of elements from token to token.
 */
int args_tokens(PyArrayObject **out, PyObject *o, const char *name, ptq_dtype dtype, int64_t *ldx);

/* Copies of index arrays, which stay valid when the caller's array changes during the call; free
 * them with PyMem_Free. A permutation of 0 .. n - 1: */
int args_permutation(int64_t **copy, PyObject *o, const char *name, npy_intp n);
/* The group of each of n columns, from 0 to groups - 1; *copy is to be freed after an error too. */
int args_groups(int32_t **copy, PyArrayObject *g_idx, npy_intp n, npy_intp groups);
/* Tokens of X: *count of them, or all `tokens` and *copy = NULL if o is None. */
int args_rows(int64_t **copy, PyObject *o, npy_intp tokens, int64_t *count);

/* An integer in [lowest, highest], where lowest >= 0; -1 after raising. */
long long args_int(PyObject *o, const char *name, long long lowest, long long highest);
int args_real(double *out, PyObject *o, const char *name);
/* Threads of a call, 0 for the default policy. */
int args_threads(PyObject *o, int *threads);

/* A field of a tuple of options: an integer in [lowest, highest], or a real number in
 * (lowest, highest]. */
typedef struct {
    const char *name;
    int real;
    double lowest, highest;
} args_field;
/* values[i] of the fields of a tuple. */
int args_fields(PyObject *tuple, const char *name, const args_field *fields, int count,
                double *values);
/* (max_code, symmetric, method, steps, candidates, scale_type, min_zero, min_shrink, norm) */
int args_grid(PyObject *tuple, ptq_grid *grid);
/* (bits, symmetric, narrow) */
int args_signed_grid(PyObject *tuple, ptq_signed_grid *grid);

/* Raise what a status means; 0 if it is PTQ_OK. */
int args_raise(ptq_status status);
/* The same, returning a new reference to None, or NULL. */
PyObject *args_result(ptq_status status);

#endif
