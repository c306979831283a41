/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Write-backs and COMMITs, until the NAS has stably what was written, and the pauses after a refusal.
 *
 * The flusher's thread starts write-backs. As long as there is more to write, the completion of one starts the next, in
 * nfsio's thread, without waking the flusher.
 */
#include "block/internal.h"

#include "base/log.h"
#include "base/thread.h"

#include <errno.h>
#include <string.h>

/*
 * A page that is not written again goes to the NAS after one to two of these, although the region has room: it should
 * be empty when memory gets short. With a tenth of that, a machine that swaps fifty pages a second found no
 * neighbours for them (13 KiB for each NFS write).
 */
#define AGE_LIMIT_MS 5000
/* The pauses before what the server refused (ENOSPC, EIO, ...) is tried again. */
#define REFUSED_PAUSE_MS 500
#define REFUSED_PAUSE_LIMIT_MS 4000
/*
 * A write that was sent again on a new connection may have a twin: the old request may still lie in the server's
 * queue, and be carried out after the new one. Until the twin must be done, the server gets no other bytes for those
 * pages. See docs/decisions/0011.
 */
#define TWIN_MS 5000
/* The same for requests that the last worker may have had in flight. */
#define REPLAY_MS 1000
/*
 * A server that changes its verifier with each answer (two servers behind one address; one that restarts all the time)
 * never confirms an UNSTABLE write: after so many COMMITs in vain, one after the other, all writes are FILE_SYNC for a
 * time, which needs no verifier.
 */
#define COMMITS_IN_VAIN 4
#define DISTRUST_MS 60000
/* How often the flusher checks whether holds are over. */
#define HOLD_TICK_MS 250

/*
 * The server has refused these pages, or a COMMIT. They are held for a pause that grows, while others may go: a full
 * server still overwrites blocks that it has. Logged once, until everything that was refused is written or the server
 * refuses for another reason. Lock held.
 */
static void note_refusal(struct engine *engine, int error, uint64_t first_page, uint64_t count_pages)
{
	struct region_counters *c = counters(engine);
	uint64_t now = now_ms();

	assert_locked(&engine->lock);
	if (atomic_load(&engine->stolen))
		return;
	if (now >= engine->refused_until_ms) {
		uint64_t pause_ms = engine->refused_pause_ms * 2;

		if (pause_ms < REFUSED_PAUSE_MS)
			pause_ms = REFUSED_PAUSE_MS;
		engine->refused_pause_ms = pause_ms < REFUSED_PAUSE_LIMIT_MS ? pause_ms : REFUSED_PAUSE_LIMIT_MS;
		engine->refused_until_ms = now + engine->refused_pause_ms;
	}
	cache_hold(engine->cache, first_page, count_pages, engine->refused_until_ms);
	count(&c->write_errors, 1);
	engine->refused_sequence = cache_sequence(engine->cache);
	if (atomic_load_explicit(&c->write_back_error, memory_order_relaxed) == (uint64_t)-error)
		return;
	set_counter(&c->write_back_error, (uint64_t)-error);
	log_line("the server refuses to write (%s): %u pages wait in memory, trying again", strerror(-error),
		 cache_unstable_count(engine->cache));
}

/* The server has taken a write or a COMMIT. The refusal ends when all that it covers is written. Lock held. */
static void note_success(struct engine *engine)
{
	struct region_counters *c = counters(engine);

	assert_locked(&engine->lock);
	engine->progress_at_ms = now_ms();
	if (atomic_load_explicit(&c->write_back_error, memory_order_relaxed) == 0 ||
	    !cache_is_stable(engine->cache, engine->refused_sequence))
		return;
	engine->refused_pause_ms = engine->commit_refused_until_ms = 0;
	set_counter(&c->write_back_error, 0);
	log_line("the server writes again");
}

static void keep_flushing(struct engine *engine, bool changed);

static void write_back_done(struct nfsio_req *req)
{
	struct write_back *write_back = (struct write_back *)req;
	struct engine *engine = write_back->engine;
	int error = req->error != 0 ? req->error : req->moved_bytes != req->length_bytes ? -EIO : 0;

	count_duration(counters(engine)->nfs_write_us, now_us() - write_back->started_us);
	engine_lock(engine);
	if (error != 0)
		cache_page_run_failed(engine->cache, &write_back->pages);
	else if (req->stable)
		cache_page_run_stable(engine->cache, &write_back->pages);
	else
		cache_page_run_uncommitted(engine->cache, &write_back->pages, req->verifier);
	if (req->resent) {
		uint64_t until_ms = now_ms() + TWIN_MS;

		cache_hold(engine->cache, write_back->pages.first_page, write_back->pages.count, until_ms);
		engine->held_until_ms = until_ms;
	}
	assert(write_back->busy && engine->write_backs_busy > 0);
	write_back->busy = false;
	engine->write_backs_busy--;
	if (write_back->pages_max > SHORT_RUN_PAGES) {
		assert(engine->spare_count < LONG_BUFFERS);
		engine->spare[engine->spare_count++] = write_back->data;
	}
	count(&counters(engine)->nfs_in_flight, (uint64_t)-1);
	engine->lacks_file_sync |= error == -EPROTO && req->op == NFSIO_WRITE;
	if (error == 0)
		note_success(engine);
	else if (error != -ECANCELED)
		note_refusal(engine, error, write_back->pages.first_page, write_back->pages.count);
	note_unstable(engine);
	file_look_locked(engine);
	keep_flushing(engine, error != 0 || req->resent);
	engine_unlock(engine);
}

/* A COMMIT has ended, and the server may have lost some of the pages that were written before it. Lock held. */
static void note_committed(struct engine *engine, uint32_t lost_pages)
{
	assert_locked(&engine->lock);
	if (lost_pages == 0) {
		engine->commits_in_vain = 0;
		return;
	}
	count(&counters(engine)->lost_uncommitted_pages, lost_pages);
	log_line("the server restarted: writing %u pages again that it had not committed", lost_pages);
	if (++engine->commits_in_vain < COMMITS_IN_VAIN)
		return;
	engine->commits_in_vain = 0;
	engine->distrust_until_ms = now_ms() + DISTRUST_MS;
	log_line("the server's write verifier was another one %d times in a row: writing with FILE_SYNC for %d s",
		 COMMITS_IN_VAIN, DISTRUST_MS / 1000);
}

static void commit_done(struct nfsio_req *req)
{
	struct engine *engine = req->context;

	engine_lock(engine);
	assert(engine->committing);
	if (req->error != 0) {
		cache_commit_failed(engine->cache);
	} else {
		note_committed(engine, cache_commit_done(engine->cache, req->verifier));
	}
	engine->committing = false;
	if (req->error == 0) {
		note_success(engine);
	} else if (req->error != -ECANCELED) {
		note_refusal(engine, req->error, 0, engine->region.page_count);
		engine->commit_refused_until_ms = engine->refused_until_ms;
	}
	note_unstable(engine);
	keep_flushing(engine, req->error != 0);
	engine_unlock(engine);
}

/* Is there a reason to write back now, rather than to wait for neighbours? Lock held. */
static bool wants_write_back(const struct engine *engine)
{
	uint64_t oldest = cache_oldest_dirty(engine->cache);

	if (oldest == 0)
		return false;
	return engine->waiting_for_stable > 0 || engine->waiting_for_slot > 0 || engine->stop ||
	       is_half_full(engine) || oldest <= engine->aged_sequence;
}

/* Is there a reason to send a COMMIT now? Lock held. */
static bool wants_commit(const struct engine *engine)
{
	uint32_t uncommitted = cache_uncommitted_count(engine->cache);

	if (uncommitted == 0 || engine->committing || now_ms() < engine->commit_refused_until_ms)
		return false;
	/* one COMMIT for many writes: while more are coming, it waits for a good number of pages */
	if (uncommitted >= engine->region.slot_count / 4)
		return true;
	/* pages that are held are not waited for */
	if (engine->waiting_for_stable > 0 || engine->waiting_for_slot > 0)
		return cache_oldest_dirty(engine->cache) == 0;
	return cache_unstable_count(engine->cache) == uncommitted;
}

/* A free one that takes all of the page run that is next; NULL when there is none. Lock held. */
static struct write_back *free_write_back(struct engine *engine)
{
	uint32_t pages = cache_next_page_run(engine->cache, pages_at_once(engine, RUN_PAGES_MAX));
	struct write_back *fits = NULL;

	for (unsigned i = 0; i < WRITE_BACKS; i++) {
		struct write_back *write_back = &engine->write_backs[i];
		bool is_short = write_back->pages_max == SHORT_RUN_PAGES;

		if (!write_back->busy && write_back->pages_max >= pages && (is_short || engine->spare_count > 0))
			fits = write_back; /* the last: a short one, where one will do */
	}
	return fits;
}

/*
 * A FLUSH must end although its pages are written again and again: a page that was overtaken is written FILE_SYNC, so
 * that what is under way counts whether it is overtaken again or not. Lock held.
 */
static bool must_be_stable(const struct engine *engine, const struct page_run *pages)
{
	/* where FILE_SYNC is not to be had, the refusal has a pause, and rewriting at once would have none */
	return engine->options.stable_writes || now_ms() < engine->distrust_until_ms ||
	       (pages->is_overtaken && engine->waiting_for_stable > 0 && !engine->lacks_file_sync);
}

/* Start one write-back. Lock held; dropped while it is submitted. */
static void start_write_back(struct engine *engine, struct write_back *write_back)
{
	assert(!write_back->busy && engine->write_backs_busy < WRITE_BACKS);
	if (write_back->pages_max > SHORT_RUN_PAGES) {
		assert(engine->spare_count > 0);
		write_back->data = engine->spare[--engine->spare_count];
	}
	cache_take_page_run(engine->cache, pages_at_once(engine, write_back->pages_max), &write_back->pages,
			    write_back->data);
	write_back->busy = true;
	engine->write_backs_busy++;
	write_back->started_us = now_us();
	write_back->req = (struct nfsio_req){
		.op = must_be_stable(engine, &write_back->pages) ? NFSIO_WRITE : NFSIO_WRITE_UNSTABLE,
		.offset_bytes = write_back->pages.first_page * SLOT_BYTES,
		.length_bytes = write_back->pages.count * SLOT_BYTES,
		.data = write_back->data,
		.done = write_back_done,
	};
	count(&counters(engine)->nfs_writes, 1);
	count(&counters(engine)->nfs_written_bytes, write_back->req.length_bytes);
	count(&counters(engine)->nfs_in_flight, 1);
	engine_unlock(engine);
	for (uint32_t i = 0; i < write_back->pages.count; i++)
		proof_seal(&engine->region, write_back->pages.first_page + i, write_back->pages.proofs[i],
			   write_back->data + (size_t)i * SLOT_BYTES);
	nfsio_submit(engine->ios[0], &write_back->req);
	engine_lock(engine);
}

/* Send a COMMIT. Lock held; dropped while it is submitted. */
static void commit(struct engine *engine)
{
	assert(!engine->committing);
	cache_commit_begin(engine->cache);
	engine->committing = true;
	engine->commit = (struct nfsio_req){ .op = NFSIO_COMMIT, .done = commit_done, .context = engine };
	count(&counters(engine)->nfs_commits, 1);
	engine_unlock(engine);
	nfsio_submit(engine->ios[0], &engine->commit);
	engine_lock(engine);
}

/*
 * Start one write-back or COMMIT, if there is a reason to. Returns whether it did. Lock held; dropped while a request
 * is submitted.
 */
static bool flush_step(struct engine *engine)
{
	struct write_back *write_back;

	if (engine->abandon || atomic_load(&engine->stolen))
		return false;
	if (wants_write_back(engine)) {
		write_back = free_write_back(engine);
		engine->starved = write_back == NULL && engine->write_backs_busy > 0;
		if (write_back != NULL) {
			start_write_back(engine, write_back);
			return true;
		}
	}
	if (!wants_commit(engine))
		return false;
	commit(engine);
	return true;
}

void flusher_call(struct engine *engine)
{
	if (!engine->starved)
		pthread_cond_signal(&engine->work);
}

/*
 * A write-back or COMMIT has ended: start what is next. The flusher is woken where a time limit matters: for pages that
 * grow old, after a refusal (`changed`), and for the end. Lock held; dropped while requests are submitted.
 */
static void keep_flushing(struct engine *engine, bool changed)
{
	engine->starved = false;
	while (flush_step(engine))
		;
	if (changed || engine->stop || (engine->flusher_rests && cache_dirty_count(engine->cache) > 0))
		pthread_cond_signal(&engine->work);
}

/*
 * What the last worker had in flight may reach the server after what this one sends, and so may twins of what the last
 * worker sent again. That counts for every page, not only for those that are dirty now: one that was trimmed, or is
 * clean, may be written at once.
 */
void flusher_hold_replay(struct engine *engine)
{
	uint64_t now = now_ms(), until_ms = now + REPLAY_MS;
	uint64_t twins_ms = atomic_load(&counters(engine)->twins_until_ms);

	if (atomic_load(&engine->region.header->generation) > 1) {
		if (twins_ms == NFSIO_TWINS_UNDER_WAY)
			until_ms = now + TWIN_MS;
		else if (twins_ms > until_ms && twins_ms <= now + TWIN_MS)
			until_ms = twins_ms;
		engine->held_until_ms = until_ms;
		cache_hold(engine->cache, 0, engine->region.page_count, until_ms);
		set_counter(&counters(engine)->twins_until_ms, until_ms);
	}
	nfsio_note_twins(engine->ios[0], &counters(engine)->twins_until_ms, TWIN_MS);
}

void *flusher_thread(void *arg)
{
	struct engine *engine = arg;
	uint64_t young_sequence, young_at_ms; /* the newest write at that time */

	touch_stack();
	engine_lock(engine);
	young_sequence = engine->aged_sequence;
	young_at_ms = now_ms();
	for (;;) {
		bool are_held = cache_end_holds(engine->cache, now_ms());
		uint64_t now;

		if (engine->stop &&
		    (engine->abandon || atomic_load(&engine->stolen) || cache_unstable_count(engine->cache) == 0))
			break;
		if (flush_step(engine))
			continue;
		now = now_ms();
		if (now - young_at_ms >= AGE_LIMIT_MS) {
			engine->aged_sequence = young_sequence;
			young_sequence = cache_sequence(engine->cache);
			young_at_ms = now;
		} else if (cache_unstable_count(engine->cache) == 0 || atomic_load(&engine->stolen)) {
			engine->flusher_rests = true;
			engine_wait_for_work(engine, NO_END); /* there is nothing to do: a write calls it */
			engine->flusher_rests = false;
		} else {
			uint64_t end_ms = young_at_ms + AGE_LIMIT_MS;

			if (are_held && end_ms > now + HOLD_TICK_MS)
				end_ms = now + HOLD_TICK_MS;
			engine_wait_for_work(engine, end_ms);
		}
	}
	engine_unlock(engine);
	return NULL;
}
