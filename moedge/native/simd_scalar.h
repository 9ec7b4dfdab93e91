/* Eight lanes in plain C, for any compiler and processor. */

#include <string.h>

typedef struct { float v[8]; } vf;
typedef struct { int32_t v[8]; } vi;
typedef struct { int16_t v[16]; } vs;
typedef struct { uint8_t v[32]; } vb;

#define EACH(n) for (int i = 0; i < n; i++)

static inline vf vf_zero(void) { vf r = {{0}}; return r; }
static inline vf vf_load(const float *p) { vf r; memcpy(&r, p, 32); return r; }
static inline void vf_store(float *p, vf a) { memcpy(p, &a, 32); }
static inline vf vf_add(vf a, vf b) { EACH(8) a.v[i] += b.v[i]; return a; }
static inline vf vf_mul(vf a, vf b) { EACH(8) a.v[i] *= b.v[i]; return a; }
static inline vf vf_fma(vf a, vf b, vf c) { EACH(8) c.v[i] += a.v[i] * b.v[i]; return c; }
static inline vf vf_all(const float *p) { vf r; EACH(8) r.v[i] = p[0]; return r; }
static inline vf vf_halves(const float *p) { vf r; EACH(8) r.v[i] = p[i / 4]; return r; }
static inline vf vf_from_half(const uint16_t *p) { vf r; EACH(8) r.v[i] = from_half(p[i]); return r; }
static inline vf vf_from_halves(uint64_t low, uint64_t high) {
    vf r;
    EACH(8) r.v[i] = from_half((uint16_t)((i < 4 ? low : high) >> i % 4 * 16));
    return r;
}
static inline vf vf_from_int8(uint64_t bytes) { vf r; EACH(8) r.v[i] = (int8_t)(bytes >> i * 8); return r; }
static inline vf vf_from_bf16(const uint16_t *p) { vf r; EACH(8) r.v[i] = from_bits((uint32_t)p[i] << 16); return r; }
static inline vf vf_from_int(vi a) { vf r; EACH(8) r.v[i] = (float)a.v[i]; return r; }
static inline float vf_sum(vf a) {
    return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}

static inline vi vi_zero(void) { vi r = {{0}}; return r; }

static inline vs vs_load(const int16_t *p) { vs r; memcpy(&r, p, 32); return r; }
static inline vs vs_from_int8(const int8_t *p) { vs r; EACH(16) r.v[i] = p[i]; return r; }
/* sum + the products of a and b, pairs of neighbours added */
static inline vi vs_dot(vi sum, vs a, vs b) {
    EACH(8) sum.v[i] += a.v[2 * i] * b.v[2 * i] + a.v[2 * i + 1] * b.v[2 * i + 1];
    return sum;
}

static inline vb vb_load(const uint8_t *p) { vb r; memcpy(&r, p, 32); return r; }
static inline vb vb_load_half(const uint8_t *p) { vb r = {{0}}; memcpy(&r, p, 16); return r; }
static inline vb vb_low(vb a) { EACH(32) a.v[i] &= 15; return a; }
static inline vb vb_high(vb a) { EACH(32) a.v[i] >>= 4; return a; }
static inline vb vb_look_up(vb a, const uint8_t *table) { EACH(32) a.v[i] = table[a.v[i]]; return a; }
/* a * x + b * y, fours of neighbours added; a and b at most 24, x and y signed */
static inline vi vb_dot(vb a, vb x, vb b, vb y) {
    vi r = {{0}};
    EACH(32) r.v[i / 4] += a.v[i] * (int8_t)x.v[i] + b.v[i] * (int8_t)y.v[i];
    return r;
}
#define prefetch(p) ((void)(p))
