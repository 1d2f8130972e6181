/* words.h - the layout of packed weights, the same for every CPU level.
 *
 * A panel is PTQ_LANES outputs; in it, 32-bit words of the lanes lie side by side, so that a row of
 * words fills a 512-bit register, and is a row of a tile. A word holds quads: the codes of four
 * consecutive inputs, one in each byte, which an 8-bit dot product takes at once.
 *
 *   8 bits  word k:        quad k
 *   4 bits  word k:        quad 2k in the low halves of the bytes, 2k + 1 in the high halves
 *   2 bits  word k:        quad 4k + s in bits 2s and 2s + 1 of each byte
 *   3 bits  words 3k ...:  two words of 2 bits, the low bits of quads 8k .. 8k + 7, then one whose
 *                          bit s of each byte is the third bit of quad 8k + s
 *
 * The inputs that fill the fewest whole words are a step. Groups of inputs with one grid start at a
 * step: what a group lacks is padded with code 0, and such places see an activation of 0. */
#ifndef PTQ_WORDS_H
#define PTQ_WORDS_H

#include <stdint.h>

enum {
    PTQ_LANES = 16,
    PTQ_ROW_WORDS = PTQ_LANES, /* 32-bit words from one row of a panel to the next */
    PTQ_QUAD = 4,
    PTQ_LONGEST_STEP = 32,
};

/* Largest number of places, and of outputs: no size of this layout leaves 64 bits. */
#define PTQ_MOST_PLACES ((int64_t)1 << 28)

_Static_assert(PTQ_LANES * sizeof(uint32_t) == 64, "a row is a cache line");

static inline int ptq_has_words(int bits) {
    return bits == 2 || bits == 3 || bits == 4 || bits == 8;
}

/* Inputs of a step, and its words of one lane. */
static inline int ptq_step_places(int bits) { return bits == 3 ? 32 : 32 / bits; }
static inline int ptq_step_words(int bits) { return bits == 3 ? 3 : 1; }

static inline int64_t ptq_panels(int64_t outputs) { return (outputs + PTQ_LANES - 1) / PTQ_LANES; }

/* Words of one lane for `places` inputs, whole steps. */
static inline int64_t ptq_lane_words(int bits, int64_t places) {
    return places / ptq_step_places(bits) * ptq_step_words(bits);
}

/* The code at place i of a lane; words of a lane are PTQ_ROW_WORDS apart. */
static inline unsigned ptq_word_code(const uint32_t *lane, int bits, int64_t i) {
    const int64_t step = i / ptq_step_places(bits) * ptq_step_words(bits) * PTQ_ROW_WORDS;
    const int in_step = (int)(i % ptq_step_places(bits)), quad = in_step / PTQ_QUAD;
    const int byte = 8 * (in_step % PTQ_QUAD);
    if (bits != 3) return lane[step] >> (byte + bits * quad) & ((1u << bits) - 1);
    const uint32_t low = lane[step + quad / 4 * PTQ_ROW_WORDS] >> (byte + 2 * (quad % 4)) & 3;
    return low | (lane[step + 2 * PTQ_ROW_WORDS] >> (byte + quad) & 1) << 2;
}

/* Put a code where zeros are. */
static inline void ptq_word_put(uint32_t *lane, int bits, int64_t i, uint32_t code) {
    const int64_t step = i / ptq_step_places(bits) * ptq_step_words(bits) * PTQ_ROW_WORDS;
    const int in_step = (int)(i % ptq_step_places(bits)), quad = in_step / PTQ_QUAD;
    const int byte = 8 * (in_step % PTQ_QUAD);
    if (bits != 3) {
        lane[step] |= code << (byte + bits * quad);
        return;
    }
    lane[step + quad / 4 * PTQ_ROW_WORDS] |= (code & 3) << (byte + 2 * (quad % 4));
    lane[step + 2 * PTQ_ROW_WORDS] |= (code >> 2) << (byte + quad);
}

#endif
