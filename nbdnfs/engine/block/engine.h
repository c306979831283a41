/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * engine: the block device. Pages go in and out of a region, which a flusher writes back to the NAS.
 *
 * Every request function may be called from any thread, blocks until it is done, and returns 0 or -errno:
 *
 *   -EINVAL  not a multiple of 4096 bytes at a multiple of 4096 inside the device
 *   -EIO     a page does not match its checksum; the file is shorter than the device; the file is stolen; waiting for
 *            the server took longer than nfs.soft_limit_ms; the file was gone for nfs.gone_limit_ms
 *   other    what the server answered to a READ for 30 s, or for nfs.soft_limit_ms where there is one
 *
 * Without a limit requests wait for the server for as long as it takes. What was acknowledged stays in the region after
 * an error, too, and is written when that is possible again.
 *
 * After engine_create() none of them maps memory, allocates (libnfs does), or starts a thread.
 */
#ifndef NBDNFS_ENGINE_H
#define NBDNFS_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "nfs/nfsio.h"
#include "nfs/owner_watch.h"
#include "region/region.h"

/* With fewer slots, write-backs leave no room for read-ahead. */
#define ENGINE_REGION_PAGES_MIN 256
#define ENGINE_CONNECTIONS_MAX 16
/*
 * A region (region.h: slots, and a table that grows with the device, a little over 1 MiB for each GiB, 2 MiB with
 * encryption) may have this share of the machine's memory, but always so many bytes.
 */
#define ENGINE_MEMORY_SHARE 8
#define ENGINE_MEMORY_MIN_BYTES (64u << 20)

struct engine;

struct engine_options {
	struct nfsio_options nfs;
	int region_fd;          /* a memfd that remains the caller's; -1: the engine makes one */
	uint32_t region_pages;  /* slots of a region that is new */
	enum region_version region_version; /* of a region that is new; one that was made before stays as it is */
	uint64_t clear_bytes;   /* of an encrypted one: what stays readable from the device's start; whole pages */
	unsigned connections;   /* 1 to ENGINE_CONNECTIONS_MAX; all but the first serve one reader at a time */
	bool stable_writes;     /* write with FILE_SYNC, rather than UNSTABLE and COMMIT */
	uint32_t read_ahead_pages; /* the most to have ready for one reader; 0: no read-ahead */
	struct owner_options owner; /* identity NULL: ownership is not looked at */
	/*
	 * When the file is stolen, end the process with this status: its keeper then lets the kernel's requests fail.
	 * 0: stay, and fail all requests here.
	 */
	int exit_status_when_stolen;
};

/*
 * Connect, open the file, map the region and take over what it holds. Returns 0 and *engine, or -errno and *why.
 * -EFBIG: the file is so large that a new region for it would have more than its share of memory; nothing was allocated
 * for it.
 */
int engine_create(const struct engine_options *options, struct engine **engine, struct nfsio_failure *why);

/*
 * End the threads and free the engine. With a region of its own, wait first until the NAS has everything that can be
 * read later, or waiting is an error; of an encrypted one, that is what is in clear text. A region of the caller's
 * keeps its pages for the next engine.
 */
void engine_destroy(struct engine *engine);

uint64_t engine_size_bytes(const struct engine *engine);
/* As its region was made. */
bool engine_is_encrypted(const struct engine *engine);
struct region_header *engine_region(const struct engine *engine);

int engine_read(struct engine *engine, uint8_t *data, uint64_t offset_bytes, uint64_t length_bytes);
/* The pages are in the region when it returns; with `fua`, on the NAS, stably. */
int engine_write(struct engine *engine, const uint8_t *data, uint64_t offset_bytes, uint64_t length_bytes, bool fua);
/*
 * Everything that was written before is on the NAS, stably, when it returns: of each page what was written last before
 * the FLUSH, or later. A page that is trimmed meanwhile is not waited for: the NAS may have older bytes of it then, as
 * after any TRIM.
 */
int engine_flush(struct engine *engine);
/*
 * The pages may be forgotten: until they are written again, they read as anything that was ever there. The file keeps
 * its blocks: filling a hole again fails when the NAS is full.
 */
int engine_trim(struct engine *engine, uint64_t offset_bytes, uint64_t length_bytes);

/*
 * Reads and writes in steps, for a thread that serves many of them and may wait for none: the *attendant*. It also
 * receives the NAS's answers (nfsio_attend()). There is one at most; the functions below are for its thread alone,
 * but for engine_finish_*().
 */

/*
 * A request of the attendant's, which keeps it in place until it has ended. Used by one thread at a time: the
 * attendant, or the one that it was left to, until that gives it back.
 */
struct engine_request {
	/* set by the attendant; the rest zero */
	uint8_t *data;          /* of a read */
	const uint8_t *payload; /* of a write; it may lie elsewhere in the next step */
	uint64_t offset_bytes, length_bytes;
	struct nfsio_req *reqs; /* of a read: room for one for each page */
	void (*answered)(struct engine_request *request); /* of a read: called once, in any thread, without locks */

	/* the engine's own */
	_Atomic uint64_t *place; /* in the region; NULL: it has none there */
	uint64_t started_us;    /* constant after engine_note_request() */
	uint64_t asked_us;
	uint64_t wait_until_ms; /* of one that waits: see engine_read_step(), engine_write_step() */
	uint64_t page;          /* the number of pages that are done with */
	uint32_t missed, used;  /* pages that are in no slot; how many of `reqs` are for them */
	atomic_uint outstanding; /* of these */
	bool has_begun, needs_slot;
};

/* A request has come: its time counts from now. Once, before its first step. */
void engine_note_request(struct engine *engine, struct engine_request *request);
/* It has ended, whichever function gave the result. Once. */
void engine_note_result(struct engine_request *request);
/*
 * Begin a read, or go on. 0 or -errno: it has ended, see engine_read(). -EAGAIN: a page is being fetched, go on after
 * engine_take_progress(), or at request->wait_until_ms by CLOCK_MONOTONIC: waiting is an error then. -EINPROGRESS: the
 * NAS has been asked, and `answered` will be called; then engine_read_end().
 */
int engine_read_step(struct engine *engine, struct engine_request *request);
/* 0 or -errno: it has ended. -EAGAIN: something is not what was expected, engine_finish_read() finds out. */
int engine_read_end(struct engine *engine, struct engine_request *request);
/*
 * Begin a write without FUA, or go on. 0 or -errno: it has ended. -EAGAIN: the region is full; go on after
 * engine_take_progress(), or at request->wait_until_ms by CLOCK_MONOTONIC: waiting may have become an error by then.
 */
int engine_write_step(struct engine *engine, struct engine_request *request);

/*
 * What the attendant leaves to another thread, which may wait: engine_read(), engine_write() of the payload with FUA or
 * without, or of a payload of one page to each of its pages, and engine_flush(). The time that the request has taken
 * already counts.
 */
int engine_finish_read(struct engine *engine, struct engine_request *request);
int engine_finish_write(struct engine *engine, struct engine_request *request, bool fua);
int engine_finish_fill(struct engine *engine, struct engine_request *request, bool fua);
int engine_finish_flush(struct engine *engine, struct engine_request *request);

/*
 * Make the calling thread the attendant. `wake_fd`, an eventfd(2) of its own, is written to when it should look. Every
 * `tick_ms` the engine's threads that have left their work to it look as well, in case a wake-up was lost.
 */
void engine_attend(struct engine *engine, int wake_fd, uint32_t tick_ms);
/*
 * What to poll, before poll(2); returns for how many ms at most, -1: any time. And what is to be done after it.
 * *opened: as for nfsio_before_poll().
 */
#define ENGINE_ATTENDED 2
#define ENGINE_POLLED (ENGINE_ATTENDED * NFSIO_POLLED)
int engine_before_poll(struct engine *engine, struct pollfd fds[ENGINE_POLLED], uint32_t *opened);
void engine_after_poll(struct engine *engine, const struct pollfd fds[ENGINE_POLLED]);
/* May what a step waits for have come since the last call? */
bool engine_take_progress(struct engine *engine);
/* The attendant stops. No request is under way. */
void engine_leave(struct engine *engine);

#endif
