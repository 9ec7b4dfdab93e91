/* Eight lanes as two NEON registers (AArch64). */

#include <arm_neon.h>

typedef struct { float32x4_t a, b; } vf;
typedef struct { int32x4_t a, b; } vi;
typedef struct { int16x8_t a, b; } vs;
typedef struct { uint8x16_t a, b; } vb;

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
static inline vf vf_from_halves(uint64_t low, uint64_t high) {
    float16x4_t a = vreinterpret_f16_u16(vcreate_u16(low)), b = vreinterpret_f16_u16(vcreate_u16(high));
    return (vf){vcvt_f32_f16(a), vcvt_f32_f16(b)};
}
static inline vf vf_from_int8(uint64_t bytes) {
    int16x8_t wide = vmovl_s8(vcreate_s8(bytes));
    return (vf){vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
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

static inline vs vs_load(const int16_t *p) { return (vs){vld1q_s16(p), vld1q_s16(p + 8)}; }
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

static inline vb vb_load(const uint8_t *p) { return (vb){vld1q_u8(p), vld1q_u8(p + 16)}; }
static inline vb vb_load_half(const uint8_t *p) { return (vb){vld1q_u8(p), vdupq_n_u8(0)}; }
static inline vb vb_low(vb x) { return (vb){vandq_u8(x.a, vdupq_n_u8(15)), vandq_u8(x.b, vdupq_n_u8(15))}; }
static inline vb vb_high(vb x) { return (vb){vshrq_n_u8(x.a, 4), vshrq_n_u8(x.b, 4)}; }
static inline vb vb_look_up(vb x, const uint8_t *table) {
    uint8x16_t entries = vld1q_u8(table);
    return (vb){vqtbl1q_u8(entries, x.a), vqtbl1q_u8(entries, x.b)};
}
static inline int32x4_t dot_bytes(uint8x16_t a, uint8x16_t x, uint8x16_t b, uint8x16_t y) {
    int8x16_t p = vreinterpretq_s8_u8(a), q = vreinterpretq_s8_u8(x);
    int8x16_t r = vreinterpretq_s8_u8(b), s = vreinterpretq_s8_u8(y);
    int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(p), vget_low_s8(q)), vget_low_s8(r), vget_low_s8(s));
    int16x8_t high = vmlal_high_s8(vmull_high_s8(p, q), r, s);
    return vpadalq_s16(vpaddlq_s16(low), high);
}
static inline vi vb_dot(vb a, vb x, vb b, vb y) {
    return (vi){dot_bytes(a.a, x.a, b.a, y.a), dot_bytes(a.b, x.b, b.b, y.b)};
}
#define prefetch(p) __builtin_prefetch(p)
