/* One row of bf16 numbers times a matrix, bit-equal to what another library gives: by adding in its order.

   The matrix lies as it is, or in fewer bits a number (shorten.c) among others: then a group of its rows at a time is
   restored into memory that stays in the processor's cache. Threads take groups of rows, so their number changes no
   bit. Which order is right is found by trying (runtime/product.py). */

#include <string.h>

#include "moedge.h"
#include "order.h"
#include "pool.h"

enum { RESTORED = 1024 }; /* numbers that are restored at once: levels.c does that fastest */

static const order *const orders[] = {
    NULL, /* so that there is one where no compiler makes any */
#ifdef MOEDGE_LANES
    &moedge_lanes,
#endif
#ifdef MOEDGE_PAIRS
    &moedge_pairs,
#endif
};

int moedge_orders(void) { return (int)(sizeof orders / sizeof *orders) - 1; }
const char *moedge_order_name(int o) { return orders[o + 1]->name; }
int moedge_order_runs(int o) { return orders[o + 1]->runs(); }

/* Numbers of a thread's own memory: a group of rows, and what is restored before and behind them. */
static int64_t own_numbers(const moedge_product *call) {
    return call->shortened ? (int64_t)GROUP * call->columns + 2 * RESTORED : 0;
}

size_t moedge_product_workspace(const moedge_product *call, int threads) {
    return (size_t)threads * (size_t)own_numbers(call) * sizeof(uint16_t);
}

typedef struct {
    int variant;
    const moedge_product *call;
} product_job;

/* Rows from `row` on, as bf16. */
static const uint16_t *restored(const product_job *job, int row, int rows, uint16_t *own) {
    const moedge_product *call = job->call;
    int64_t begin = call->first + (int64_t)row * call->columns, end = begin + (int64_t)rows * call->columns;
    int64_t from = begin - begin % RESTORED, to = end + (RESTORED - end % RESTORED) % RESTORED;
    if (to > call->count) to = call->count;
    moedge_restore_some(job->variant, call->shortened, call->count, from, to, own);
    return own + (begin - from);
}

static void run_product(void *context, int thread, int threads, pool_barrier *barrier) {
    (void)barrier;
    const product_job *job = context;
    const moedge_product *call = job->call;
    int groups = (call->rows + GROUP - 1) / GROUP;
    int begin = GROUP * (int)((int64_t)groups * thread / threads);
    int end = GROUP * (int)((int64_t)groups * (thread + 1) / threads);
    if (end > call->rows) end = call->rows;
    uint16_t *own = (uint16_t *)(void *)call->workspace + thread * own_numbers(call);
    for (int row = begin; row < end; row += GROUP) {
        int rows = end - row < GROUP ? end - row : GROUP;
        const uint16_t *w, *ahead;
        if (call->shortened) {
            ahead = w = restored(job, row, rows, own);
        } else {
            w = call->matrix + (int64_t)row * call->columns;
            ahead = end - row >= 2 * GROUP ? w + (int64_t)GROUP * call->columns : w;
        }
        orders[call->order + 1]->times(w, rows, call->columns, call->step, call->x, ahead, call->out + row);
    }
}

void moedge_one_row(int variant, const moedge_product *call, int threads) {
    product_job job = {variant, call};
    pool_run(threads, run_product, &job);
}
