/* A few threads that wait for a job that all of them take part in, and a barrier within it. */

#ifndef MOEDGE_POOL_H
#define MOEDGE_POOL_H

typedef struct pool_barrier pool_barrier;

/* Runs job(context, thread, threads, barrier) on `threads` threads, the calling one included, and waits for all.
   With fewer threads where the pool is in use by another caller or threads cannot be made. */
void pool_run(int threads, void (*job)(void *, int, int, pool_barrier *), void *context);
void pool_wait(pool_barrier *barrier, int threads); /* until all have come */

#endif
