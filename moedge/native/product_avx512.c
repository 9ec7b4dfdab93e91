/* AVX-512 VL with VNNI: the same eight lanes, multiply and add in one instruction, twice the registers. */

#include <math.h>
#include <string.h>

#define MOEDGE_VNNI
#include "product.h"
#include "simd_x86.h"
#include "product.inc"
#include "quantise.inc"
#include "restore.inc"

static int runs(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

const variant moedge_avx512 = {"avx512-vnni", runs, prepare, product, dequantise, scores, weighted, round_row, restore, read_sum};
