/* Eight lanes as two NEON registers (AArch64). */

#include <arm_neon.h>

typedef struct { float32x4_t a, b; } vf;
typedef struct { int32x4_t a, b; } vi;
typedef struct { int16x8_t a, b; } vs;
typedef struct { uint16x8_t a, b; } vb;

static inline vf vf_zero(void) { return (vf){vdupq_n_f32(0), vdupq_n_f32(0)}; }
static inline vf vf_load(const float *p) { return (vf){vld1q_f32(p), vld1q_f32(p + 4)}; }
static inline void vf_store(float *p, vf x) { vst1q_f32(p, x.a); vst1q_f32(p + 4, x.b); }
static inline vf vf_add(vf x, vf y) { return (vf){vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
static inline vf vf_mul(vf x, vf y) { return (vf){vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
static inline vf vf_fma(vf x, vf y, vf z) { return (vf){vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
static inline vf vf_all(const float *p) { return (vf){vdupq_n_f32(p[0]), vdupq_n_f32(p[0])}; }
static inline vf vf_halves(const float *p) { return (vf){vdupq_n_f32(p[0]), vdupq_n_f32(p[1])}; }
static inline vf vf_from_half(const uint16_t *p) {
    float16x8_t half = vreinterpretq_f16_u16(vld1q_u16(p));
    return (vf){vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
}
static inline vf vf_from_bf16(const uint16_t *p) {
    uint16x8_t bits = vld1q_u16(p);
    return (vf){vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
                vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16))};
}
static inline vf vf_from_int(vi x) { return (vf){vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b)}; }
static inline float vf_sum(vf x) {
    float32x4_t quad = vaddq_f32(x.a, x.b);
    float32x2_t pair = vadd_f32(vget_low_f32(quad), vget_high_f32(quad));
    return vget_lane_f32(pair, 0) + vget_lane_f32(pair, 1);
}

static inline vi vi_zero(void) { return (vi){vdupq_n_s32(0), vdupq_n_s32(0)}; }
static inline vi vi_load(const int32_t *p) { return (vi){vld1q_s32(p), vld1q_s32(p + 4)}; }
static inline void vi_store(int32_t *p, vi x) { vst1q_s32(p, x.a); vst1q_s32(p + 4, x.b); }
static inline vi vi_all(int32_t x) { return (vi){vdupq_n_s32(x), vdupq_n_s32(x)}; }
static inline vi vi_halves(int32_t x, int32_t y) { return (vi){vdupq_n_s32(x), vdupq_n_s32(y)}; }
static inline vi vi_sub(vi x, vi y) { return (vi){vsubq_s32(x.a, y.a), vsubq_s32(x.b, y.b)}; }
static inline vi vi_mul(vi x, vi y) { return (vi){vmulq_s32(x.a, y.a), vmulq_s32(x.b, y.b)}; }

static inline vs vs_load(const int16_t *p) { return (vs){vld1q_s16(p), vld1q_s16(p + 8)}; }
static inline vs vs_all(int16_t x) { return (vs){vdupq_n_s16(x), vdupq_n_s16(x)}; }
static inline vs vs_from_int8(const int8_t *p) {
    int8x16_t bytes = vld1q_s8(p);
    return (vs){vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)};
}
/* not neighbours, but numbers four apart are added: only the sum over all lanes of a half matters to the caller */
static inline vi vs_dot(vi sum, vs x, vs y) {
    sum.a = vmlal_high_s16(vmlal_s16(sum.a, vget_low_s16(x.a), vget_low_s16(y.a)), x.a, y.a);
    sum.b = vmlal_high_s16(vmlal_s16(sum.b, vget_low_s16(x.b), vget_low_s16(y.b)), x.b, y.b);
    return sum;
}

static inline vb vb_load(const uint8_t *p) {
    return (vb){vreinterpretq_u16_u8(vld1q_u8(p)), vreinterpretq_u16_u8(vld1q_u8(p + 16))};
}
static inline vb vb_load_half(const uint8_t *p) { return (vb){vreinterpretq_u16_u8(vld1q_u8(p)), vdupq_n_u16(0)}; }
static inline vs vb_nibbles(vb x, const int shift) {
    int16x8_t back = vdupq_n_s16((int16_t)-shift);
    uint16x8_t mask = vdupq_n_u16(15);
    return (vs){vreinterpretq_s16_u16(vandq_u16(vshlq_u16(x.a, back), mask)),
                vreinterpretq_s16_u16(vandq_u16(vshlq_u16(x.b, back), mask))};
}
static inline int16x8_t look_up(int16x8_t codes, int8x16_t table) {
    int8x16_t found = vqtbl1q_s8(table, vreinterpretq_u8_s16(codes));
    return vshrq_n_s16(vshlq_n_s16(vreinterpretq_s16_s8(found), 8), 8);
}
static inline vs vb_look_up(vb x, const int shift, const int8_t *table) {
    int8x16_t entries = vld1q_s8(table);
    vs codes = vb_nibbles(x, shift);
    return (vs){look_up(codes.a, entries), look_up(codes.b, entries)};
}
#define prefetch(p) __builtin_prefetch(p)
