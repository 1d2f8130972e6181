/* level_avx512.c - x86 with AVX-512: 8 x 48 register tile (24 accumulators of 32 registers). */
#include "kernels.h"

#ifdef PTQ_X86
#include <immintrin.h>
#include <math.h>
#include <string.h>

#ifdef __clang__
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define TABLE ptq_kernels_avx512
#define TABLE_NAME "avx512"
#define MR 8
#define NR 48
#define VL 16
/* Rows that the register tile fetches ahead: beyond the first cache it has half the speed without,
 * and with 4 rows. */
#ifndef AHEAD
#define AHEAD 8
#endif
typedef __m512 vf;
#define vf_load(p) _mm512_loadu_ps(p)
#define vf_store(p, v) _mm512_storeu_ps(p, v)
#define vf_stream(p, v) _mm512_stream_ps(p, v)
#define vf_set1(x) _mm512_set1_ps(x)
#define vf_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define vf_add(a, b) _mm512_add_ps(a, b)
#define vf_min(a, b) _mm512_min_ps(a, b)
#define vf_max(a, b) _mm512_max_ps(a, b)
#define vf_load_f16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define vf_load_bf16(p)  \
    _mm512_castsi512_ps( \
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
/* sum (VL doubles) += x */
static inline void vf_widen_add(double *sum, vf x) {
    const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    const __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    _mm512_storeu_pd(sum, _mm512_add_pd(_mm512_loadu_pd(sum), a));
    _mm512_storeu_pd(sum + 8, _mm512_add_pd(_mm512_loadu_pd(sum + 8), b));
}
#define INT8_MR 8
#define INT8_PANELS 3
#define INT8_STEPS 2
#define INT8_OFFSET 128
#define vi_load(p) ((vi)_mm512_loadu_si512(p))
#define vi_store(p, v) _mm512_storeu_si512(p, (__m512i)(v))
#define vi_set1(x) ((vi)_mm512_set1_epi32(x))
#define vi_part(s, w)                             \
    ((s) ? (vi)_mm512_srli_epi16((__m512i)(w), 8) \
         : (vi)_mm512_and_si512((__m512i)(w), _mm512_set1_epi16(0x00ff)))
#define vi_dot(acc, w, x) \
    ((vi)_mm512_add_epi32((__m512i)(acc), _mm512_madd_epi16((__m512i)(w), (__m512i)(x))))
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
