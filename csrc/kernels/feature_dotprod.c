/* feature_dotprod.c - 64-bit Arm with dot products: a 4 x 16 tile over quads of codes. */
#include "kernels.h"

#ifdef PTQ_ARM64
#include <arm_neon.h>
#include <string.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define VL 4
#define INT8_MR 4
#define INT8_PANELS 1
#define INT8_STEPS 1
#define INT8_OFFSET 0 /* both sides are signed */
typedef int32_t vi __attribute__((vector_size(VL * 4)));
#define vi_load(p) ((vi)vld1q_s32((const int32_t *)(p)))
#define vi_store(p, v) vst1q_s32(p, (int32x4_t)(v))
#define vi_set1(x) ((vi)vdupq_n_s32(x))
#define vi_part(s, w) ((vi)veorq_u8((uint8x16_t)(w), vdupq_n_u8(128)))
#define vi_dot(acc, w, x) ((vi)vdotq_s32((int32x4_t)(acc), (int8x16_t)(w), (int8x16_t)(x)))
#include "int8.inc"

void ptq_add_neon_dotprod(ptq_kernels *k) {
    k->int8 = (ptq_int8_kernels){INT8_GROUP, .finish = k->int8.finish};
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
