/* The variant for every processor. */

#include <math.h>
#include <string.h>

/* unrolled and inlined as the others are, this one took a minute to compile */
#ifndef UNROLL
#define UNROLL
#define INLINE static
#endif

#include "product.h"
#include "simd_scalar.h"
#include "product.inc"
#include "quantise.inc"
#include "restore.inc"

static int runs(void) { return 1; }

const variant moedge_scalar = {"scalar", runs, prepare, product, dequantise, scores, weighted, round_row, restore, read_sum};
