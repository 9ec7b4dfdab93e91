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
static inline vf vf_from_bf16(const uint16_t *p) { vf r; EACH(8) r.v[i] = from_bits((uint32_t)p[i] << 16); return r; }
static inline vf vf_from_int(vi a) { vf r; EACH(8) r.v[i] = (float)a.v[i]; return r; }
static inline float vf_sum(vf a) {
    return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}

static inline vi vi_zero(void) { vi r = {{0}}; return r; }
static inline vi vi_load(const int32_t *p) { vi r; memcpy(&r, p, 32); return r; }
static inline void vi_store(int32_t *p, vi a) { memcpy(p, &a, 32); }
static inline vi vi_all(int32_t a) { vi r; EACH(8) r.v[i] = a; return r; }
static inline vi vi_halves(int32_t a, int32_t b) { vi r; EACH(8) r.v[i] = i < 4 ? a : b; return r; }
static inline vi vi_sub(vi a, vi b) { EACH(8) a.v[i] -= b.v[i]; return a; }
static inline vi vi_mul(vi a, vi b) { EACH(8) a.v[i] *= b.v[i]; return a; }

static inline vs vs_load(const int16_t *p) { vs r; memcpy(&r, p, 32); return r; }
static inline vs vs_all(int16_t a) { vs r; EACH(16) r.v[i] = a; return r; }
static inline vs vs_from_int8(const int8_t *p) { vs r; EACH(16) r.v[i] = p[i]; return r; }
/* sum + the products of a and b, pairs of neighbours added */
static inline vi vs_dot(vi sum, vs a, vs b) {
    EACH(8) sum.v[i] += a.v[2 * i] * b.v[2 * i] + a.v[2 * i + 1] * b.v[2 * i + 1];
    return sum;
}

static inline vb vb_load(const uint8_t *p) { vb r; memcpy(&r, p, 32); return r; }
static inline vb vb_load_half(const uint8_t *p) { vb r = {{0}}; memcpy(&r, p, 16); return r; }
/* the 4 bits at `shift` of every 16 bits */
static inline vs vb_nibbles(vb a, const int shift) {
    vs r;
    EACH(16) r.v[i] = (int16_t)((a.v[2 * i] | a.v[2 * i + 1] << 8) >> shift & 15);
    return r;
}
static inline vs vb_look_up(vb a, const int shift, const int8_t *table) {
    vs r = vb_nibbles(a, shift);
    EACH(16) r.v[i] = table[r.v[i]];
    return r;
}
#define prefetch(p) ((void)(p))
