/* Rounding to nearest in groups: the same bytes as formats.quantise makes with torch, one row at a time. */

#include <math.h>
#include <stdlib.h>

#include "moedge.h"
#include "product.h"

enum { TOP = 15 }; /* the largest scale of a row is at most about 2^TOP */

/* To fp16, never towards zero; below 2^16. */
static uint16_t half_away(float value) {
    uint32_t bits = to_bits(value), size = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    if (size < 0x38800000) return (uint16_t)(sign | (uint32_t)ceilf(from_bits(size) * 0x1p24f));
    uint32_t half = (size - 0x38000000) >> 13;
    return (uint16_t)(sign | (half + ((size & 0x1fff) != 0)));
}

static float nearest(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; } /* ties to even; |x| < 2^22 */
static float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

typedef struct { float low, high; } range;

/* Of `count` numbers, a multiple of 8, and zero. In eight lanes, which a compiler makes vectors of. */
static range range_of(const float *x, int count) {
    float low[8] = {0}, high[8] = {0};
    for (int i = 0; i < count; i += 8)
        for (int k = 0; k < 8; k++) {
            low[k] = x[i + k] < low[k] ? x[i + k] : low[k];
            high[k] = x[i + k] > high[k] ? x[i + k] : high[k];
        }
    for (int k = 1; k < 8; k++) {
        low[0] = low[k] < low[0] ? low[k] : low[0];
        high[0] = high[k] > high[0] ? high[k] : high[0];
    }
    return (range){low[0], high[0]};
}

/* One row as fp32; whether all of it is finite. */
static int load_row(const moedge_rounding *call, int r, float *x) {
    int64_t start = r * call->row_step;
    uint32_t largest = 0;
    if (call->x_code == MOEDGE_BF16 && call->column_step == 1) {
        const uint16_t *bits = (const uint16_t *)call->x + start;
        for (int c = 0; c < call->columns; c++) x[c] = from_bits((uint32_t)bits[c] << 16);
    } else {
        for (int c = 0; c < call->columns; c++) x[c] = load_number(call->x, call->x_code, start + c * call->column_step);
    }
    for (int c = 0; c < call->columns; c++) {
        uint32_t size = to_bits(x[c]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    return largest < 0x7f800000;
}

/* One group's scale, zero point and numbers; `shift` takes the number zero to. */
static void round_group(const moedge_rounding *call, const float *x, int64_t at, int8_t *q) {
    int eight = call->code == MOEDGE_INT8;
    float bottom = eight ? (call->zeros ? -128 : -127) : 0, top = eight ? 127 : 15, shift = eight ? 0 : 8, scale;
    range r = range_of(x, call->group);
    if (call->zeros) scale = (r.high - r.low) / (eight ? 255.0f : 15.0f);
    else {
        float largest = -r.low > r.high ? r.low : r.high;
        scale = eight ? fabsf(largest) / 127 : largest / -8 + 0.0f; /* no negative zero */
    }
    call->scales[at] = half_away(scale);
    float wide = from_half(call->scales[at]), inverse = wide == 0 ? wide : 1 / wide;
    if (call->zeros) {
        shift = clamp(nearest(-r.low * inverse) + bottom, bottom, top);
        call->zeros[at] = (int8_t)shift;
    }
    for (int i = 0; i < call->group; i++) q[i] = (int8_t)clamp(nearest(x[i] * inverse) + shift, bottom, top);
}

static void round_row(const moedge_rounding *call, int r, float *x, int8_t *q) {
    int groups = (call->columns + call->group - 1) / call->group, numbers = groups * call->group;
    range whole = range_of(x, numbers);
    float largest = -whole.low > whole.high ? -whole.low : whole.high;
    int power = 0;
    if (largest > 0) {
        frexpf(largest, &power);
        power -= (call->code == MOEDGE_INT8 ? 6 : 3) + TOP;
        power = power < -126 ? -126 : power > 127 ? 127 : power;
    }
    float down = ldexpf(1, -power);
    call->factors[r] = ldexpf(1, power);
    for (int i = 0; i < numbers; i++) x[i] *= down;
    for (int g = 0; g < groups; g++)
        round_group(call, x + g * call->group, (int64_t)r * groups + g, q + g * call->group);
    if (call->code == MOEDGE_INT8) {
        int8_t *values = (int8_t *)call->values + (int64_t)r * numbers;
        for (int i = 0; i < numbers; i++) values[i] = q[i];
        return;
    }
    uint8_t *values = (uint8_t *)call->values + (int64_t)r * numbers / 2;
    for (int b = 0; b < numbers; b += BLOCK)
        for (int i = 0; i < 16; i++) values[b / 2 + i] = (uint8_t)(q[b + i] | q[b + 16 + i] << 4);
}

int moedge_quantise(const moedge_rounding *call) {
    size_t numbers = (size_t)(call->columns + call->group - 1) / (size_t)call->group * (size_t)call->group;
    float *x = malloc(numbers * (sizeof *x + 1));
    if (!x) return 2;
    int8_t *q = (int8_t *)(x + numbers);
    for (int r = 0; r < call->rows; r++) {
        if (!load_row(call, r, x)) {
            free(x);
            return 1;
        }
        for (size_t c = (size_t)call->columns; c < numbers; c++) x[c] = 0;
        round_row(call, r, x, q);
    }
    free(x);
    return 0;
}
