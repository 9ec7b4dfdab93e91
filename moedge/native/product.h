/* What each variant (scalar, AVX2, AVX-512, NEON) offers; product.inc is its one implementation. */

#ifndef MOEDGE_PRODUCT_H
#define MOEDGE_PRODUCT_H

#include "moedge.h"

#define BLOCK 32 /* numbers that share an activation's scale */

/* Inputs of a product: `count` rows of `columns` numbers, as fp32 (plain weights) or as integers in blocks with a scale.
   Padded with zeros to `blocks`, a multiple of 8. int8 weights take int16, within 2^-16 of a block's largest number;
   4-bit weights take int8, within 2^-8: a sixteenth of what the weights' own rounding does, and half the work. */
typedef struct {
    int32_t columns, blocks, code;
    int32_t unit;    /* sums are those of unit * q: 12, 8 or 1 where weights have a zero point, 0 for none */
    float *plain;    /* [count, blocks * 32] */
    int16_t *q;      /* [count, blocks * 32], for int8 weights */
    int8_t *q8;      /* [count, blocks * 32], for 4-bit weights, in the order in which these unpack */
    float *scales;   /* [count, blocks] */
    float *sums;     /* [count, blocks], to be taken off for the zero point; whole numbers below 2^24 */
} prepared;

typedef struct {
    const char *name;
    int (*runs)(void);
    void (*prepare)(const prepared *to, int row, const float *x);
    /* out[i * stride + r - begin] = product of row r of the matrix with input row rows[i], begin <= r < end */
    void (*product)(const moedge_matrix *m, const uint8_t *extent, const prepared *x, const int32_t *rows, int n,
                    int begin, int end, float *out, int stride);
    void (*dequantise)(const moedge_matrix *m, const uint8_t *extent, int begin, int end, int bf16, void *out);
    /* Of one head, its size a multiple of 8: out[t] = q * key t, and out = the sum of weights[t] * value t. */
    void (*scores)(int code, const float *q, const void *keys, int size, int tokens, float *out);
    void (*weighted)(int code, const float *weights, const void *values, int size, int tokens, float *out);
    int (*round_row)(const moedge_rounding *call, int row, float *x, int8_t *q, float *ranges); /* see quantise.inc */
    /* `before`: the exponent in front of code 1; count is a multiple of BLOCK */
    void (*restore)(const uint8_t *rest, const uint8_t *codes, uint16_t before, int64_t count, uint16_t *x);
    uint64_t (*read_sum)(const uint8_t *memory, size_t nbytes);
} variant;

extern const variant moedge_scalar, moedge_avx2, moedge_avx512, moedge_neon;
const variant *moedge_variant(int v); /* of those compiled in */

/* An input of `count` rows for products with m, laid out from workspace + *end on; *end moves behind it. */
prepared moedge_take_prepared(const moedge_matrix *m, int count, uint8_t *workspace, size_t *end);

static inline float from_bits(uint32_t bits) {
    union { uint32_t u; float f; } pun = {bits};
    return pun.f;
}

static inline uint32_t to_bits(float value) {
    union { float f; uint32_t u; } pun = {value};
    return pun.u;
}

static inline float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 0) {
        float value = (float)mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    return from_bits(sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | mantissa << 13);
}

static inline float load_number(const uint8_t *base, int code, int64_t index) {
    if (code == MOEDGE_F32) return ((const float *)base)[index];
    uint16_t bits = ((const uint16_t *)base)[index];
    return code == MOEDGE_BF16 ? from_bits((uint32_t)bits << 16) : from_half(bits);
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif
