/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Where the backing file was last found: its handle, its numbers. A worker leaves that for the next one, which needs
 * neither mountd nor the file's name then. What the bytes mean is for the caller to know; a later version that means
 * something else changes LAST_PLACE_FORMAT.
 *
 * It lies behind the region's header, in the rest of the header's SLOT_BYTES, which versions without it leave alone. It
 * is there twice: a worker may be killed while it writes one.
 */
#ifndef NBDNFS_LAST_PLACE_H
#define NBDNFS_LAST_PLACE_H

#include "region/region.h"

#define LAST_PLACE_OFFSET 2048
#define LAST_PLACE_DATA_BYTES 232
#define LAST_PLACE_FORMAT 1u

struct last_place {
	uint32_t crc;           /* CRC-32C of what follows */
	uint32_t format;
	uint64_t number;        /* the greater one is the newer; 0: there is none */
	uint8_t data[LAST_PLACE_DATA_BYTES];
	uint64_t reserved;      /* 0 */
};
_Static_assert(sizeof(struct region_header) <= LAST_PLACE_OFFSET, "layout");
_Static_assert(sizeof(struct last_place) == 256, "layout");
_Static_assert(LAST_PLACE_OFFSET + 2 * sizeof(struct last_place) <= SLOT_BYTES, "layout");

/* Keep `bytes`, at most LAST_PLACE_DATA_BYTES. One thread at a time. */
void last_place_keep(struct region *region, const void *data, size_t bytes);
/* Returns false, and zeros, where none was kept, or none by a version that means the same. */
bool last_place_read(const struct region *region, void *data, size_t bytes);

#endif
