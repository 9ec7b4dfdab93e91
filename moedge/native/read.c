/* Read what lies close together in a file: in one call, so that a reading thread needs no interpreter meanwhile. */

#include <string.h>
#include <unistd.h>

#include "moedge.h"

int64_t moedge_read(int file, const moedge_piece *pieces, int count, int64_t begin, int64_t end, uint8_t *block,
                    int64_t size) {
    int64_t total = 0;
    for (int64_t at = begin; at < end; at += size) {
        int64_t want = end - at < size ? end - at : size, page = MOEDGE_PAGE;
        ssize_t got = pread(file, block, (size_t)((want + page - 1) / page * page), at);
        if (got < want) return -1; /* the caller finds out why */
        for (int i = 0; i < count; i++) {
            int64_t low = pieces[i].offset > at ? pieces[i].offset : at;
            int64_t high = pieces[i].offset + pieces[i].nbytes;
            if (high > at + want) high = at + want;
            if (low < high) memcpy(pieces[i].to + (low - pieces[i].offset), block + (low - at), (size_t)(high - low));
        }
        total += got;
    }
    return total;
}
