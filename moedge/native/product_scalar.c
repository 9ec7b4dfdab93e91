/* The variant for every processor. */

#include <string.h>

/* unrolled and inlined as the others are, this one took a minute to compile */
#define UNROLL
#define INLINE static

#include "product.h"
#include "simd_scalar.h"
#include "product.inc"

static int runs(void) { return 1; }

const variant moedge_scalar = {"scalar", runs, prepare, product, dequantise, read_sum};
