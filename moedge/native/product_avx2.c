/* AVX2, FMA and F16C: x86 since about 2013. Compiled with -mavx2 -mfma -mf16c. */

#include <math.h>
#include <string.h>

#include "product.h"
#include "simd_x86.h"
#include "product.inc"
#include "quantise.inc"
#include "restore.inc"

static int runs(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

const variant moedge_avx2 = {"avx2", runs, prepare, product, dequantise, scores, weighted, round_row, restore, read_sum};
