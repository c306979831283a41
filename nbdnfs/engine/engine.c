/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Requests, the flusher and read-ahead, over one cache. See engine.h for what is promised.
 *
 * The flusher starts write-backs; as long as there is more to write, each that is done starts the next one from nfsio's
 * thread, without a detour over the flusher's.
 *
 * Locks: engine->lock guards the cache, the streams and all that struct engine says it does. It is never held
 * over a call of nfsio, but for nfsio_state(): completions take it. They run in nfsio's thread, without any lock
 * of its own.
 */
#include "engine.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cache.h"
#include "crc32c.h"
#include "log.h"
#include "streams.h"
#include "thread.h"

/* Pages of a request that are looked up, checksummed and fetched in one go. */
#define BATCH_PAGES 64
/*
 * Write-backs and read-aheads under way at once, and what one of each moves at most. Short runs are for pages that
 * lie alone: a server that is a millisecond away takes many of them in the time of one. They take no more than lies
 * together anyway; what is longer waits for a long one rather than being cut to pieces.
 */
#define LONG_RUNS 8
#define SHORT_RUNS 8
#define SHORT_RUN_PAGES 4
#define FETCHES 4
#define FETCH_PAGES RUN_PAGES_MAX
/* Buffers of RUN_PAGES_MAX pages, for long runs and for fetches: few of the one are under way beside many of the other. */
#define LONG_BUFFERS 10

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
/* A page whose checksum is wrong is read so often before it is given up. */
#define CHECKSUM_TRIES 3

/* A write-back under way, or a place for one. */
struct run {
	struct nfsio_req req;   /* first: its owner is found from it */
	struct engine *engine;
	struct cache_run pages;
	uint8_t *data;          /* pages_max pages; a long run has them while it is busy */
	uint32_t pages_max;
	uint64_t started_us;
	bool busy;              /* guarded by engine->lock */
};

/* A read-ahead under way, or a place for one. */
struct fetch {
	struct nfsio_req req;
	struct engine *engine;
	uint64_t first_page;
	uint64_t number;
	uint32_t count;
	uint8_t *data;          /* FETCH_PAGES pages, while it is busy */
	uint64_t started_us;
	bool busy;              /* guarded by engine->lock */
};

struct engine {
	/* constant after engine_create() */
	struct engine_options options;
	/*
	 * The first is for write-backs, read-ahead, and reads that find no other idle. Each of the others is lent to one
	 * reader at a time, who receives his answer himself (nfsio_transfer.c): nobody has to be woken to hand it to him.
	 */
	struct nfsio *ios[ENGINE_CONNECTIONS_MAX];
	unsigned io_count;
	struct region region;
	uint64_t size_bytes;
	uint64_t reconnects_before; /* of workers before this one */
	uint32_t piece_bytes;
	bool own_region;
	uint8_t *buffers;       /* of the runs and fetches, and the samples */
	uint8_t *samples;       /* a page for each connection's thread */
	pthread_t flusher;
	struct owner *owner;    /* NULL: nobody asked for one */

	atomic_bool stolen;     /* somebody else has the file: nothing works any more; set once, under `lock` */

	pthread_mutex_t lock;   /* guards everything below, and the cache */
	pthread_cond_t work;    /* the flusher has something to do */
	pthread_cond_t progress; /* slots became clean or free, a fetch ended, or the file or the way to it changed */
	struct cache *cache;
	struct streams streams;
	struct run runs[LONG_RUNS + SHORT_RUNS]; /* the long ones first */
	uint8_t *spare[LONG_BUFFERS]; /* that nobody has */
	unsigned spare_count;
	unsigned runs_busy;
	struct fetch fetches[FETCHES];
	struct nfsio_req commit;
	bool committing;
	bool starved;           /* a run is wanted and none is free: the next one that is done goes on, by itself */
	bool flusher_rests;     /* until it is called */
	bool stop;              /* the flusher is to end, once the NAS has all or `abandon` is set */
	bool abandon;
	uint32_t waiting_for_stable; /* requests that wait for the NAS */
	uint32_t waiting_for_slot;
	bool lent[ENGINE_CONNECTIONS_MAX]; /* ios that have their reader */
	uint64_t fetch_number;
	uint64_t aged_sequence; /* what was written up to it is old enough to go */
	uint64_t refused_until_ms; /* what the server refuses is held back until then, and no commit before the other */
	uint64_t commit_refused_until_ms;
	uint64_t refused_pause_ms;
	uint64_t refused_sequence; /* what had been written when it refused last */
	uint64_t progress_at_ms; /* when the NAS last took something */
	uint64_t held_until_ms; /* until when pages are held back from it */
	bool lost;              /* the file is gone, and waiting for it is an error */
};

static uint64_t now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000 + (uint64_t)ts.tv_nsec / 1000;
}

static uint64_t now_ms(void)
{
	return now_us() / 1000;
}

static struct region_counters *counters(struct engine *engine)
{
	return &engine->region.header->counters;
}

/* How much of the file has always been there; UINT64_MAX: all of it. */
static uint64_t cut_bytes(const struct engine *engine)
{
	uint64_t least = UINT64_MAX;

	for (unsigned i = 0; i < engine->io_count; i++)
		if (nfsio_cut_bytes(engine->ios[i]) < least)
			least = nfsio_cut_bytes(engine->ios[i]);
	return least;
}

static bool is_unlinked(const struct engine *engine)
{
	for (unsigned i = 0; i < engine->io_count; i++)
		if (nfsio_is_unlinked(engine->ios[i]))
			return true;
	return false;
}

/* As far as answers have told. */
static enum region_file file_state(const struct engine *engine)
{
	if (is_unlinked(engine))
		return REGION_FILE_REMOVED;
	return cut_bytes(engine) < UINT64_MAX ? REGION_FILE_CUT : REGION_FILE_THERE;
}

/* A server that answers has another file now, or a shorter one. Lock held. */
static void note_file(struct engine *engine, enum region_file state)
{
	_Atomic uint64_t *counter = &counters(engine)->file_state;

	if (atomic_load_explicit(counter, memory_order_relaxed) == state)
		return;
	set_counter(counter, state);
	if (state == REGION_FILE_CUT)
		log_line("the file has been cut to %llu bytes: what lay behind that is lost, and reading it is an error",
			 (unsigned long long)cut_bytes(engine));
	else if (state == REGION_FILE_REMOVED && is_unlinked(engine))
		log_line("the file has been removed; the server serves it as long as it has it open: end its use now");
}

/* Lock held. */
static void look_at_file_locked(struct engine *engine)
{
	enum region_file state = file_state(engine);

	/* what the connections' threads have found out by name says more */
	if (state != REGION_FILE_THERE &&
	    atomic_load_explicit(&counters(engine)->file_state, memory_order_relaxed) == REGION_FILE_THERE)
		note_file(engine, state);
}

/* Some answer may have told that the file is shorter than it was, or has lost its name. */
static void look_at_file(struct engine *engine)
{
	if (file_state(engine) == REGION_FILE_THERE)
		return;
	pthread_mutex_lock(&engine->lock);
	look_at_file_locked(engine);
	pthread_mutex_unlock(&engine->lock);
}

/* ------------------------------------------------------------------ write-back: completions, no lock --- */

/* Lock held. */
static void note_unstable(struct engine *engine)
{
	set_counter(&counters(engine)->unstable_pages, cache_unstable_count(engine->cache));
}

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

static void run_done(struct nfsio_req *req)
{
	struct run *run = (struct run *)req;
	struct engine *engine = run->engine;
	int error = req->error != 0 ? req->error : req->moved_bytes != req->length_bytes ? -EIO : 0;

	count_duration(counters(engine)->nfs_write_us, now_us() - run->started_us);
	pthread_mutex_lock(&engine->lock);
	if (error != 0)
		cache_run_failed(engine->cache, &run->pages);
	else if (req->stable)
		cache_run_stable(engine->cache, &run->pages);
	else
		cache_run_uncommitted(engine->cache, &run->pages, req->verifier);
	if (req->resent) {
		uint64_t until_ms = now_ms() + TWIN_MS;

		cache_hold(engine->cache, run->pages.first_page, run->pages.count, until_ms);
		engine->held_until_ms = until_ms;
		set_counter(&counters(engine)->twins_until_ms, until_ms); /* for a worker after this one */
	}
	run->busy = false;
	engine->runs_busy--;
	if (run->pages_max > SHORT_RUN_PAGES)
		engine->spare[engine->spare_count++] = run->data;
	count(&counters(engine)->nfs_in_flight, (uint64_t)-1);
	if (error == 0)
		note_success(engine);
	else if (error != -ECANCELED)
		note_refusal(engine, error, run->pages.first_page, run->pages.count);
	note_unstable(engine);
	look_at_file_locked(engine);
	if (error != 0 || req->stable) /* else nobody gains anything before the COMMIT */
		pthread_cond_broadcast(&engine->progress);
	keep_flushing(engine, error != 0 || req->resent);
	pthread_mutex_unlock(&engine->lock);
}

static void commit_done(struct nfsio_req *req)
{
	struct engine *engine = req->owner;

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

/* Of what must still travel; what only waits for a COMMIT has a limit of its own. Lock held. */
static bool is_half_full(const struct engine *engine)
{
	return cache_unstable_count(engine->cache) - cache_uncommitted_count(engine->cache) >=
	       engine->region.slot_count / 2;
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

/* No more than the server moves in one READ or WRITE; of a very small one the transport makes several. */
static uint32_t pages_at_once(const struct engine *engine, uint32_t wanted)
{
	uint32_t most = engine->piece_bytes / PAGE_BYTES;

	return wanted <= most ? wanted : most > 0 ? most : 1;
}

/* One for the run that is next; NULL when none is free that takes all of it. Lock held. */
static struct run *free_run(struct engine *engine)
{
	uint32_t pages = cache_next_run(engine->cache, pages_at_once(engine, RUN_PAGES_MAX));
	struct run *fits = NULL;

	for (struct run *run = engine->runs; run < engine->runs + LONG_RUNS + SHORT_RUNS; run++) {
		bool is_short = run->pages_max == SHORT_RUN_PAGES;

		if (!run->busy && run->pages_max >= pages && (is_short || engine->spare_count > 0))
			fits = run; /* the last: a short one, where one will do */
	}
	return fits;
}

/* Start one write-back. Lock held, dropped meanwhile. */
static void write_back(struct engine *engine, struct run *run)
{
	if (run->pages_max > SHORT_RUN_PAGES)
		run->data = engine->spare[--engine->spare_count];
	cache_take_run(engine->cache, &run->pages, pages_at_once(engine, run->pages_max), run->data);
	run->busy = true;
	engine->runs_busy++;
	run->started_us = now_us();
	run->req = (struct nfsio_req){
		.op = engine->options.stable_writes ? NFSIO_WRITE : NFSIO_WRITE_UNSTABLE,
		.offset_bytes = run->pages.first_page * PAGE_BYTES,
		.length_bytes = run->pages.count * PAGE_BYTES,
		.data = run->data,
		.done = run_done,
	};
	count(&counters(engine)->nfs_writes, 1);
	count(&counters(engine)->nfs_written_bytes, run->req.length_bytes);
	count(&counters(engine)->nfs_in_flight, 1);
	pthread_mutex_unlock(&engine->lock);
	nfsio_submit(engine->ios[0], &run->req);
	pthread_mutex_lock(&engine->lock);
}

/* Lock held, dropped meanwhile. */
static void commit(struct engine *engine)
{
	cache_commit_begin(engine->cache);
	engine->committing = true;
	engine->commit = (struct nfsio_req){ .op = NFSIO_COMMIT, .done = commit_done, .owner = engine };
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
	struct run *run;

	if (engine->abandon || atomic_load(&engine->stolen))
		return false;
	if (wants_write_back(engine)) {
		run = free_run(engine);
		engine->starved = run == NULL && engine->runs_busy > 0;
		if (run != NULL) {
			write_back(engine, run);
			return true;
		}
	}
	if (!wants_commit(engine))
		return false;
	commit(engine);
	return true;
}

/* There is something to do, unless all runs are under way. Lock held. */
static void call_flusher(struct engine *engine)
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

static void *flusher_thread(void *arg)
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

/* ------------------------------------------------------------------ read-ahead ------------------------- */

static void fetch_done(struct nfsio_req *req)
{
	struct fetch *fetch = (struct fetch *)req;
	struct engine *engine = fetch->engine;
	bool ok = req->error == 0 && req->moved_bytes == req->length_bytes &&
		  req->offset_bytes + req->length_bytes <= cut_bytes(engine);
	uint32_t crcs[FETCH_PAGES];

	count_duration(counters(engine)->nfs_read_us, now_us() - fetch->started_us);
	for (uint32_t i = 0; ok && i < fetch->count; i++)
		crcs[i] = crc32c(fetch->data + (size_t)i * PAGE_BYTES, PAGE_BYTES);
	pthread_mutex_lock(&engine->lock);
	cache_fetch_done(engine->cache, fetch->first_page, fetch->count, fetch->number, ok ? fetch->data : NULL, crcs);
	fetch->busy = false;
	engine->spare[engine->spare_count++] = fetch->data;
	count(&counters(engine)->nfs_in_flight, (uint64_t)-1);
	pthread_cond_broadcast(&engine->progress);
	pthread_mutex_unlock(&engine->lock);
}

static struct fetch *free_fetch(struct engine *engine)
{
	for (struct fetch *fetch = engine->fetches; fetch < engine->fetches + FETCHES; fetch++)
		if (!fetch->busy)
			return fetch;
	return NULL;
}

/* Fetch pages into slots, as far as there is room for them. Lock held, dropped meanwhile. */
static void fetch_pages(struct engine *engine, uint64_t first_page, uint32_t pages)
{
	while (pages > 0) {
		struct fetch *fetch = free_fetch(engine);
		uint32_t most = pages_at_once(engine, pages < FETCH_PAGES ? pages : FETCH_PAGES);

		/* it must not take the place of pages that writes will need at once */
		if (fetch == NULL || engine->spare_count == 0 ||
		    cache_unstable_count(engine->cache) >= engine->region.slot_count * 3 / 4)
			return;
		fetch->number = ++engine->fetch_number;
		fetch->count = cache_fetch_begin(engine->cache, first_page, most, fetch->number);
		if (fetch->count == 0) {
			first_page++; /* somebody has it: go on behind it */
			pages--;
			continue;
		}
		fetch->busy = true;
		fetch->data = engine->spare[--engine->spare_count];
		fetch->first_page = first_page;
		fetch->started_us = now_us();
		fetch->req = (struct nfsio_req){
			.op = NFSIO_READ,
			.offset_bytes = first_page * PAGE_BYTES,
			.length_bytes = fetch->count * PAGE_BYTES,
			.data = fetch->data,
			.done = fetch_done,
		};
		first_page += fetch->count;
		pages -= fetch->count;
		count(&counters(engine)->read_ahead_pages, fetch->count);
		count(&counters(engine)->nfs_reads, 1);
		count(&counters(engine)->nfs_read_bytes, fetch->req.length_bytes);
		count(&counters(engine)->nfs_in_flight, 1);
		pthread_mutex_unlock(&engine->lock);
		nfsio_submit(engine->ios[0], &fetch->req);
		pthread_mutex_lock(&engine->lock);
	}
}

/* These pages have been asked for: fetch what their walker will want next. */
static void read_ahead(struct engine *engine, uint64_t page, uint32_t pages)
{
	struct prefetch prefetch;
	uint32_t used, wasted;

	pthread_mutex_lock(&engine->lock);
	used = cache_take_used(engine->cache);
	wasted = cache_take_wasted(engine->cache);
	streams_judge(&engine->streams, used, wasted);
	if (streams_note(&engine->streams, page, pages, engine->region.page_count, &prefetch))
		for (uint32_t i = 0; i < prefetch.times; i++)
			fetch_pages(engine, prefetch.first + (uint64_t)(prefetch.step * (int64_t)i), prefetch.count);
	pthread_mutex_unlock(&engine->lock);
	count(&counters(engine)->read_ahead_hits, used);
	count(&counters(engine)->read_ahead_wasted, wasted);
}

/* ------------------------------------------------------------------ requests --------------------------- */

static int check_range(const struct engine *engine, uint64_t offset_bytes, uint64_t length_bytes)
{
	if (offset_bytes % PAGE_BYTES != 0 || length_bytes % PAGE_BYTES != 0 || length_bytes == 0 ||
	    offset_bytes > engine->size_bytes || length_bytes > engine->size_bytes - offset_bytes)
		return -EINVAL;
	return 0;
}

/* What a request returns that is otherwise without error. */
static int result_of(struct engine *engine)
{
	return atomic_load(&engine->stolen) ? -EIO : 0;
}

/* For nfsio to recognise the file by. Called by its threads, without a lock. */
static bool sample_page(void *owner, unsigned number, uint64_t *offset_bytes, uint32_t *crc)
{
	struct engine *engine = owner;
	uint64_t page = 0;
	bool found;

	pthread_mutex_lock(&engine->lock);
	/* from all over the device, and after a page that is wrong not its neighbour */
	found = cache_known_page(engine->cache, number * 0x9e3779b97f4a7c15u % engine->region.page_count, &page, crc);
	pthread_mutex_unlock(&engine->lock);
	*offset_bytes = page * PAGE_BYTES;
	return found;
}

/* What is known of all connections, into the counters. Called by nfsio's threads, without a lock. */
static void link_changed(void *owner)
{
	struct engine *engine = owner;
	enum nfsio_link link = NFSIO_UP;
	uint64_t connects = 0;
	int64_t silent_since_ms = 0;
	bool away = false;

	pthread_mutex_lock(&engine->lock);
	engine->lost = false;
	for (unsigned i = 0; i < engine->io_count; i++) {
		struct nfsio_state state;

		nfsio_state(engine->ios[i], &state);
		connects += state.connects;
		engine->lost |= state.lost;
		away |= state.link == NFSIO_AWAY;
		if (state.link > link)
			link = state.link;
		if (state.silent_since_ms > silent_since_ms)
			silent_since_ms = state.silent_since_ms;
	}
	set_counter(&counters(engine)->disconnected, away);
	set_counter(&counters(engine)->reconnects, engine->reconnects_before + connects - engine->io_count);
	note_file(engine, link == NFSIO_REMOVED	   ? REGION_FILE_REMOVED
			  : link == NFSIO_REPLACED ? REGION_FILE_REPLACED
						   : file_state(engine));
	pthread_cond_broadcast(&engine->progress);
	pthread_mutex_unlock(&engine->lock);
	for (unsigned i = 0; silent_since_ms != 0 && i < engine->io_count; i++)
		nfsio_suspect(engine->ios[i], silent_since_ms);
}

static void watch(struct engine *engine, struct nfsio *io, uint8_t *page)
{
	nfsio_recognise(io, sample_page, engine, page);
	nfsio_watch(io, link_changed, engine);
}

/*
 * Make sure that a page that the NAS answered is what was written to it. What was written since it was asked for
 * is newer, and in a slot or, if that was quick, on the NAS already: asked again then.
 */
static int verify_page(struct engine *engine, uint64_t page, uint8_t *data)
{
	struct region_counters *c = counters(engine);
	uint32_t found = crc32c(data, PAGE_BYTES);

	for (int tries = 0;; tries++) {
		struct nfsio_req req = {
			.op = NFSIO_READ, .offset_bytes = page * PAGE_BYTES, .length_bytes = PAGE_BYTES, .data = data
		};
		enum cache_lookup newer = CACHE_MISS;
		uint32_t wanted;
		int error;

		pthread_mutex_lock(&engine->lock);
		wanted = cache_checksum(engine->cache, page);
		if (wanted != 0 && wanted != found)
			while ((newer = cache_read(engine->cache, page, data)) == CACHE_WAIT)
				pthread_cond_wait(&engine->progress, &engine->lock);
		pthread_mutex_unlock(&engine->lock);
		if (newer == CACHE_HIT || (wanted != 0 && wanted == found))
			return 0;
		if (wanted == 0) /* where the file was cut it has zeros again, which nobody has written */
			return (page + 1) * PAGE_BYTES <= cut_bytes(engine) ? 0 : -EIO;
		if (tries == CHECKSUM_TRIES)
			break;
		count(&c->checksum_rereads, 1);
		error = nfsio_transfer(engine->ios[0], &req);
		if (error != 0)
			return error;
		if (req.moved_bytes != PAGE_BYTES)
			return -EIO;
		found = crc32c(data, PAGE_BYTES);
	}
	count(&c->checksum_failures, 1);
	log_line("page %llu of the backing file is not what was written to it: the server has lost or changed it",
		 (unsigned long long)page);
	return -EIO;
}

/* What the NAS answered to a request of consecutive pages, checked. */
static int verify_request(struct engine *engine, const struct nfsio_req *req)
{
	int error = req->error;

	look_at_file(engine);
	if (error == 0 && req->moved_bytes != req->length_bytes)
		error = -EIO; /* the file ends before the device: it was cut */
	for (uint32_t at = 0; error == 0 && at < req->length_bytes; at += PAGE_BYTES)
		error = verify_page(engine, (req->offset_bytes + at) / PAGE_BYTES, req->data + at);
	return error;
}

/* The number of a connection to read over. Lock held. */
static unsigned lend(struct engine *engine)
{
	for (unsigned i = 1; i < engine->io_count; i++)
		if (!engine->lent[i]) {
			engine->lent[i] = true;
			return i;
		}
	return 0;
}

/*
 * At most BATCH_PAGES pages. What is in no slot comes straight into the request's buffer; a page that is read
 * once is in the reader's memory then, and has no need of a slot.
 */
static int read_batch(struct engine *engine, uint8_t *data, uint64_t page, uint32_t pages)
{
	struct nfsio_req reqs[BATCH_PAGES];
	struct nfsio_batch batch;
	uint64_t started_us;
	uint32_t missed = 0;
	size_t used = 0;
	unsigned io = 0;
	int error = 0;

	pthread_mutex_lock(&engine->lock);
	for (uint32_t i = 0; i < pages; i++) {
		uint8_t *target = data + (size_t)i * PAGE_BYTES;
		struct nfsio_req *last = used > 0 ? &reqs[used - 1] : NULL;
		enum cache_lookup found;

		while ((found = cache_read(engine->cache, page + i, target)) == CACHE_WAIT)
			pthread_cond_wait(&engine->progress, &engine->lock);
		if (found == CACHE_HIT)
			continue;
		missed++;
		if (last != NULL && last->data + last->length_bytes == target &&
		    last->length_bytes + PAGE_BYTES <= engine->piece_bytes)
			last->length_bytes += PAGE_BYTES;
		else
			reqs[used++] = (struct nfsio_req){
				.op = NFSIO_READ,
				.offset_bytes = (page + i) * PAGE_BYTES,
				.length_bytes = PAGE_BYTES,
				.data = target,
			};
	}
	if (used > 0)
		io = lend(engine);
	pthread_mutex_unlock(&engine->lock);
	started_us = now_us();
	nfsio_batch_start(engine->ios[io], &batch, reqs, used);
	read_ahead(engine, page, pages); /* behind what somebody waits for */
	nfsio_batch_wait(&batch);
	if (io > 0) {
		pthread_mutex_lock(&engine->lock);
		engine->lent[io] = false;
		pthread_mutex_unlock(&engine->lock);
	}
	for (size_t i = 0; i < used; i++) {
		count(&counters(engine)->nfs_reads, 1);
		count(&counters(engine)->nfs_read_bytes, reqs[i].length_bytes);
		if (error == 0)
			error = verify_request(engine, &reqs[i]);
	}
	if (used > 0)
		count_duration(counters(engine)->nfs_read_us, now_us() - started_us);
	count(&counters(engine)->hit_pages, pages - missed);
	count(&counters(engine)->missed_pages, missed);
	return error;
}

int engine_read(struct engine *engine, uint8_t *data, uint64_t offset_bytes, uint64_t length_bytes)
{
	uint64_t started_us = now_us();
	uint64_t page = offset_bytes / PAGE_BYTES, pages = length_bytes / PAGE_BYTES;
	int error = check_range(engine, offset_bytes, length_bytes);

	if (error == 0)
		error = result_of(engine);
	while (error == 0 && pages > 0) {
		uint32_t now = pages < BATCH_PAGES ? (uint32_t)pages : BATCH_PAGES;

		error = read_batch(engine, data, page, now);
		if (error == -ESTALE)
			error = -EIO; /* the file is gone: NBD has no word for it */
		if (error == 0)
			error = result_of(engine); /* it may have been somebody else's page already */
		data += (size_t)now * PAGE_BYTES;
		page += now;
		pages -= now;
	}
	count(&counters(engine)->reads, 1);
	count(&counters(engine)->read_bytes, length_bytes);
	count_duration(counters(engine)->read_us, now_us() - started_us);
	return error;
}

/*
 * Wait for `progress`. False when that is to end in an error: the file is gone, or the mount is soft and the NAS has
 * taken nothing for too long since `since_ms`. Lock held, dropped meanwhile.
 */
static bool wait_for_nas(struct engine *engine, uint64_t since_ms)
{
	uint64_t limit_ms = engine->options.nfs.soft_limit_ms, end_ms = since_ms;
	struct timespec until;

	if (engine->lost || atomic_load(&engine->stolen))
		return false;
	call_flusher(engine);
	if (limit_ms == 0) {
		pthread_cond_wait(&engine->progress, &engine->lock);
		return true;
	}
	if (engine->progress_at_ms > end_ms)
		end_ms = engine->progress_at_ms;
	if (engine->held_until_ms > end_ms)
		end_ms = engine->held_until_ms; /* that is our doing, not the server's */
	end_ms += limit_ms;
	if (now_ms() >= end_ms)
		return false;
	until.tv_sec = (time_t)(end_ms / 1000);
	until.tv_nsec = (long)(end_ms % 1000) * 1000000;
	pthread_cond_timedwait(&engine->progress, &engine->lock, &until);
	return true;
}

/*
 * Wait until the flusher has brought everything of these pages up to `sequence` to the NAS. Returns 0 or -EIO.
 * Lock held, dropped meanwhile.
 */
static int wait_pages_stable(struct engine *engine, uint64_t page, uint64_t pages, uint64_t sequence)
{
	uint64_t since_ms = now_ms();
	int error = 0;

	engine->waiting_for_stable++;
	for (uint64_t i = 0; i < pages && error == 0; i++)
		while (!cache_page_is_stable(engine->cache, page + i, sequence))
			if (!wait_for_nas(engine, since_ms)) {
				error = -EIO;
				break;
			}
	engine->waiting_for_stable--;
	return error;
}

/* At most BATCH_PAGES pages. After an error some of them are written. */
static int write_batch(struct engine *engine, const uint8_t *data, uint64_t page, uint32_t pages, bool fua)
{
	uint32_t crcs[BATCH_PAGES], filled = 0;
	uint64_t since_ms = now_ms();
	bool was_idle;
	int error = 0;

	for (uint32_t i = 0; i < pages; i++)
		crcs[i] = crc32c(data + (size_t)i * PAGE_BYTES, PAGE_BYTES);
	pthread_mutex_lock(&engine->lock);
	was_idle = cache_unstable_count(engine->cache) == 0;
	for (uint32_t i = 0; i < pages && error == 0; i++) {
		enum cache_store stored;

		while ((stored = cache_write(engine->cache, page + i, data + (size_t)i * PAGE_BYTES, crcs[i], !fua)) ==
			       CACHE_FULL &&
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
		call_flusher(engine);
	if (fua && error == 0)
		error = wait_pages_stable(engine, page, pages, cache_sequence(engine->cache));
	pthread_mutex_unlock(&engine->lock);
	count(&counters(engine)->filled_pages_written, filled);
	return error != 0 ? error : result_of(engine);
}

int engine_write(struct engine *engine, const uint8_t *data, uint64_t offset_bytes, uint64_t length_bytes, bool fua)
{
	uint64_t started_us = now_us();
	uint64_t page = offset_bytes / PAGE_BYTES, pages = length_bytes / PAGE_BYTES;
	int error = check_range(engine, offset_bytes, length_bytes);

	if (error == 0)
		error = result_of(engine);
	while (error == 0 && pages > 0) {
		uint32_t now = pages < BATCH_PAGES ? (uint32_t)pages : BATCH_PAGES;

		error = write_batch(engine, data, page, now, fua);
		data += (size_t)now * PAGE_BYTES;
		page += now;
		pages -= now;
	}
	count(&counters(engine)->writes, 1);
	count(&counters(engine)->written_bytes, length_bytes);
	count_duration(counters(engine)->write_us, now_us() - started_us);
	return error;
}

int engine_flush(struct engine *engine)
{
	uint64_t page = 0, sequence, since_ms = now_ms();
	bool in_time = true;

	count(&counters(engine)->flushes, 1);
	pthread_mutex_lock(&engine->lock);
	engine->waiting_for_stable++;
	while (in_time && !cache_materialise(engine->cache, &page))
		in_time = wait_for_nas(engine, since_ms);
	sequence = cache_sequence(engine->cache);
	while (in_time && !cache_is_stable(engine->cache, sequence))
		in_time = wait_for_nas(engine, since_ms);
	engine->waiting_for_stable--;
	pthread_mutex_unlock(&engine->lock);
	return in_time ? result_of(engine) : -EIO;
}

int engine_trim(struct engine *engine, uint64_t offset_bytes, uint64_t length_bytes)
{
	uint64_t page = offset_bytes / PAGE_BYTES, pages = length_bytes / PAGE_BYTES;
	int error = check_range(engine, offset_bytes, length_bytes);

	count(&counters(engine)->trims, 1);
	if (error != 0)
		return error;
	pthread_mutex_lock(&engine->lock);
	for (uint64_t i = 0; i < pages; i++)
		cache_trim(engine->cache, page + i);
	note_unstable(engine);
	pthread_cond_broadcast(&engine->progress);
	pthread_mutex_unlock(&engine->lock);
	return 0;
}

/* ------------------------------------------------------------------ create and destroy ----------------- */

static int fail(struct nfsio_failure *why, int error, const char *message)
{
	*why = (struct nfsio_failure){ .phase = NFSIO_OPEN, .error = error };
	snprintf(why->message, sizeof(why->message), "%s", message);
	return error;
}

/* FNV-1a of the URL up to its options: the server and the path. */
static uint64_t hash_path(const char *url)
{
	uint64_t hash = 0xcbf29ce484222325u;

	for (; *url != '\0' && *url != '?'; url++)
		hash = (hash ^ (uint8_t)*url) * 0x100000001b3u;
	return hash;
}

static int map_region(struct engine *engine, const struct nfsio_stat *st, struct nfsio_failure *why)
{
	struct region_identity identity = {
		.device_bytes = engine->size_bytes,
		.fileid = st->fileid,
		.path_hash = hash_path(engine->options.nfs.url),
	};
	char message[128];
	int error = region_map(&engine->region, engine->options.region_fd, &identity, engine->options.region_pages,
			       message, sizeof(message));

	return error == 0 ? 0 : fail(why, error, message[0] != '\0' ? message : strerror(-error));
}

static int make_buffers(struct engine *engine)
{
	size_t long_bytes = (size_t)RUN_PAGES_MAX * PAGE_BYTES, short_bytes = (size_t)SHORT_RUN_PAGES * PAGE_BYTES;
	size_t bytes = LONG_BUFFERS * long_bytes + SHORT_RUNS * short_bytes + engine->io_count * PAGE_BYTES;
	uint8_t *at = aligned_alloc(PAGE_BYTES, bytes);

	if (at == NULL)
		return -ENOMEM;
	memset(at, 0, bytes); /* touched now, not in an emergency */
	engine->buffers = at;
	for (; engine->spare_count < LONG_BUFFERS; at += long_bytes)
		engine->spare[engine->spare_count++] = at;
	for (unsigned i = 0; i < LONG_RUNS; i++)
		engine->runs[i] = (struct run){ .engine = engine, .pages_max = RUN_PAGES_MAX };
	for (unsigned i = LONG_RUNS; i < LONG_RUNS + SHORT_RUNS; i++, at += short_bytes)
		engine->runs[i] = (struct run){ .engine = engine, .pages_max = SHORT_RUN_PAGES, .data = at };
	for (struct fetch *fetch = engine->fetches; fetch < engine->fetches + FETCHES; fetch++)
		*fetch = (struct fetch){ .engine = engine };
	engine->samples = at;
	return 0;
}

/* The owner's word on the file. No lock held. */
static void owner_changed(void *arg, enum owner_state state)
{
	struct engine *engine = arg;

	set_counter(&counters(engine)->owner_state, state);
	if (state != OWNER_LOST)
		return;
	if (engine->options.exit_status_when_lost != 0)
		_exit(engine->options.exit_status_when_lost);
	pthread_mutex_lock(&engine->lock);
	atomic_store(&engine->stolen, true);
	pthread_cond_broadcast(&engine->progress);
	pthread_cond_signal(&engine->work);
	pthread_mutex_unlock(&engine->lock);
}

static void close_connections(struct engine *engine)
{
	/* the thread of one looks at all of them: see link_changed() */
	for (unsigned i = 0; i < engine->io_count; i++)
		nfsio_stop(engine->ios[i]);
	for (unsigned i = 0; i < engine->io_count; i++)
		nfsio_end(engine->ios[i]);
	while (engine->io_count > 0)
		nfsio_close(engine->ios[--engine->io_count]);
}

static int open_connections(struct engine *engine, struct nfsio_failure *why)
{
	struct nfsio_options options = engine->options.nfs;

	while (engine->io_count < engine->options.connections) {
		int error = nfsio_open(&options, &engine->ios[engine->io_count], why);

		if (error != 0) {
			close_connections(engine);
			return error;
		}
		engine->io_count++;
		options.quiet = true; /* the first one tells what there is to tell about the server */
	}
	return 0;
}

/*
 * What a worker before this one had under way may arrive after what is sent now, and so may what that one had sent
 * twice.
 */
static void hold_replay(struct engine *engine)
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

static void stop_owner(struct engine *engine)
{
	if (engine->owner == NULL)
		return;
	nfsio_stop(engine->ios[0]); /* it may wait for the server */
	owner_destroy(engine->owner);
	engine->owner = NULL;
}

int engine_create(const struct engine_options *options, struct engine **out, struct nfsio_failure *why)
{
	struct engine *engine = calloc(1, sizeof(*engine));
	pthread_condattr_t monotonic;
	struct nfsio_stat st;
	int error;

	if (engine == NULL)
		return fail(why, -ENOMEM, "");
	engine->options = *options;
	engine->own_region = options->region_fd < 0;
	if (options->owner.identity != NULL) {
		engine->owner = owner_create(&options->owner);
		if (engine->owner == NULL) {
			error = fail(why, -ENOMEM, "");
			goto fail_free;
		}
		engine->options.nfs.may_write = owner_may_write;
		engine->options.nfs.judge = engine->owner;
	}
	error = open_connections(engine, why);
	if (error != 0)
		goto fail_free;
	nfsio_opened_stat(engine->ios[0], &st);
	engine->size_bytes = st.size_bytes;
	engine->piece_bytes = nfsio_max_transfer_bytes(engine->ios[0]);
	if (!nfsio_has_commit(engine->ios[0]))
		engine->options.stable_writes = true;
	if (st.size_bytes == 0 || st.size_bytes % PAGE_BYTES != 0) {
		char message[128];

		snprintf(message, sizeof(message), "its size, %llu bytes, is no multiple of %u",
			 (unsigned long long)st.size_bytes, PAGE_BYTES);
		error = fail(why, -EINVAL, message);
		goto fail_close;
	}
	error = map_region(engine, &st, why);
	if (error != 0)
		goto fail_close;
	engine->cache = cache_create(&engine->region);
	if (engine->cache == NULL || make_buffers(engine) != 0) {
		error = fail(why, -ENOMEM, "");
		goto fail_unmap;
	}
	set_counter(&counters(engine)->nfs_in_flight, 0);
	set_counter(&counters(engine)->write_back_error, 0);
	engine->reconnects_before = atomic_load(&counters(engine)->reconnects);
	hold_replay(engine);
	count(&counters(engine)->replayed_pages, cache_dirty_count(engine->cache));
	engine->aged_sequence = cache_sequence(engine->cache); /* what was replayed has waited long enough */
	note_unstable(engine);
	streams_init(&engine->streams, options->read_ahead_pages);
	pthread_mutex_init(&engine->lock, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&engine->work, &monotonic);
	pthread_cond_init(&engine->progress, &monotonic);
	pthread_condattr_destroy(&monotonic);
	set_counter(&counters(engine)->owner_state, OWNER_NONE);
	if (engine->owner != NULL) {
		error = owner_start(engine->owner, engine->ios[0], owner_changed, engine, why);
		if (error != 0)
			goto fail_unmap;
	}
	error = thread_start(&engine->flusher, flusher_thread, engine);
	if (error != 0) {
		fail(why, error, "");
		goto fail_owner;
	}
	for (unsigned i = 0; i < engine->io_count; i++)
		watch(engine, engine->ios[i], engine->samples + (size_t)i * PAGE_BYTES);
	*out = engine;
	return 0;
fail_owner:
	stop_owner(engine);
fail_unmap:
	if (engine->cache != NULL)
		cache_destroy(engine->cache);
	free(engine->buffers);
	region_unmap(&engine->region);
fail_close:
	close_connections(engine);
fail_free:
	if (engine->owner != NULL)
		owner_destroy(engine->owner);
	free(engine);
	return error;
}

void engine_destroy(struct engine *engine)
{
	bool all_written = false, lost = false;

	while (engine->own_region && !all_written && !lost) {
		all_written = engine_flush(engine) == 0; /* soft: its end is no reason to forget what is in memory */
		pthread_mutex_lock(&engine->lock);
		lost = engine->lost || atomic_load(&engine->stolen);
		pthread_mutex_unlock(&engine->lock);
	}
	pthread_mutex_lock(&engine->lock);
	engine->abandon = !all_written;
	if (engine->own_region && !all_written)
		log_line("%u pages are given up that the server did not take", cache_unstable_count(engine->cache));
	engine->stop = true;
	pthread_cond_signal(&engine->work);
	pthread_mutex_unlock(&engine->lock);
	pthread_join(engine->flusher, NULL);
	stop_owner(engine);
	close_connections(engine); /* ends what is still under way */
	cache_destroy(engine->cache);
	region_unmap(&engine->region);
	pthread_cond_destroy(&engine->work);
	pthread_cond_destroy(&engine->progress);
	pthread_mutex_destroy(&engine->lock);
	free(engine->buffers);
	free(engine);
}

uint64_t engine_size_bytes(const struct engine *engine)
{
	return engine->size_bytes;
}

struct region_header *engine_region(const struct engine *engine)
{
	return engine->region.header;
}
