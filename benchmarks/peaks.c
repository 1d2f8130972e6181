/* peaks.c - what one core does at most: instructions on registers alone, for benchmarks/peaks.py.
 * Each function runs n rounds and returns the operations of a round (a product and a sum are two),
 * or 0 if this compiler or CPU kind has no such instruction. Call only what the CPU has. */
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define ALL "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
    "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory"
#define UPPER "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23"
#define TWELVE(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define MORE(f) f(12) f(13) f(16) f(17) f(18) f(19) f(20) f(21) f(22) f(23)
#define CLEAR_Y(i) "vpxor %%ymm" #i ",%%ymm" #i ",%%ymm" #i "\n"
#define CLEAR_Z(i) "vpxord %%zmm" #i ",%%zmm" #i ",%%zmm" #i "\n"
#define LOOP(body) "1:\n" body "dec %0\njnz 1b\nvzeroupper\n"

#define FMA_Y(i) "vfmadd231ps %%ymm14,%%ymm15,%%ymm" #i "\n"
int64_t fma_avx2(int64_t n) {
    __asm__ volatile(TWELVE(CLEAR_Y) CLEAR_Y(14) CLEAR_Y(15) LOOP(TWELVE(FMA_Y)) : "+r"(n)::ALL);
    return 12 * 8 * 2;
}

#define MADD_Y(i) "vpmaddwd %%ymm14,%%ymm15,%%ymm13\nvpaddd %%ymm13,%%ymm" #i ",%%ymm" #i "\n"
int64_t madd_avx2(int64_t n) {
    __asm__ volatile(TWELVE(CLEAR_Y) CLEAR_Y(14) CLEAR_Y(15) LOOP(TWELVE(MADD_Y)) : "+r"(n)::ALL);
    return 12 * 16 * 2;
}

#define FMA_Z(i) "vfmadd231ps %%zmm14,%%zmm15,%%zmm" #i "\n"
__attribute__((target("avx512f"))) int64_t fma_avx512(int64_t n) {
    __asm__ volatile(TWELVE(CLEAR_Z) MORE(CLEAR_Z) CLEAR_Z(14) CLEAR_Z(15)
                         LOOP(TWELVE(FMA_Z) MORE(FMA_Z))
                     : "+r"(n)::ALL, UPPER);
    return 22 * 16 * 2;
}

#define MADD_Z(i) "vpmaddwd %%zmm14,%%zmm15,%%zmm13\nvpaddd %%zmm13,%%zmm" #i ",%%zmm" #i "\n"
__attribute__((target("avx512f,avx512bw"))) int64_t madd_avx512(int64_t n) {
    __asm__ volatile(TWELVE(CLEAR_Z) CLEAR_Z(14) CLEAR_Z(15) LOOP(TWELVE(MADD_Z)) : "+r"(n)::ALL);
    return 12 * 32 * 2;
}

#define DOT_Z(i) "vpdpbusd %%zmm14,%%zmm15,%%zmm" #i "\n"
__attribute__((target("avx512f,avx512vnni"))) int64_t dot_vnni(int64_t n) {
    __asm__ volatile(TWELVE(CLEAR_Z) MORE(CLEAR_Z) CLEAR_Z(14) CLEAR_Z(15)
                         LOOP(TWELVE(DOT_Z) MORE(DOT_Z))
                     : "+r"(n)::ALL, UPPER);
    return 22 * 64 * 2;
}

#define PAIR_Z(i) "vdpbf16ps %%zmm14,%%zmm15,%%zmm" #i "\n"
__attribute__((target("avx512f,avx512bf16"))) int64_t dot_bf16(int64_t n) {
    __asm__ volatile(TWELVE(CLEAR_Z) MORE(CLEAR_Z) CLEAR_Z(14) CLEAR_Z(15)
                         LOOP(TWELVE(PAIR_Z) MORE(PAIR_Z))
                     : "+r"(n)::ALL, UPPER);
    return 22 * 32 * 2;
}

static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} whole_tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

#define TILES(op)                                                                                 \
    __asm__ volatile("ldtilecfg (%1)\ntilezero %%tmm0\ntilezero %%tmm1\ntilezero %%tmm2\n"        \
                     "tilezero %%tmm3\ntilezero %%tmm4\ntilezero %%tmm5\ntilezero %%tmm6\n"       \
                     "tilezero %%tmm7\n1:\n" op " %%tmm6,%%tmm4,%%tmm0\n" op                      \
                     " %%tmm7,%%tmm4,%%tmm1\n" op " %%tmm6,%%tmm5,%%tmm2\n" op                    \
                     " %%tmm7,%%tmm5,%%tmm3\ndec %0\njnz 1b\ntilerelease\n"                       \
                     : "+r"(n)                                                                    \
                     : "r"(&whole_tiles)                                                          \
                     : "cc", "memory")
__attribute__((target("amx-tile,amx-int8"))) int64_t dot_amx_int8(int64_t n) {
    TILES("tdpbsud");
    return 4 * 16 * 16 * 64 * 2;
}
__attribute__((target("amx-tile,amx-bf16"))) int64_t dot_amx_bf16(int64_t n) {
    TILES("tdpbf16ps");
    return 4 * 16 * 16 * 32 * 2;
}
#endif
