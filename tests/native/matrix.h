/* Random numbers and random stored matrices with their values by definition, for the programs that check kernels. */

#ifndef MATRIX_H
#define MATRIX_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moedge.h"
#include "product.h"

static uint64_t state = 1;

static uint32_t random_bits(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}
static int below(int n) { return (int)(random_bits() % (uint32_t)n); }
static float normal(void) { /* near enough: the sum of four uniforms */
    float sum = 0;
    for (int i = 0; i < 4; i++) sum += (float)random_bits() * 0x1p-32f - 0.5f;
    return sum * 1.7f;
}
static void *allocate(size_t nbytes) {
    void *memory = malloc(nbytes ? nbytes : 1);
    if (!memory) exit(2);
    return memory;
}

static uint16_t to_half(float value) { /* rounded towards zero; enough for test data */
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000;
    int exponent = (int)(bits >> 23 & 255) - 112;
    uint32_t mantissa = bits & 0x7fffff;
    if (exponent >= 31) return (uint16_t)(sign | 0x7bff);
    if (exponent > 0) return (uint16_t)(sign | (uint32_t)exponent << 10 | mantissa >> 13);
    if (exponent < -10) return (uint16_t)sign;
    return (uint16_t)(sign | (mantissa | 0x800000) >> (14 - exponent));
}

typedef struct {
    uint8_t *bytes;
    size_t nbytes;
} extent_bytes;

static int64_t put(extent_bytes *e, const void *data, size_t nbytes) {
    int64_t at = (int64_t)((e->nbytes + 63) / 64 * 64);
    e->bytes = realloc(e->bytes, (size_t)at + nbytes + 1);
    if (!e->bytes) exit(2);
    memset(e->bytes + e->nbytes, 0xff, (size_t)at - e->nbytes);
    memcpy(e->bytes + at, data, nbytes);
    e->nbytes = (size_t)at + nbytes;
    return at;
}

/* ---- a random stored matrix, and its value by the definition in formats.py ---- */

static void put_bias(extent_bytes *e, moedge_matrix *m, int stored_rows) {
    uint32_t *bias = allocate((size_t)stored_rows * 4);
    m->bias_code = below(3);
    for (int i = 0; i < stored_rows; i++) {
        uint32_t bits = to_bits(normal());
        if (m->bias_code == MOEDGE_F32) bias[i] = bits;
        else ((uint16_t *)bias)[i] = m->bias_code == MOEDGE_BF16 ? (uint16_t)(bits >> 16) : to_half(from_bits(bits));
    }
    m->bias = put(e, bias, (size_t)stored_rows * (m->bias_code == MOEDGE_F32 ? 4 : 2));
    free(bias);
}

static void put_quantised(extent_bytes *e, moedge_matrix *m, int stored_rows, int extreme) {
    int groups = (m->columns + m->group - 1) / m->group;
    size_t scales_count = (size_t)stored_rows * (size_t)groups;
    size_t values = scales_count * (size_t)m->group / (m->code == MOEDGE_INT8 ? 1 : 2);
    int asymmetric = m->code != MOEDGE_MXFP4 && below(2);
    uint8_t *bytes = allocate(values);
    uint16_t *scales = allocate(scales_count * 2);
    int8_t *zeros = allocate(scales_count);
    float *factors = allocate((size_t)stored_rows * 4);
    for (size_t i = 0; i < values; i++) bytes[i] = (uint8_t)random_bits();
    for (size_t i = 0; i < scales_count; i++) {
        float scale = normal() * (extreme ? ldexpf(1, -below(30)) : 1) * 8192;
        scales[i] = below(8) ? to_half(scale) : 0;
        zeros[i] = (int8_t)(m->code == MOEDGE_INT8 ? below(256) - 128 : below(16));
    }
    for (int i = 0; i < stored_rows; i++) factors[i] = ldexpf(1, -20 - (extreme ? below(60) : 0));
    m->values = put(e, bytes, values);
    m->scales = put(e, scales, scales_count * 2);
    m->factors = put(e, factors, (size_t)stored_rows * 4);
    m->zeros = asymmetric ? put(e, zeros, scales_count) : -1;
    free(bytes), free(scales), free(zeros), free(factors);
}

static moedge_matrix put_matrix(extent_bytes *e, int code, int rows, int columns, int step, int extreme) {
    moedge_matrix m = {.values = -1, .scales = -1, .factors = -1, .zeros = -1, .bias = -1, .code = code, .rows = rows,
                       .columns = columns, .group = 32 << below(4), .first = below(step), .step = step};
    int stored_rows = rows * step;
    if (code == MOEDGE_MXFP4) m.group = 32;
    if (below(2)) put_bias(e, &m, stored_rows);
    if (code >= MOEDGE_INT8) {
        put_quantised(e, &m, stored_rows, extreme);
        return m;
    }
    size_t count = (size_t)stored_rows * (size_t)columns;
    uint32_t *numbers = allocate(count * 4);
    for (size_t i = 0; i < count; i++) {
        uint32_t bits = to_bits(normal() * (extreme ? ldexpf(1, below(20) - 14) : 1));
        if (code == MOEDGE_F32) numbers[i] = bits;
        else ((uint16_t *)numbers)[i] = code == MOEDGE_BF16 ? (uint16_t)(bits >> 16) : to_half(from_bits(bits));
    }
    m.values = put(e, numbers, count * (code == MOEDGE_F32 ? 4 : 2));
    free(numbers);
    return m;
}

/* The weight, and the size of what the kernel adds up for it: the stored value and its zero point one by one. */
static double weight(const moedge_matrix *m, const uint8_t *extent, int r, int c, double *size) {
    static const double mxfp4[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    int64_t row = m->first + (int64_t)r * m->step, groups = (m->columns + m->group - 1) / m->group;
    if (m->code < MOEDGE_INT8) {
        double plain = load_number(extent + m->values, m->code, row * m->columns + c);
        *size = fabs(plain);
        return plain;
    }
    int64_t group = row * groups + c / m->group, number = row * groups * m->group + c;
    double scale = from_half(((const uint16_t *)(extent + m->scales))[group]);
    double value, zero = m->zeros < 0 ? (m->code == MOEDGE_INT4 ? 8 : 0) : ((const int8_t *)extent)[m->zeros + group];
    if (m->code == MOEDGE_INT8) value = ((const int8_t *)extent)[m->values + number];
    else {
        int64_t block = number / 32, j = number % 32;
        uint8_t byte = extent[m->values + block * 16 + j % 16];
        int code = j < 16 ? byte & 15 : byte >> 4;
        value = m->code == MOEDGE_INT4 ? code : 2 * mxfp4[code & 7] * (code & 8 ? -1 : 1);
    }
    scale *= ((const float *)(extent + m->factors))[row];
    *size = (fabs(value) + fabs(zero)) * fabs(scale);
    return (value - zero) * scale;
}

/* Input c as 4-bit weights see it: int8, with a scale for each 32. */
static double rounded(const double *x, int c, int columns) {
    float largest = 0;
    for (int k = c / 32 * 32; k < columns && k < c / 32 * 32 + 32; k++) largest = fmaxf(largest, fabsf((float)x[k]));
    return largest < 1e-30f ? 0 : rint((float)x[c] * (127 / largest)) * (largest / 127);
}

/* The product, and how large its rounding error may be: relative to the sum of the sizes of what is added. */
static double reference(const moedge_matrix *m, const uint8_t *extent, int r, const double *x, double *size) {
    double sum = 0;
    *size = 0;
    for (int c = 0; c < m->columns; c++) {
        double w_size, w = weight(m, extent, r, c, &w_size), largest = 0;
        if (m->code >= MOEDGE_INT8) { /* an input is as exact as the largest of its block */
            for (int k = c / 32 * 32; k < m->columns && k < c / 32 * 32 + 32; k++) largest = fmax(largest, fabs(x[k]));
        } else largest = fabs(x[c]);
        sum += w * (m->code > MOEDGE_INT8 ? rounded(x, c, m->columns) : x[c]);
        *size += w_size * largest;
    }
    if (m->bias >= 0) {
        double bias = load_number(extent + m->bias, m->bias_code, m->first + (int64_t)r * m->step);
        sum += bias;
        *size += fabs(bias);
    }
    return sum;
}

static void fail(const char *what, int v, const moedge_matrix *m, int tokens, double error, double allowed) {
    printf("%s differs: variant %s, code %d, group %d, %d x %d, asymmetric %d, step %d, %d tokens: %g, allowed %g\n", what,
           moedge_variant_name(v), m->code, m->group, m->rows, m->columns, m->zeros >= 0, m->step, tokens, error, allowed);
    exit(1);
}

static float *random_inputs(int tokens, int columns, int extreme) {
    float *x = allocate((size_t)tokens * (size_t)columns * 4);
    for (int i = 0; i < tokens * columns; i++)
        x[i] = below(9) ? normal() * (extreme ? ldexpf(1, below(40) - 20) : 1) : 0.0f;
    if (columns > 40 && below(3) == 0) memset(x, 0, 32 * 4); /* a block of zeros */
    return x;
}

#endif
