/* feature_amx.c - x86 with AMX: 2 x 2 tiles of 16 rows of 64 bytes, for int8 codes and for pairs of
 * bf16. A row of a panel of words is a row of the right tile as it stands; tokens are packed as
 * left tiles. The bf16 product takes subnormal numbers for 0, in operands and in sums, and sums two
 * products at a time, each sum rounded to nearest. */
#include "kernels.h"

#ifdef PTQ_X86
#include <immintrin.h>
#include <string.h>

#ifdef __clang__
#pragma clang attribute push(                                                                 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8,amx-bf16")
#endif

/* GCC does not know that the instructions below read memory. */
#define WRITTEN() __asm__ volatile("" ::: "memory")

enum {
    ROWS = 16,
    ROW = 64 /* bytes */,
    WORDS = ROW / 4,
    TILE = ROWS * WORDS /* words */,
    SIDE = 32
};

/* All eight tiles whole. The tile state is a thread's own. */
static void amx_enter(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    _Static_assert(sizeof config == 64, "as the CPU reads it");
    for (int t = 0; t < 8; t++) {
        config.row_bytes[t] = ROW;
        config.rows[t] = ROWS;
    }
    WRITTEN();
    _tile_loadconfig(&config);
}

static void amx_leave(void) { _tile_release(); }

/* ---- int8 ------------------------------------------------------------------------------ */

_Static_assert(SIDE <= PTQ_INT8_MAX_MR, "results of a tile fit what the caller has for them");

/* Word k of token i in tile (k / 16, i / 16), row i % 16, word k % 16. */
static void amx_int8_pack(const int8_t *restrict codes, int64_t stride, int64_t n, int tokens,
                          void *strip) {
    char *restrict out = strip;
    for (int64_t c = 0; c < n; c += ROW, out += SIDE * ROW) {
        const int64_t width = n - c < ROW ? n - c : ROW;
        if (tokens < SIDE || width < ROW) memset(out, 0, SIDE * ROW);
        for (int i = 0; i < tokens; i++)
            memcpy(out + i * ROW, codes + i * stride + c, (size_t)width);
    }
}

/* The last rows of up to two panels, filled up with zeros to a tile each. */
typedef struct {
    _Alignas(64) uint32_t words[2][TILE];
} amx_rest;

/* halves: 16 or 32 tokens; panels 1 or 2. */
static inline __attribute__((always_inline)) void amx_int8_tiles(int halves, int panels,
                                                                 const int8_t *A, const uint32_t *B,
                                                                 int64_t stride, int64_t words,
                                                                 int32_t *C, int64_t ldc) {
    const uint32_t *B1 = B + stride;
    const int64_t row = ldc * (int64_t)sizeof *C, whole = words / WORDS;
    int32_t *const lower = C + ROWS * ldc;
    amx_rest rest;
    _tile_loadd(0, C, row);
    if (panels > 1) _tile_loadd(1, C + PTQ_LANES, row);
    if (halves > 1) _tile_loadd(2, lower, row);
    if (halves > 1 && panels > 1) _tile_loadd(3, lower + PTQ_LANES, row);
    for (int64_t k = 0; k <= whole; k++, A += SIDE * ROW, B += TILE, B1 += TILE) {
        if (k == whole) {
            const size_t left = sizeof(uint32_t) * (size_t)(words % WORDS * PTQ_ROW_WORDS);
            if (!left) break;
            memset(&rest, 0, sizeof rest);
            B = memcpy(rest.words[0], B, left);
            if (panels > 1) B1 = memcpy(rest.words[1], B1, left);
            WRITTEN();
        }
        _tile_loadd(4, A, ROW);
        _tile_loadd(6, B, ROW);
        _tile_dpbsud(0, 4, 6);
        if (panels > 1) {
            _tile_loadd(7, B1, ROW);
            _tile_dpbsud(1, 4, 7);
        }
        if (halves > 1) {
            _tile_loadd(5, A + ROWS * ROW, ROW);
            _tile_dpbsud(2, 5, 6);
            if (panels > 1) _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, C, row);
    if (panels > 1) _tile_stored(1, C + PTQ_LANES, row);
    if (halves > 1) _tile_stored(2, lower, row);
    if (halves > 1 && panels > 1) _tile_stored(3, lower + PTQ_LANES, row);
}

static void amx_int8_dots(int tokens, int panels, const void *strip, const uint32_t *B,
                          int64_t stride, int64_t words, int32_t *C, int64_t ldc) {
    if (panels > 1) {
        if (tokens > ROWS) amx_int8_tiles(2, 2, strip, B, stride, words, C, ldc);
        else amx_int8_tiles(1, 2, strip, B, stride, words, C, ldc);
    } else {
        if (tokens > ROWS) amx_int8_tiles(2, 1, strip, B, stride, words, C, ldc);
        else amx_int8_tiles(1, 1, strip, B, stride, words, C, ldc);
    }
}

/* ---- bf16 ------------------------------------------------------------------------------ */

#define MR SIDE
#define NR SIDE
#include "pairs.inc"

/* C (32, 32) += the products of 16 pairs at a time: left tiles from A, right ones from B. */
static void amx_gemm(float *C, const uint32_t *A, ptrdiff_t sa, const uint32_t *B, ptrdiff_t K) {
    (void)sa;
    const int64_t row = SIDE * (int64_t)sizeof *C;
    WRITTEN();
    _tile_loadd(0, C, row);
    _tile_loadd(1, C + ROWS, row);
    _tile_loadd(2, C + ROWS * SIDE, row);
    _tile_loadd(3, C + ROWS * SIDE + ROWS, row);
    for (ptrdiff_t k = 0; k < K; k += WORDS, A += 2 * TILE, B += ROWS * SIDE) {
        _tile_loadd(4, A, ROW);
        _tile_loadd(6, B, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, B + ROWS, row);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, A + TILE, ROW);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, C, row);
    _tile_stored(1, C + ROWS, row);
    _tile_stored(2, C + ROWS * SIDE, row);
    _tile_stored(3, C + ROWS * SIDE + ROWS, row);
}

typedef uint32_t four __attribute__((vector_size(16), aligned(4), may_alias));

/* Four rows of four words as columns, from a row of a panel to a row of a tile. */
static inline void turn_four(const uint32_t *in, uint32_t *out) {
    const four a = *(const four *)in, b = *(const four *)(in + SIDE);
    const four c = *(const four *)(in + 2 * SIDE), d = *(const four *)(in + 3 * SIDE);
    const four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    const four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const four AB = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const four CD = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    *(four *)out = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
    *(four *)(out + WORDS) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    *(four *)(out + 2 * WORDS) = __builtin_shufflevector(AB, CD, 0, 1, 4, 5);
    *(four *)(out + 3 * WORDS) = __builtin_shufflevector(AB, CD, 2, 3, 6, 7);
}

/* The right operand as pairs.inc has it; of it, turned, the tiles of the left one. */
static void amx_pairs_pack(const uint16_t *X, int64_t ldx, const int64_t *rows, int64_t first,
                           int64_t count, int64_t c, int64_t columns, uint32_t *out,
                           uint32_t *left) {
    const int64_t pairs = (count + 1) / 2, whole = (pairs + WORDS - 1) / WORDS * WORDS;
    pairs_pack(X, ldx, rows, first, count, c, columns, out, NULL);
    memset(out + pairs * SIDE, 0, sizeof *out * (size_t)((whole - pairs) * SIDE));
    for (int64_t k = 0; k < whole; k += 4)
        for (int i = 0; i < SIDE; i += 4)
            turn_four(out + k * SIDE + i,
                      left + k / WORDS * 2 * TILE + i / ROWS * TILE + i % ROWS * WORDS + k % WORDS);
}

void ptq_add_avx512_amx(ptq_kernels *k) {
    k->int8 = (ptq_int8_kernels){.mr = SIDE,
                                 .panels = SIDE / PTQ_LANES,
                                 .token_bytes = (int)sizeof(int32_t),
                                 .step = WORDS,
                                 .offset = 128, /* one side is unsigned */
                                 .pack = amx_int8_pack,
                                 .dots = amx_int8_dots,
                                 .enter = amx_enter,
                                 .leave = amx_leave,
                                 .finish = k->int8.finish};
    k->pairs = (ptq_pairs_kernels){.mr = SIDE,
                                   .nr = SIDE,
                                   .step = WORDS,
                                   .turned = 1,
                                   .gemm = amx_gemm,
                                   .pack = amx_pairs_pack,
                                   .enter = amx_enter,
                                   .leave = amx_leave};
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
