/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Write, flush and trim. */
#include "block/internal.h"

#include <errno.h>
#include <sched.h>

/* Pages that are forgotten in one go: a TRIM may be of a million. */
#define TRIM_PAGES 1024

/*
 * Wait for `progress`, not beyond `until_ms`. Returns false when waiting is an error, for a request that has waited
 * since `since_ms`. Lock held; dropped while waiting.
 */
static bool wait_for_nas_until(struct engine *engine, uint64_t since_ms, uint64_t until_ms)
{
	uint64_t end_ms;

	if (!may_wait(engine, since_ms, &end_ms))
		return false;
	flusher_call(engine);
	engine_wait(engine, end_ms < until_ms ? end_ms : until_ms);
	return true;
}

/* The same, without a limit other than may_wait()'s. */
static bool wait_for_nas(struct engine *engine, uint64_t since_ms)
{
	return wait_for_nas_until(engine, since_ms, NO_END);
}

/*
 * Wait until the NAS has every write up to `sequence` to these pages, stably, for a request that has waited
 * since `since_ms`. Returns 0 or -EIO. Lock held; dropped while waiting.
 */
static int wait_pages_stable(struct engine *engine, uint64_t page, uint64_t pages, uint64_t sequence, uint64_t since_ms)
{
	for (uint64_t i = 0; i < pages; i++)
		while (!cache_page_is_stable(engine->cache, page + i, sequence))
			if (!wait_for_nas(engine, since_ms))
				return -EIO;
	return 0;
}

/*
 * Write at most BATCH_PAGES pages, for a request that has waited since `since_ms`. After an error, some of them may be
 * written.
 */
static int write_batch(struct engine *engine, const uint8_t *data, size_t stride_bytes, uint64_t page, uint32_t pages,
		       bool fua, uint64_t since_ms)
{
	uint64_t proofs[BATCH_PAGES];
	uint32_t filled = 0;
	bool was_idle;
	int error = 0;

	assert(pages <= BATCH_PAGES);
	proofs_of(&engine->region, data, stride_bytes, pages, proofs);
	engine_lock(engine);
	engine->waiting_for_stable += fua; /* from the first page on: none of them may be filled meanwhile */
	was_idle = cache_unstable_count(engine->cache) == 0;
	for (uint32_t i = 0; i < pages && error == 0; i++) {
		enum cache_store stored;

		while ((stored = cache_write(engine->cache, page + i, data + i * stride_bytes, proofs[i],
					     may_fill(engine, page + i, fua))) == CACHE_FULL &&
		       error == 0) {
			count(&counters(engine)->stalls, 1);
			engine->waiting_for_slot++;
			if (!wait_for_nas(engine, since_ms))
				error = -EIO;
			engine->waiting_for_slot--;
		}
		filled += stored == CACHE_FILLED;
	}
	note_unstable(engine);
	if (was_idle || is_half_full(engine))
		flusher_call(engine);
	if (fua && error == 0)
		error = wait_pages_stable(engine, page, pages, cache_sequence(engine->cache), since_ms);
	engine->waiting_for_stable -= fua;
	engine_unlock(engine);
	count(&counters(engine)->filled_pages_written, filled);
	return error != 0 ? error : result_of(engine);
}

/*
 * engine_write(), for a request that has waited since `started_us`, by now_us(). The bytes of a page are
 * `stride_bytes` from those of the one before it; 0: they are the same ones.
 */
static int write_range(struct engine *engine, const uint8_t *data, size_t stride_bytes, uint64_t offset_bytes,
		       uint64_t length_bytes, bool fua, uint64_t started_us)
{
	uint64_t page = offset_bytes / SLOT_BYTES, pages = length_bytes / SLOT_BYTES;
	int error = check_range(engine, offset_bytes, length_bytes);

	if (error == 0)
		error = result_of(engine);
	while (error == 0 && pages > 0) {
		uint32_t now = pages < BATCH_PAGES ? (uint32_t)pages : BATCH_PAGES;

		error = write_batch(engine, data, stride_bytes, page, now, fua, started_us / 1000);
		data += (size_t)now * stride_bytes;
		page += now;
		pages -= now;
	}
	note_write(engine, length_bytes, started_us);
	return error;
}

int engine_write(struct engine *engine, const uint8_t *data, uint64_t offset_bytes, uint64_t length_bytes, bool fua)
{
	uint64_t started_us = now_us();
	_Atomic uint64_t *place = request_began(engine, started_us / 1000);
	int error = write_range(engine, data, SLOT_BYTES, offset_bytes, length_bytes, fua, started_us);

	request_ended(place);
	return error;
}

int engine_finish_write(struct engine *engine, struct engine_request *request, bool fua)
{
	return write_range(engine, request->payload, SLOT_BYTES, request->offset_bytes, request->length_bytes, fua,
			   request->started_us);
}

int engine_finish_fill(struct engine *engine, struct engine_request *request, bool fua)
{
	return write_range(engine, request->payload, 0, request->offset_bytes, request->length_bytes, fua,
			   request->started_us);
}

/*
 * Give the filled pages slots, and the lock to others from time to time. 0; -EIO: waiting is an error; -EAGAIN: it is
 * `until_ms`. Lock held; dropped meanwhile.
 */
static int materialise(struct engine *engine, uint64_t since_ms, uint64_t until_ms)
{
	uint64_t page = 0;

	for (;;) {
		enum cache_materialise done = cache_materialise(engine->cache, &page, BATCH_PAGES);

		if (done == CACHE_MATERIALISED)
			return 0;
		if (now_ms() >= until_ms)
			return -EAGAIN;
		if (done == CACHE_NO_SLOT && !wait_for_nas_until(engine, since_ms, until_ms))
			return -EIO;
		if (done == CACHE_MORE) {
			engine_unlock(engine);
			sched_yield(); /* else this thread is the first to have it again */
			engine_lock(engine);
		}
	}
}

int flush_until(struct engine *engine, uint64_t since_ms, uint64_t until_ms)
{
	uint64_t sequence;
	int error;

	engine_lock(engine);
	engine->waiting_for_stable++;
	error = materialise(engine, since_ms, until_ms);
	sequence = cache_sequence(engine->cache);
	while (error == 0 && !cache_is_stable(engine->cache, sequence)) {
		if (now_ms() >= until_ms)
			error = -EAGAIN;
		else if (!wait_for_nas_until(engine, since_ms, until_ms))
			error = -EIO;
	}
	engine->waiting_for_stable--;
	engine_unlock(engine);
	return error == 0 ? result_of(engine) : error;
}

int end_write_backs(struct engine *engine, uint64_t until_ms)
{
	uint64_t since_ms = now_ms();
	int error = 0;

	engine_lock(engine);
	while (error == 0 && cache_unstable_count(engine->cache) > 0) {
		if (now_ms() >= until_ms)
			error = -EAGAIN;
		else if (!wait_for_nas_until(engine, since_ms, until_ms))
			error = -EIO;
	}
	engine_unlock(engine);
	return error;
}

int engine_flush(struct engine *engine)
{
	uint64_t since_ms = now_ms();
	_Atomic uint64_t *place = request_began(engine, since_ms);
	int error;

	count(&counters(engine)->flushes, 1);
	error = flush_until(engine, since_ms, NO_END);
	request_ended(place);
	return error;
}

int engine_finish_flush(struct engine *engine, struct engine_request *request)
{
	count(&counters(engine)->flushes, 1);
	return flush_until(engine, request->started_us / 1000, NO_END);
}

int engine_trim(struct engine *engine, uint64_t offset_bytes, uint64_t length_bytes)
{
	uint64_t page = offset_bytes / SLOT_BYTES, end = page + length_bytes / SLOT_BYTES;
	int error = check_range(engine, offset_bytes, length_bytes);

	count(&counters(engine)->trims, 1);
	while (error == 0 && page < end) {
		uint64_t now = page + TRIM_PAGES < end ? page + TRIM_PAGES : end;

		engine_lock(engine);
		while (page < now)
			cache_trim(engine->cache, page++);
		note_unstable(engine);
		engine_unlock(engine);
	}
	return error;
}
