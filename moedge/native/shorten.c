/* bf16 numbers in 12 bits, without loss: sign and mantissa as they are, and 4 bits for the exponent.

   The exponents of a matrix of weights lie close together (3 bits of information; DFloat11, arXiv 2504.11651). Code 0 is
   the exponent 0, codes 1 to 15 are the exponents base to base + 14. The few numbers with others stand in a list. */

#include <string.h>

#include "moedge.h"
#include "product.h"
#ifdef MOEDGE_LEVELS
#include "levels.h"
#endif

enum { CODES = 15, HEAD = 64, SAMPLE = 31, FEW = 2048 }; /* one in SAMPLE is looked at to find the base, of few all */

typedef struct {
    uint32_t base, listed;
} head;

/* Where the parts of `count` shortened numbers lie, a multiple of BLOCK: head, signs and mantissas, codes, list. */
typedef struct {
    int64_t room; /* of the list */
    size_t codes, places, values, end;
} parts;

static parts parts_of(int64_t count) {
    parts p = {.room = count / 512 + 16, .codes = HEAD + (size_t)count};
    p.places = p.codes + (size_t)count / 2;
    p.values = p.places + (size_t)p.room * sizeof(uint32_t);
    p.end = p.values + (size_t)p.room * sizeof(uint16_t);
    return p;
}

size_t moedge_short_bytes(int64_t count) { return parts_of(count).end; }

/* The base whose codes stand for most of a sample; among equals the least, as small numbers are what weights have more
   of than a sample shows. */
static uint32_t find_base(const uint16_t *x, int64_t count) {
    uint32_t seen[256] = {0}, within = 0, most = 0, best = 256 - CODES;
    for (int64_t i = 0; i < count; i += count < SAMPLE * FEW ? 1 + count / FEW : SAMPLE) seen[x[i] >> 7 & 0xff]++;
    for (int e = 255; e >= 1; e--) {
        within += seen[e];
        if (e + CODES <= 255) within -= seen[e + CODES];
        if (within >= most && e <= 256 - CODES) {
            most = within;
            best = (uint32_t)e;
        }
    }
    return best;
}

/* One block: its signs and mantissas to `rest`, its codes; whether each number has to be listed. Each loop is one that
   compilers make vectors of. */
static int shorten_block(const uint16_t *restrict x, uint8_t base, uint8_t *restrict rest, uint8_t *restrict codes,
                         uint8_t *restrict odd) {
    uint8_t code[BLOCK];
    for (int i = 0; i < BLOCK; i++) rest[i] = (uint8_t)((x[i] >> 8 & 0x80) | (x[i] & 0x7f));
    for (int i = 0; i < BLOCK; i++) code[i] = (uint8_t)(x[i] >> 7);
    for (int i = 0; i < BLOCK; i++) {
        uint8_t above = (uint8_t)(code[i] - base), known = above < CODES ? 0xff : 0, some = code[i] ? 0xff : 0;
        odd[i] = (uint8_t)(some & ~known);
        code[i] = (uint8_t)((above + 1) & known);
    }
    for (int i = 0; i < BLOCK / 2; i++) codes[i] = (uint8_t)(code[i] | code[i + BLOCK / 2] << 4);
    uint64_t any[BLOCK / 8];
    memcpy(any, odd, sizeof any);
    return (any[0] | any[1] | any[2] | any[3]) != 0;
}

int moedge_shorten(const uint16_t *x, int64_t count, uint8_t *out) {
    parts p = parts_of(count);
    head h = {find_base(x, count), 0};
    for (int64_t at = 0; at < count; at += BLOCK) {
        uint8_t odd[BLOCK];
        if (!shorten_block(x + at, (uint8_t)h.base, out + HEAD + at, out + p.codes + at / 2, odd)) continue;
        for (int i = 0; i < BLOCK; i++) {
            if (!odd[i]) continue;
            if (h.listed == p.room) return 0;
            uint32_t place = (uint32_t)(at + i);
            memcpy(out + p.places + h.listed * sizeof place, &place, sizeof place);
            memcpy(out + p.values + h.listed * sizeof *x, x + place, sizeof *x);
            h.listed++;
        }
    }
    memcpy(out, &h, sizeof h);
    return 1;
}

/* The first number of the list that stands at `begin` or behind it; places ascend. */
static uint32_t find_listed(const uint8_t *places, uint32_t listed, int64_t begin) {
    uint32_t low = 0, high = listed, place;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        memcpy(&place, places + middle * sizeof place, sizeof place);
        if (place < begin) low = middle + 1;
        else high = middle;
    }
    return low;
}

void moedge_restore_some(int v, const uint8_t *from, int64_t count, int64_t begin, int64_t end, uint16_t *x) {
    parts p = parts_of(count);
    head h;
    memcpy(&h, from, sizeof h);
#ifdef MOEDGE_LEVELS
    if (h.base == LEVELS) {
        moedge_levels_restore(from, count, begin, end, x);
        return;
    }
#endif
    const uint8_t *rest = from + HEAD + begin, *codes = from + p.codes + begin / 2;
    moedge_variant(v)->restore(rest, codes, (uint16_t)(h.base - 1), end - begin, x);
    for (uint32_t i = find_listed(from + p.places, h.listed, begin); i < h.listed; i++) {
        uint32_t place;
        memcpy(&place, from + p.places + i * sizeof place, sizeof place);
        if (place >= end) break;
        memcpy(x + place - begin, from + p.values + i * sizeof *x, sizeof *x);
    }
}

void moedge_restore(int v, const uint8_t *from, int64_t count, uint16_t *x) {
    moedge_restore_some(v, from, count, 0, count, x);
}

#ifdef MOEDGE_LEVELS
size_t moedge_compact(const uint16_t *x, int64_t count, uint8_t *out, size_t room) {
    return moedge_levels_run() ? moedge_levels_encode(x, count, out, room) : 0;
}
#else
size_t moedge_compact(const uint16_t *x, int64_t count, uint8_t *out, size_t room) {
    (void)x, (void)count, (void)out, (void)room;
    return 0;
}
#endif
