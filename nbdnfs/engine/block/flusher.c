/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Write-backs and COMMITs, until the NAS has for good what was written, and the pauses when it refuses.
 *
 * The flusher starts write-backs; as long as there is more to write, each that is done starts the next one from nfsio's
 * thread, without a detour over the flusher's.
 */
#include "block/internal.h"

#include "base/log.h"
#include "base/thread.h"

#include <errno.h>
#include <string.h>

/*
 * A page that nobody rewrites goes to the NAS after one to two of these, also when there is room for more. Swap is not
 * there for later: what counts is that the region is empty when much comes at once. With a tenth of that, a machine that
 * swaps fifty pages a second found no neighbours for them (13 KiB for each NFS write).
 */
#define AGE_LIMIT_MS 5000
/* What the server refuses (ENOSPC, EIO, ...) is tried again, but not at full speed: these are the pauses. */
#define REFUSED_PAUSE_MS 500
#define REFUSED_PAUSE_LIMIT_MS 4000
/*
 * A write that was repeated on a new connection may still lie in the server's queue of the old one, and be done
 * after its repetition. Until it must have been, the server gets no other bytes for those pages. See
 * docs/decisions/0011.
 */
#define TWIN_MS 5000
/* The same for what a worker before this one may have had under way. */
#define REPLAY_MS 1000
/* How often the flusher looks whether pages may travel again. */
#define HOLD_TICK_MS 250

/* ------------------------------------------------------------------ write-back: completions, no lock --- */

/*
 * It refuses these pages, or a commit. They are held back for a pause that grows, while others may go: a full server
 * still takes what has its blocks. Said once, however often, until all that it refused is written or it refuses for
 * another reason. Lock held.
 */
static void note_refusal(struct engine *engine, int error, uint64_t first_page, uint64_t count_pages)
{
	struct region_counters *c = counters(engine);
	uint64_t now = now_ms();

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

/* It has taken something. That one page went through does not say that it takes all again. Lock held. */
static void note_success(struct engine *engine)
{
	struct region_counters *c = counters(engine);

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
	pthread_mutex_lock(&engine->lock);
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
		set_counter(&counters(engine)->twins_until_ms, until_ms); /* for a worker after this one */
	}
	write_back->busy = false;
	engine->write_backs_busy--;
	if (write_back->pages_max > SHORT_RUN_PAGES)
		engine->spare[engine->spare_count++] = write_back->data;
	count(&counters(engine)->nfs_in_flight, (uint64_t)-1);
	if (error == 0)
		note_success(engine);
	else if (error != -ECANCELED)
		note_refusal(engine, error, write_back->pages.first_page, write_back->pages.count);
	note_unstable(engine);
	file_look_locked(engine);
	if (error != 0 || req->stable) /* else nobody gains anything before the COMMIT */
		pthread_cond_broadcast(&engine->progress);
	keep_flushing(engine, error != 0 || req->resent);
	pthread_mutex_unlock(&engine->lock);
}

static void commit_done(struct nfsio_req *req)
{
	struct engine *engine = req->context;

	pthread_mutex_lock(&engine->lock);
	if (req->error != 0) {
		cache_commit_failed(engine->cache);
	} else {
		uint32_t lost = cache_commit_done(engine->cache, req->verifier);

		count(&counters(engine)->lost_uncommitted_pages, lost);
		if (lost > 0)
			log_line("the server has restarted: writing %u pages again that it had not on disk", lost);
	}
	engine->committing = false;
	if (req->error == 0) {
		note_success(engine);
	} else if (req->error != -ECANCELED) {
		note_refusal(engine, req->error, 0, engine->region.page_count);
		engine->commit_refused_until_ms = engine->refused_until_ms;
	}
	note_unstable(engine);
	pthread_cond_broadcast(&engine->progress);
	keep_flushing(engine, req->error != 0);
	pthread_mutex_unlock(&engine->lock);
}

/* ------------------------------------------------------------------ the flusher ------------------------ */

/* Is there a reason to write back now, rather than to wait for neighbours? Lock held. */
static bool wants_write_back(const struct engine *engine)
{
	uint64_t oldest = cache_oldest_dirty(engine->cache);

	if (oldest == 0)
		return false;
	return engine->waiting_for_stable > 0 || engine->waiting_for_slot > 0 || engine->stop ||
	       is_half_full(engine) || oldest <= engine->aged_sequence;
}

/* Is there a reason to make the server keep what it has, now? Lock held. */
static bool wants_commit(const struct engine *engine)
{
	uint32_t uncommitted = cache_uncommitted_count(engine->cache);

	if (uncommitted == 0 || engine->committing || now_ms() < engine->commit_refused_until_ms)
		return false;
	/* one commit for many writes: while more are coming, it waits for a good number of pages */
	if (uncommitted >= engine->region.slot_count / 4)
		return true;
	/* what is held back is not waited for */
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

/* Start one write-back. Lock held, dropped meanwhile. */
static void start_write_back(struct engine *engine, struct write_back *write_back)
{
	if (write_back->pages_max > SHORT_RUN_PAGES)
		write_back->data = engine->spare[--engine->spare_count];
	cache_take_page_run(engine->cache, pages_at_once(engine, write_back->pages_max), &write_back->pages,
			    write_back->data);
	write_back->busy = true;
	engine->write_backs_busy++;
	write_back->started_us = now_us();
	write_back->req = (struct nfsio_req){
		.op = engine->options.stable_writes ? NFSIO_WRITE : NFSIO_WRITE_UNSTABLE,
		.offset_bytes = write_back->pages.first_page * PAGE_BYTES,
		.length_bytes = write_back->pages.count * PAGE_BYTES,
		.data = write_back->data,
		.done = write_back_done,
	};
	count(&counters(engine)->nfs_writes, 1);
	count(&counters(engine)->nfs_written_bytes, write_back->req.length_bytes);
	count(&counters(engine)->nfs_in_flight, 1);
	pthread_mutex_unlock(&engine->lock);
	nfsio_submit(engine->ios[0], &write_back->req);
	pthread_mutex_lock(&engine->lock);
}

/* Lock held, dropped meanwhile. */
static void commit(struct engine *engine)
{
	cache_commit_begin(engine->cache);
	engine->committing = true;
	engine->commit = (struct nfsio_req){ .op = NFSIO_COMMIT, .done = commit_done, .context = engine };
	count(&counters(engine)->nfs_commits, 1);
	pthread_mutex_unlock(&engine->lock);
	nfsio_submit(engine->ios[0], &engine->commit);
	pthread_mutex_lock(&engine->lock);
}

/* Wait for `work`, at most `ms`. Lock held, dropped meanwhile. */
static void wait_for_work(struct engine *engine, uint64_t ms)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += (time_t)(ms / 1000);
	until.tv_nsec += (long)(ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_nsec -= 1000000000;
		until.tv_sec++;
	}
	pthread_cond_timedwait(&engine->work, &engine->lock, &until);
}

/* Start one write-back or COMMIT, if there is reason to. Lock held, dropped meanwhile. */
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
 * A write-back or COMMIT is done: start what is next. The flusher is called where it has to look at the clock: for
 * pages that grow old, for a server that has refused one (`changed`), and for the end. Lock held, dropped meanwhile.
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
 * What a worker before this one had under way may arrive after what is sent now, and so may what that one had sent
 * twice.
 */
void flusher_hold_replay(struct engine *engine)
{
	uint64_t now = now_ms(), until_ms = now + REPLAY_MS;
	uint64_t twins_ms = atomic_load_explicit(&counters(engine)->twins_until_ms, memory_order_relaxed);

	if (twins_ms > until_ms && twins_ms <= now + TWIN_MS)
		until_ms = twins_ms;
	if (cache_dirty_count(engine->cache) > 0) {
		engine->held_until_ms = until_ms;
		cache_hold(engine->cache, 0, engine->region.page_count, until_ms);
	}
}

void *flusher_thread(void *arg)
{
	struct engine *engine = arg;
	uint64_t young_sequence, young_at_ms; /* what was written up to it was there then */

	touch_stack();
	pthread_mutex_lock(&engine->lock);
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
			pthread_cond_wait(&engine->work, &engine->lock);
			engine->flusher_rests = false;
		} else {
			uint64_t left_ms = young_at_ms + AGE_LIMIT_MS - now;

			wait_for_work(engine, are_held && left_ms > HOLD_TICK_MS ? HOLD_TICK_MS : left_ms);
		}
	}
	pthread_mutex_unlock(&engine->lock);
	return NULL;
}
