/* Any CPU: four-lane vectors of the compiler, no fused multiply-add. */
#include "kernels.h"

#include <math.h>
#include <string.h>

#define LEVEL(name) name##_base
#define LEVEL_NAME "base"
#define MR 4
#define NR 8
#define VL 4
typedef float vf __attribute__((vector_size(16), aligned(4), may_alias));
#define vf_load(p) (*(const vf *)(p))
#define vf_store(p, v) (*(vf *)(p) = (v))
#ifdef PTQ_X86
#include <xmmintrin.h>
#define vf_stream(p, v) _mm_stream_ps(p, (__m128)(v))
#else
#define vf_stream(p, v) vf_store(p, v)
#endif
#define vf_set1(x) ((vf){(x), (x), (x), (x)})
#define vf_fma(a, b, c) ((a) * (b) + (c))
#define vf_add(a, b) ((a) + (b))
#define vf_min(a, b) least_base_vf(a, b)
#define vf_max(a, b) most_base_vf(a, b)
#define vf_load_f16(p) half_base_vf(p)
#define vf_load_bf16(p) bf16_base_vf(p)
static inline vf least_base_vf(vf a, vf b) {
    for (int i = 0; i < VL; i++) a[i] = a[i] < b[i] ? a[i] : b[i];
    return a;
}
static inline vf most_base_vf(vf a, vf b) {
    for (int i = 0; i < VL; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
}
static inline vf bits_base_vf(const uint32_t *u) {
    vf x;
    memcpy(&x, u, sizeof x);
    return x;
}
static inline vf bf16_base_vf(const uint16_t *p) {
    uint32_t u[VL];
    for (int i = 0; i < VL; i++) u[i] = (uint32_t)p[i] << 16;
    return bits_base_vf(u);
}
/* Inf and NaN become 65536 and more. */
static inline vf half_base_vf(const uint16_t *p) {
    uint32_t u[VL], sign[VL];
    for (int i = 0; i < VL; i++) {
        u[i] = (uint32_t)(p[i] & 0x7fffu) << 13;
        sign[i] = (uint32_t)(p[i] & 0x8000u) << 16;
    }
    const vf x = bits_base_vf(u) * vf_set1(0x1p112f);
    memcpy(u, &x, sizeof x);
    for (int i = 0; i < VL; i++) u[i] |= sign[i];
    return bits_base_vf(u);
}
/* sum (VL doubles) += x */
static inline void vf_widen_add(double *sum, vf x) {
    for (int i = 0; i < VL; i++) sum[i] += (double)x[i];
}
#include "kernels.inc"

const ptq_kernels ptq_kernels_base = LEVEL_TABLE(LEVEL_NAME, NULL, NULL);
