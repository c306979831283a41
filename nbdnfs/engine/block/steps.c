/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Read and write in steps: what reads.c and writes.c do, for a thread that may not wait. engine.h has the contract. */
#include "block/internal.h"

#include <errno.h>

/* Pages whose proofs are computed before the region is asked for room: those that find none are computed again. */
#define PROOFS_AT_ONCE 8

void engine_note_request(struct engine *engine, struct engine_request *request)
{
	request->started_us = now_us();
	request->place = request_began(engine, request->started_us / 1000);
}

void engine_note_result(struct engine_request *request)
{
	request_ended(request->place);
	request->place = NULL;
}

/* Returns whether this is the first step, and *error. */
static bool begin(struct engine *engine, struct engine_request *request, int *error)
{
	if (request->has_begun)
		return false;
	assert(request->started_us != 0); /* engine_note_request() */
	request->has_begun = true;
	*error = check_range(engine, request->offset_bytes, request->length_bytes);
	if (*error == 0)
		*error = result_of(engine);
	return true;
}

static int read_ended(struct engine *engine, struct engine_request *request, int error)
{
	note_read(engine, request->length_bytes, request->started_us, error);
	return error == -ESTALE ? -EIO : error; /* the file is gone: NBD has no ESTALE */
}

static void read_answered(struct nfsio_req *req)
{
	struct engine_request *request = req->context;

	if (atomic_fetch_sub(&request->outstanding, 1) == 1)
		request->answered(request);
}

/* A page is in no slot: the NAS will be asked for it. */
static void add_missed(const struct engine *engine, struct engine_request *request, uint64_t page, uint8_t *target)
{
	struct nfsio_req *req;

	request->missed++;
	req = add_read(engine, request->reqs, &request->used, page, target, request->started_us / 1000);
	req->done = read_answered;
	req->context = request;
}

int engine_read_step(struct engine *engine, struct engine_request *request)
{
	uint64_t first = request->offset_bytes / SLOT_BYTES, pages = request->length_bytes / SLOT_BYTES;
	struct nfsio *io;
	uint32_t used;
	int error = 0;

	if (begin(engine, request, &error) && error != 0) {
		/* a request outside the device is the client's mistake, not an I/O error */
		note_read(engine, request->length_bytes, request->started_us, error == -EINVAL ? 0 : error);
		return error;
	}
	engine_lock(engine);
	for (; request->page < pages; request->page++) {
		uint8_t *target = request->data + request->page * SLOT_BYTES;
		enum cache_lookup found = cache_read(engine->cache, first + request->page, target);

		if (found == CACHE_WAIT) {
			request->wait_until_ms = read_ends_ms(engine, request->started_us / 1000);
			error = now_ms() < request->wait_until_ms ? -EAGAIN : -EIO;
			if (error == -EAGAIN)
				engine->attendant_waits = true;
			engine_unlock(engine);
			return error == -EAGAIN ? error : read_ended(engine, request, error);
		}
		if (found == CACHE_MISS)
			add_missed(engine, request, first + request->page, target);
	}
	io = engine->ios[engine->io_count > 1 && !engine->is_down[1] ? 1 : 0];
	engine_unlock(engine);
	count(&counters(engine)->hit_pages, pages - request->missed);
	count(&counters(engine)->missed_pages, request->missed);
	request->asked_us = now_us();
	used = request->used;
	atomic_store(&request->outstanding, used);
	/* `answered` may be called, in another thread, once the last is submitted: the request is still in place */
	for (uint32_t i = 0; i < used; i++)
		nfsio_submit(io, &request->reqs[i]);
	readahead_follow(engine, first, (uint32_t)pages); /* sent after what is waited for */
	return used > 0 ? -EINPROGRESS : read_ended(engine, request, result_of(engine));
}

/* One READ was answered: are its pages what was written? 0, -errno, or -EAGAIN: that needs a longer look. */
static int check_answer(struct engine *engine, const struct nfsio_req *req)
{
	int error = req->error;

	if (error == 0 && req->moved_bytes != req->length_bytes)
		error = -EIO; /* the file ends before the device: it was truncated */
	for (uint32_t at = 0; error == 0 && at < req->length_bytes; at += SLOT_BYTES) {
		uint64_t page = (req->offset_bytes + at) / SLOT_BYTES, proof;

		error = check_page(engine, page, req->data + at, &proof);
		if (error != -EAGAIN)
			continue;
		engine_lock(engine);
		if (cache_read(engine->cache, page, req->data + at) == CACHE_HIT)
			error = 0; /* written since the READ was sent */
		engine_unlock(engine);
	}
	return error;
}

int engine_read_end(struct engine *engine, struct engine_request *request)
{
	int error = 0;

	assert(atomic_load(&request->outstanding) == 0);
	file_look(engine);
	for (uint32_t i = 0; i < request->used; i++) {
		count(&counters(engine)->nfs_reads, 1);
		count(&counters(engine)->nfs_read_bytes, request->reqs[i].length_bytes);
		if (error == 0 || error == -EAGAIN) {
			int found = check_answer(engine, &request->reqs[i]);

			error = found != 0 ? found : error; /* a longer look does not help against an error */
		}
	}
	count_duration(counters(engine)->nfs_read_us, now_us() - request->asked_us);
	if (error == -EAGAIN)
		return error;
	return read_ended(engine, request, error != 0 ? error : result_of(engine)); /* it may be another machine's */
}

/* The write waits for a slot, or does not any more. Lock held. */
static void set_needs_slot(struct engine *engine, struct engine_request *request, bool needs_slot)
{
	assert_locked(&engine->lock);
	if (needs_slot && !request->needs_slot)
		engine->waiting_for_slot++;
	if (!needs_slot && request->needs_slot)
		engine->waiting_for_slot--;
	request->needs_slot = needs_slot;
}

/* Write the next pages, as far as there is room. 0, -EAGAIN or -EIO. */
static int write_pages(struct engine *engine, struct engine_request *request, uint32_t pages)
{
	const uint8_t *data = request->payload + request->page * SLOT_BYTES;
	uint64_t first = request->offset_bytes / SLOT_BYTES + request->page;
	uint64_t proofs[PROOFS_AT_ONCE];
	uint32_t filled = 0, done = 0;
	bool was_idle;
	int error = 0;

	assert(pages <= PROOFS_AT_ONCE);
	proofs_of(&engine->region, data, SLOT_BYTES, pages, proofs);
	engine_lock(engine);
	was_idle = cache_unstable_count(engine->cache) == 0;
	for (; done < pages && error == 0; done += error == 0) {
		enum cache_store stored = cache_write(engine->cache, first + done, data + (size_t)done * SLOT_BYTES,
						      proofs[done], may_fill(engine, first + done, false));

		filled += stored == CACHE_FILLED;
		if (stored == CACHE_FULL)
			error = may_wait(engine, request->started_us / 1000, &request->wait_until_ms) ? -EAGAIN : -EIO;
	}
	if (error == -EAGAIN) {
		count(&counters(engine)->stalls, 1);
		engine->attendant_waits = true;
	}
	set_needs_slot(engine, request, error == -EAGAIN);
	note_unstable(engine);
	if (error == -EAGAIN || was_idle || is_half_full(engine))
		flusher_call(engine);
	engine_unlock(engine);
	count(&counters(engine)->filled_pages_written, filled);
	request->page += done;
	return error;
}

int engine_write_step(struct engine *engine, struct engine_request *request)
{
	uint64_t pages = request->length_bytes / SLOT_BYTES;
	int error = 0;

	begin(engine, request, &error);
	while (error == 0 && request->page < pages) {
		uint64_t left = pages - request->page;

		error = write_pages(engine, request, left < PROOFS_AT_ONCE ? (uint32_t)left : PROOFS_AT_ONCE);
	}
	if (error == -EAGAIN)
		return error;
	if (error == 0)
		error = result_of(engine);
	note_write(engine, request->length_bytes, request->started_us);
	return error;
}
