/* NEON, which every AArch64 processor has. */

#include <math.h>
#include <string.h>

#include "product.h"
#include "simd_neon.h"
#include "product.inc"
#include "quantise.inc"
#include "restore.inc"

static int runs(void) { return 1; }

const variant moedge_neon = {"neon", runs, prepare, product, dequantise, scores, weighted, round_row, restore, read_sum};
