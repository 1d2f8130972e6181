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
typedef int32_t vf_mask __attribute__((vector_size(16)));
/* a where it is the one wanted, else b, as the instructions of the other levels do with NaN */
static inline vf vf_pick(vf_mask take, vf a, vf b) {
    return (vf)((take & (vf_mask)a) | (~take & (vf_mask)b));
}
#define vf_max(a, b) vf_pick((vf_mask)((a) > (b)), a, b)
#define vf_min(a, b) vf_pick((vf_mask)((a) < (b)), a, b)
#include "kernels.inc"

const ptq_kernels ptq_kernels_base = LEVEL_TABLE(LEVEL_NAME, NULL, NULL);
