/* panel.c - panels of nr rows. */
#include "internal.h"

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
#define SHUFFLE __builtin_shufflevector

/* out[j * nr + r] = in[r * n + j] for a 4 x 4 tile. */
static inline void transpose4(const float *in, int64_t n, float *out, int64_t nr) {
    const four a = *(const four *)in, b = *(const four *)(in + n);
    const four c = *(const four *)(in + 2 * n), d = *(const four *)(in + 3 * n);
    const four ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
    const four AB = SHUFFLE(a, b, 2, 6, 3, 7), CD = SHUFFLE(c, d, 2, 6, 3, 7);
    *(four *)out = SHUFFLE(ab, cd, 0, 1, 4, 5);
    *(four *)(out + nr) = SHUFFLE(ab, cd, 2, 3, 6, 7);
    *(four *)(out + 2 * nr) = SHUFFLE(AB, CD, 0, 1, 4, 5);
    *(four *)(out + 3 * nr) = SHUFFLE(AB, CD, 2, 3, 6, 7);
}

void ptq_panel_load(const ptq_kernels *k, const float *W, int64_t rows, int64_t n, int64_t row,
                    float *panel) {
    const int64_t nr = k->gemm.nr, present = ptq_min64(nr, rows - row);
    const int64_t r4 = present / 4 * 4, j4 = n / 4 * 4;
    const float *w = W + row * n;
    if (present < nr) memset(panel, 0, sizeof(float) * (size_t)(n * nr));
    enum { BLOCK = 16 }; /* columns: whole cache lines of W */
    for (int64_t j0 = 0; j0 < n; j0 += BLOCK)
        for (int64_t r = 0; r < r4; r += 4)
            for (int64_t j = j0; j < ptq_min64(j0 + BLOCK, j4); j += 4)
                transpose4(w + r * n + j, n, panel + j * nr + r, nr);
    for (int64_t r = 0; r < present; r++)
        for (int64_t j = r < r4 ? j4 : 0; j < n; j++) panel[j * nr + r] = w[r * n + j];
}
