/* level_base.c - any CPU: four-lane vectors of the compiler, no fused multiply-add. */
#include "kernels.h"

#include <math.h>
#include <string.h>

#include "../core/round.h"

#define TABLE ptq_kernels_base
#define TABLE_NAME "base"
#define MR 4
#define NR 8
#define VL 4
typedef float vf __attribute__((vector_size(16), aligned(4), may_alias));
#define vf_load(p) (*(const vf *)(p))
#define vf_store(p, v) (*(vf *)(p) = (v))
#ifdef PTQ_X86
#include <emmintrin.h>
#define vf_stream(p, v) _mm_stream_ps(p, (__m128)(v))
#else
#define vf_stream(p, v) vf_store(p, v)
#endif
#define vf_set1(x) ((vf){(x), (x), (x), (x)})
#define vf_fma(a, b, c) ((a) * (b) + (c))
#define vf_add(a, b) ((a) + (b))
static inline vf vf_min(vf a, vf b) {
    for (int i = 0; i < VL; i++) a[i] = a[i] < b[i] ? a[i] : b[i];
    return a;
}
static inline vf vf_max(vf a, vf b) {
    for (int i = 0; i < VL; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
}
static inline vf vf_load_f16(const uint16_t *p) {
    float x[VL];
    for (int i = 0; i < VL; i++) x[i] = ptq_from_half(p[i]);
    return vf_load(x);
}
static inline vf vf_load_bf16(const uint16_t *p) {
    float x[VL];
    for (int i = 0; i < VL; i++) x[i] = ptq_from_bf16(p[i]);
    return vf_load(x);
}
/* sum (VL doubles) += x */
static inline void vf_widen_add(double *sum, vf x) {
    for (int i = 0; i < VL; i++) sum[i] += (double)x[i];
}
#define INT8_MR 2
#define INT8_PANELS 1
#define INT8_STEPS 2
#define INT8_OFFSET 128
#define vi_load(p) (*(const vi_any *)(p))
#define vi_store(p, v) (*(vi_any *)(p) = (v))
#define vi_set1(x) ((vi_any){(x), (x), (x), (x)})
#define vi_part(s, w) ((s) ? (w) >> 8 & 0x00ff00ff : (w) & 0x00ff00ff)
typedef int32_t vi_any __attribute__((vector_size(16), aligned(4), may_alias));
static inline vi_any vi_dot(vi_any acc, vi_any w, vi_any x) {
#ifdef PTQ_X86
    return acc + (vi_any)_mm_madd_epi16((__m128i)w, (__m128i)x);
#else
    return acc + (w << 16 >> 16) * (x << 16 >> 16) + (w >> 16) * (x >> 16);
#endif
}
#define LOWBIT_TOKENS 2
#define LOWBIT_PANELS 1
#define LOWBIT_GROUPS "lowbit_plain.inc"
#include "kernels.inc"
