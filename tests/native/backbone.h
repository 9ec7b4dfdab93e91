/* Checks of what the backbone uses: rows times a matrix, the norm, and rounding; and of numbers in 12 bits. */

#ifndef BACKBONE_H
#define BACKBONE_H

#include "matrix.h"

static double number(const void *x, int code, int i) { return load_number(x, code, i); }

/* What is stored of `value` in a dtype, rounded. */
static void put_number(void *x, int code, int i, float value) {
    if (code == MOEDGE_F32) ((float *)x)[i] = value;
    else ((uint16_t *)x)[i] = (uint16_t)(to_bits(value) >> 16);
}

static void check_linear(int v, int code) {
    int rows = 1 + below(90), columns = 1 + below(below(4) ? 90 : 500), count = 1 + below(below(3) ? 3 : 130);
    int x_code = below(2) ? MOEDGE_F32 : MOEDGE_BF16, out_code = below(2) ? MOEDGE_F32 : MOEDGE_BF16;
    extent_bytes extent = {NULL, 0};
    moedge_matrix m = put_matrix(&extent, code, rows, columns, 1, below(2));
    m.bias = -1;
    size_t each = x_code == MOEDGE_F32 ? 4 : 2, out_each = out_code == MOEDGE_F32 ? 4 : 2;
    void *x = allocate((size_t)(count * columns) * each), *out = allocate((size_t)(count * rows) * out_each);
    void *again = allocate((size_t)(count * rows) * out_each);
    float *numbers = random_inputs(count, columns, below(2));
    for (int i = 0; i < count * columns; i++) put_number(x, x_code, i, numbers[i]);
    uint8_t *workspace = allocate(moedge_linear_workspace(&m, count));
    moedge_rows call = {count, x_code, out_code, x, out, workspace};
    moedge_linear(v, &m, extent.bytes, &call, 1);
    call.out = again;
    moedge_linear(v, &m, extent.bytes, &call, 1 + below(3));
    if (memcmp(out, again, (size_t)(count * rows) * out_each)) fail("linear by threads", v, &m, count, 1, 0);
    double *wide = allocate((size_t)columns * 8);
    for (int i = 0; i < count; i++) {
        for (int c = 0; c < columns; c++) wide[c] = number(x, x_code, i * columns + c);
        for (int r = 0; r < rows; r++) {
            double size, expected = reference(&m, extent.bytes, r, wide, &size);
            double allowed = size * 0x1p-15 + 1e-36 + (out_code == MOEDGE_F32 ? 0 : (fabs(expected) + size * 0x1p-15) * 0x1p-8);
            double error = fabs(number(out, out_code, i * rows + r) - expected);
            if (!(error <= allowed)) fail("linear", v, &m, count, error, allowed);
        }
    }
    free(extent.bytes), free(x), free(out), free(again), free(numbers), free(workspace), free(wide);
}

static void check_norm(void) {
    int count = 1 + below(4), columns = 1 + below(300), code = below(2) ? MOEDGE_F32 : MOEDGE_BF16;
    size_t each = code == MOEDGE_F32 ? 4 : 2;
    void *x = allocate((size_t)(count * columns) * each), *out = allocate((size_t)(count * columns) * each);
    float *weight = random_inputs(1, columns, 0), *numbers = random_inputs(count, columns, below(2));
    for (int i = 0; i < count * columns; i++) put_number(x, code, i, numbers[i]);
    moedge_norm call = {count, columns, code, MOEDGE_F32, 1e-6f, below(2) ? 1.0f : 0.0f, x, weight, out};
    moedge_rms_norm(&call);
    for (int i = 0; i < count; i++) {
        double sum = 0;
        for (int c = 0; c < columns; c++) sum += pow(number(x, code, i * columns + c), 2);
        double scale = 1 / sqrt(sum / columns + (double)call.epsilon);
        for (int c = 0; c < columns; c++) {
            double expected = number(x, code, i * columns + c) * scale * ((double)call.offset + weight[c]);
            double error = fabs(number(out, code, i * columns + c) - expected);
            double allowed = fabs(expected) * (code == MOEDGE_F32 ? 0x1p-18 : 0x1p-6) + 1e-30;
            moedge_matrix none = {.rows = count, .columns = columns, .code = code};
            if (!(error <= allowed)) fail("norm", 0, &none, count, error, allowed);
        }
    }
    free(x), free(out), free(weight), free(numbers);
}

/* Every number is within a step of what is stored for it: what the bytes are is for the tests beside torch. */
static void check_rounding(int v, int code) {
    int rows = 1 + below(5), columns = 1 + below(200), group = 32 << below(4), transposed = below(2);
    int groups = (columns + group - 1) / group, asymmetric = below(2);
    size_t stored = (size_t)(rows * groups * group) / (code == MOEDGE_INT8 ? 1 : 2);
    float *x = random_inputs(rows, columns, below(2)), *factors = allocate((size_t)rows * 4);
    uint8_t *values = allocate(stored);
    uint16_t *scales = allocate((size_t)(rows * groups) * 2);
    int8_t *zeros = allocate((size_t)(rows * groups));
    moedge_rounding call = {rows, columns, code, MOEDGE_F32, group, transposed ? 1 : columns, transposed ? rows : 1,
                            x, values, scales, factors, asymmetric ? zeros : NULL};
    if (moedge_quantise(v, &call)) exit(2);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) {
            int at = r * groups * group + c, place = r * groups + c / group, value;
            if (code == MOEDGE_INT8) value = ((const int8_t *)values)[at];
            else value = at % 32 < 16 ? values[at / 32 * 16 + at % 16] & 15 : values[at / 32 * 16 + at % 16] >> 4;
            int zero = asymmetric ? zeros[place] : code == MOEDGE_INT4 ? 8 : 0;
            double step = fabs((double)from_half(scales[place]) * factors[r]);
            double given = x[transposed ? c * rows + r : r * columns + c];
            double error = fabs((value - zero) * (double)from_half(scales[place]) * factors[r] - given);
            moedge_matrix shape = {.rows = rows, .columns = columns, .code = code, .group = group};
            if (!(error <= 1.1 * step + fabs(given) * 0x1p-9)) fail("rounding", v, &shape, 0, error, 1.1 * step);
        }
    float kept = x[0];
    x[0] = NAN;
    if (moedge_quantise(v, &call) != 1) exit(3);
    x[0] = kept;
    free(x), free(factors), free(values), free(scales), free(zeros);
}

/* Numbers around one size, with zeros and, up to more than fit into the list, numbers of any other size. */
static void check_shortening(int v) {
    static const moedge_matrix none = {.code = MOEDGE_BF16};
    int count = 32 * (1 + below(200)), rare = below(3) ? 2 + below(400) : 0, size = below(256), any = 0;
    uint16_t *x = allocate((size_t)count * 2), *again = allocate((size_t)count * 2);
    for (int i = 0; i < count; i++) {
        int exponent = size - below(15), odd = rare && below(rare) == 0;
        x[i] = (uint16_t)((odd ? below(256) : exponent < 0 ? 0 : exponent) << 7 | below(128) | below(2) << 15);
        any += odd;
    }
    uint8_t *out = allocate(moedge_short_bytes(count));
    int done = moedge_shorten(x, count, out);
    if (!done && any <= count / 512 + 16) fail("numbers that fit", 0, &none, count, any, count / 512 + 16);
    if (done) {
        moedge_restore(v, out, count, again);
        if (memcmp(x, again, (size_t)count * 2)) fail("shortened numbers", 0, &none, count, 1, 0);
    }
    free(x), free(again), free(out);
}

#endif
