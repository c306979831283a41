/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * engine: the block device. Reads, writes, flushes and trims of whole pages over one nfsio.
 *
 * Every function may be called from any thread, blocks until it is done, and returns 0 or -errno:
 * -EINVAL for what is not a multiple of 4096 at a multiple of 4096 inside the device.
 */
#ifndef NBDNFS_ENGINE_H
#define NBDNFS_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "nfsio.h"

#define ENGINE_PAGE_BYTES 4096

struct engine;

/* Connects and opens. -EINVAL with a message in *why when the file is no multiple of a page. */
int engine_create(const struct nfsio_options *options, struct engine **engine, struct nfsio_failure *why);
void engine_destroy(struct engine *engine);

uint64_t engine_size_bytes(const struct engine *engine);

int engine_read(struct engine *engine, uint8_t *data, uint64_t offset_bytes, uint64_t length_bytes);
/* On the NAS when it returns, with or without FUA: there is no cache between. */
int engine_write(struct engine *engine, const uint8_t *data, uint64_t offset_bytes, uint64_t length_bytes);
int engine_flush(struct engine *engine);
int engine_trim(struct engine *engine, uint64_t offset_bytes, uint64_t length_bytes);

#endif
