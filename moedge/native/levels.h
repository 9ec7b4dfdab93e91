/* What shorten.c asks of levels.c, which not every processor can run. */

#ifndef MOEDGE_LEVELS_H
#define MOEDGE_LEVELS_H

#include <stddef.h>
#include <stdint.h>

enum { LEVELS = 0xffffffff /* stands at the start of what levels.c wrote */ };

int moedge_levels_run(void);
/* Bytes written, or 0 where more than `room` would be needed. */
size_t moedge_levels_encode(const uint16_t *x, int64_t count, uint8_t *out, size_t room);
void moedge_levels_restore(const uint8_t *from, int64_t count, int64_t begin, int64_t end, uint16_t *x);

#endif
