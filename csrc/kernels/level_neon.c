/* level_neon.c - 64-bit Arm: 4 x 20 register tile of four-lane vectors (20 accumulators of 32
 * registers leave room for what is multiplied), fused multiply-adds. */
#include "kernels.h"

#ifdef PTQ_ARM64
#include <arm_neon.h>
#include <math.h>
#include <string.h>

#define TABLE ptq_kernels_neon
#define TABLE_NAME "neon"
#define MR 4
#define NR 20
#define LOWBIT_TOKENS 4
#define VL 4
typedef float32x4_t vf;
#define vf_load(p) vld1q_f32(p)
#define vf_store(p, v) vst1q_f32(p, v)
#define vf_stream(p, v) vst1q_f32(p, v)
#define vf_set1(x) vdupq_n_f32(x)
#define vf_fma(a, b, c) vfmaq_f32(c, a, b)
#define vf_add(a, b) vaddq_f32(a, b)
/* The second if they do not compare, as everywhere: vminq_f32 would give NaN. */
#define vf_min(a, b) vf_pick(vcltq_f32(a, b), a, b)
#define vf_max(a, b) vf_pick(vcgtq_f32(a, b), a, b)
#define vf_load_f16(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#define vf_load_bf16(p) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))
static inline vf vf_pick(uint32x4_t which, vf a, vf b) { return vbslq_f32(which, a, b); }
/* sum (VL doubles) += x */
static inline void vf_widen_add(double *sum, vf x) {
    vst1q_f64(sum, vaddq_f64(vld1q_f64(sum), vcvt_f64_f32(vget_low_f32(x))));
    vst1q_f64(sum + 2, vaddq_f64(vld1q_f64(sum + 2), vcvt_high_f64_f32(x)));
}
#include "kernels.inc"
#endif
