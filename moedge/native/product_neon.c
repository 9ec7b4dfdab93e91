/* NEON, which every AArch64 processor has. */

#include <string.h>

#include "product.h"
#include "simd_neon.h"
#include "product.inc"

static int runs(void) { return 1; }

const variant moedge_neon = {"neon", runs, prepare, product, dequantise, scores, weighted, read_sum};
