/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * engine: the block device. Whole pages in and out of a region, which a flusher empties onto the NAS.
 *
 * Every request function may be called from any thread, blocks until it is done, and returns 0 or -errno:
 * -EINVAL for what is not a multiple of 4096 at a multiple of 4096 inside the device, -EIO for a page whose
 * checksum is wrong and for everything once somebody else has taken the file, what the server answered for reads
 * that it refuses. A server that is away is waited for,
 * unless nfs.soft_limit_ms says for how long; a file that is gone for nfs.gone_limit_ms: both are -EIO, for
 * whoever waits. What was acknowledged is kept all the same, and written when that is possible again.
 *
 * After engine_create() none of them maps memory, allocates of the engine's own, or starts a thread.
 */
#ifndef NBDNFS_ENGINE_H
#define NBDNFS_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "nfs/nfsio.h"
#include "nfs/owner_watch.h"
#include "region/region.h"

/* Fewer slots than this leave no room for write-backs and read-aheads side by side. */
#define ENGINE_REGION_PAGES_MIN 256
#define ENGINE_CONNECTIONS_MAX 16

struct engine;

struct engine_options {
	struct nfsio_options nfs;
	int region_fd;          /* a memfd that the caller keeps, -1: one of the engine's own */
	uint32_t region_pages;  /* slots of a region that is made */
	unsigned connections;   /* 1 to ENGINE_CONNECTIONS_MAX: one for all, the others for one reader at a time each */
	bool stable_writes;     /* FILE_SYNC each, rather than UNSTABLE with a COMMIT now and then */
	uint32_t read_ahead_pages; /* at most so many; 0: none */
	struct owner_options owner; /* identity NULL: the file is written whoever owns it */
	/*
	 * When somebody else takes the file: end the process with this status, so that its keeper can let the kernel's
	 * requests fail. 0: stay, and fail all of them here.
	 */
	int exit_status_when_stolen;
};

/* Connects, opens, maps the region and takes over what it holds. Returns 0, or -errno and *why. */
int engine_create(const struct engine_options *options, struct engine **engine, struct nfsio_failure *why);

/*
 * Ends the threads. With a region of its own, waits until the NAS has everything, or until waiting is an error; a
 * region of the caller's keeps what it holds for the next engine.
 */
void engine_destroy(struct engine *engine);

uint64_t engine_size_bytes(const struct engine *engine);
struct region_header *engine_region(const struct engine *engine);

int engine_read(struct engine *engine, uint8_t *data, uint64_t offset_bytes, uint64_t length_bytes);
/* In the region when it returns; with `fua` on the NAS, stably. */
int engine_write(struct engine *engine, const uint8_t *data, uint64_t offset_bytes, uint64_t length_bytes, bool fua);
/* Returns when everything that was written before is on the NAS, stably. */
int engine_flush(struct engine *engine);
/* The pages may be forgotten; the file keeps its blocks: a hole would need space again when memory is short. */
int engine_trim(struct engine *engine, uint64_t offset_bytes, uint64_t length_bytes);

#endif
