/* cpu.c - which kernel level runs; chosen once, when the module is loaded. */
#include <string.h>

#include "../kernels/kernels.h"

static const ptq_kernels *selected = &ptq_kernels_base;

#ifdef PTQ_X86
/* f16c is tested with avx2 and fma because some virtual machines hide one of them. */
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
static int has_avx512_bf16(void) {
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif
static int always(void) { return 1; }

/* Best first. */
static const struct {
    const char *name;
    int (*supported)(void);
    const ptq_kernels *kernels;
} levels[] = {
#ifdef PTQ_X86
    {"avx512_bf16", has_avx512_bf16, &ptq_kernels_avx512_bf16},
    {"avx512", has_avx512, &ptq_kernels_avx512},
    {"avx2", has_avx2, &ptq_kernels_avx2},
#endif
    {"base", always, &ptq_kernels_base},
};
enum { LEVELS = sizeof levels / sizeof *levels };

int ptq_cpu_supports(const char *level) {
    for (int i = 0; i < LEVELS; i++)
        if (!strcmp(levels[i].name, level)) return levels[i].supported();
    return 0;
}

ptq_status ptq_cpu_select(const char *level) {
    const int any = !level || !*level;
    for (int i = 0; i < LEVELS; i++)
        if ((any || !strcmp(levels[i].name, level)) && levels[i].supported()) {
            selected = levels[i].kernels;
            return PTQ_OK;
        }
    return PTQ_INVALID;
}

const char *ptq_cpu_level(void) { return selected->name; }

const ptq_kernels *ptq_kernels_get(void) { return selected; }
