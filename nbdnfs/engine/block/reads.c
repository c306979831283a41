/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reads: out of slots, from the NAS, and what is done about a page that is not what was written. */
#include "block/internal.h"

#include "base/log.h"

#include <errno.h>

/* How often a page that does not agree with its proof is read again. */
#define CHECKSUM_TRIES 3

/*
 * Copy a page out, once it is not being fetched. 0 and *found; -EIO: it still is at `end_ms`, by now_ms(). Lock held;
 * dropped while waiting.
 */
static int read_slot(struct engine *engine, uint64_t page, uint8_t *data, uint64_t end_ms, enum cache_lookup *found)
{
	while ((*found = cache_read(engine->cache, page, data)) == CACHE_WAIT) {
		if (now_ms() >= end_ms)
			return -EIO;
		engine_wait(engine, end_ms); /* until the fetch ends, as every READ does */
	}
	return 0;
}

/*
 * Check that a page that the NAS returned is what was written to it. That counts against the server only where what was
 * written is still what it was when the READ was sent: a page that others keep writing is read until it is not
 * overtaken. The request has waited since `since_ms`.
 */
static int verify_page(struct engine *engine, uint64_t page, uint8_t *data, uint64_t since_ms)
{
	struct region_counters *c = counters(engine);
	uint64_t asked_for = NO_PROOF; /* the first READ was sent elsewhere: it may have been overtaken */
	int wrong = 0;

	for (;;) {
		struct nfsio_req req = {
			.op = NFSIO_READ,
			.offset_bytes = page * SLOT_BYTES,
			.length_bytes = SLOT_BYTES,
			.data = data,
			.waits_since_ms = (int64_t)since_ms,
		};
		enum cache_lookup newer;
		uint64_t proof;
		int error = check_page(engine, page, data, &proof);

		if (error != -EAGAIN)
			return error;
		wrong = proof == asked_for ? wrong + 1 : 0;
		engine_lock(engine);
		error = read_slot(engine, page, data, read_ends_ms(engine, since_ms), &newer);
		asked_for = cache_proof(engine->cache, page);
		engine_unlock(engine);
		if (error != 0 || newer == CACHE_HIT)
			return error;
		if (wrong == CHECKSUM_TRIES)
			break;
		count(&c->checksum_rereads, 1);
		error = nfsio_transfer(engine->ios[0], &req);
		if (error != 0)
			return error;
		if (req.moved_bytes != SLOT_BYTES)
			return -EIO;
	}
	count(&c->checksum_failures, 1);
	log_line("page %llu of the backing file is not what was written to it: the server lost or changed it",
		 (unsigned long long)page);
	return -EIO;
}

/* The result of a READ of consecutive pages, each of them checked, for a request that has waited since `since_ms`. */
static int verify_request(struct engine *engine, const struct nfsio_req *req, uint64_t since_ms)
{
	/* else the file ends before the device: it was truncated */
	int error = req->moved_bytes == req->length_bytes ? 0 : -EIO;

	assert(req->error == 0);
	for (uint32_t at = 0; error == 0 && at < req->length_bytes; at += SLOT_BYTES)
		error = verify_page(engine, (req->offset_bytes + at) / SLOT_BYTES, req->data + at, since_ms);
	return error;
}

/* Lend a connection that is up to a reader. Returns its number; 0 is shared and is not lent. Lock held. */
static unsigned lend(struct engine *engine)
{
	for (unsigned i = 1; i < engine->io_count; i++)
		if (!engine->lent[i] && !engine->is_down[i]) {
			engine->lent[i] = true;
			return i;
		}
	return 0;
}

/*
 * Copy out the pages that have a slot, and write a READ into `reqs` for each run of the others. Returns how many there
 * are, or -EIO. Lock held; dropped while waiting.
 */
static int look_up(struct engine *engine, uint8_t *data, uint64_t page, uint32_t pages, uint64_t since_ms,
		   struct nfsio_req reqs[BATCH_PAGES])
{
	uint64_t end_ms = read_ends_ms(engine, since_ms);
	uint32_t used = 0;

	for (uint32_t i = 0; i < pages; i++) {
		uint8_t *target = data + (size_t)i * SLOT_BYTES;
		enum cache_lookup found;

		if (read_slot(engine, page + i, target, end_ms, &found) != 0)
			return -EIO;
		if (found != CACHE_HIT)
			add_read(engine, reqs, &used, page + i, target, since_ms);
	}
	return (int)used;
}

/*
 * Read at most BATCH_PAGES pages, for a request that has waited since `since_ms`. What is in no slot comes straight
 * into the request's buffer and gets no slot: the reader has it in memory then.
 */
static int read_batch(struct engine *engine, uint8_t *data, uint64_t page, uint32_t pages, uint64_t since_ms)
{
	struct nfsio_req reqs[BATCH_PAGES];
	struct nfsio_batch batch;
	uint64_t started_us;
	uint32_t missed = 0;
	unsigned io = 0;
	int used, error = 0;

	assert(pages <= BATCH_PAGES);
	engine_lock(engine);
	used = look_up(engine, data, page, pages, since_ms, reqs);
	if (used > 0)
		io = lend(engine);
	engine_unlock(engine);
	if (used < 0)
		return used;
	started_us = now_us();
	if (used > 0)
		nfsio_batch_start(engine->ios[io], &batch, reqs, (size_t)used);
	readahead_follow(engine, page, pages); /* sent after what this thread waits for */
	if (used > 0)
		nfsio_batch_wait(&batch);
	if (io > 0) {
		engine_lock(engine);
		assert(engine->lent[io]);
		engine->lent[io] = false;
		engine_unlock(engine);
	}
	if (used > 0)
		file_look(engine);
	for (int i = 0; i < used; i++)
		if (reqs[i].error != 0)
			error = reqs[i].error; /* then no page needs a longer look */
	for (int i = 0; i < used; i++) {
		missed += reqs[i].length_bytes / SLOT_BYTES;
		count(&counters(engine)->nfs_reads, 1);
		count(&counters(engine)->nfs_read_bytes, reqs[i].length_bytes);
		if (error == 0)
			error = verify_request(engine, &reqs[i], since_ms);
	}
	if (used > 0)
		count_duration(counters(engine)->nfs_read_us, now_us() - started_us);
	count(&counters(engine)->hit_pages, pages - missed);
	count(&counters(engine)->missed_pages, missed);
	return error;
}

/*
 * Read whole pages of the device. A soft limit counts from `since_ms`. 0: it restarts for each BATCH_PAGES. 0 or
 * -errno, as engine_read().
 */
static int read_range(struct engine *engine, uint8_t *data, uint64_t offset_bytes, uint64_t length_bytes,
		      uint64_t since_ms)
{
	uint64_t page = offset_bytes / SLOT_BYTES, pages = length_bytes / SLOT_BYTES;
	int error = result_of(engine);

	while (error == 0 && pages > 0) {
		uint32_t now = pages < BATCH_PAGES ? (uint32_t)pages : BATCH_PAGES;

		error = read_batch(engine, data, page, now, since_ms != 0 ? since_ms : now_ms());
		if (error == -ESTALE)
			error = -EIO; /* the file is gone: NBD has no ESTALE */
		if (error == 0)
			error = result_of(engine); /* the page may be another machine's */
		data += (size_t)now * SLOT_BYTES;
		page += now;
		pages -= now;
	}
	return error;
}

int engine_read(struct engine *engine, uint8_t *data, uint64_t offset_bytes, uint64_t length_bytes)
{
	uint64_t started_us = now_us();
	_Atomic uint64_t *place = request_began(engine, started_us / 1000);
	int wrong = check_range(engine, offset_bytes, length_bytes), error = 0;

	if (wrong == 0)
		error = read_range(engine, data, offset_bytes, length_bytes, 0);
	note_read(engine, length_bytes, started_us, error);
	request_ended(place);
	return wrong != 0 ? wrong : error;
}

int engine_finish_read(struct engine *engine, struct engine_request *request)
{
	uint64_t since_ms = request->started_us / 1000;
	int error = read_range(engine, request->data, request->offset_bytes, request->length_bytes, since_ms);

	note_read(engine, request->length_bytes, request->started_us, error);
	return error;
}
