/* The kernels against double precision, over random shapes, formats, biases, activations and numbers of tokens and
   threads. Extents are allocated to the byte, so that the address sanitizer sees any read beyond them.

   check [seconds] [seed]: prints one line per variant, and exits with 1 at the first difference. */

#include <time.h>

#include "attention.h"
#include "backbone.h"
#include "exact.h"
#include "matrix.h"

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
            check_linear(v, rounds % 6);
            check_norm();
            check_decoder(v, rounds % 6 == MOEDGE_F16 ? MOEDGE_BF16 : rounds % 6);
            check_shortening(v);
            check_restore_some(v);
            check_one_row(v);
            check_rounding(v, rounds % 2 ? MOEDGE_INT8 : MOEDGE_INT4);
        }
        printf("%s: %d rounds\n", moedge_variant_name(v), rounds);
    }
    return 0;
}
