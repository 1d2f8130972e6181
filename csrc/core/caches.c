/* caches.c - sizes of the caches that blocks are made for, and the pages that blocks lie on. */
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

/* What the system says about a cache in bytes, or a common size where it says nothing usable. */
static int64_t cache_size(int name, int64_t least, int64_t common) {
    const int64_t size = name < 0 ? 0 : (int64_t)sysconf(name);
    return size < least || size > 64 * common ? common : size;
}

#ifdef _SC_LEVEL2_CACHE_SIZE
enum { FIRST = _SC_LEVEL1_DCACHE_SIZE, SECOND = _SC_LEVEL2_CACHE_SIZE };
#else
enum { FIRST = -1, SECOND = -1 };
#endif

int64_t ptq_first_cache(void) {
    static _Atomic(int64_t) known; /* virtual machines answer slowly */
    if (!atomic_load(&known)) atomic_store(&known, cache_size(FIRST, 8 << 10, 32 << 10));
    return atomic_load(&known);
}

int64_t ptq_second_cache(void) {
    static _Atomic(int64_t) known;
    if (!atomic_load(&known)) atomic_store(&known, cache_size(SECOND, 64 << 10, 512 << 10));
    return atomic_load(&known);
}

void *ptq_alloc_large(int64_t count, size_t size) {
    void *p = ptq_alloc(count, size);
#ifdef MADV_HUGEPAGE
    enum { PAGE = 2 << 20 };
    const uintptr_t start = ((uintptr_t)p + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = ((uintptr_t)p + (uintptr_t)count * size) / PAGE * PAGE;
    if (p && end > start) (void)madvise((void *)start, end - start, MADV_HUGEPAGE);
#endif
    return p;
}
