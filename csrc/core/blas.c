/* blas.c - SciPy's routines, if the binding has handed them over. */
#include "blas.h"

#include <stdatomic.h>
#include <stddef.h>

static _Atomic(ptq_ssyrk_fn) ssyrk;
static _Atomic(ptq_spotrf_fn) spotrf;

void ptq_blas_set(ptq_ssyrk_fn new_ssyrk, ptq_spotrf_fn new_spotrf) {
    atomic_store(&ssyrk, new_ssyrk);
    atomic_store(&spotrf, new_spotrf);
}
const char *ptq_blas_name(void) {
    return ptq_blas_ssyrk() && ptq_blas_spotrf() ? "scipy" : "builtin";
}
ptq_ssyrk_fn ptq_blas_ssyrk(void) { return atomic_load(&ssyrk); }
ptq_spotrf_fn ptq_blas_spotrf(void) { return atomic_load(&spotrf); }
