/* feature_amx.c - x86 with AMX: 2 x 2 tiles of 16 rows of 64 bytes, for int8 codes and for pairs of
 * bf16. A row of a panel of words is a row of the right tile as it stands; tokens are packed as
 * left tiles. The bf16 product takes subnormal numbers for 0, in operands and in sums, and adds up
 * 32 products in an order of its own before it adds them to the sum. */
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

/* Cache lines to fetch at each of `steps` steps. */
static inline int64_t lines_of(const ptq_ahead *ahead, int64_t steps) {
    const int64_t lines = (ahead->end - ahead->start) / WORDS;
    return steps ? (lines + steps - 1) / steps : 0;
}

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
                                                                 int32_t *C, int64_t ldc,
                                                                 const ptq_ahead *ahead) {
    const uint32_t *B1 = B + stride;
    const int64_t row = ldc * (int64_t)sizeof *C, whole = words / WORDS;
    int32_t *const lower = C + ROWS * ldc;
    const uint32_t *next = ahead->start;
    const int64_t lines = lines_of(ahead, whole);
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
        for (int64_t i = 0; i < lines; i++, next += WORDS) __builtin_prefetch(next, 0, 2);
    }
    _tile_stored(0, C, row);
    if (panels > 1) _tile_stored(1, C + PTQ_LANES, row);
    if (halves > 1) _tile_stored(2, lower, row);
    if (halves > 1 && panels > 1) _tile_stored(3, lower + PTQ_LANES, row);
}

static void amx_int8_dots(int tokens, int panels, const void *strip, const uint32_t *B,
                          int64_t stride, int64_t words, int32_t *C, int64_t ldc,
                          const ptq_ahead *ahead) {
    if (panels > 1) {
        if (tokens > ROWS) amx_int8_tiles(2, 2, strip, B, stride, words, C, ldc, ahead);
        else amx_int8_tiles(1, 2, strip, B, stride, words, C, ldc, ahead);
    } else {
        if (tokens > ROWS) amx_int8_tiles(2, 1, strip, B, stride, words, C, ldc, ahead);
        else amx_int8_tiles(1, 1, strip, B, stride, words, C, ldc, ahead);
    }
}

/* ---- bf16 ------------------------------------------------------------------------------ */

/* C (32, 32) += the products of 16 pairs at a time: left tiles from A, right ones from B. */
static void amx_gemm(float *C, const uint32_t *A, ptrdiff_t sa, const uint32_t *B, ptrdiff_t K,
                     const ptq_ahead *ahead) {
    (void)sa;
    const int64_t row = SIDE * (int64_t)sizeof *C;
    const uint32_t *next = ahead->start;
    const int64_t lines = lines_of(ahead, K / WORDS);
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
        for (int64_t i = 0; i < lines; i++, next += WORDS) __builtin_prefetch(next, 0, 2);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, C, row);
    _tile_stored(1, C + ROWS, row);
    _tile_stored(2, C + ROWS * SIDE, row);
    _tile_stored(3, C + ROWS * SIDE + ROWS, row);
    WRITTEN();
}

/* The transpose of a tile whose rows are SIDE words apart. */
static inline void turn(const uint32_t *in, uint32_t *out) {
    __m512i a[ROWS], b[ROWS];
    for (int i = 0; i < ROWS; i++) a[i] = _mm512_loadu_si512(in + i * SIDE);
    for (int i = 0; i < ROWS; i += 2) { /* pairs of rows, words of all four quarters */
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < ROWS; i += 4) { /* four rows: column j of quarter q in quarter q of i + j */
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int j = 0; j < 4; j++) { /* then the quarters of four such */
        b[j] = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88);
        b[j + 4] = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xdd);
        b[j + 8] = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x88);
        b[j + 12] = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xdd);
    }
    for (int j = 0; j < 8; j++) {
        _mm512_storeu_si512(out + j * WORDS, _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88));
        _mm512_storeu_si512(out + (j + 8) * WORDS, _mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd));
    }
}

/* Words of 16 columns of a pair of tokens. */
static inline __m512i pair(__m256i a, __m256i b) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(a),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

/* 16 columns from `at` of a token; absent ones are zero. */
static inline __m256i columns_of(const uint16_t *x, int64_t at, int64_t width) {
    const int64_t left = width - at;
    const unsigned present = left >= ROWS ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
    return _mm256_maskz_loadu_epi16((__mmask16)present, x + at);
}

/* The right operand, and of it, turned, the tiles of the left one. */
static void amx_pairs_pack(const uint16_t *X, int64_t ldx, const int64_t *rows, int64_t first,
                           int64_t count, int64_t c, int64_t columns, uint32_t *out,
                           uint32_t *left) {
    const int64_t width = columns - c < SIDE ? columns - c : SIDE;
    for (int64_t t = 0; t < count; t += 2 * ROWS, out += ROWS * SIDE, left += 2 * TILE) {
        for (int k = 0; k < ROWS; k++)
            for (int half = 0; half < SIDE; half += ROWS) {
                __m256i x[2];
                for (int i = 0; i < 2; i++) {
                    const int64_t token = first + t + 2 * k + i;
                    x[i] =
                        token >= first + count
                            ? _mm256_setzero_si256()
                            : columns_of(X + (rows ? rows[token] : token) * ldx + c, half, width);
                }
                _mm512_storeu_si512(out + k * SIDE + half, pair(x[0], x[1]));
            }
        turn(out, left);
        turn(out + ROWS, left + TILE);
    }
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
