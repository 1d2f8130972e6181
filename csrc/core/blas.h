/* blas.h - Fortran BLAS/LAPACK by pointer, 32-bit integers, column-major; NULL: use the built-in.
 * Never called by several threads at once: two thread pools fight. A call cannot be interrupted, so
 * large products are cut into calls of about a tenth of a second on a slow core. */
#ifndef PTQ_BLAS_H
#define PTQ_BLAS_H

#include "ptq.h"

enum {
    PTQ_BLAS_TILE = 1024, /* rows and columns of a call */
    PTQ_BLAS_DEPTH = 512, /* terms of its sums */
};

const ptq_blas *ptq_blas_get(void);

#endif
