/* bind.h - the functions of _core; positional arguments only, keywords live in Python. */
#ifndef PTQ_BIND_H
#define PTQ_BIND_H

#include "args.h"

/* Every function that is bound in a bind_*.c file: its prototype and its row of the method table
 * come from here. */
#define PTQ_FUNCTIONS(X)    \
    X(hessian_update)       \
    X(hessian_finish)       \
    X(cross_update)         \
    X(moved_outputs)        \
    X(symmetric_check)      \
    X(finite_check)         \
    X(factor)               \
    X(target_correction)    \
    X(gptq)                 \
    X(rtn)                  \
    X(obq)                  \
    X(best_paths)           \
    X(couple_rows)          \
    X(couple_block)         \
    X(objective)            \
    X(codes_on_grid)        \
    X(channel_ranges)       \
    X(equalization_scales)  \
    X(equalization_errors)  \
    X(signed_grid)          \
    X(activation_range)     \
    X(activations_quantize) \
    X(outlier_columns)      \
    X(bias_correction)      \
    X(int8_matmul)          \
    X(int8_pack)            \
    X(int8_linear)          \
    X(pack)                 \
    X(unpack)               \
    X(words_pack)           \
    X(words_unpack)         \
    X(packed_dequantize)    \
    X(packed_matmul)        \
    X(decoder_begin)        \
    X(decoder_end)          \
    X(decoder_blocks)       \
    X(softmax_quantize)     \
    X(softmax_statistics)   \
    X(softmax_exp)          \
    X(energy)               \
    X(energy_columns)       \
    X(activation_statistics)

#define PTQ_DECLARE(name)           \
    extern const char name##_doc[]; \
    PyObject *bind_##name(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PTQ_FUNCTIONS(PTQ_DECLARE)
#undef PTQ_DECLARE

/* Define function `name` of `count` arguments, whose names are in `arguments`; the body follows and
 * sees them as args[]. `doc` says in a sentence what it does, then the shapes. */
#define PTQ_BIND(name, count, arguments, doc)                                        \
    const char name##_doc[] = #name "($module, " arguments ", /)\n--\n\n" doc;       \
    static PyObject *name##_call(PyObject *const *args);                             \
    PyObject *bind_##name(PyObject *self, PyObject *const *args, Py_ssize_t nargs) { \
        (void)self;                                                                  \
        return args_call(#name "(" arguments ")", name##_call, args, nargs, count);  \
    }                                                                                \
    static PyObject *name##_call(PyObject *const *args)

/* (words, order, bits, scales, zeros, starts) of outputs and inputs that are set; w->starts is a
 * copy, to be freed with PyMem_Free (bind_lowbit.c). */
int args_packed(PyObject *const *args, ptq_packed *w);
/* Refuse what are no panels of words of 8-bit weights (outputs, n) (bind_int8.c). */
int args_words(PyArrayObject *words, npy_intp outputs, npy_intp n);

/* Run a core call with the GIL released. Arguments are evaluated without it, so they may read
 * PyArray_DATA, which is held (args_call), but no shape, which another thread may set. */
#define PTQ_WITHOUT_GIL(status, call)           \
    do {                                        \
        Py_BEGIN_ALLOW_THREADS status = (call); \
        Py_END_ALLOW_THREADS                    \
    } while (0)

#endif
