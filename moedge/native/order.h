/* The orders in which others add the products of a row of bf16 numbers and a matrix: see exact.c. */

#ifndef MOEDGE_ORDER_H
#define MOEDGE_ORDER_H

#include "moedge.h"

enum { GROUP = 32 }; /* rows that are computed at once */

typedef struct {
    const char *name;
    int (*runs)(void);
    /* out[r] = row r of w times x, for the first `rows` of at most GROUP rows of `columns` numbers, a multiple of 32.
       `step`: how many numbers of a row go together. `ahead`: rows of the same number that will be needed next. */
    void (*times)(const uint16_t *w, int rows, int columns, int step, const uint16_t *x, const uint16_t *ahead,
                  uint16_t *out);
} order;

extern const order moedge_pairs, moedge_lanes;

#endif
