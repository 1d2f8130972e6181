/* round.h - rounding, clamping, 16-bit floats and the min-max grid, each written once; for the core
 * and for the kernels, which compile them anew at every CPU level. */
#ifndef PTQ_ROUND_H
#define PTQ_ROUND_H

#include <stdint.h>
#include <string.h>

#include "ptq.h"

/* 2^23 + 2^22: after x + PTQ_ROUND_MAGIC the low bits of the float are x rounded to an integer,
 * ties to even, for |x| < 2^22, on top of PTQ_ROUND_BITS. */
#define PTQ_ROUND_MAGIC 12582912.0f
#define PTQ_ROUND_BITS 0x4b400000u

static inline float ptq_from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}
static inline uint32_t ptq_to_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

/* Nearest, ties to even, for |x| < 2^22; larger values keep sign and size, and get clamped. */
static inline float ptq_rne(float x) { return (x + PTQ_ROUND_MAGIC) - PTQ_ROUND_MAGIC; }

static inline float ptq_clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* Code of x on a grid of codes from 0 to `top`. */
static inline float ptq_code(float x, float scale, float zero, float top) {
    return ptq_clamp(ptq_rne(x / scale) + zero, 0.0f, top);
}

/* Exact for finite values; the shift leaves the exponent short by 112. Inf and NaN become 65536
 * and more. */
static inline float ptq_from_half(uint16_t h) {
    const float x = ptq_from_bits((uint32_t)(h & 0x7fffu) << 13) * 0x1p112f;
    return ptq_from_bits(ptq_to_bits(x) | (uint32_t)(h & 0x8000u) << 16);
}

static inline float ptq_from_bf16(uint16_t h) { return ptq_from_bits((uint32_t)h << 16); }

/* One value of an array of a 32 or 16-bit dtype. */
static inline float ptq_value(ptq_dtype dtype, const void *x, int64_t i) {
    if (dtype == PTQ_F32) return ((const float *)x)[i];
    const uint16_t u = ((const uint16_t *)x)[i];
    return dtype == PTQ_F16 ? ptq_from_half(u) : ptq_from_bf16(u);
}

/* Nearest, ties to even, without the last `drop` bits (at least 1), of what is not NaN. */
static inline float ptq_drop_bits(float x, uint32_t drop) {
    const uint32_t u = ptq_to_bits(x), half = (1u << (drop - 1)) - 1 + ((u >> drop) & 1);
    return ptq_from_bits((u + half) & ~((1u << drop) - 1));
}

static inline float ptq_to_bf16(float x) { return ptq_drop_bits(x, 16); }

/* A positive scale rounded to its storage type (ties to even), never below its smallest normal. */
static inline float ptq_round_scale(float s, int type) {
    const uint32_t drop = type == PTQ_F16 ? 13 : type == PTQ_BF16 ? 16 : 0;
    const float smallest = type == PTQ_F16 ? 0x1p-14f : 0x1p-126f;
    if (drop) s = ptq_drop_bits(s, drop);
    return s < smallest ? smallest : s;
}

/* Distance of two codes when `steps` of them span [low, high], which holds 0, or when symmetric
 * [-m, m] with m the larger of -low and high. `empty` if the range is the point 0. */
static inline float ptq_minmax_scale(float low, float high, float steps, int symmetric,
                                     float empty) {
    if (symmetric) {
        const float reach = -low > high ? -low : high;
        return reach > 0.0f ? reach / (steps / 2) : empty;
    }
    return high > low ? (high - low) / steps : empty;
}

/* x = scale * (code - zero) */
typedef struct {
    float scale, zero;
} ptq_affine;

/* The weights' grid over [low, high], which holds 0. */
static inline ptq_affine ptq_minmax_grid(const ptq_grid *grid, float low, float high) {
    const float top = (float)grid->max_code;
    const float s = ptq_minmax_scale(low, high, top, grid->symmetric, 1.0f);
    const float scale = ptq_round_scale(s, grid->scale_type);
    const float zero = ptq_clamp(ptq_rne(-low / scale), (float)grid->min_zero, top);
    return (ptq_affine){scale, grid->symmetric ? (float)((grid->max_code + 1) / 2) : zero};
}

#endif
