/* AVX-512 BF16: each sum goes along its row by pairs, one instruction for two products, as in oneDNN's brgemm kernels,
   which add blocks of 512 numbers to each other (oneDNN 3.12, brg_matmul:avx512_core_bf16; found by trying).
   Compiled with -mavx512bw -mavx512vl -mavx512bf16. */

#include <immintrin.h>
#include <string.h>

#include "order.h"

enum { LANES = 16, WIDTH = 2 * LANES }; /* rows of a tile, and numbers of each */

static int runs(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
}

/* 16 x 16 numbers of 32 bits: what was row i becomes lane i. */
static inline void transpose(__m512i *r) {
    __m512i t[LANES];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* Add the products of WIDTH numbers of the 16 rows that begin `at` numbers behind w. */
static inline __m512 add_tile(__m512 sum, const uint16_t *w, const int64_t *at, const uint16_t *x,
                              const uint16_t *ahead) {
    __m512i r[LANES];
    for (int i = 0; i < LANES; i++) {
        r[i] = _mm512_loadu_si512(w + at[i]);
        _mm_prefetch((const char *)(ahead + at[i]), _MM_HINT_T1);
    }
    transpose(r);
    for (int i = 0; i < LANES; i++) {
        int32_t pair;
        memcpy(&pair, x + 2 * i, sizeof pair);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)r[i]);
    }
    return sum;
}

static void store(uint16_t *out, int rows, __m512 sums) {
    __mmask16 some = rows >= LANES ? 0xffff : (__mmask16)((1u << (rows > 0 ? rows : 0)) - 1);
    _mm256_mask_storeu_epi16(out, some, (__m256i)_mm512_cvtneps_pbh(sums));
}

static void times(const uint16_t *w, int rows, int columns, int step, const uint16_t *x, const uint16_t *ahead,
                  uint16_t *out) {
    int64_t at[GROUP];
    for (int i = 0; i < GROUP; i++) at[i] = (int64_t)(i < rows ? i : rows - 1) * columns;
    __m512 above = _mm512_setzero_ps(), below = above; /* two tiles at once: one's products wait for the other's */
    for (int begin = 0; begin < columns; begin += step) {
        __m512 a = _mm512_setzero_ps(), b = a;
        for (int c = begin; c < begin + step && c < columns; c += WIDTH) {
            a = add_tile(a, w + c, at, x + c, ahead + c);
            b = add_tile(b, w + c, at + LANES, x + c, ahead + c);
        }
        above = begin ? _mm512_add_ps(above, a) : a;
        below = begin ? _mm512_add_ps(below, b) : b;
    }
    store(out, rows, above);
    store(out + LANES, rows - LANES, below);
}

const order moedge_pairs = {"pairs", runs, times};
