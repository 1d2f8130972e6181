/* pack.c - dense little-endian bit streams; the layout under every checkpoint format. */
#include "internal.h"

typedef struct {
    const uint8_t *codes;
    uint8_t *out;
    const uint32_t *words;
    uint32_t *packed;
    int64_t rows, columns, per_row;
    int bits;
} stream;

enum { ROWS = 32 };

static void pack_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const stream *s = ctx;
    for (int64_t r = task * ROWS; r < ptq_min64((task + 1) * ROWS, s->rows); r++) {
        const uint8_t *codes = s->codes + r * s->columns;
        uint32_t *words = s->packed + r * s->per_row;
        uint64_t pending = 0;
        int held = 0;
        for (int64_t i = 0; i < s->columns; i++) {
            pending |= (uint64_t)codes[i] << held;
            held += s->bits;
            if (held < 32) continue;
            *words++ = (uint32_t)pending;
            pending >>= 32;
            held -= 32;
        }
        if (held) *words = (uint32_t)pending;
    }
}

static void unpack_task(void *ctx, int64_t task, int thread) {
    (void)thread;
    const stream *s = ctx;
    const uint8_t mask = (uint8_t)((1u << s->bits) - 1);
    for (int64_t r = task * ROWS; r < ptq_min64((task + 1) * ROWS, s->rows); r++) {
        const uint32_t *words = s->words + r * s->per_row;
        uint8_t *codes = s->out + r * s->columns;
        uint64_t pending = 0;
        int held = 0;
        for (int64_t i = 0; i < s->columns; i++) {
            if (held < s->bits) {
                pending |= (uint64_t)*words++ << held;
                held += 32;
            }
            codes[i] = (uint8_t)(pending & mask);
            pending >>= s->bits;
            held -= s->bits;
        }
    }
}

ptq_status ptq_pack(const uint8_t *codes, int64_t rows, int64_t columns, int bits, uint32_t *words,
                    int threads) {
    if (bits < 1 || bits > 8 || rows < 0 || columns < 0) return PTQ_INVALID;
    stream s = {.codes = codes,
                .packed = words,
                .rows = rows,
                .columns = columns,
                .per_row = ptq_ceil_div(columns * bits, 32),
                .bits = bits};
    return ptq_parallel_for(ptq_ceil_div(rows, ROWS), ptq_thread_count(threads), pack_task, &s);
}

ptq_status ptq_unpack(const uint32_t *words, int64_t rows, int64_t columns, int bits,
                      uint8_t *codes, int threads) {
    if (bits < 1 || bits > 8 || rows < 0 || columns < 0) return PTQ_INVALID;
    stream s = {.words = words,
                .out = codes,
                .rows = rows,
                .columns = columns,
                .per_row = ptq_ceil_div(columns * bits, 32),
                .bits = bits};
    return ptq_parallel_for(ptq_ceil_div(rows, ROWS), ptq_thread_count(threads), unpack_task, &s);
}
