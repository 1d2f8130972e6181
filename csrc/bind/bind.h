/* bind.h - the functions of _core; positional arguments only, keywords live in Python. */
#ifndef PTQ_BIND_H
#define PTQ_BIND_H

#include "args.h"

#define PTQ_BIND(name) PyObject *name(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
PTQ_BIND(bind_hessian_update);
PTQ_BIND(bind_hessian_finish);
PTQ_BIND(bind_symmetric_check);
PTQ_BIND(bind_finite_check);
PTQ_BIND(bind_factor);
PTQ_BIND(bind_gptq);
PTQ_BIND(bind_rtn);
PTQ_BIND(bind_obq);
PTQ_BIND(bind_objective);
PTQ_BIND(bind_pack);
PTQ_BIND(bind_unpack);
PTQ_BIND(bind_softmax_quantize);
PTQ_BIND(bind_softmax_statistics);
PTQ_BIND(bind_softmax_exp);
PTQ_BIND(bind_energy);
PTQ_BIND(bind_energy_columns);

/* Run a core call with the GIL released. */
#define PTQ_WITHOUT_GIL(status, call) \
    do {                              \
        Py_BEGIN_ALLOW_THREADS        \
        status = (call);              \
        Py_END_ALLOW_THREADS          \
    } while (0)

#endif
