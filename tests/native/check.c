/* The kernels against double precision, over random shapes, formats, biases, activations and numbers of tokens and
   threads. Extents are allocated to the byte, so that the address sanitizer sees any read beyond them.

   check [seconds] [seed]: prints one line per variant, and exits with 1 at the first difference. */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

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

static double act(const moedge_expert *e, double gate, double up) {
    int gated = e->gate.rows > 0;
    double a = gated ? gate : up;
    switch (e->activation) {
        case MOEDGE_SILU: a = a / (1 + exp(-a)); break;
        case MOEDGE_GELU: a = 0.5 * a * (1 + erf(a / sqrt(2))); break;
        case MOEDGE_GELU_TANH: a = 0.5 * a * (1 + tanh(sqrt(2 / 3.14159265358979) * (a + 0.044715 * a * a * a))); break;
        case MOEDGE_RELU: a = fmax(a, 0); break;
        case MOEDGE_RELU_SQUARED: a = fmax(a, 0) * fmax(a, 0); break;
        default:
            a = fmin(a, e->limit);
            return (fmax(fmin(up, e->limit), -e->limit) + 1) * (a / (1 + exp(-e->alpha * a)));
    }
    return gated ? a * up : a;
}

/* ---- checks ---- */

enum { MOST_TOKENS = 70, MOST_EXPERTS = 3 };

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

static void check_product(int v, int code) {
    int rows = 1 + below(21), columns = 1 + below(below(4) ? 90 : 700), tokens = 1 + below(below(3) ? 5 : 64);
    int extreme = below(2), begin = below(rows), n = rows - begin;
    extent_bytes extent = {NULL, 0};
    moedge_matrix m = put_matrix(&extent, code, rows, columns, 1 + below(2), extreme);
    float *x = random_inputs(tokens, columns, extreme), *out = allocate((size_t)(tokens * n) * 4);
    int32_t *order = allocate((size_t)tokens * 4);
    size_t nbytes = 0;
    uint8_t nowhere[1];
    moedge_take_prepared(&m, tokens, nowhere, &nbytes);
    uint8_t *workspace = allocate(nbytes);
    nbytes = 0;
    prepared input = moedge_take_prepared(&m, tokens, workspace, &nbytes);
    for (int t = 0; t < tokens; t++) {
        moedge_variant(v)->prepare(&input, t, x + (size_t)t * (size_t)columns);
        order[t] = below(tokens);
    }
    m.bias = -1; /* is not the product's */
    moedge_variant(v)->product(&m, extent.bytes, &input, order, tokens, begin, rows, out, n);
    double *wide = allocate((size_t)columns * 8);
    for (int t = 0; t < tokens; t++) {
        for (int c = 0; c < columns; c++) wide[c] = x[order[t] * columns + c];
        for (int r = begin; r < rows; r++) {
            double size, expected = reference(&m, extent.bytes, r, wide, &size);
            double error = fabs(out[t * n + r - begin] - expected), allowed = size * 0x1p-15 + 1e-36;
            if (!(error <= allowed)) fail("product", v, &m, tokens, error, allowed);
        }
    }
    free(extent.bytes), free(x), free(out), free(order), free(workspace), free(wide);
}

static void check_dequantise(int v, int code) {
    extent_bytes extent = {NULL, 0};
    moedge_matrix m = put_matrix(&extent, code, 1 + below(9), 1 + below(150), 1 + below(2), below(2));
    float *out = allocate((size_t)(m.rows * m.columns) * 4);
    uint16_t *rounded = allocate((size_t)(m.rows * m.columns) * 2);
    moedge_dequantise(v, &m, extent.bytes, 0, m.rows, 0, out);
    moedge_dequantise(v, &m, extent.bytes, 0, m.rows, 1, rounded);
    for (int i = 0; i < m.rows * m.columns; i++) {
        double size, expected = weight(&m, extent.bytes, i / m.columns, i % m.columns, &size);
        double error = fabs(from_bits((uint32_t)rounded[i] << 16) - expected);
        if (out[i] != (float)expected) fail("dequantised number", v, &m, 0, fabs(out[i] - expected), 0);
        if (!(error <= fabs(expected) * 0x1p-8)) fail("dequantised bf16", v, &m, 0, error, fabs(expected) * 0x1p-8);
    }
    free(extent.bytes), free(out), free(rounded);
}

typedef struct {
    int experts, tokens, hidden, width;
    extent_bytes extents[MOST_EXPERTS];
    moedge_expert expert;
    int32_t starts[MOST_EXPERTS + 1], token_of[MOST_EXPERTS * MOST_TOKENS];
    float weights[MOST_EXPERTS * MOST_TOKENS];
    float *x;
} layer;

static layer random_layer(int code) {
    static const int down_codes[] = {MOEDGE_INT8, MOEDGE_INT4, MOEDGE_BF16};
    layer l = {.experts = 1 + below(MOST_EXPERTS), .tokens = 1 + below(below(2) ? 3 : MOST_TOKENS),
               .hidden = 1 + below(140), .width = 1 + below(100)};
    int gated = below(4) > 0, step = 1 + below(2), down_code = below(2) ? code : down_codes[below(3)];
    uint64_t start = state;
    for (int e = 0; e < l.experts; e++) {
        state = start; /* so that every expert gets the same layout; the numbers differ by the inputs below */
        l.expert.up = put_matrix(&l.extents[e], code, l.width, l.hidden, step, 0);
        l.expert.gate = l.expert.up;
        l.expert.gate.first = (l.expert.up.first + 1) % step;
        l.expert.gate.rows = gated ? l.width : 0;
        l.expert.down = put_matrix(&l.extents[e], down_code, l.hidden, l.width, 1, 0);
        for (int64_t i = 0; e && i < l.expert.up.scales; i += 3) l.extents[e].bytes[i] ^= 1;
    }
    l.expert.activation = gated ? below(MOEDGE_CLAMPED_SWIGLU + 1) : below(MOEDGE_CLAMPED_SWIGLU);
    l.expert.alpha = 1.702f, l.expert.limit = 7.0f;
    for (int e = 0; e < l.experts; e++) {
        int end = l.starts[e];
        for (int t = 0; t < l.tokens; t++)
            if (below(3)) l.token_of[end] = t, l.weights[end++] = normal();
        l.starts[e + 1] = end;
    }
    l.x = random_inputs(l.tokens, l.hidden, 0);
    return l;
}

/* How large a number of the middle may be, and with that its error, from the sizes of its gate and up. */
static double act_size(const moedge_expert *e, double gate, double up) {
    if (e->activation == MOEDGE_CLAMPED_SWIGLU) return gate * (up + 1);
    double a = e->gate.rows ? gate : up;
    return (e->activation == MOEDGE_RELU_SQUARED ? a * a : a) * (e->gate.rows ? up : 1);
}

static void expected_terms(const layer *l, double *terms, double *sizes) {
    double *x = allocate((size_t)l->hidden * 8), *middle = allocate((size_t)l->width * 8);
    double *middle_size = allocate((size_t)l->width * 8);
    const moedge_expert *k = &l->expert;
    for (int e = 0; e < l->experts; e++)
        for (int i = l->starts[e]; i < l->starts[e + 1]; i++) {
            const uint8_t *extent = l->extents[e].bytes;
            for (int c = 0; c < l->hidden; c++) x[c] = l->x[l->token_of[i] * l->hidden + c];
            for (int r = 0; r < l->width; r++) {
                double gate_size = 0, up_size;
                double gate = k->gate.rows ? reference(&k->gate, extent, r, x, &gate_size) : 0;
                middle[r] = act(k, gate, reference(&k->up, extent, r, x, &up_size));
                middle_size[r] = act_size(k, gate_size, up_size);
            }
            for (int r = 0; r < l->hidden; r++) {
                double *size = sizes + i * l->hidden + r;
                reference(&k->down, extent, r, middle_size, size);
                *size *= fabs(l->weights[i]);
                terms[i * l->hidden + r] = l->weights[i] * reference(&k->down, extent, r, middle, &(double){0});
            }
        }
    free(x), free(middle), free(middle_size);
}

static void run(const layer *l, int v, int threads, float *out, float *terms) {
    const uint8_t *extents[MOST_EXPERTS];
    for (int e = 0; e < l->experts; e++) extents[e] = l->extents[e].bytes;
    uint8_t *workspace = allocate(moedge_workspace(&l->expert, l->tokens, l->starts[l->experts]));
    moedge_call call = {l->experts, l->tokens, extents, l->starts, l->token_of, l->weights, l->x, out, terms, workspace};
    moedge_layer(v, &l->expert, &call, threads);
    free(workspace);
}

static void check_layer(int v, int code) {
    layer l = random_layer(code);
    size_t count = (size_t)l.starts[l.experts] * (size_t)l.hidden, out_count = (size_t)(l.tokens * l.hidden);
    double *expected = allocate(count * 8), *sizes = allocate(count * 8);
    float *terms = allocate(count * 4), *out = calloc(out_count, 4), *again = calloc(out_count, 4);
    expected_terms(&l, expected, sizes);
    run(&l, v, 1, out, terms);
    /* a middle that lies between two int8 may go either way: products are checked exactly by check_product */
    double most = l.expert.down.code > MOEDGE_INT8 ? 0x1p-8 : 1e-4;
    for (size_t i = 0; i < count; i++) {
        double error = fabs(terms[i] - expected[i]), allowed = sizes[i] * most + 1e-30;
        if (!(error <= allowed)) fail("layer", v, &l.expert.up, l.tokens, error, allowed);
    }
    run(&l, v, 2, again, NULL);
    if (memcmp(out, again, out_count * 4)) fail("layer on two threads", v, &l.expert.up, l.tokens, 1, 0);
    memset(again, 0, out_count * 4);
    for (int i = 0; i < l.starts[l.experts]; i++)
        for (int r = 0; r < l.hidden; r++) again[l.token_of[i] * l.hidden + r] += terms[i * l.hidden + r];
    if (memcmp(out, again, out_count * 4)) fail("sum of the terms", v, &l.expert.up, l.tokens, 1, 0);
    for (int e = 0; e < l.experts; e++) free(l.extents[e].bytes);
    free(expected), free(sizes), free(terms), free(out), free(again), free(l.x);
}

int main(int count, char **arguments) {
    double seconds = count > 1 ? atof(arguments[1]) : 2;
    uint64_t seed = count > 2 ? strtoull(arguments[2], NULL, 10) : 1;
    for (int v = 0; v < moedge_variants(); v++) {
        if (!moedge_variant_runs(v)) {
            printf("%s: this processor has not its instructions\n", moedge_variant_name(v));
            continue;
        }
        clock_t start = clock();
        int rounds = 0;
        state = seed;
        for (; rounds < 6 || clock() - start < seconds * CLOCKS_PER_SEC; rounds++) {
            check_product(v, rounds % 6);
            check_layer(v, rounds % 6);
            if (rounds % 6 >= MOEDGE_INT8) check_dequantise(v, rounds % 6);
        }
        printf("%s: %d rounds\n", moedge_variant_name(v), rounds);
    }
    return 0;
}
