/* AVX2: each row in `step` sums of 8 numbers in turn, which are added in halves, as PyTorch's own product of bf16 does
   with step 64 (ATen/native/cpu/ReducedPrecisionFloatGemvFastPathKernel.cpp). Compiled with -mavx2 -mfma. */

#include <immintrin.h>

#include "order.h"
#include "product.h"

enum { LANES = 8, MOST = 8 }; /* numbers of a sum, and sums */

static int runs(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static inline __m256 wide(const uint16_t *x) {
    __m256i numbers = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(numbers, 16));
}

static inline float halve(__m256 v) {
    v = _mm256_add_ps(v, _mm256_permute2f128_ps(v, v, 1));
    v = _mm256_add_ps(v, _mm256_shuffle_ps(v, v, 0x4e));
    v = _mm256_add_ps(v, _mm256_shuffle_ps(v, v, 0xb1));
    return _mm256_cvtss_f32(v);
}

static inline float dot(const uint16_t *w, const uint16_t *x, int columns, const int sums, const uint16_t *ahead) {
    __m256 sum[MOST], rest = _mm256_setzero_ps();
    int c = 0;
    for (int i = 0; i < sums; i++) sum[i] = _mm256_setzero_ps();
    for (; c + sums * LANES <= columns; c += sums * LANES) {
        _mm_prefetch((const char *)(ahead + c), _MM_HINT_T1);
        _mm_prefetch((const char *)(ahead + c + 32), _MM_HINT_T1);
        for (int i = 0; i < sums; i++) sum[i] = _mm256_fmadd_ps(wide(x + c + LANES * i), wide(w + c + LANES * i), sum[i]);
    }
    for (int half = sums / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sum[i] = _mm256_add_ps(sum[i], sum[half + i]);
    for (; c + 2 * LANES <= columns; c += 2 * LANES) {
        rest = _mm256_fmadd_ps(wide(x + c), wide(w + c), rest);
        rest = _mm256_fmadd_ps(wide(x + c + LANES), wide(w + c + LANES), rest);
    }
    return halve(sum[0]) + halve(rest);
}

static void times(const uint16_t *w, int rows, int columns, int step, const uint16_t *x, const uint16_t *ahead,
                  uint16_t *out) {
    for (int r = 0; r < rows; r++) {
        int64_t at = (int64_t)r * columns;
        out[r] = to_bf16(step == MOST * LANES ? dot(w + at, x, columns, MOST, ahead + at)
                                              : dot(w + at, x, columns, MOST / 2, ahead + at));
    }
}

const order moedge_lanes = {"lanes", runs, times};
