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
#define INT8_MR 4
#define INT8_PANELS 1
#define INT8_STEPS 2
#define INT8_OFFSET 128
#define vi_load(p) ((vi)vld1q_s32((const int32_t *)(p)))
#define vi_store(p, v) vst1q_s32(p, (int32x4_t)(v))
#define vi_set1(x) ((vi)vdupq_n_s32(x))
#define vi_part(s, w)                          \
    ((s) ? (vi)vshrq_n_u16((uint16x8_t)(w), 8) \
         : (vi)vandq_u16((uint16x8_t)(w), vdupq_n_u16(0x00ff)))
#define vi_dot(acc, w, x) \
    ((vi)vaddq_s32((int32x4_t)(acc), pair_sums((int16x8_t)(w), (int16x8_t)(x))))
static inline int32x4_t pair_sums(int16x8_t w, int16x8_t x) {
    return vpaddq_s32(vmull_s16(vget_low_s16(w), vget_low_s16(x)), vmull_high_s16(w, x));
}
#define LOWBIT_TOKENS 4
#define LOWBIT_PANELS 2
#define LOWBIT_GROUPS "lowbit_plain.inc"
#include "kernels.inc"
#endif
