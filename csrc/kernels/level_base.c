/* Any CPU: four-lane vectors of the compiler, no fused multiply-add. */
#include "kernels.h"

#include <math.h>
#include <string.h>

#define LEVEL(name) name##_base
#define LEVEL_NAME "base"
#define MR 4
#define NR 8
#define VL 4
typedef float vf __attribute__((vector_size(16), aligned(4), may_alias));
#define vf_load(p) (*(const vf *)(p))
#define vf_store(p, v) (*(vf *)(p) = (v))
#define vf_set1(x) ((vf){(x), (x), (x), (x)})
#define vf_fma(a, b, c) ((a) * (b) + (c))
#include "kernels.inc"

const ptq_kernels ptq_kernels_base = LEVEL_TABLE(LEVEL_NAME, NULL, NULL);
