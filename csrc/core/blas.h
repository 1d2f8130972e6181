/* blas.h - Fortran BLAS/LAPACK by pointer, 32-bit integers, column-major; NULL: use the built-in.
 * Never called inside a parallel region: two thread pools fight. */
#ifndef PTQ_BLAS_H
#define PTQ_BLAS_H

#include "ptq.h"

ptq_ssyrk_fn ptq_blas_ssyrk(void);
ptq_spotrf_fn ptq_blas_spotrf(void);

#endif
