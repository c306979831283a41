/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Requests, the flusher and read-ahead, over one cache. See engine.h for what is promised.
 *
 * Locks: engine->lock guards the cache, the streams and all that struct engine says it does. It is never held
 * over a call of nfsio, whose completions take it: they run in nfsio's thread, without any lock of its own.
 */
#include "engine.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cache.h"
#include "crc32c.h"
#include "log.h"
#include "stack.h"
#include "streams.h"

/* Pages of a request that are looked up, checksummed and fetched in one go. */
#define BATCH_PAGES 64
/* Write-backs and read-aheads under way at once, and what one of each moves at most. */
#define RUNS 4
#define FETCHES 4
#define FETCH_PAGES 32

/* A page that nobody rewrites goes to the NAS after one to two of these, also when there is room for more. */
#define AGE_LIMIT_MS 500
/* What the server refuses (ENOSPC, EIO, ...) is tried again, but not at full speed. */
#define REFUSED_PAUSE_MS 1000
/* A page whose checksum is wrong is read so often before it is given up. */
#define CHECKSUM_TRIES 3

/* A write-back under way, or a place for one. */
struct run {
	struct nfsio_req req;   /* first: its owner is found from it */
	struct engine *engine;
	struct cache_run pages;
	uint8_t *data;          /* RUN_PAGES_MAX pages */
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
	uint8_t *data;          /* FETCH_PAGES pages */
	uint64_t started_us;
	bool busy;              /* guarded by engine->lock */
};

struct engine {
	/* constant after engine_create() */
	struct engine_options options;
	struct nfsio *read_io, *write_io; /* the same with one connection */
	struct region region;
	uint64_t size_bytes;
	uint32_t piece_bytes;
	bool own_region;
	uint8_t *buffers;       /* of the runs and fetches */
	pthread_t flusher;
	struct owner *owner;    /* NULL: nobody asked for one */

	atomic_bool lost;       /* somebody else has the file: nothing works any more; set once, under `lock` */

	pthread_mutex_t lock;   /* guards everything below, and the cache */
	pthread_cond_t work;    /* the flusher has something to do */
	pthread_cond_t progress; /* slots became clean or free, or a fetch ended */
	struct cache *cache;
	struct streams streams;
	struct run runs[RUNS];
	struct fetch fetches[FETCHES];
	struct nfsio_req commit;
	bool committing;
	bool stop;              /* the flusher is to end, once the NAS has all or `abandon` is set */
	bool abandon;
	uint32_t waiting_for_stable; /* requests that wait for the NAS */
	uint32_t waiting_for_slot;
	uint64_t fetch_number;
	uint64_t aged_sequence; /* what was written up to it is old enough to go */
	uint64_t refused_until_ms; /* no write-back before, the server has refused one */
};

static uint64_t now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000 + (uint64_t)ts.tv_nsec / 1000;
}

static struct region_counters *counters(struct engine *engine)
{
	return &engine->region.header->counters;
}

/* ------------------------------------------------------------------ write-back: completions, no lock --- */

/* Lock held. */
static void note_unstable(struct engine *engine)
{
	set_counter(&counters(engine)->unstable_pages, cache_unstable_count(engine->cache));
}

/* The server's word on a write-back or a commit; said once for each change. Lock held. */
static void note_result(struct engine *engine, int error)
{
	struct region_counters *c = counters(engine);
	uint64_t before = atomic_load_explicit(&c->write_back_error, memory_order_relaxed);

	if (error == -ECANCELED || atomic_load(&engine->lost))
		return;
	if (error != 0) {
		count(&c->write_errors, 1);
		engine->refused_until_ms = now_us() / 1000 + REFUSED_PAUSE_MS;
	}
	if (before == (uint64_t)-error)
		return;
	set_counter(&c->write_back_error, (uint64_t)-error);
	if (error != 0)
		log_line("the server refuses to write (%s): %u pages wait in memory, trying again", strerror(-error),
			 cache_unstable_count(engine->cache));
	else
		log_line("the server writes again");
}

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
	run->busy = false;
	count(&counters(engine)->nfs_in_flight, (uint64_t)-1);
	note_result(engine, error);
	note_unstable(engine);
	pthread_cond_broadcast(&engine->progress);
	pthread_cond_signal(&engine->work);
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
	note_result(engine, req->error);
	note_unstable(engine);
	pthread_cond_broadcast(&engine->progress);
	pthread_cond_signal(&engine->work);
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

	if (uncommitted == 0 || engine->committing)
		return false;
	/* one commit for many writes: while more are coming, it waits for a good number of pages */
	if (uncommitted >= engine->region.slot_count / 4)
		return true;
	if (engine->waiting_for_stable > 0 || engine->waiting_for_slot > 0)
		return cache_dirty_count(engine->cache) == 0;
	return cache_unstable_count(engine->cache) == uncommitted;
}

/* No more than the server moves in one READ or WRITE; of a very small one the transport makes several. */
static uint32_t pages_at_once(const struct engine *engine, uint32_t wanted)
{
	uint32_t most = engine->piece_bytes / PAGE_BYTES;

	return wanted <= most ? wanted : most > 0 ? most : 1;
}

static struct run *free_run(struct engine *engine)
{
	for (struct run *run = engine->runs; run < engine->runs + RUNS; run++)
		if (!run->busy)
			return run;
	return NULL;
}

/* Start one write-back. Lock held, dropped meanwhile. */
static void write_back(struct engine *engine, struct run *run)
{
	cache_take_run(engine->cache, &run->pages, pages_at_once(engine, RUN_PAGES_MAX), run->data);
	run->busy = true;
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
	nfsio_submit(engine->write_io, &run->req);
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
	nfsio_submit(engine->write_io, &engine->commit);
	pthread_mutex_lock(&engine->lock);
}

/* Wait for `work`, at most `ms`. Lock held, dropped meanwhile. True when the time was up. */
static bool wait_for_work(struct engine *engine, uint64_t ms)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += (time_t)(ms / 1000);
	until.tv_nsec += (long)(ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_nsec -= 1000000000;
		until.tv_sec++;
	}
	return pthread_cond_timedwait(&engine->work, &engine->lock, &until) == ETIMEDOUT;
}

static void *flusher_thread(void *arg)
{
	struct engine *engine = arg;
	uint64_t young_sequence = 0; /* what was written up to it is one AGE_LIMIT_MS old */

	touch_stack();
	pthread_mutex_lock(&engine->lock);
	for (;;) {
		uint64_t now_ms = now_us() / 1000;
		struct run *run = free_run(engine);

		if (engine->stop &&
		    (engine->abandon || atomic_load(&engine->lost) || cache_unstable_count(engine->cache) == 0))
			break;
		if (atomic_load(&engine->lost)) {
			pthread_cond_wait(&engine->work, &engine->lock);
		} else if (now_ms < engine->refused_until_ms) {
			wait_for_work(engine, engine->refused_until_ms - now_ms);
		} else if (run != NULL && wants_write_back(engine)) {
			write_back(engine, run);
		} else if (wants_commit(engine)) {
			commit(engine);
		} else if (cache_dirty_count(engine->cache) == 0) {
			pthread_cond_wait(&engine->work, &engine->lock);
		} else if (wait_for_work(engine, AGE_LIMIT_MS)) {
			engine->aged_sequence = young_sequence;
			young_sequence = cache_sequence(engine->cache);
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
	bool ok = req->error == 0 && req->moved_bytes == req->length_bytes;
	uint32_t crcs[FETCH_PAGES];

	count_duration(counters(engine)->nfs_read_us, now_us() - fetch->started_us);
	for (uint32_t i = 0; ok && i < fetch->count; i++)
		crcs[i] = crc32c(fetch->data + (size_t)i * PAGE_BYTES, PAGE_BYTES);
	pthread_mutex_lock(&engine->lock);
	cache_fetch_done(engine->cache, fetch->first_page, fetch->count, fetch->number, ok ? fetch->data : NULL, crcs);
	fetch->busy = false;
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
		if (fetch == NULL || cache_unstable_count(engine->cache) >= engine->region.slot_count * 3 / 4)
			return;
		fetch->number = ++engine->fetch_number;
		fetch->count = cache_fetch_begin(engine->cache, first_page, most, fetch->number);
		if (fetch->count == 0) {
			first_page++; /* somebody has it: go on behind it */
			pages--;
			continue;
		}
		fetch->busy = true;
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
		nfsio_submit(engine->read_io, &fetch->req);
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
	return atomic_load(&engine->lost) ? -EIO : 0;
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
		if (wanted == 0 || wanted == found || newer == CACHE_HIT)
			return 0;
		if (tries == CHECKSUM_TRIES)
			break;
		count(&c->checksum_rereads, 1);
		error = nfsio_transfer(engine->read_io, &req);
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

	if (error == 0 && req->moved_bytes != req->length_bytes)
		error = -EIO; /* the file ends before the device: it was cut */
	for (uint32_t at = 0; error == 0 && at < req->length_bytes; at += PAGE_BYTES)
		error = verify_page(engine, (req->offset_bytes + at) / PAGE_BYTES, req->data + at);
	return error;
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
	pthread_mutex_unlock(&engine->lock);
	started_us = now_us();
	nfsio_batch_start(engine->read_io, &batch, reqs, used);
	read_ahead(engine, page, pages); /* behind what somebody waits for */
	nfsio_batch_wait(&batch);
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

/* Wait until the flusher has brought everything of these pages up to `sequence` to the NAS. Lock held, dropped. */
static void wait_pages_stable(struct engine *engine, uint64_t page, uint64_t pages, uint64_t sequence)
{
	engine->waiting_for_stable++;
	pthread_cond_signal(&engine->work);
	for (uint64_t i = 0; i < pages; i++)
		while (!atomic_load(&engine->lost) && !cache_page_is_stable(engine->cache, page + i, sequence))
			pthread_cond_wait(&engine->progress, &engine->lock);
	engine->waiting_for_stable--;
}

/* At most BATCH_PAGES pages. */
static int write_batch(struct engine *engine, const uint8_t *data, uint64_t page, uint32_t pages, bool fua)
{
	uint32_t crcs[BATCH_PAGES], filled = 0;
	bool was_idle;

	for (uint32_t i = 0; i < pages; i++)
		crcs[i] = crc32c(data + (size_t)i * PAGE_BYTES, PAGE_BYTES);
	pthread_mutex_lock(&engine->lock);
	was_idle = cache_unstable_count(engine->cache) == 0;
	for (uint32_t i = 0; i < pages; i++) {
		enum cache_store stored;

		while ((stored = cache_write(engine->cache, page + i, data + (size_t)i * PAGE_BYTES, crcs[i], !fua)) ==
		       CACHE_FULL) {
			if (atomic_load(&engine->lost))
				break;
			count(&counters(engine)->stalls, 1);
			engine->waiting_for_slot++;
			pthread_cond_signal(&engine->work);
			pthread_cond_wait(&engine->progress, &engine->lock);
			engine->waiting_for_slot--;
		}
		filled += stored == CACHE_FILLED;
	}
	note_unstable(engine);
	if (was_idle || is_half_full(engine))
		pthread_cond_signal(&engine->work);
	if (fua)
		wait_pages_stable(engine, page, pages, cache_sequence(engine->cache));
	pthread_mutex_unlock(&engine->lock);
	count(&counters(engine)->filled_pages_written, filled);
	return result_of(engine);
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
	uint64_t page = 0, sequence;

	count(&counters(engine)->flushes, 1);
	pthread_mutex_lock(&engine->lock);
	engine->waiting_for_stable++;
	while (!atomic_load(&engine->lost) && !cache_materialise(engine->cache, &page)) {
		pthread_cond_signal(&engine->work);
		pthread_cond_wait(&engine->progress, &engine->lock);
	}
	sequence = cache_sequence(engine->cache);
	pthread_cond_signal(&engine->work);
	while (!atomic_load(&engine->lost) && !cache_is_stable(engine->cache, sequence))
		pthread_cond_wait(&engine->progress, &engine->lock);
	engine->waiting_for_stable--;
	pthread_mutex_unlock(&engine->lock);
	return result_of(engine);
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
	size_t run_bytes = (size_t)RUN_PAGES_MAX * PAGE_BYTES, fetch_bytes = (size_t)FETCH_PAGES * PAGE_BYTES;
	size_t bytes = RUNS * run_bytes + FETCHES * fetch_bytes;
	uint8_t *at = aligned_alloc(PAGE_BYTES, bytes);

	if (at == NULL)
		return -ENOMEM;
	memset(at, 0, bytes); /* touched now, not in an emergency */
	engine->buffers = at;
	for (struct run *run = engine->runs; run < engine->runs + RUNS; run++, at += run_bytes)
		*run = (struct run){ .engine = engine, .data = at };
	for (struct fetch *fetch = engine->fetches; fetch < engine->fetches + FETCHES; fetch++, at += fetch_bytes)
		*fetch = (struct fetch){ .engine = engine, .data = at };
	return 0;
}

static int start_flusher(struct engine *engine)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	int error;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, THREAD_STACK_BYTES);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&engine->flusher, &attributes, flusher_thread, engine);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	return -error;
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
	atomic_store(&engine->lost, true);
	pthread_cond_broadcast(&engine->progress);
	pthread_cond_signal(&engine->work);
	pthread_mutex_unlock(&engine->lock);
}

static int open_connections(struct engine *engine, struct nfsio_failure *why)
{
	int error = nfsio_open(&engine->options.nfs, &engine->read_io, why);

	if (error == 0 && engine->options.connections > 1) {
		error = nfsio_open(&engine->options.nfs, &engine->write_io, why);
		if (error != 0)
			nfsio_close(engine->read_io);
	} else if (error == 0) {
		engine->write_io = engine->read_io;
	}
	return error;
}

static void close_connections(struct engine *engine)
{
	if (engine->write_io != engine->read_io)
		nfsio_close(engine->write_io);
	nfsio_close(engine->read_io);
}

static void stop_owner(struct engine *engine)
{
	if (engine->owner == NULL)
		return;
	nfsio_stop(engine->write_io); /* it may wait for the server */
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
	nfsio_opened_stat(engine->read_io, &st);
	engine->size_bytes = st.size_bytes;
	engine->piece_bytes = nfsio_max_transfer_bytes(engine->read_io);
	if (!nfsio_has_commit(engine->write_io))
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
	count(&counters(engine)->replayed_pages, cache_dirty_count(engine->cache));
	engine->aged_sequence = cache_sequence(engine->cache); /* what was replayed has waited long enough */
	note_unstable(engine);
	streams_init(&engine->streams, options->read_ahead_pages);
	pthread_mutex_init(&engine->lock, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&engine->work, &monotonic);
	pthread_condattr_destroy(&monotonic);
	pthread_cond_init(&engine->progress, NULL);
	set_counter(&counters(engine)->owner_state, OWNER_NONE);
	if (engine->owner != NULL) {
		error = owner_start(engine->owner, engine->write_io, owner_changed, engine, why);
		if (error != 0)
			goto fail_unmap;
	}
	error = start_flusher(engine);
	if (error != 0) {
		fail(why, error, "");
		goto fail_owner;
	}
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
	if (engine->own_region)
		engine_flush(engine);
	pthread_mutex_lock(&engine->lock);
	engine->abandon = !engine->own_region;
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
