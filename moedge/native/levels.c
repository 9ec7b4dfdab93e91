/* bf16 numbers in about 10.7 bits, without loss: sign and mantissa as they are, the exponent in levels of two bits.

   A code of 0 to 2 is one of the three most common exponents, 3 sends to the next level, which names the next three; what
   three levels do not name stands as a byte. That is within a tenth of a bit of the exponents' entropy, and a block of
   32 numbers is taken apart by two deposits of bits (BMI2's pdep). Compiled with -mavx2 -mbmi2 -mpopcnt.

   head (64 bytes) | where each chunk begins, 4 bytes | the exponents of each segment, 16 bytes | chunks
   chunk: bytes of levels 2 and 3 (2 x 2) | signs and mantissas | level 1 | level 2 | level 3 | other exponents

   Number 8 f + k of a block has bits 8 k + 2 f of a level's word, so that one shift takes a word apart. */

#include <immintrin.h>
#include <string.h>

#include "levels.h"

enum {
    BLOCK = 32,
    CHUNK = 1024,        /* numbers that can be restored by themselves */
    SEGMENT = 64,        /* chunks that share a table */
    RANKS = 9,           /* exponents that the levels name */
    WINDOW = 16,         /* these lie so close together, but for zero */
    HEAD = 64,
    SAMPLE = 7,          /* one in so many numbers is looked at to find them */
    AHEAD = 4096,        /* bytes: prefetched before they are needed */
    BEYOND = 16,         /* bytes that may be read behind the last */
};

#define FIRST UINT64_C(0x5555555555555555) /* the lower bit of each code */

typedef struct {
    uint8_t exponents[RANKS], base; /* by rank; where the window begins */
    uint8_t unused[6];
} table;

int moedge_levels_run(void) {
    __builtin_cpu_init(); /* the first two Zen have pdep, but take hundreds of cycles for it */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
           !__builtin_cpu_is("znver1") && !__builtin_cpu_is("znver2");
}

static int64_t chunks_of(int64_t count) { return (count + CHUNK - 1) / CHUNK; }
static int64_t segments_of(int64_t count) { return (chunks_of(count) + SEGMENT - 1) / SEGMENT; }

/* ---- encode ---- */

/* The most common exponents of some numbers: zero, and those of the window that holds most. */
static table find_table(const uint16_t *x, int64_t count) {
    uint32_t seen[256] = {0}, within = 0, most = 0;
    table t = {.base = 1};
    for (int64_t i = 0; i < count; i += count < SAMPLE * CHUNK ? 1 : SAMPLE) seen[x[i] >> 7 & 0xff]++;
    for (int e = 1; e < 256; e++) {
        within += seen[e];
        if (e > WINDOW) within -= seen[e - WINDOW];
        if (within > most) {
            most = within;
            t.base = (uint8_t)(e > WINDOW ? e - WINDOW + 1 : 1);
        }
    }
    for (int rank = 0; rank < RANKS; rank++) {
        int best = 0;
        for (int e = t.base; e < t.base + WINDOW && e < 256; e++)
            if (seen[e] > seen[best]) best = e;
        t.exponents[rank] = (uint8_t)best;
        seen[best] = 0;
    }
    return t;
}

/* Ranks of exponents by their place in the window, as a byte each; RANKS for what has none. `zero`: of zero. */
static __m128i ranks_of(const table *t, uint8_t *zero) {
    uint8_t ranks[WINDOW];
    memset(ranks, RANKS, sizeof ranks);
    *zero = RANKS;
    for (int rank = RANKS - 1; rank >= 0; rank--) {
        if (t->exponents[rank] == 0) *zero = (uint8_t)rank;
        else ranks[t->exponents[rank] - t->base] = (uint8_t)rank;
    }
    return _mm_loadu_si128((const __m128i *)(const void *)ranks);
}

/* 32 codes of two bits, a byte each, to a word. */
static inline uint64_t word_of(__m256i codes) {
    __m256i shifted = _mm256_sllv_epi64(codes, _mm256_setr_epi64x(0, 2, 4, 6));
    __m128i half = _mm_or_si128(_mm256_castsi256_si128(shifted), _mm256_extracti128_si256(shifted, 1));
    return (uint64_t)_mm_cvtsi128_si64(_mm_or_si128(half, _mm_unpackhi_epi64(half, half)));
}

static inline __m256i codes_of(uint64_t word) {
    __m256i shifted = _mm256_srlv_epi64(_mm256_set1_epi64x((long long)word), _mm256_setr_epi64x(0, 2, 4, 6));
    return _mm256_and_si256(shifted, _mm256_set1_epi8(3));
}

static inline uint64_t load64(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

/* The codes of `word` that are 3. */
static inline uint64_t threes(uint64_t word) { return (word & word >> 1 & FIRST) * 3; }

/* Which number of a block the code at `bit` of a word belongs to. */
static inline int number_at(int bit) { return bit % 8 / 2 * 8 + bit / 8; }

typedef struct {
    uint8_t bytes[CHUNK / 4 + BEYOND];
    uint32_t bits;
} stream;

static inline void append(stream *s, uint64_t value, uint32_t bits) {
    uint32_t within = s->bits % 8;
    uint8_t *at = s->bytes + s->bits / 8;
    uint64_t word = (*at & ((1u << within) - 1)) | value << within, above = value >> 1 >> (63 - within);
    memcpy(at, &word, sizeof word);
    at[8] = (uint8_t)above;
    s->bits += bits;
}

typedef struct {
    stream second, third;
    uint8_t others[CHUNK];
    uint32_t other;
} tail;

static inline void encode_block(const uint16_t *x, const table *t, __m128i ranks, uint8_t zero, uint8_t *rest,
                                uint8_t *first, tail *to) {
    const __m256i low = _mm256_set1_epi16(0xff), three = _mm256_set1_epi8(3);
    __m256i a = _mm256_loadu_si256((const __m256i *)(const void *)x);
    __m256i b = _mm256_loadu_si256((const __m256i *)(const void *)(x + 16));
    __m256i exponents = _mm256_packus_epi16(_mm256_and_si256(_mm256_srli_epi16(a, 7), low),
                                            _mm256_and_si256(_mm256_srli_epi16(b, 7), low));
    __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    __m256i below = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
    __m256i sign = _mm256_set1_epi8((char)0x80);
    __m256i own = _mm256_or_si256(_mm256_and_si256(high, sign), _mm256_andnot_si256(sign, below));
    exponents = _mm256_permute4x64_epi64(exponents, 0xd8); /* packs go by halves */
    _mm256_storeu_si256((__m256i *)(void *)rest, _mm256_permute4x64_epi64(own, 0xd8));
    __m256i place = _mm256_sub_epi8(exponents, _mm256_set1_epi8((char)t->base));
    __m256i inside = _mm256_cmpeq_epi8(_mm256_min_epu8(place, _mm256_set1_epi8(WINDOW - 1)), place);
    __m256i rank = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(ranks), place);
    rank = _mm256_blendv_epi8(_mm256_set1_epi8(RANKS), rank, inside);
    rank = _mm256_blendv_epi8(rank, _mm256_set1_epi8((char)zero), _mm256_cmpeq_epi8(exponents, _mm256_setzero_si256()));
    uint64_t one = word_of(_mm256_min_epu8(rank, three));
    uint64_t two = word_of(_mm256_min_epu8(_mm256_subs_epu8(rank, three), three));
    uint64_t last = word_of(_mm256_subs_epu8(rank, _mm256_set1_epi8(6)));
    uint64_t sent = threes(one), again = threes(two), other = threes(last) & FIRST;
    memcpy(first, &one, sizeof one);
    append(&to->second, _pext_u64(two, sent), (uint32_t)_mm_popcnt_u64(sent));
    append(&to->third, _pext_u64(last, again), (uint32_t)_mm_popcnt_u64(again));
    for (; other; other &= other - 1) {
        int number = number_at(__builtin_ctzll(other));
        to->others[to->other++] = (uint8_t)(x[number] >> 7);
    }
}

/* One chunk to `out`; how many bytes it took, or 0 where these are more than `room`. */
static size_t encode_chunk(const uint16_t *x, int count, const table *t, uint8_t *out, size_t room) {
    tail to;
    to.second.bits = to.third.bits = to.other = 0;
    to.second.bytes[0] = to.third.bytes[0] = 0;
    uint8_t rest[CHUNK], first[CHUNK / 4], zero;
    __m128i ranks = ranks_of(t, &zero);
    for (int i = 0; i < count; i += BLOCK) encode_block(x + i, t, ranks, zero, rest + i, first + i / 4, &to);
    uint16_t sizes[2] = {(uint16_t)((to.second.bits + 7) / 8), (uint16_t)((to.third.bits + 7) / 8)};
    const struct { const void *from; size_t size; } pieces[] = {
        {sizes, sizeof sizes},         {rest, (size_t)count},        {first, (size_t)count / 4},
        {to.second.bytes, sizes[0]}, {to.third.bytes, sizes[1]}, {to.others, to.other},
    };
    size_t end = 0;
    for (int i = 0; i < 6; i++) {
        if (end + pieces[i].size > room) return 0;
        memcpy(out + end, pieces[i].from, pieces[i].size);
        end += pieces[i].size;
    }
    return end;
}

size_t moedge_levels_encode(const uint16_t *x, int64_t count, uint8_t *out, size_t room) {
    size_t begins = HEAD, tables = begins + (size_t)chunks_of(count) * sizeof(uint32_t);
    size_t end = tables + (size_t)segments_of(count) * sizeof(table);
    uint32_t head = LEVELS;
    if (end + BEYOND > room) return 0;
    memcpy(out, &head, sizeof head);
    table t = {.base = 1};
    for (int64_t chunk = 0; chunk < chunks_of(count); chunk++) {
        int64_t at = chunk * CHUNK, left = count - at;
        if (chunk % SEGMENT == 0) {
            t = find_table(x + at, left < SEGMENT * CHUNK ? left : SEGMENT * CHUNK);
            memcpy(out + tables + (size_t)(chunk / SEGMENT) * sizeof t, &t, sizeof t);
        }
        uint32_t here = (uint32_t)end;
        memcpy(out + begins + (size_t)chunk * sizeof here, &here, sizeof here);
        size_t taken = encode_chunk(x + at, left < CHUNK ? (int)left : CHUNK, &t, out + end, room - BEYOND - end);
        if (!taken) return 0;
        end += taken;
    }
    return end + BEYOND;
}

/* ---- restore ---- */

/* `bits` bits from `bit` on, and whatever follows them. */
static inline uint64_t bits_at(const uint8_t *bytes, uint32_t bit, uint32_t bits) {
    uint32_t within = bit % 8;
    const uint8_t *at = bytes + bit / 8;
    uint64_t found = load64(at) >> within;
    return bits <= 56 ? found : found | (uint64_t)at[8] << 1 << (63 - within);
}

static void restore_chunk(const uint8_t *from, int count, __m256i high, __m256i low, uint16_t *x) {
    uint16_t sizes[2];
    memcpy(sizes, from, sizeof sizes);
    const uint8_t *rest = from + sizeof sizes, *first = rest + count, *second = first + count / 4;
    const uint8_t *third = second + sizes[0], *others = third + sizes[1];
    uint32_t two = 0, three = 0;
    const __m256i sign = _mm256_set1_epi8((char)0x80);
    for (int at = 0; at < count; at += BLOCK, x += BLOCK) {
        _mm_prefetch((const char *)rest + at + at / 4 + at / 8 + AHEAD, _MM_HINT_T0);
        uint64_t one = load64(first + at / 4), sent = threes(one);
        uint32_t bits = (uint32_t)_mm_popcnt_u64(sent);
        uint64_t next = _pdep_u64(bits_at(second, two, bits), sent), again = threes(next);
        two += bits, bits = (uint32_t)_mm_popcnt_u64(again);
        uint64_t last = _pdep_u64(bits_at(third, three, bits), again), other = threes(last) & FIRST;
        three += bits;
        __m256i rank = _mm256_add_epi8(_mm256_add_epi8(codes_of(one), codes_of(next)), codes_of(last));
        __m256i own = _mm256_loadu_si256((const __m256i *)(const void *)(rest + at));
        __m256i above = _mm256_or_si256(_mm256_shuffle_epi8(high, rank), _mm256_and_si256(own, sign));
        __m256i below = _mm256_or_si256(_mm256_shuffle_epi8(low, rank), _mm256_andnot_si256(sign, own));
        __m256i a = _mm256_unpacklo_epi8(below, above), b = _mm256_unpackhi_epi8(below, above);
        _mm256_storeu_si256((__m256i *)(void *)x, _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256((__m256i *)(void *)(x + 16), _mm256_permute2x128_si256(a, b, 0x31));
        for (; other; other &= other - 1) {
            uint16_t *number = x + number_at(__builtin_ctzll(other));
            *number = (uint16_t)(*number | *others++ << 7);
        }
    }
}

/* Bytes of a number's exponent by rank: its upper seven bits, and its last in front of the mantissa. */
static void spread(const table *t, __m256i *high, __m256i *low) {
    uint8_t above[16] = {0}, below[16] = {0};
    for (int rank = 0; rank < RANKS; rank++) {
        above[rank] = t->exponents[rank] >> 1;
        below[rank] = (uint8_t)(t->exponents[rank] << 7);
    }
    *high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)above));
    *low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)below));
}

void moedge_levels_restore(const uint8_t *from, int64_t count, int64_t begin, int64_t end, uint16_t *x) {
    const uint8_t *begins = from + HEAD, *tables = begins + chunks_of(count) * (int64_t)sizeof(uint32_t);
    __m256i high = _mm256_setzero_si256(), low = high;
    for (int64_t chunk = begin / CHUNK; chunk * CHUNK < end; chunk++) {
        int64_t at = chunk * CHUNK, size = count - at < CHUNK ? count - at : CHUNK;
        uint32_t here;
        memcpy(&here, begins + chunk * (int64_t)sizeof here, sizeof here);
        if (chunk % SEGMENT == 0 || at <= begin) {
            table t;
            memcpy(&t, tables + chunk / SEGMENT * (int64_t)sizeof t, sizeof t);
            spread(&t, &high, &low);
        }
        if (begin <= at && at + size <= end) {
            restore_chunk(from + here, (int)size, high, low, x + (at - begin));
            continue;
        }
        uint16_t whole[CHUNK];
        restore_chunk(from + here, (int)size, high, low, whole);
        int64_t first = begin > at ? begin : at, last = end < at + size ? end : at + size;
        memcpy(x + (first - begin), whole + (first - at), (size_t)(last - first) * sizeof *x);
    }
}
