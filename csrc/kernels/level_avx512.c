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
/* Rows that the register tile fetches ahead: beyond the first cache it has half the speed without,
 * and with 4 rows. */
#define AHEAD 8
#include "avx512.h"
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
#define LOWBIT_GROUPS "lowbit_avx512.inc"
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
