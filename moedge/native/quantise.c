/* Rounding to nearest in groups: the same bytes as formats.quantise makes with torch, one row at a time. */

#include <stdlib.h>

#include "moedge.h"
#include "product.h"

int moedge_quantise(int v, const moedge_rounding *call) {
    size_t groups = (size_t)(call->columns + call->group - 1) / (size_t)call->group, numbers = groups * (size_t)call->group;
    float *x = malloc(numbers * (sizeof *x + 1) + 2 * groups * sizeof *x);
    if (!x) return 2;
    float *ranges = x + numbers;
    int8_t *q = (int8_t *)(ranges + 2 * groups);
    for (int r = 0; r < call->rows; r++) {
        if (!moedge_variant(v)->round_row(call, r, x, q, ranges)) {
            free(x);
            return 1;
        }
    }
    free(x);
    return 0;
}
