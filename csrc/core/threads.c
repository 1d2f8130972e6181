/* threads.c - loops over tasks on several threads; the only file that knows of threads and OpenMP.
 *
 * OpenMP says how many threads a call may have (its settings, and what the process may use of the
 * machine); the loops run on threads of their own. A parallel region of OpenMP ends when the last
 * thread of its team arrives, with all others spinning: on a busy machine that is a scheduler's
 * slice per region, and a call on two threads took several times as long as on one. Here nothing
 * waits for a helper that has not begun: the calling thread starts at once, helpers take tasks from
 * the same counter when the machine wakes them, and the caller sleeps only while a helper is still
 * inside a task. Short waits are spun, but no longer than it takes to fall asleep and wake.
 *
 * Loops of phases follow each other within microseconds, so their helpers stay awake for a while
 * after one and enter the next without a lock. Phases end when their tasks are done, whoever did
 * them: a helper that comes late, or never, is not waited for there either. */
#include "ptq.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum {
    MOST_HELPERS = 1023,
    SPINS = 2000, /* a few microseconds */
    PAUSES = 256, /* between looks at the clock, or before others get the core */
};

/* How long a helper of phases stays awake for the next ones, in seconds. */
static const double awake = 300e-6;

static inline void pause_briefly(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    __asm__ volatile("yield");
#endif
}

/* Helpers do not survive fork: in the child there is the calling thread alone. */
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
    const int most = requested > 0 ? requested : omp_get_max_threads();
    const int processors = omp_get_num_procs();
    const int count = most < processors ? most : processors;
    return count > MOST_HELPERS ? MOST_HELPERS + 1 : count > 1 ? count : 1;
#else
    (void)requested;
    return 1;
#endif
}

int ptq_worth_threads(double work) {
    const double worth_helpers = 3e5; /* some ten microseconds on one core */
    return work >= worth_helpers;
}

int ptq_threads_for_work(int requested, double work) {
    return ptq_worth_threads(work) ? ptq_thread_count(requested) : 1;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct loop {
    ptq_task task;
    void *ctx;
    int64_t tasks;
    atomic_llong next;
    atomic_int stop;
    atomic_int inside; /* helpers that have joined and not left */
    int threads;
    atomic_int joined;       /* thread numbers given away, or refused beyond `threads` */
    const ptq_phase *phases; /* instead of `task`, `count` of them */
    int count;
    atomic_ullong turn; /* phase << 32 | tasks of it that were taken, or asked for in vain */
    atomic_llong done;  /* tasks of this phase */
    /* under the pool's lock */
    int open; /* to helpers that are awake, without the lock */
    struct loop *following;
    pthread_cond_t left; /* signalled by the last helper inside */
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

static void run_tasks(loop *l, int thread) {
    while (!ptq_should_stop()) {
        const int64_t i = atomic_fetch_add_explicit(&l->next, 1, memory_order_relaxed);
        if (i >= l->tasks) break;
        l->task(l->ctx, i, thread);
    }
}

static int phase_of(loop *l) {
    return (int)(atomic_load_explicit(&l->turn, memory_order_acquire) >> 32);
}

/* Until the phase is over. */
static void await_phase(loop *l, int phase) {
    for (int i = 1; phase_of(l) == phase; i++) {
        pause_briefly();
        if (i % PAUSES) continue;
        if (ptq_should_stop()) return;
        sched_yield();
    }
}

static void run_phases(loop *l, int thread) {
    while (!ptq_should_stop()) {
        const unsigned long long turn = atomic_fetch_add(&l->turn, 1);
        const int phase = (int)(turn >> 32);
        const int64_t task = (int64_t)(turn & 0xffffffffu);
        if (phase >= l->count) break;
        const ptq_phase *p = &l->phases[phase];
        if (task >= p->tasks) {
            await_phase(l, phase);
            continue;
        }
        p->task(p->ctx, task, thread);
        if (atomic_fetch_add(&l->done, 1) + 1 < p->tasks) continue;
        if (p->after) p->after(p->ctx);
        atomic_store(&l->done, 0);
        atomic_store(&l->turn, (unsigned long long)(phase + 1) << 32);
    }
}

static void run(loop *l, int thread) {
    if (l->phases) run_phases(l, thread);
    else run_tasks(l, thread);
}

/* ---- helpers ----------------------------------------------------------------------------- */

static struct {
    pthread_mutex_t lock;
    pthread_cond_t wanted; /* a loop was put on the list */
    loop *first;           /* loops that helpers may join */
    int helpers, idle;     /* threads there are; of these, how many wait for `wanted` */
    /* without the lock */
    atomic_uint published;  /* loops so far */
    _Atomic(loop *) phased; /* a loop of phases that awake helpers may enter */
    atomic_int entering;    /* helpers that look at it; it stays until they have joined or left */
    atomic_int waiting;     /* helpers that are awake */
    atomic_int plain;       /* loops on the list that awake helpers can enter under the lock only */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wanted = PTHREAD_COND_INITIALIZER};

static int has_work(loop *l) {
    return l->phases ? phase_of(l) < l->count : atomic_load(&l->next) < l->tasks;
}

/* A loop with tasks left and a thread number to give away, or NULL. */
static loop *joinable(void) {
    for (loop *l = pool.first; l; l = l->following)
        if (atomic_load(&l->joined) < l->threads && has_work(l) && !atomic_load(&l->stop)) return l;
    return NULL;
}

/* Enter the loop that awake helpers may, if there is one and a number left; 1 if so. */
static int join_phases(void) {
    atomic_fetch_add(&pool.entering, 1);
    loop *const l = atomic_load(&pool.phased);
    const int thread = l ? atomic_fetch_add(&l->joined, 1) : 0;
    const int joins = l && thread < l->threads;
    if (joins) atomic_fetch_add(&l->inside, 1);
    atomic_fetch_sub(&pool.entering, 1);
    if (!joins) return 0;
    running = l;
    run_phases(l, thread);
    running = NULL;
    atomic_fetch_sub(&l->inside, 1); /* the last that is done with it */
    return 1;
}

/* Enter loops of phases as they come, without sleep or lock, until there was none for a while, or
 * there is a loop that takes the lock. Returns until when to stay awake. */
static double stay_awake(unsigned seen, double until) {
    atomic_fetch_add(&pool.waiting, 1);
    for (int i = 1;; i++) {
        const unsigned published = atomic_load_explicit(&pool.published, memory_order_acquire);
        if (published != seen) {
            if (join_phases()) until = now() + awake;
            if (atomic_load(&pool.plain)) break;
            seen = published;
            continue;
        }
        pause_briefly();
        if (i % PAUSES) continue;
        if (now() > until) break;
        sched_yield();
    }
    atomic_fetch_sub(&pool.waiting, 1);
    return until;
}

/* Runs for ever; the process ends with its main thread. */
static void *help(void *unused) {
    (void)unused;
    double until = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        loop *l = joinable();
        if (!l && until > 0) {
            const unsigned seen = atomic_load(&pool.published);
            pthread_mutex_unlock(&pool.lock);
            until = stay_awake(seen, until);
            if (now() > until) until = 0;
            pthread_mutex_lock(&pool.lock);
            continue;
        }
        if (!l) {
            pool.idle++;
            pthread_cond_wait(&pool.wanted, &pool.lock);
            pool.idle--;
            continue;
        }
        const int thread = atomic_fetch_add(&l->joined, 1);
        if (thread >= l->threads) continue; /* an awake helper was faster */
        const int phased = l->phases != NULL;
        atomic_fetch_add(&l->inside, 1);
        pthread_mutex_unlock(&pool.lock);
        running = l;
        run(l, thread);
        running = NULL;
        if (phased) {
            atomic_fetch_sub(&l->inside, 1); /* the last that is done with it */
            until = now() + awake;
        }
        pthread_mutex_lock(&pool.lock);
        if (!phased && atomic_fetch_sub(&l->inside, 1) == 1) pthread_cond_signal(&l->left);
    }
    return NULL;
}

/* Have `wanted` helpers, if the system grants them; under the lock. Signals are for others. */
static void ensure_helpers(int wanted) {
    if (pool.helpers >= wanted) return;
    sigset_t all, before;
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pthread_t helper; pool.helpers < wanted; pool.helpers++)
        if (pthread_create(&helper, &attributes, help, NULL)) break;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

/* Put the loop on the list and wake as many helpers as it can use. */
static void publish(loop *l) {
    pthread_mutex_lock(&pool.lock);
    ensure_helpers(l->threads - 1);
    l->following = pool.first;
    pool.first = l;
    loop *none = NULL;
    l->open = l->phases && atomic_compare_exchange_strong(&pool.phased, &none, l);
    if (!l->open) atomic_fetch_add(&pool.plain, 1);
    atomic_fetch_add(&pool.published, 1);
    const int wanted = l->threads - 1 - atomic_load(&pool.waiting);
    for (int i = 0; i < wanted && i < pool.idle; i++) pthread_cond_signal(&pool.wanted);
    pthread_mutex_unlock(&pool.lock);
}

/* Helpers of phases leave by themselves when these are over, or stopped. */
static void await_leaving(loop *l) {
    for (int i = 1; atomic_load(&pool.entering) || atomic_load(&l->inside); i++) {
        pause_briefly();
        if (i % PAUSES) continue;
        ptq_should_stop();
        sched_yield();
    }
}

/* Take the loop off the list, so that no helper joins any more, and wait until all have left. An
 * interrupt while a helper is inside a long task stops it. */
static void withdraw(loop *l) {
    pthread_mutex_lock(&pool.lock);
    loop **at = &pool.first;
    while (*at != l) at = &(*at)->following;
    *at = l->following;
    if (l->open) atomic_store(&pool.phased, NULL);
    else atomic_fetch_sub(&pool.plain, 1);
    pthread_mutex_unlock(&pool.lock);
    if (l->phases) {
        await_leaving(l);
        return;
    }
    for (int i = 0; i < SPINS && atomic_load_explicit(&l->inside, memory_order_acquire); i++)
        continue;
    pthread_mutex_lock(&pool.lock);
    while (atomic_load(&l->inside)) {
        struct timespec limit;
        clock_gettime(CLOCK_REALTIME, &limit);
        limit.tv_nsec += 50 * 1000 * 1000;
        if (limit.tv_nsec >= 1000000000) {
            limit.tv_nsec -= 1000000000;
            limit.tv_sec++;
        }
        if (pthread_cond_timedwait(&l->left, &pool.lock, &limit) != ETIMEDOUT) continue;
        pthread_mutex_unlock(&pool.lock); /* the poll may run anything */
        ptq_should_stop();
        pthread_mutex_lock(&pool.lock);
    }
    pthread_mutex_unlock(&pool.lock);
}

static ptq_status run_loop(loop *l) {
    loop *const outer = running;
    const int outer_polls = polls;
    running = l;
    polls = !outer; /* a loop inside a task leaves polling to its task */
    const double start = polls ? now() : 0;
    if (start - last_poll > 0.5) last_poll = start; /* a fresh call need not poll at once */
    const int shared = l->threads > 1 && !pthread_cond_init(&l->left, NULL);
    if (shared) publish(l);
    run(l, 0);
    if (shared) {
        withdraw(l);
        pthread_cond_destroy(&l->left);
    }
    running = outer;
    polls = outer_polls;
    return atomic_load(&l->stop) ? PTQ_INTERRUPTED : PTQ_OK;
}

ptq_status ptq_parallel_for(int64_t tasks, int threads, ptq_task task, void *ctx) {
    loop l = {.task = task, .ctx = ctx, .tasks = tasks, .joined = 1};
    l.threads = threads < tasks ? threads : tasks > 0 ? (int)tasks : 1;
    return run_loop(&l);
}

ptq_status ptq_parallel_phases(const ptq_phase *phases, int count, int threads) {
    for (int i = 0; i < count; i++)
        if (phases[i].tasks < 1 || phases[i].tasks > INT32_MAX) return PTQ_INVALID;
    loop l = {.phases = phases, .count = count, .joined = 1, .threads = threads};
    return run_loop(&l);
}
