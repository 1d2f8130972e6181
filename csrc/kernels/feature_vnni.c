/* feature_vnni.c - x86 with AVX512_VNNI: products of quads of codes, in the 8 x 48 tile and with
 * packed weights. */
#include "kernels.h"

#ifdef PTQ_X86
#include <immintrin.h>
#include <string.h>

#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#include "avx512.h"
#include "lanes.inc"
#define INT8_MR 8
#define INT8_PANELS 3
#define INT8_STEPS 1
#define INT8_OFFSET 128 /* one side is unsigned */
#define vi_load(p) ((vi)_mm512_loadu_si512(p))
#define vi_store(p, v) _mm512_storeu_si512(p, (__m512i)(v))
#define vi_set1(x) ((vi)_mm512_set1_epi32(x))
#define vi_part(s, w) (w)
#define vi_dot(acc, w, x) ((vi)_mm512_dpbusd_epi32((__m512i)(acc), (__m512i)(w), (__m512i)(x)))
#include "int8.inc"

#include "lowbit.inc"
#include "lowbit_vnni.inc"
#include "lowbit_int8.inc"
#include "lowbit_fixed.inc"

void ptq_add_avx512_vnni(ptq_kernels *k) {
    k->int8 = (ptq_int8_kernels){INT8_GROUP, .finish = k->int8.finish};
    _Static_assert(LOWBIT_TOKENS == 8 && LOWBIT_PANELS == 4, "as the level's");
    k->lowbit.int8 = lowbit_int8;
    k->lowbit.dots = lowbit_dots;
    k->lowbit.fixed = lowbit_fixed;
    k->lowbit.fixed_bits = 8;
    k->lowbit.fixed_tokens = k->lowbit.block_tokens;
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
