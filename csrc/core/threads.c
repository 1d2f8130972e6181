/* threads.c - the only file that knows of OpenMP. */
#include "ptq.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* libgomp's workers do not survive fork: a region in the child would wait for them for ever. */
static atomic_int forked;
static _Atomic(ptq_poll) poll_callback;

static void mark_forked(void) { atomic_store(&forked, 1); }

void ptq_set_poll(ptq_poll poll) {
    static atomic_int registered;
    if (!atomic_exchange(&registered, 1)) pthread_atfork(NULL, NULL, mark_forked);
    atomic_store(&poll_callback, poll);
}

int ptq_has_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

int ptq_thread_count(int requested) {
#ifdef _OPENMP
    if (atomic_load(&forked)) return 1;
    if (requested > 0) return requested;
    const int most = omp_get_max_threads(), processors = omp_get_num_procs();
    return most < processors ? most : processors;
#else
    (void)requested;
    return 1;
#endif
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct {
    ptq_task task;
    void *ctx;
    int64_t tasks;
    atomic_llong next;
    atomic_int stop;
} loop;

static void run_thread(loop *l, int thread) {
    const ptq_poll poll = thread == 0 ? atomic_load(&poll_callback) : NULL;
    double due = poll ? now() + 0.05 : 0;
    while (!atomic_load_explicit(&l->stop, memory_order_relaxed)) {
        const int64_t i = atomic_fetch_add_explicit(&l->next, 1, memory_order_relaxed);
        if (i >= l->tasks) break;
        l->task(l->ctx, i, thread);
        if (poll && now() > due) {
            if (poll()) atomic_store(&l->stop, 1);
            due = now() + 0.05;
        }
    }
}

ptq_status ptq_parallel_for(int64_t tasks, int threads, ptq_task task, void *ctx) {
    loop l = {.task = task, .ctx = ctx, .tasks = tasks};
    int team = ptq_thread_count(threads);
    if (team > tasks) team = tasks > 0 ? (int)tasks : 1;
#ifdef _OPENMP
    if (team > 1) {
#pragma omp parallel num_threads(team)
        run_thread(&l, omp_get_thread_num());
    } else
#endif
        run_thread(&l, 0);
    return atomic_load(&l.stop) ? PTQ_INTERRUPTED : PTQ_OK;
}
