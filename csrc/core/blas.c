/* blas.c - SciPy's routines, where the binding has handed them over. */
#include "blas.h"

static ptq_ssyrk_fn ssyrk;
static ptq_spotrf_fn spotrf;

void ptq_blas_set(ptq_ssyrk_fn new_ssyrk, ptq_spotrf_fn new_spotrf) {
    ssyrk = new_ssyrk;
    spotrf = new_spotrf;
}
const char *ptq_blas_name(void) { return ssyrk && spotrf ? "scipy" : "builtin"; }
ptq_ssyrk_fn ptq_blas_ssyrk(void) { return ssyrk; }
ptq_spotrf_fn ptq_blas_spotrf(void) { return spotrf; }
