/* blas.c - SciPy's routines, if the binding has handed them over. */
#include "blas.h"

#include <stdatomic.h>
#include <stddef.h>

static _Atomic(const ptq_blas *) routines;

void ptq_blas_set(const ptq_blas *blas) { atomic_store(&routines, blas); }
const ptq_blas *ptq_blas_get(void) { return atomic_load(&routines); }
const char *ptq_blas_name(void) { return ptq_blas_get() ? "scipy" : "builtin"; }
