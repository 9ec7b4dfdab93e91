/* Threads sleep on a condition variable between jobs; within one they spin, as its phases end within microseconds of
   each other. After a fork the child has none of them and makes its own. */

#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <unistd.h>

enum { LARGEST = 64 };

struct pool_barrier { atomic_int waiting, generation; };

static struct {
    pthread_mutex_t busy, lock;
    pthread_cond_t wake;
    pid_t owner;
    int workers;              /* threads made so far */
    unsigned long job_number; /* under lock */
    int taking_part;          /* workers below this number join the job; under lock */
    void (*job)(void *, int, int, pool_barrier *);
    void *context;
    pool_barrier barrier;
    atomic_int running;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void relax(int spin) {
    if (spin % 64 == 63) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
    else __builtin_ia32_pause();
#endif
}

void pool_wait(pool_barrier *barrier, int threads) {
    if (threads == 1) return;
    int generation = atomic_load(&barrier->generation);
    if (atomic_fetch_add(&barrier->waiting, 1) == threads - 1) {
        atomic_store(&barrier->waiting, 0);
        atomic_fetch_add(&barrier->generation, 1);
        return;
    }
    for (int spin = 0; atomic_load(&barrier->generation) == generation; spin = (spin + 1) & 0xffff) relax(spin);
}

static void *work(void *argument) {
    int me = (int)(long)argument;
    unsigned long seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.job_number == seen) pthread_cond_wait(&pool.wake, &pool.lock);
        seen = pool.job_number;
        int threads = pool.taking_part;
        if (me >= threads) continue;
        pthread_mutex_unlock(&pool.lock);
        pool.job(pool.context, me, threads, &pool.barrier);
        atomic_fetch_sub(&pool.running, 1);
        pthread_mutex_lock(&pool.lock);
    }
    return NULL;
}

static int make_workers(int threads) {
    if (pool.owner != getpid()) {
        pool.owner = getpid();
        pool.workers = 1;
        pool.job_number = 0;
        pthread_mutex_init(&pool.lock, NULL); /* may have been held while forking */
        pthread_cond_init(&pool.wake, NULL);
    }
    while (pool.workers < threads && pool.workers < LARGEST) {
        pthread_t thread;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        int failed = pthread_create(&thread, &attributes, work, (void *)(long)pool.workers);
        pthread_attr_destroy(&attributes);
        if (failed) break;
        pool.workers++;
    }
    return threads < pool.workers ? threads : pool.workers;
}

void pool_run(int threads, void (*job)(void *, int, int, pool_barrier *), void *context) {
    pool_barrier alone = {0};
    if (threads < 2 || pthread_mutex_trylock(&pool.busy)) {
        job(context, 0, 1, &alone);
        return;
    }
    threads = make_workers(threads);
    pthread_mutex_lock(&pool.lock);
    pool.job = job;
    pool.context = context;
    pool.taking_part = threads;
    atomic_store(&pool.running, threads - 1);
    pool.job_number++;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    job(context, 0, threads, &pool.barrier);
    for (int spin = 0; atomic_load(&pool.running); spin = (spin + 1) & 0xffff) relax(spin);
    pthread_mutex_unlock(&pool.busy);
}
