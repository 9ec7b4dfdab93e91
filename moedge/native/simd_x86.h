/* Eight lanes with AVX2, FMA and F16C; VNNI's one-instruction dot where MOEDGE_VNNI says so. Same results either way. */

#include <immintrin.h>

typedef __m256 vf;
typedef __m256i vi;
typedef __m256i vs;
typedef __m256i vb;

static inline vf vf_zero(void) { return _mm256_setzero_ps(); }
static inline vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vf_all(const float *p) { return _mm256_broadcast_ss(p); }
static inline vf vf_halves(const float *p) {
    __m256d both = _mm256_broadcast_sd((const double *)(const void *)p);
    return _mm256_permutevar_ps(_mm256_castpd_ps(both), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
}
static inline vf vf_from_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline vf vf_from_halves(uint64_t low, uint64_t high) {
    return _mm256_cvtph_ps(_mm_set_epi64x((long long)high, (long long)low));
}
static inline vf vf_from_int8(uint64_t bytes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)bytes)));
}
static inline vf vf_from_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline vf vf_from_int(vi a) { return _mm256_cvtepi32_ps(a); }
static inline float vf_sum(vf a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

static inline vi vi_zero(void) { return _mm256_setzero_si256(); }

static inline vs vs_load(const int16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline vs vs_from_int8(const int8_t *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)); }
static inline vi vs_dot(vi sum, vs a, vs b) {
#ifdef MOEDGE_VNNI
    return _mm256_dpwssd_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

static inline vb vb_load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline vb vb_load_half(const uint8_t *p) {
    return _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_loadu_si128((const __m128i *)p), 0);
}
static inline vb vb_low(vb a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
static inline vb vb_high(vb a) { return vb_low(_mm256_srli_epi16(a, 4)); }
static inline vb vb_look_up(vb a, const uint8_t *table) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), a);
}
static inline vi vb_dot(vb a, vb x, vb b, vb y) {
#ifdef MOEDGE_VNNI
    return _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(_mm256_setzero_si256(), a, x), b, y);
#else
    __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(a, x), _mm256_maddubs_epi16(b, y));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}
#define prefetch(p) _mm_prefetch((const char *)(p), _MM_HINT_T0) /* a function of nothing else would be dropped */
