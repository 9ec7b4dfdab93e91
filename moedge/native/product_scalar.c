/* The variant for every processor. */

#include <string.h>

/* unrolled and inlined as the others are, this one took a minute to compile */
#ifndef UNROLL
#define UNROLL
#define INLINE static
#endif

#include "product.h"
#include "simd_scalar.h"
#include "product.inc"

static int runs(void) { return 1; }

const variant moedge_scalar = {"scalar", runs, prepare, product, dequantise, scores, weighted, read_sum};
