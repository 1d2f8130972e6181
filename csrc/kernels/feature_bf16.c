/* feature_bf16.c - x86 with AVX512_BF16: the 8 x 48 tile of AVX-512 over pairs of bf16. */
#include "kernels.h"

#ifdef PTQ_X86
#include <immintrin.h>
#include <string.h>

#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
#define MR 8
#define NR 48
#define VL 16
#ifndef AHEAD
#define AHEAD 8 /* as in level_avx512.c */
#endif
#include "pairs.inc"

static inline __m512bh as_bf16(__m512i x) {
    __m512bh y;
    memcpy(&y, &x, sizeof y);
    return y;
}

static void pairs_gemm(float *restrict C, const uint32_t *restrict A, ptrdiff_t sa,
                       const uint32_t *restrict B, ptrdiff_t K, const ptq_ahead *ahead) {
    (void)ahead;
    __m512 acc[MR][NR / VL];
    for (int i = 0; i < MR; i++)
        for (int v = 0; v < NR / VL; v++) acc[i][v] = _mm512_loadu_ps(C + i * NR + v * VL);
    for (ptrdiff_t k = 0; k < K; k++, A += sa, B += NR) {
        __builtin_prefetch(A + AHEAD * sa);
        for (int v = 0; v < NR / VL; v++) __builtin_prefetch(B + AHEAD * NR + v * VL);
        __m512bh b[NR / VL];
        for (int v = 0; v < NR / VL; v++) b[v] = as_bf16(_mm512_loadu_si512(B + v * VL));
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
            __m512bh a = as_bf16(_mm512_set1_epi32((int)A[i]));
            for (int v = 0; v < NR / VL; v++) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], a, b[v]);
        }
    }
    for (int i = 0; i < MR; i++)
        for (int v = 0; v < NR / VL; v++) _mm512_storeu_ps(C + i * NR + v * VL, acc[i][v]);
}

void ptq_add_avx512_bf16(ptq_kernels *k) {
    k->pairs =
        (ptq_pairs_kernels){.mr = MR, .nr = NR, .step = 1, .gemm = pairs_gemm, .pack = pairs_pack};
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
