/* cpu.c - which kernels run: a level, and the features that this CPU has on top of it. */
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "../kernels/kernels.h"

#if defined(PTQ_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#endif
#ifdef PTQ_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* f16c is tested with avx2 and fma because some virtual machines hide one of them; by hand, as
 * compilers know its name only since GCC 13 and clang 19. */
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
static int has_avx512_vnni(void) { return __builtin_cpu_supports("avx512vnni"); }
static int has_avx512_bf16(void) { return __builtin_cpu_supports("avx512bf16"); }

/* The bits of the extended state that the system keeps for a thread. */
static uint64_t kept_state(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (uint64_t)d << 32 | a;
}

/* Linux gives a process the state of the tiles, for all of its threads, when it is asked for. */
static int has_amx(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { BF16 = 1 << 22, TILE = 1 << 24, INT8 = 1 << 25, STATE = 3 << 17 /* tiles, settings */ };
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    const unsigned all = BF16 | TILE | INT8;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & all) == all &&
           (kept_state() & STATE) == STATE &&
           syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}
#endif
#ifdef PTQ_ARM64
static int has_dotprod(void) {
#if defined(__ARM_FEATURE_DOTPROD)
    return 1;
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) & 1ul << 20) != 0; /* HWCAP_ASIMDDP */
#else
    return 0;
#endif
}
#endif
static int always(void) { return 1; }

enum { MAX_FEATURES = 3 };

/* What CPUs of a level may have on top of it; its name follows the level's and an underscore. */
typedef struct {
    const char *name;
    int (*supported)(void);
    void (*add)(ptq_kernels *kernels);
} feature;

/* Best first, and features in the order in which they are put over the table. */
static const struct {
    const ptq_kernels *kernels;
    int (*supported)(void);
    feature features[MAX_FEATURES];
} levels[] = {
#ifdef PTQ_X86
    {&ptq_kernels_avx512,
     has_avx512,
     {{"vnni", has_avx512_vnni, ptq_add_avx512_vnni},
      {"bf16", has_avx512_bf16, ptq_add_avx512_bf16},
      {"amx", has_amx, ptq_add_avx512_amx}}},
    {&ptq_kernels_avx2, has_avx2, {{0}}},
#endif
#ifdef PTQ_ARM64
    /* every 64-bit Arm has it */
    {&ptq_kernels_neon, always, {{"dotprod", has_dotprod, ptq_add_neon_dotprod}}},
#endif
    {&ptq_kernels_base, always, {{0}}},
};
enum { LEVELS = sizeof levels / sizeof *levels };

/* A level and a set of its features. */
typedef struct {
    int level;
    unsigned features;
} selection;

/* The part of `name` that follows `word`, if it starts with it and there ends a word; or NULL. */
static const char *after_word(const char *name, const char *word) {
    const size_t length = strlen(word);
    if (strncmp(name, word, length) || (name[length] && name[length] != '_')) return NULL;
    return name + length;
}

/* Index of the feature that `word`, up to an underscore or the end, names; or -1. */
static int find_feature(int level, const char *word) {
    for (int f = 0; f < MAX_FEATURES && levels[level].features[f].name; f++)
        if (after_word(word, levels[level].features[f].name)) return f;
    return -1;
}

static int find_level(const char *name) {
    for (int i = 0; i < LEVELS; i++)
        if (after_word(name, levels[i].kernels->name)) return i;
    return -1;
}

/* Whether this CPU runs what `name` says: "avx512", or "avx512_vnni_bf16" with features. */
static int find_selection(const char *name, selection *found) {
    *found = (selection){find_level(name), 0};
    if (found->level < 0 || !levels[found->level].supported()) return 0;
    for (name += strlen(levels[found->level].kernels->name); *name;) {
        const int f = find_feature(found->level, name + 1);
        if (f < 0 || !levels[found->level].features[f].supported()) return 0;
        if (found->features >> f) return 0; /* each once, in order: one name for one selection */
        found->features |= 1u << f;
        name = after_word(name + 1, levels[found->level].features[f].name);
    }
    return 1;
}

/* The best level, with all of its features that there are. */
static selection best_selection(void) {
    selection best = {0, 0};
    while (!levels[best.level].supported()) best.level++;
    for (int f = 0; f < MAX_FEATURES && levels[best.level].features[f].name; f++)
        if (levels[best.level].features[f].supported()) best.features |= 1u << f;
    return best;
}

/* One table for each selection, made when it is first asked for and never changed afterwards:
 * whoever still works with an earlier one may go on. */
typedef struct {
    char name[64];
    ptq_kernels kernels;
} table;

static table tables[LEVELS][1u << MAX_FEATURES];
static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
static _Atomic(const ptq_kernels *) selected = &ptq_kernels_base;

static void make_table(table *t, selection s) {
    t->kernels = *levels[s.level].kernels;
    strcpy(t->name, t->kernels.name);
    for (int f = 0; f < MAX_FEATURES; f++) {
        if (!(s.features >> f & 1)) continue;
        levels[s.level].features[f].add(&t->kernels);
        strcat(strcat(t->name, "_"), levels[s.level].features[f].name);
    }
    t->kernels.name = t->name;
}

int ptq_cpu_supports(const char *name) {
    selection ignored;
    return find_selection(name, &ignored);
}

ptq_status ptq_cpu_select(const char *name) {
    selection s;
    if (!name || !*name) s = best_selection();
    else if (!find_selection(name, &s)) return PTQ_INVALID;
    table *t = &tables[s.level][s.features];
    pthread_mutex_lock(&making);
    if (!t->kernels.name) make_table(t, s);
    pthread_mutex_unlock(&making);
    atomic_store(&selected, &t->kernels);
    return PTQ_OK;
}

const char *ptq_cpu_level(void) { return atomic_load(&selected)->name; }

const ptq_kernels *ptq_kernels_get(void) { return atomic_load(&selected); }
