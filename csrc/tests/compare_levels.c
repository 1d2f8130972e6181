/* compare_levels.c - run the core without Python at the base level and at every other level of this
 * CPU, on fixed pseudo-random inputs, and compare: integers exactly, floats within a stated bound.
 * See compare_levels.sh. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../core/ptq.h"

static const char *const LEVELS[] = {"avx2",        "avx512",      "avx512_bf16",
                                     "avx512_vnni", "avx512_amx",  "avx512_vnni_bf16_amx",
                                     "neon",        "neon_dotprod"};

enum { ROWS = 53, N = 96, TOKENS = 301, GROUP = 16, THREADS = 2, MAX_OUTPUTS = 384 };
/* Softmax: (BATCH, HEADS, QUERIES, KEYS). */
enum { BATCH = 2, HEADS = 3, QUERIES = 37, KEYS = 131, ENTRIES = BATCH * HEADS * QUERIES * KEYS };

static const double EPS = 0x1p-24; /* a float's rounding, relative */

/* Results of one level: values as doubles, and how far another level's may be from them. */
typedef struct {
    char name[40];
    int64_t count;
    double *value, *bound; /* bound NULL: not at all */
} output;

typedef struct {
    int count;
    output output[MAX_OUTPUTS];
} results;

static void *must(void *p) {
    if (!p) {
        fputs("out of memory\n", stderr);
        exit(2);
    }
    return p;
}

static void check(ptq_status status, const char *what) {
    if (!status) return;
    fprintf(stderr, "%s: status %d\n", what, (int)status);
    exit(2);
}

/* A new output; the caller fills its values. */
static output *add_output(results *r, const char *name, int64_t count, int with_bound) {
    output *o = &r->output[r->count++];
    if (r->count > MAX_OUTPUTS) abort();
    snprintf(o->name, sizeof o->name, "%s", name);
    o->count = count;
    o->value = must(calloc((size_t)count, sizeof *o->value));
    o->bound = with_bound ? must(calloc((size_t)count, sizeof *o->bound)) : NULL;
    return o;
}

#define DEFINE_RECORD(type)                                                                \
    static output *record_##type(results *r, const char *name, const type *x, int64_t n) { \
        output *o = add_output(r, name, n, 0);                                             \
        for (int64_t i = 0; i < n; i++) o->value[i] = (double)x[i];                        \
        return o;                                                                          \
    }
DEFINE_RECORD(uint8_t)
DEFINE_RECORD(int8_t)
DEFINE_RECORD(int16_t)
DEFINE_RECORD(int32_t)
DEFINE_RECORD(int64_t)
DEFINE_RECORD(float)
DEFINE_RECORD(double)

/* Allow a distance of `relative` times the value. */
static output *within(output *o, double relative) {
    o->bound = must(calloc((size_t)o->count, sizeof *o->bound));
    for (int64_t i = 0; i < o->count; i++) o->bound[i] = relative * fabs(o->value[i]);
    return o;
}

/* The same, relative to the largest value. */
static output *near(output *o, double relative) {
    double most = 0.0;
    for (int64_t i = 0; i < o->count; i++) most = fmax(most, fabs(o->value[i]));
    o->bound = must(calloc((size_t)o->count, sizeof *o->bound));
    for (int64_t i = 0; i < o->count; i++) o->bound[i] = relative * most;
    return o;
}

/* Inputs, the same in every run. */
static struct {
    float X[TOKENS * N], W[ROWS * N], W_hat[ROWS * N], H[N * N], R[N * N], scores[ENTRIES];
    float P[ENTRIES];
    uint16_t half[TOKENS * N], bf16[TOKENS * N];
    uint8_t allowed[ENTRIES];
    int64_t perm[N];
} in;

static uint64_t state = 88172645463325252u;
/* xorshift64*, then the middle of the sum of four: near enough to a normal variable. */
static float uniform(void) {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (float)((state * 2685821657736338717u) >> 40) * 0x1p-24f;
}
static float normal(void) { return 1.7f * (uniform() + uniform() + uniform() + uniform() - 2.0f); }

/* float16 bits of x, toward zero; its range is not left. */
static uint16_t half_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    const int exponent = (int)(u >> 23 & 255) - 112;
    const uint32_t sign = u >> 16 & 0x8000;
    if (exponent <= 0) return (uint16_t)sign;
    return (uint16_t)(sign | (uint32_t)exponent << 10 | (u >> 13 & 0x3ff));
}

static void make_inputs(void) {
    for (int i = 0; i < TOKENS * N; i++) {
        uint32_t u;
        in.X[i] = normal() * (float)(1 + i % N % 7);
        memcpy(&u, &in.X[i], sizeof u);
        in.half[i] = half_bits(in.X[i]);
        in.bf16[i] = (uint16_t)(u >> 16);
    }
    for (int i = 0; i < ROWS * N; i++) in.W[i] = normal();
    for (int i = 0; i < ROWS * N; i++) in.W_hat[i] = in.W[i] + 0.05f * normal();
    for (int i = 0; i < N; i++) in.perm[i] = i * 5 % N; /* 5 and 96 have no common divisor */
    for (int i = 0; i < N * N; i++) {
        double sum = i % N == i / N ? 3.0 : 0.0;
        for (int t = 0; t < TOKENS; t++)
            sum += (double)in.X[t * N + i / N] * (double)in.X[t * N + i % N] / TOKENS;
        in.H[i] = (float)sum;
    }
    for (int i = 0; i < ENTRIES; i++) in.scores[i] = 3.0f * normal();
    for (int i = 0; i < ENTRIES; i++) in.allowed[i] = uniform() < 0.7f;
    for (int row = 0; row < ENTRIES; row += KEYS) {
        double sum = 0.0;
        for (int i = 0; i < KEYS; i++) sum += exp((double)in.scores[row + i]);
        for (int i = 0; i < KEYS; i++)
            in.P[row + i] = (float)(exp((double)in.scores[row + i]) / sum);
    }
    double shift[N];
    int64_t info;
    for (int i = 0; i < N; i++) shift[i] = 0.1;
    check(ptq_cpu_select("base"), "base");
    check(ptq_factor(in.H, N, in.perm, shift, in.R, &info, 1), "factor");
}

/* Bound: the error of a float32 sum of TOKENS products, of both levels. */
static void run_hessian(results *r) {
    static const struct {
        const char *name;
        const void *X;
        ptq_dtype dtype;
    } kinds[] = {{"hessian f32", in.X, PTQ_F32},
                 {"hessian f16", in.half, PTQ_F16},
                 {"hessian bf16", in.bf16, PTQ_BF16}};
    for (int k = 0; k < 3; k++) {
        static float S[N * N], H[N * N];
        memset(S, 0, sizeof S);
        check(ptq_hessian_update(S, N, kinds[k].X, N, kinds[k].dtype, NULL, TOKENS, THREADS),
              kinds[k].name);
        check(ptq_hessian_finish(S, H, N, 2.0 / TOKENS, THREADS), kinds[k].name);
        output *o = record_float(r, kinds[k].name, H, N * N);
        within(o, 0.0);
        for (int i = 0; i < N * N; i++) {
            double reach = 0.0;
            for (int t = 0; t < TOKENS; t++)
                reach += fabs((double)in.X[t * N + i / N] * (double)in.X[t * N + i % N]);
            o->bound[i] = 2.0 * EPS * (TOKENS + 2) * reach * 2.0 / TOKENS;
        }
    }
}

/* (W_hat - W)^T against the tokens of X that stand beside them: ROWS tokens. */
static void run_cross(results *r) {
    static float S[N * N];
    const ptq_cross_args a = {.S = S,
                              .m = N,
                              .n = N,
                              .A = in.W_hat,
                              .B = in.W,
                              .X = in.X,
                              .lda = N,
                              .ldb = N,
                              .ldx = N,
                              .dtype = PTQ_F32,
                              .tokens = ROWS};
    memset(S, 0, sizeof S);
    check(ptq_cross_update(&a, THREADS), "cross");
    output *o = record_float(r, "cross", S, N * N);
    within(o, 0.0);
    for (int i = 0; i < N * N; i++)
        for (int t = 0; t < ROWS; t++) {
            const float moved = in.W_hat[t * N + i / N] - in.W[t * N + i / N];
            o->bound[i] +=
                2.0 * EPS * (ROWS + 2) * fabs((double)moved * (double)in.X[t * N + i % N]);
        }
}

/* (X - its tokens backwards) W^T, of N inputs and ROWS outputs. */
static void run_moved(results *r) {
    static float turned[TOKENS * N], out[TOKENS * ROWS];
    for (int t = 0; t < TOKENS; t++)
        memcpy(turned + t * N, in.X + (TOKENS - 1 - t) * N, sizeof(float) * N);
    memset(out, 0, sizeof out);
    const ptq_moved_args a = {.out = out,
                              .tokens = TOKENS,
                              .m = ROWS,
                              .n = N,
                              .Y = in.X,
                              .X = turned,
                              .ldy = N,
                              .ldx = N,
                              .W = in.W};
    check(ptq_moved_outputs(&a, THREADS), "moved");
    output *o = record_float(r, "moved", out, TOKENS * ROWS);
    within(o, 0.0);
    for (int i = 0; i < TOKENS * ROWS; i++)
        for (int j = 0; j < N; j++) {
            const float moved = in.X[i / ROWS * N + j] - turned[i / ROWS * N + j];
            o->bound[i] +=
                2.0 * EPS * (N + 2) * fabs((double)moved * (double)in.W[i % ROWS * N + j]);
        }
}

/* In double at every level, each sum in the same order: equal. */
static void run_coupled(results *r) {
    static uint8_t codes[ROWS * N], zeros[ROWS * N / GROUP];
    static float scales[ROWS * N / GROUP];
    static double B[ROWS * ROWS], objective[ROWS];
    int32_t g_idx[N];
    for (int j = 0; j < N; j++) g_idx[j] = j / GROUP;
    for (int i = 0; i < ROWS * N / GROUP; i++) zeros[i] = 4;
    for (int i = 0; i < ROWS * N / GROUP; i++) scales[i] = 0.3f + 0.01f * (float)(i % 7);
    memset(codes, 4, sizeof codes);
    for (int i = 0; i < ROWS; i++)
        for (int k = 0; k < ROWS; k++) B[i * ROWS + k] = 1.0 / (1 + abs(i - k));
    const ptq_coupled_args a = {.W = in.W,
                                .H = in.H,
                                .B = B,
                                .perm = in.perm,
                                .g_idx = g_idx,
                                .scales = scales,
                                .zeros = zeros,
                                .rows = ROWS,
                                .n = N,
                                .groups = N / GROUP,
                                .max_code = 7,
                                .passes = 2,
                                .codes = codes,
                                .objective = objective};
    check(ptq_couple_rows(&a, THREADS), "coupled");
    record_uint8_t(r, "coupled rows", codes, ROWS * N);
    record_double(r, "  objectives", objective, ROWS);
}

/* In double at every level, each sum in the same order: equal. */
static void run_target(results *r) {
    static double F[N * N], out[ROWS * N];
    double shift[N];
    int64_t info;
    for (int i = 0; i < N * N; i++) F[i] = (double)in.X[i];
    for (int i = 0; i < N; i++) shift[i] = 0.01 * (i + 1);
    const ptq_target_args a = {
        .W = in.W, .F = F, .H = in.H, .shift = shift, .rows = ROWS, .n = N, .out = out};
    check(ptq_target_correction(&a, &info, THREADS), "target");
    record_double(r, "target", out, ROWS * N);
}

/* R R^T, which must be near P H P^T + shift at every level: (n + 3) roundings of each. */
static void run_factor(results *r) {
    static float R[N * N];
    double shift[N];
    int64_t info;
    for (int i = 0; i < N; i++) shift[i] = 0.01 * i;
    memset(R, 0, sizeof R);
    check(ptq_factor(in.H, N, in.perm, shift, R, &info, THREADS), "factor");
    output *o = add_output(r, "factor", N * N, 1);
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            for (int k = 0; k < N; k++)
                o->value[i * N + j] += (double)R[i * N + k] * (double)R[j * N + k];
            const int64_t a = in.perm[i], b = in.perm[j];
            const double scale =
                ((double)in.H[a * N + a] + shift[a]) * ((double)in.H[b * N + b] + shift[b]);
            o->bound[i * N + j] = 2.0 * (N + 3) * EPS * sqrt(scale);
        }
}

static ptq_grid weight_grid(int method, int symmetric) {
    return (ptq_grid){.max_code = 7,
                      .symmetric = symmetric,
                      .method = method,
                      .steps = 30,
                      .candidates = 4,
                      .scale_type = PTQ_F32,
                      .min_shrink = 0.4f,
                      .norm = 2.4f};
}

/* Codes are integers, exact; scales follow weights that float32 sums have updated. */
static void run_gptq(results *r) {
    static uint8_t codes[ROWS * N], zeros[ROWS * N / GROUP];
    static float scales[ROWS * N / GROUP];
    static int32_t g_idx[N];
    static double history[5 * ROWS];
    for (int method = PTQ_GRID_MINMAX; method <= PTQ_GRID_FEEDBACK; method++)
        for (int refine_passes = 0; refine_passes <= 2; refine_passes += 2) {
            const int fixed = refine_passes > 0 && method != PTQ_GRID_FEEDBACK;
            char name[40];
            const ptq_gptq_args a = {.W = in.W,
                                     .H = in.H,
                                     .R = in.R,
                                     .perm = in.perm,
                                     .rows = ROWS,
                                     .n = N,
                                     .G = GROUP,
                                     .block = 32,
                                     .static_groups = fixed,
                                     .groups_follow_order = !fixed,
                                     .feedback = 1,
                                     .refine_passes = refine_passes,
                                     .refit_rounds = refine_passes / 2,
                                     .shift = 0.1,
                                     .grid = weight_grid(method, 0),
                                     .codes = codes,
                                     .scales = scales,
                                     .zeros = zeros,
                                     .g_idx = g_idx,
                                     .history = history};
            check(ptq_gptq(&a, THREADS), "gptq");
            snprintf(name, sizeof name, "gptq grid %d refine_passes %d", method, refine_passes);
            record_uint8_t(r, name, codes, ROWS * N);
            record_uint8_t(r, "  zeros", zeros, ROWS * N / GROUP);
            record_int32_t(r, "  groups", g_idx, N);
            within(record_float(r, "  scales", scales, ROWS * N / GROUP), 1e-4);
            within(record_double(r, "  objectives", history, (1 + 2 * refine_passes) * ROWS), 1e-3);
        }
}

/* Nothing here is summed across lanes or fused except under the Hessian, which only ranks. */
static void run_rtn(results *r) {
    static uint8_t codes[ROWS * N], zeros[ROWS * N / GROUP];
    static float scales[ROWS * N / GROUP];
    for (int method = PTQ_GRID_MINMAX; method <= PTQ_GRID_HESSIAN; method++) {
        char name[40];
        const ptq_grid grid = weight_grid(method, method == PTQ_GRID_MSE);
        check(ptq_rtn(in.W, ROWS, N, GROUP, &grid, in.H, codes, scales, zeros, THREADS), "rtn");
        snprintf(name, sizeof name, "rtn grid %d", method);
        record_uint8_t(r, name, codes, ROWS * N);
        record_float(r, "  scales", scales, ROWS * N / GROUP);
        record_uint8_t(r, "  zeros", zeros, ROWS * N / GROUP);
    }
    float row_scales[ROWS];
    uint8_t row_zeros[ROWS];
    for (int i = 0; i < ROWS; i++) row_scales[i] = 0.3f;
    for (int i = 0; i < ROWS; i++) row_zeros[i] = 7;
    check(ptq_codes_on_grid(in.W, ROWS, N, row_scales, row_zeros, 15, codes, THREADS), "codes");
    record_uint8_t(r, "codes on grid", codes, ROWS * N);
}

/* Bound: n roundings of the sum of absolute products. */
static void run_objective(results *r) {
    double out[ROWS];
    check(ptq_objective(in.W, ROWS, N, in.H, out, THREADS), "objective");
    output *o = record_double(r, "objective", out, ROWS);
    within(o, 0.0);
    for (int i = 0; i < ROWS * N * N; i++) {
        const int row = i / N / N, j = i / N % N, k = i % N;
        o->bound[row] +=
            2.0 * N * EPS *
            fabs((double)in.W[row * N + j] * (double)in.H[j * N + k] * (double)in.W[row * N + k]);
    }
}

/* Sums run in the same order everywhere. */
static void run_ranges(results *r) {
    const void *X[] = {in.X, in.half, in.bf16};
    for (int dtype = PTQ_F32; dtype <= PTQ_BF16; dtype++) {
        float low[N], high[N];
        double sum[N];
        check(ptq_channel_ranges(X[dtype], N, N, (ptq_dtype)dtype, NULL, TOKENS, low, high, sum,
                                 THREADS),
              "ranges");
        record_float(r, "ranges: low", low, N);
        record_float(r, "ranges: high", high, N);
        record_double(r, "ranges: sum", sum, N);
    }
}

/* Codes are rounded alike everywhere, and all sums are in double. */
static void run_statistics(results *r) {
    const void *X[] = {in.X, in.half, in.bf16};
    static int64_t counts[N], histogram[PTQ_MAGNITUDE_BINS], places[2 * PTQ_LARGEST];
    for (int dtype = PTQ_F32; dtype <= PTQ_BF16; dtype++) {
        double sums[PTQ_STATISTICS_SUMS];
        float most[N], largest[PTQ_LARGEST];
        const ptq_statistics_args a = {X[dtype], N, N, (ptq_dtype)dtype, NULL, TOKENS, 8, 1.0f, 0};
        ptq_statistics out = {sums, most, counts, histogram, largest, places};
        check(ptq_activation_statistics(&a, &out, THREADS), "statistics");
        record_double(r, "statistics: sums", sums, PTQ_STATISTICS_SUMS);
        record_float(r, "statistics: most", most, N);
        record_float(r, "statistics: largest", largest, PTQ_LARGEST);
    }
}

/* Products of 8-bit codes: random and extreme ones, shapes around the tiles of every level. */
static void run_int8(results *r) {
    static const struct {
        int64_t tokens, outputs, n;
    } shapes[] = {{1, 1, 1},     {1, 53, 96},     {2, 16, 64},   {3, 17, 65},
                  {5, 33, 127},  {6, 48, 128},    {16, 47, 200}, {17, 49, 63},
                  {33, 97, 260}, {70, 200, 4100}, {1100, 18, 40}};
    enum { MOST = 70 * 4100, MOST_W = 200 * 4100, MOST_Y = 1100 * 18 };
    static int8_t x[MOST], w[MOST_W], x_zeros[1100], w_zeros[200];
    static float x_scales[1100], w_scales[200], bias[200], y[MOST_Y], values[MOST];
    static uint32_t words[208 * 1028];
    static int32_t sums[200];
    static float offsets[200];
    state = 362436069362436069u; /* the same at every level */
    for (int extreme = 0; extreme < 3; extreme++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            const int64_t T = shapes[i].tokens, O = shapes[i].outputs, n = shapes[i].n;
            char name[40];
            for (int64_t j = 0; j < T * n; j++)
                x[j] = extreme ? -128 : (int8_t)(256.0f * uniform() - 128.0f);
            for (int64_t j = 0; j < O * n; j++)
                w[j] = extreme ? (int8_t)(extreme > 1 ? 127 : -128)
                               : (int8_t)(256.0f * uniform() - 128.0f);
            for (int64_t j = 0; j < T * n; j++) values[j] = normal();
            for (int64_t j = 0; j < T; j++) x_zeros[j] = (int8_t)(j * 37 % 256 - 128);
            for (int64_t j = 0; j < O; j++) w_zeros[j] = (int8_t)(j * 53 % 256 - 128);
            for (int64_t j = 0; j < O; j++) offsets[j] = (float)(w_zeros[j] + 128);
            for (int64_t j = 0; j < T; j++) x_scales[j] = 0.01f + uniform();
            for (int64_t j = 0; j < O; j++) w_scales[j] = 0.01f + uniform();
            for (int64_t j = 0; j < O; j++) bias[j] = normal();
            ptq_int8_args a = {.tokens = T,
                               .outputs = O,
                               .n = n,
                               .x = x,
                               .x_grids = T,
                               .x_scales = x_scales,
                               .x_zeros = x_zeros,
                               .w = w,
                               .w_grids = O,
                               .w_scales = w_scales,
                               .w_zeros = w_zeros,
                               .y = y};
            check(ptq_int8_matmul(&a, THREADS), "int8");
            snprintf(name, sizeof name, "int8 %d of %dx%dx%d", extreme, (int)T, (int)O, (int)n);
            record_float(r, name, y, T * O);
            check(ptq_int8_pack(w, 1, O, n, words, sums, THREADS), "pack");
            a = (ptq_int8_args){.tokens = T,
                                .outputs = O,
                                .n = n,
                                .values = values,
                                .ldx = n,
                                .grid = {.bits = 8, .symmetric = extreme == 1},
                                .words = words,
                                .sums = sums,
                                .w_grids = O,
                                .w_scales = w_scales,
                                .w_offsets = offsets,
                                .bias = bias,
                                .y = y};
            check(ptq_int8_matmul(&a, THREADS), "int8 of values");
            record_float(r, "  of values", y, T * O);
        }
}

static void run_activations(results *r) {
    static int8_t x[TOKENS * N], w[ROWS * N];
    static int16_t wide[TOKENS * N], zeros[TOKENS], w_zeros[ROWS];
    static int8_t x_zeros[TOKENS], w_zeros8[ROWS];
    static float scales[TOKENS], w_scales[ROWS], y[TOKENS * ROWS];
    const ptq_signed_grid grid = {.bits = 8}, wide_grid = {.bits = 12, .symmetric = 1};
    uint8_t outliers[N];
    check(ptq_activations_quantize(in.half, N, PTQ_F16, NULL, TOKENS, &wide_grid, 1, wide, scales,
                                   zeros, THREADS),
          "activations");
    record_int16_t(r, "12-bit activations", wide, TOKENS * N);
    check(ptq_activations_quantize(in.X, N, PTQ_F32, NULL, TOKENS, &grid, 1, x, scales, zeros,
                                   THREADS),
          "activations");
    record_int8_t(r, "8-bit activations", x, TOKENS * N);
    record_float(r, "  scales", scales, TOKENS);
    const ptq_signed_grid coarse = {.bits = 8, .bf16 = 1};
    check(ptq_activations_quantize(in.X, N, PTQ_F32, NULL, TOKENS, &coarse, 1, x, scales, zeros,
                                   THREADS),
          "activations");
    record_int8_t(r, "8-bit activations in bf16", x, TOKENS * N);
    check(ptq_outlier_columns(in.X, N, PTQ_F32, TOKENS, 15.0f, outliers, THREADS), "outliers");
    record_uint8_t(r, "outlier columns", outliers, N);
    check(ptq_activations_quantize(in.X, N, PTQ_F32, NULL, TOKENS, &grid, 1, x, scales, zeros,
                                   THREADS),
          "activations");
    check(ptq_activations_quantize(in.W, N, PTQ_F32, NULL, ROWS, &grid, 1, w, w_scales, w_zeros,
                                   THREADS),
          "weights");
    for (int i = 0; i < TOKENS; i++) x_zeros[i] = (int8_t)zeros[i];
    for (int i = 0; i < ROWS; i++) w_zeros8[i] = (int8_t)w_zeros[i];
    const ptq_int8_args a = {.x = x,
                             .w = w,
                             .tokens = TOKENS,
                             .outputs = ROWS,
                             .n = N,
                             .x_grids = TOKENS,
                             .w_grids = ROWS,
                             .x_scales = scales,
                             .w_scales = w_scales,
                             .x_zeros = x_zeros,
                             .w_zeros = w_zeros8,
                             .y = y};
    check(ptq_int8_matmul(&a, THREADS), "int8");
    record_float(r, "int8 product", y, TOKENS * ROWS);
}

/* Codes are exact; the exponential is good to 2 ulp, fused or not. Statistics are exact. */
static void run_softmax(results *r) {
    static float out[ENTRIES], e[ENTRIES], shifted[ENTRIES];
    static uint8_t codes[ENTRIES];
    static int64_t sums[HEADS * PTQ_LENGTH_CLASSES * 4];
    const double none = 0.0;
    const ptq_attention attention = {.batch = BATCH, .heads = HEADS, .q = QUERIES, .k = KEYS};
    ptq_softmax_args a = {.attention = attention,
                          .grid = {1.0f / 255, 0, 255},
                          .table = &none,
                          .table_heads = 1,
                          .table_lengths = 1,
                          .scores = in.scores};
    ptq_rows_info info;
    for (int i = 0; i < ENTRIES; i++) shifted[i] = -2.0f * fabsf(in.scores[i]);
    check(ptq_softmax_exp(shifted, ENTRIES, e, THREADS), "exp");
    within(record_float(r, "exponential", e, ENTRIES), 8 * EPS);
    a.codes = 1;
    a.out = codes;
    check(ptq_softmax_quantize(&a, &info, THREADS), "softmax codes");
    record_uint8_t(r, "softmax codes", codes, ENTRIES);
    a.codes = 0;
    a.out = out;
    a.correction = PTQ_CORRECT_ROW_SUM;
    a.attention.causal = 1;
    a.attention.allowed = in.allowed;
    a.attention.allowed_batch = BATCH;
    a.attention.allowed_heads = HEADS;
    a.attention.allowed_q = QUERIES;
    check(ptq_softmax_quantize(&a, &info, THREADS), "softmax values");
    record_float(r, "softmax values", out, ENTRIES);
    a.of = PTQ_OF_EXPONENTIALS;
    check(ptq_softmax_quantize(&a, &info, THREADS), "exponentials, row sum");
    /* The missing mass cancels: its error is that of the sum of the row, which is 1. */
    output *o = within(record_float(r, "exponentials, row sum", out, ENTRIES), 0);
    for (int i = 0; i < ENTRIES; i++) o->bound[i] = 4 * EPS;
    a.correction = PTQ_CORRECT_CODE_SUM;
    a.codes = 1;
    a.out = codes;
    check(ptq_softmax_quantize(&a, &info, THREADS), "exponentials, codes");
    record_uint8_t(r, "exponentials, codes", codes, ENTRIES);
    a.of = PTQ_OF_SQUARES;
    check(ptq_softmax_quantize(&a, &info, THREADS), "squares, codes");
    record_uint8_t(r, "squares, codes", codes, ENTRIES);
    a.codes = 0;
    a.out = out;
    a.correction = PTQ_CORRECT_ROW_SUM;
    check(ptq_softmax_quantize(&a, &info, THREADS), "squares, row sum");
    o = within(record_float(r, "squares, row sum", out, ENTRIES), 0);
    for (int i = 0; i < ENTRIES; i++) o->bound[i] = 4 * EPS;
    a.of = PTQ_OF_PROBABILITIES;
    check(ptq_softmax_statistics(&attention, in.P, &a.grid, 1e-3, sums, &info, THREADS),
          "softmax statistics");
    record_int64_t(r, "softmax statistics", sums, HEADS * PTQ_LENGTH_CLASSES * 4);
}

/* Packed weights at every number of bits: groups, tokens and outputs around the tiles. With int8
 * activations exact; in float within the bound of ptq_packed_matmul, of both levels. */
static void run_lowbit(results *r) {
    enum { OUTPUTS = 16 * 5 + 3, INPUTS = 416, PANELS = 6, MOST_GROUPS = 13, MOST = 15 };
    static const int bits[] = {2, 3, 4, 8}, group[] = {32, 416, 64};
    static const ptq_dtype dtypes[] = {PTQ_F16, PTQ_F32, PTQ_BF16};
    static uint8_t codes[OUTPUTS * INPUTS], zeros[PANELS * MOST_GROUPS * 16];
    static uint16_t half[PANELS * MOST_GROUPS * 16];
    static float scales[PANELS * MOST_GROUPS * 16], x[MOST * INPUTS], y[MOST * OUTPUTS];
    static float w_hat[OUTPUTS * INPUTS];
    static uint32_t words[PANELS * INPUTS / 4 * 16];
    static int32_t starts[MOST_GROUPS + 1], order[INPUTS];
    state = 362436069362436069u; /* the same at every level */
    for (int i = 0; i < INPUTS; i++) order[i] = i * 5 % INPUTS;
    for (int i = 0; i < MOST * INPUTS; i++) x[i] = normal();
    for (int b = 0; b < 4; b++)
        for (int g = 0; g < 3; g++) {
            const int64_t groups = (INPUTS + group[g] - 1) / group[g];
            const int extreme = g == 1;
            for (int i = 0; i < OUTPUTS * INPUTS; i++)
                codes[i] = extreme && i % 2 ? (uint8_t)((1 << bits[b]) - 1)
                                            : (uint8_t)(uniform() * (float)(1 << bits[b]));
            for (int i = 0; i < PANELS * MOST_GROUPS * 16; i++) {
                uint32_t u;
                scales[i] = 0.01f + uniform();
                memcpy(&u, &scales[i], sizeof u);
                half[i] = dtypes[g] == PTQ_F16 ? half_bits(scales[i]) : (uint16_t)(u >> 16);
                zeros[i] = (uint8_t)(uniform() * (float)(1 << bits[b]));
            }
            for (int64_t i = 0; i <= groups; i++)
                starts[i] = (int32_t)(i < groups ? i * group[g] : INPUTS);
            const ptq_packed w = {.bits = bits[b],
                                  .outputs = OUTPUTS,
                                  .inputs = INPUTS,
                                  .places = INPUTS,
                                  .groups = groups,
                                  .words = words,
                                  .scales = dtypes[g] == PTQ_F32 ? (void *)scales : (void *)half,
                                  .scale_dtype = dtypes[g],
                                  .zeros = zeros,
                                  .starts = starts,
                                  .order = g == 2 ? order : NULL};
            check(ptq_words_pack(&w, codes, words, THREADS), "words");
            check(ptq_packed_dequantize(&w, w_hat, THREADS), "dequantize");
            for (int64_t tokens = 1; tokens <= MOST; tokens += tokens < 4 ? 1 : 11) {
                char name[40];
                check(ptq_packed_matmul(&w, x, INPUTS, PTQ_F32, tokens, 1, y, THREADS), "int8");
                snprintf(name, sizeof name, "%d bits int8 g%d x %d", bits[b], group[g],
                         (int)tokens);
                record_float(r, name, y, tokens * OUTPUTS);
                check(ptq_packed_matmul(&w, x, INPUTS, PTQ_F32, tokens, 0, y, THREADS), "float");
                snprintf(name, sizeof name, "%d bits float g%d x %d", bits[b], group[g],
                         (int)tokens);
                output *o = record_float(r, name, y, tokens * OUTPUTS);
                within(o, 0.0);
                for (int64_t i = 0; i < tokens * OUTPUTS; i++) {
                    const int64_t t = i / OUTPUTS, out = i % OUTPUTS;
                    double reach = 0.0; /* scales are at most 1.01 */
                    for (int j = 0; j < INPUTS; j++) reach += fabs((double)x[t * INPUTS + j]);
                    o->bound[i] = 4.0 * (INPUTS + 8) * EPS * (double)(1 << bits[b]) * 1.01 * reach;
                    double exact = 0.0;
                    for (int j = 0; j < INPUTS; j++)
                        exact += (double)x[t * INPUTS + j] * (double)w_hat[out * INPUTS + j];
                    if (!(fabs(o->value[i] - exact) <= o->bound[i] / 2)) {
                        fprintf(stderr, "%s: %g is not near %g\n", name, o->value[i], exact);
                        exit(2);
                    }
                }
            }
        }
}

/* A decoder block on one token: products in float, int8 and with simulated inputs, grouped heads.
 * Floats differ by the order of sums alone. */
static void run_decoder(results *r) {
    enum { HIDDEN = 96, INNER = 80, HEADS_Q = 4, HEADS_KV = 2, HEAD = 40, SEEN = 45, WIDEST = 160 };
    static uint8_t codes[7][WIDEST * WIDEST], zeros[7][WIDEST * 16];
    static uint32_t words[7][WIDEST * WIDEST];
    static float scales[7][WIDEST * 16], w_scales[WIDEST], w_zeros[WIDEST];
    static int32_t w_sums[7][WIDEST], starts[7][2];
    static const int outputs[] = {HEADS_Q * HEAD, HEADS_KV * HEAD, HEADS_KV * HEAD, HIDDEN,
                                  INNER,          INNER,           HIDDEN};
    static const int inputs[] = {HIDDEN, HIDDEN, HIDDEN, HEADS_Q * HEAD, HIDDEN, HIDDEN, INNER};
    static float x[HIDDEN], gain[HIDDEN], angle[HEAD], kv[2][HEADS_KV * SEEN * HEAD];
    static float query[HEADS_Q * HEAD], key[HEADS_KV * HEAD], value[HEADS_KV * HEAD], y[HIDDEN];
    state = 88172645463325252u;
    for (int i = 0; i < HIDDEN; i++) x[i] = normal();
    for (int i = 0; i < HIDDEN; i++) gain[i] = 0.5f + uniform();
    for (int i = 0; i < HEAD; i++) angle[i] = (float)(i % 20) / 20.0f;
    for (int i = 0; i < HEADS_KV * SEEN * HEAD; i++) kv[0][i] = normal(), kv[1][i] = normal();
    for (int i = 0; i < WIDEST; i++) w_scales[i] = 0.002f, w_zeros[i] = 120.0f;
    for (int mode = 0; mode < 3; mode++) {
        ptq_row_layer layer[7];
        const int bits = mode == 2 ? 8 : mode == 1 ? 3 : 4;
        for (int l = 0; l < 7; l++) {
            for (int i = 0; i < outputs[l] * inputs[l]; i++)
                codes[l][i] = (uint8_t)(uniform() * (float)(1 << bits));
            for (int i = 0; i < WIDEST * 16; i++) scales[l][i] = 0.2f / (float)(1 << bits);
            for (int i = 0; i < WIDEST * 16; i++) zeros[l][i] = (uint8_t)((1 << bits) / 2 - 1);
            starts[l][1] = (inputs[l] + 31) / 32 * 32;
            layer[l] = (ptq_row_layer){.w = {.bits = bits,
                                             .outputs = outputs[l],
                                             .inputs = inputs[l],
                                             .places = bits == 8 ? inputs[l] : starts[l][1],
                                             .groups = 1,
                                             .words = words[l],
                                             .scales = scales[l],
                                             .scale_dtype = PTQ_F32,
                                             .zeros = zeros[l],
                                             .starts = starts[l]},
                                       .mode = (ptq_row_mode)mode,
                                       .grid = {.bits = 8},
                                       .w_sums = w_sums[l],
                                       .w_scales = w_scales,
                                       .w_zeros = w_zeros};
            if (bits == 8) starts[l][1] = inputs[l];
            if (mode == 2)
                check(
                    ptq_int8_pack(codes[l], 0, outputs[l], inputs[l], words[l], w_sums[l], THREADS),
                    "words of 8 bits");
            else check(ptq_words_pack(&layer[l].w, codes[l], words[l], THREADS), "words");
        }
        const ptq_block block = {PTQ_F32, HIDDEN, INNER, HEADS_Q, HEADS_KV, HEAD};
        const ptq_norm norm = {gain, 1e-5f}, heads = {gain, 1e-5f}, none = {0};
        const ptq_block_begin begin = {.block = block,
                                       .x = x,
                                       .cos = angle,
                                       .sin = angle,
                                       .norm = norm,
                                       .q_norm = mode ? none : heads,
                                       .k_norm = none,
                                       .q = layer[0],
                                       .k = layer[1],
                                       .v = layer[2],
                                       .query = query,
                                       .key = key,
                                       .value = value};
        const ptq_block_end end = {.block = block,
                                   .query = query,
                                   .keys = kv[0],
                                   .values = kv[1],
                                   .tokens = SEEN,
                                   .key_head = SEEN * HEAD,
                                   .key_token = HEAD,
                                   .value_head = SEEN * HEAD,
                                   .value_token = HEAD,
                                   .scaling = 0.158f,
                                   .x = x,
                                   .norm = norm,
                                   .o = layer[3],
                                   .gate = layer[4],
                                   .up = layer[5],
                                   .down = layer[6],
                                   .y = y};
        char name[40];
        check(ptq_decoder_begin(&begin, THREADS), "begin");
        snprintf(name, sizeof name, "decoder begin, mode %d", mode);
        near(record_float(r, name, query, HEADS_Q * HEAD), 1e-5);
        check(ptq_decoder_end(&end, THREADS), "end");
        snprintf(name, sizeof name, "decoder end, mode %d", mode);
        /* a code of an input on a tie may fall to the other side */
        near(record_float(r, name, y, HIDDEN), mode ? 2e-2 : 1e-5);
        const ptq_whole_block blocks[] = {{begin, end}, {begin, end}};
        check(ptq_decoder_blocks(blocks, 2, THREADS), "blocks");
        snprintf(name, sizeof name, "decoder blocks, mode %d", mode);
        near(record_float(r, name, y, HIDDEN), mode ? 2e-2 : 1e-5);
    }
}

static void run_energy(results *r) {
    double rows[2 * ROWS], columns[2 * N];
    check(ptq_energy(in.W, in.W_hat, PTQ_F32, ROWS, N, rows, THREADS), "energy");
    record_double(r, "energy of rows", rows, 2 * ROWS);
    check(ptq_energy_columns(in.W, in.W_hat, PTQ_F32, ROWS, N, columns, THREADS), "energy");
    record_double(r, "energy of columns", columns, 2 * N);
}

/* Squared differences of float32 products: a thousandth of the error itself. */
static void run_equalization(results *r) {
    const float *const W[] = {in.W, in.W_hat};
    const int64_t rows[] = {ROWS, ROWS - 5};
    static float scales[2 * N];
    double errors[2];
    for (int i = 0; i < N; i++) scales[i] = 1.0f;
    for (int i = 0; i < N; i++) scales[N + i] = (float)(1 + i % 7);
    const ptq_equalization_args a = {.X = in.X,
                                     .tokens = TOKENS,
                                     .n = N,
                                     .W = W,
                                     .rows = rows,
                                     .layers = 2,
                                     .scales = scales,
                                     .candidates = 2,
                                     .G = N,
                                     .grid = weight_grid(PTQ_GRID_MINMAX, 0),
                                     .act_max_code = 255,
                                     .errors = errors};
    check(ptq_equalization_errors(&a, THREADS), "equalization");
    within(record_double(r, "equalization errors", errors, 2), 1e-3);
}

static results run(const char *level) {
    results r = {0};
    check(ptq_cpu_select(level), level);
    run_hessian(&r);
    run_cross(&r);
    run_moved(&r);
    run_target(&r);
    run_coupled(&r);
    run_factor(&r);
    run_gptq(&r);
    run_rtn(&r);
    run_objective(&r);
    run_ranges(&r);
    run_statistics(&r);
    run_activations(&r);
    run_int8(&r);
    run_lowbit(&r);
    run_decoder(&r);
    run_softmax(&r);
    run_energy(&r);
    run_equalization(&r);
    return r;
}

/* Number of outputs of b that are not a's. */
static int compare(const char *level, const results *a, const results *b) {
    int bad = 0;
    for (int i = 0; i < a->count; i++) {
        const output *x = &a->output[i], *y = &b->output[i];
        double worst = 0.0;
        int64_t differing = 0, outside = 0;
        for (int64_t j = 0; j < x->count; j++) {
            const double d = fabs(x->value[j] - y->value[j]), bound = x->bound ? x->bound[j] : 0.0;
            differing += d != 0.0;
            outside += !(d <= bound);
            if (bound > 0.0 && d / bound > worst) worst = d / bound;
        }
        bad += outside > 0;
        printf("%s %-24s %6lld values, ", level, x->name, (long long)x->count);
        if (outside) printf("%lld WRONG\n", (long long)outside);
        else if (!x->bound) puts("equal");
        else printf("%lld differ, by %.2g of the bound\n", (long long)differing, worst);
    }
    return bad;
}

static void free_results(results *r) {
    for (int i = 0; i < r->count; i++) {
        free(r->output[i].value);
        free(r->output[i].bound);
    }
}

int main(void) {
    make_inputs();
    results base = run("base");
    int compared = 0, bad = 0;
    for (size_t i = 0; i < sizeof LEVELS / sizeof *LEVELS; i++) {
        if (!ptq_cpu_supports(LEVELS[i])) continue;
        results other = run(LEVELS[i]);
        bad += compare(LEVELS[i], &base, &other);
        free_results(&other);
        compared++;
    }
    free_results(&base);
    if (!compared) puts("this CPU has no level besides base");
    return bad || !compared;
}
