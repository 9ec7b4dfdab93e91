/* One row times a matrix of bf16, plain and in fewer bits a number, and parts of what lies in fewer bits. */

#ifndef EXACT_H
#define EXACT_H

#include "matrix.h"

enum { GUARD = 40 }; /* numbers behind a result, as masked stores are not seen by the sanitizer */

static double plain(uint16_t number) { return from_bits((uint32_t)number << 16); }

/* Numbers around one size, some of them zero, and as many of other sizes as the list has room for, at borders too. */
static uint16_t *random_weights(int count) {
    uint16_t *x = allocate((size_t)count * 2);
    for (int i = 0; i < count; i++)
        x[i] = (uint16_t)((below(20) ? 122 - below(15) : 0) << 7 | below(128) | below(2) << 15);
    for (int odd = below(count / 512 + 17); odd > 0; odd--) {
        int place = below(2) ? below(count) : 32 * below(count / 32) + 31 * below(2);
        x[place] = (uint16_t)((below(4) ? 1 + below(100) : 127 + below(3)) << 7 | below(128) | below(2) << 15);
    }
    return x;
}

/* As few bits as there can be, in memory that ends where they end; NULL where this processor cannot. */
static uint8_t *compacted(const uint16_t *x, int count) {
    static const moedge_matrix none = {.code = MOEDGE_BF16};
    size_t room = (size_t)count * 3 + 4096;
    uint8_t *large = allocate(room);
    size_t taken = moedge_compact(x, count, large, room);
    free(large);
    if (!taken) return NULL;
    uint8_t *out = allocate(taken - 1);
    if (moedge_compact(x, count, out, taken - 1)) fail("numbers that do not fit", 0, &none, count, 1, 0);
    free(out);
    out = allocate(taken);
    if (moedge_compact(x, count, out, taken) != taken) fail("numbers that just fit", 0, &none, count, 1, 0);
    return out;
}

static uint8_t *shortened(const uint16_t *x, int count) {
    static const moedge_matrix none = {.code = MOEDGE_BF16};
    uint8_t *compact = below(2) ? compacted(x, count) : NULL;
    if (compact) return compact;
    uint8_t *out = allocate(moedge_short_bytes(count));
    if (!moedge_shorten(x, count, out)) fail("numbers that fit", 0, &none, count, 1, 0);
    return out;
}

static void check_restore_some(int v) {
    static const moedge_matrix none = {.code = MOEDGE_BF16};
    int blocks = 1 + below(below(2) ? 4 : 100), first = below(blocks + 1);
    int begin = 32 * first, end = begin + 32 * below(blocks - first + 1);
    uint16_t *x = random_weights(32 * blocks), *again = allocate((size_t)(end - begin) * 2);
    uint8_t *from = shortened(x, 32 * blocks);
    moedge_restore_some(v, from, 32 * blocks, begin, end, again);
    if (memcmp(x + begin, again, (size_t)(end - begin) * 2)) fail("some restored", v, &none, begin, end, 0);
    free(x), free(again), free(from);
}

/* The products on so many threads -> out [rows + GUARD]. */
static uint16_t *one_row(int v, moedge_product call, int threads) {
    uint16_t *out = allocate((size_t)(call.rows + GUARD) * 2);
    memset(out, 0x5a, (size_t)(call.rows + GUARD) * 2);
    call.out = out;
    call.workspace = allocate(moedge_product_workspace(&call, threads));
    moedge_one_row(v, &call, threads);
    free(call.workspace);
    return out;
}

static void check_products(int v, const moedge_product *call) {
    moedge_matrix shape = {.code = MOEDGE_BF16, .rows = call->rows, .columns = call->columns, .step = call->step};
    moedge_product other = *call;
    other.matrix = NULL;
    size_t nbytes = (size_t)(call->rows + GUARD) * 2;
    moedge_product direct = *call;
    direct.shortened = NULL;
    uint16_t *out = one_row(v, direct, 1), *threaded = one_row(v, direct, 2 + below(4));
    uint16_t *restored = one_row(v, other, 1), *both = one_row(v, other, 2 + below(4));
    for (int r = 0; r < call->rows; r++) {
        double expected = 0, size = 0;
        for (int c = 0; c < call->columns; c++) {
            double term = plain(call->x[c]) * plain(call->matrix[r * call->columns + c]);
            expected += term, size += fabs(term);
        }
        double error = fabs(plain(out[r]) - expected), allowed = size * 0x1p-15 + fabs(expected) * 0x1p-8 + 1e-36;
        if (!(error <= allowed)) fail("one row's product", v, &shape, r, error, allowed);
    }
    for (int i = 0; i < GUARD; i++)
        if (out[call->rows + i] != 0x5a5a) fail("memory behind one row's products", v, &shape, i, 1, 0);
    if (memcmp(out, threaded, nbytes)) fail("one row by threads", v, &shape, call->order, 1, 0);
    if (memcmp(out, restored, nbytes)) fail("one row by 12 bits", v, &shape, (int)(call->first % 32), 1, 0);
    if (memcmp(out, both, nbytes)) fail("one row by 12 bits and threads", v, &shape, (int)(call->first % 32), 1, 0);
    free(out), free(threaded), free(restored), free(both);
}

static void check_one_row(int v) {
    int rows = 1 + below(below(2) ? 40 : 150), columns = 32 * (1 + below(below(4) ? 6 : 40));
    int first = below(3) ? below(150) : 32 * below(5);
    int count = (first + rows * columns + 31) / 32 * 32 + 32 * below(3);
    uint16_t *numbers = random_weights(count), *x = random_weights(columns);
    uint16_t *matrix = allocate((size_t)(rows * columns) * 2);
    memcpy(matrix, numbers + first, (size_t)(rows * columns) * 2);
    uint8_t *from = shortened(numbers, count);
    for (int o = 0; o < moedge_orders(); o++) {
        if (!moedge_order_runs(o)) continue;
        int most = strcmp(moedge_order_name(o), "lanes") ? 64 << below(7) : 32 << below(2);
        int step = strcmp(moedge_order_name(o), "lanes") && most > columns ? columns : most;
        moedge_product call = {.matrix = matrix, .shortened = from, .count = count, .first = first, .x = x,
                               .rows = rows, .columns = columns, .order = o, .step = step};
        check_products(v, &call);
    }
    free(numbers), free(x), free(matrix), free(from);
}

#endif
