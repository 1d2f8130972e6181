/* level_avx2.c - x86 with AVX2 and FMA: 4 x 24 register tile (12 accumulators of 16 registers). */
#include "kernels.h"

#ifdef PTQ_X86
#include <immintrin.h>
#include <math.h>
#include <string.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define TABLE ptq_kernels_avx2
#define TABLE_NAME "avx2"
#define MR 4
#define NR 24
#define VL 8
typedef __m256 vf;
#define vf_load(p) _mm256_loadu_ps(p)
#define vf_store(p, v) _mm256_storeu_ps(p, v)
#define vf_stream(p, v) _mm256_stream_ps(p, v)
#define vf_set1(x) _mm256_set1_ps(x)
#define vf_fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define vf_add(a, b) _mm256_add_ps(a, b)
#define vf_min(a, b) _mm256_min_ps(a, b)
#define vf_max(a, b) _mm256_max_ps(a, b)
#define vf_load_f16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define vf_load_bf16(p)  \
    _mm256_castsi256_ps( \
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
/* sum (VL doubles) += x */
static inline void vf_widen_add(double *sum, vf x) {
    const __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    const __m256d b = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    _mm256_storeu_pd(sum, _mm256_add_pd(_mm256_loadu_pd(sum), a));
    _mm256_storeu_pd(sum + 4, _mm256_add_pd(_mm256_loadu_pd(sum + 4), b));
}
#define INT8_MR 6
#define INT8_PANELS 1
#define INT8_STEPS 2
#define INT8_OFFSET 128
#define vi_load(p) ((vi)_mm256_loadu_si256((const __m256i *)(p)))
#define vi_store(p, v) _mm256_storeu_si256((__m256i *)(p), (__m256i)(v))
#define vi_set1(x) ((vi)_mm256_set1_epi32(x))
/* Pairs of 16 bits: pmaddubsw would saturate, and what avoids it takes as long. */
#define vi_part(s, w)                             \
    ((s) ? (vi)_mm256_srli_epi16((__m256i)(w), 8) \
         : (vi)_mm256_and_si256((__m256i)(w), _mm256_set1_epi16(0x00ff)))
#define vi_dot(acc, w, x) \
    ((vi)_mm256_add_epi32((__m256i)(acc), _mm256_madd_epi16((__m256i)(w), (__m256i)(x))))
#define vi_load_u8(p) ((vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define LOWBIT_GROUPS "lowbit_avx2.inc"
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
