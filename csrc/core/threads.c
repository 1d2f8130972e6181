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

int ptq_worth_threads(double work) {
    const double worth_a_team = 3e5; /* some ten microseconds on one core */
    return work >= worth_a_team;
}

int ptq_threads_for_work(int requested, double work) {
    return ptq_worth_threads(work) ? ptq_thread_count(requested) : 1;
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

static _Thread_local loop *running;    /* innermost loop of this thread */
static _Thread_local int polls;        /* this thread is the one that entered the core */
static _Thread_local double last_poll; /* kept between loops: most of them are shorter than 50 ms */

int ptq_should_stop(void) {
    if (!running) return 0;
    const ptq_poll poll = polls ? atomic_load(&poll_callback) : NULL;
    if (poll && now() - last_poll > 0.05) {
        if (poll()) atomic_store(&running->stop, 1);
        last_poll = now();
    }
    return atomic_load_explicit(&running->stop, memory_order_relaxed);
}

static void run_thread(loop *l, int thread) {
    loop *const outer = running;
    const int outer_polls = polls;
    running = l;
    polls = thread == 0 && !outer; /* a loop inside a task leaves polling to its task */
    const double start = polls ? now() : 0;
    if (start - last_poll > 0.5) last_poll = start; /* a fresh call need not poll at once */
    while (!ptq_should_stop()) {
        const int64_t i = atomic_fetch_add_explicit(&l->next, 1, memory_order_relaxed);
        if (i >= l->tasks) break;
        l->task(l->ctx, i, thread);
    }
    running = outer;
    polls = outer_polls;
}

ptq_status ptq_parallel_for(int64_t tasks, int threads, ptq_task task, void *ctx) {
    loop l = {.task = task, .ctx = ctx, .tasks = tasks};
    int team = threads;
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
