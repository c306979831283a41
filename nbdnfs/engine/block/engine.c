/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Create and destroy. */
#include "block/internal.h"

#include "base/log.h"
#include "base/thread.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(ENGINE_CONNECTIONS_MAX <= REGION_CONNECTIONS, "each connection has its place in the region");

/* How long the end may take before the log says what it waits for. */
#define PATIENCE_MS 1000

/* Returns 0, or -errno and *why. */
static int make_buffers(struct engine *engine, struct nfsio_failure *why)
{
	size_t long_bytes = (size_t)RUN_PAGES_MAX * SLOT_BYTES, short_bytes = (size_t)SHORT_RUN_PAGES * SLOT_BYTES;
	unsigned long_buffers = nfsio_has_names(engine->ios[0]) ? LIBNFS_LONG_BUFFERS : LONG_BUFFERS;
	size_t bytes = long_buffers * long_bytes + SHORT_WRITE_BACKS * short_bytes;
	uint8_t *at = aligned_alloc(SLOT_BYTES, bytes);

	if (at == NULL)
		return engine_fail(why, -ENOMEM, "");
	memset(at, 0, bytes); /* faults the pages in now, not when memory is short */
	engine->buffers = at;
	for (; engine->spare_count < long_buffers; at += long_bytes)
		engine->spare[engine->spare_count++] = at;
	for (unsigned i = 0; i < LONG_WRITE_BACKS; i++)
		engine->write_backs[i] = (struct write_back){ .engine = engine, .pages_max = RUN_PAGES_MAX };
	for (unsigned i = LONG_WRITE_BACKS; i < WRITE_BACKS; i++, at += short_bytes)
		engine->write_backs[i] =
			(struct write_back){ .engine = engine, .pages_max = SHORT_RUN_PAGES, .data = at };
	for (struct fetch *fetch = engine->fetches; fetch < engine->fetches + FETCHES; fetch++)
		*fetch = (struct fetch){ .engine = engine };
	assert(at == engine->buffers + bytes);
	return 0;
}

/*
 * Close all connections, and end the watch on ownership, whose thread uses one of them. All are ended before anything
 * is freed: the thread of a connection looks at the others (condition_changed() of file.c) and asks the watch whether
 * it may write.
 */
static void close_connections(struct engine *engine)
{
	for (unsigned i = 0; i < engine->io_count; i++)
		nfsio_stop(engine->ios[i]);
	for (unsigned i = 0; i < engine->io_count; i++)
		nfsio_join(engine->ios[i]);
	if (engine->owner_watch != NULL)
		owner_watch_destroy(engine->owner_watch);
	engine->owner_watch = NULL;
	while (engine->io_count > 0)
		nfsio_destroy(engine->ios[--engine->io_count]);
}

/* For owner_watch. No lock held. */
static void owner_state_changed(void *context, enum owner_state state)
{
	struct engine *engine = context;

	set_counter(&counters(engine)->owner_state, state);
	if (state != OWNER_STOLEN)
		return;
	if (engine->options.exit_status_when_stolen != 0)
		_exit(engine->options.exit_status_when_stolen);
	engine_lock(engine);
	atomic_store(&engine->stolen, true);
	engine->changed = true;
	pthread_cond_signal(&engine->work);
	engine_unlock(engine);
}

/* Begin to note what is waited for: what the last worker has left there is out of date. */
static void note_waits(struct engine *engine)
{
	struct region_waits *w = waits(engine);

	for (unsigned i = 0; i < REGION_CONNECTIONS; i++)
		set_counter(&w->waiting_since_ms[i], 0);
	for (unsigned i = 0; i < REGION_REQUESTS; i++)
		set_counter(&w->request_since_ms[i], 0);
	for (unsigned i = 0; i < engine->io_count; i++)
		nfsio_note_waits(engine->ios[i], &w->last_received_ms, &w->waiting_since_ms[i]);
	atomic_store(&w->writer, atomic_load(&engine->region.header->generation));
}

/* Take over what the region holds, and set the counters that say "now". */
static void take_over_region(struct engine *engine)
{
	set_counter(&counters(engine)->nfs_in_flight, 0);
	set_counter(&counters(engine)->write_back_error, 0);
	set_counter(&counters(engine)->owner_state, OWNER_NONE);
	engine->reconnects_before = atomic_load(&counters(engine)->reconnects);
	flusher_hold_replay(engine);
	count(&counters(engine)->replayed_pages, cache_dirty_count(engine->cache));
	engine->aged_sequence = cache_sequence(engine->cache); /* what is replayed has waited long enough */
	note_unstable(engine);
	note_waits(engine);
}

static void init_locks(struct engine *engine)
{
	pthread_condattr_t monotonic;

	pthread_mutex_init(&engine->lock, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&engine->work, &monotonic);
	pthread_cond_init(&engine->progress, &monotonic);
	pthread_condattr_destroy(&monotonic);
}

/* Start the threads: owner_watch's, which must allow writes first, and the flusher's. Returns 0, or -errno and *why. */
static int start_threads(struct engine *engine, struct nfsio_failure *why)
{
	uint32_t limit_ms = engine->options.nfs.connect_timeout_s * 1000;
	int error = 0;

	/* the last connection: pages are written over the first one, and may fill a slow line for long */
	if (engine->owner_watch != NULL)
		error = owner_watch_start(engine->owner_watch, engine->ios[engine->io_count - 1], limit_ms,
					  owner_state_changed, engine, why);
	if (error != 0)
		return error;
	error = thread_start(&engine->flusher, flusher_thread, engine);
	return error == 0 ? 0 : engine_fail(why, error, "");
}

/* Free what engine_create() has made so far. No thread of the engine's runs. */
static void free_engine(struct engine *engine)
{
	close_connections(engine); /* ends what is still in flight */
	if (engine->cache != NULL)
		cache_destroy(engine->cache);
	free(engine->buffers);
	free(engine->samples);
	if (engine->region.header != NULL && engine->own_region)
		region_discard(&engine->region);
	else if (engine->region.header != NULL)
		region_unmap(&engine->region);
	pthread_cond_destroy(&engine->work);
	pthread_cond_destroy(&engine->progress);
	pthread_mutex_destroy(&engine->lock);
	free(engine);
}

static int create_owner_watch(struct engine *engine, struct nfsio_failure *why)
{
	if (engine->options.owner.identity == NULL)
		return 0;
	engine->owner_watch = owner_watch_create(&engine->options.owner);
	if (engine->owner_watch == NULL)
		return engine_fail(why, -ENOMEM, "");
	engine->options.nfs.may_write = owner_watch_may_write;
	engine->options.nfs.may_write_context = engine->owner_watch;
	return 0;
}

int engine_create(const struct engine_options *options, struct engine **out, struct nfsio_failure *why)
{
	struct engine *engine = calloc(1, sizeof(*engine));
	int error;

	if (engine == NULL)
		return engine_fail(why, -ENOMEM, "");
	engine->options = *options;
	engine->own_region = options->region_fd < 0;
	engine->attendant_fd = -1;
	init_locks(engine);
	error = create_owner_watch(engine, why);
	if (error == 0)
		error = engine_open(engine, why);
	if (error == 0)
		error = make_buffers(engine, why);
	if (error != 0)
		goto fail;
	take_over_region(engine);
	streams_init(&engine->streams, options->read_ahead_pages);
	error = start_threads(engine, why);
	if (error != 0)
		goto fail;
	for (unsigned i = 0; i < engine->io_count; i++)
		file_watch(engine, i);
	*out = engine;
	return 0;
fail:
	free_engine(engine);
	return error;
}

/* The number of pages that the NAS does not have stably. Lock held. */
static unsigned long long pages_left(const struct engine *engine)
{
	return cache_unstable_count(engine->cache) + cache_filled_count(engine->cache);
}

/*
 * The keys of a region of the engine's own end with it: nobody can read what would be written now, so that only what is
 * not encrypted is. A write-back that is under way ends as usual: it must not reach the server after the next worker's.
 */
static void forget_unreadable(struct engine *engine)
{
	uint64_t clear_bytes = engine->region.clear_pages * SLOT_BYTES;

	if (is_encrypted(engine) && clear_bytes < engine->size_bytes)
		engine_trim(engine, clear_bytes, engine->size_bytes - clear_bytes);
}

/* Wait until the NAS has what is in a region of the engine's own. Returns false when waiting is an error. */
static bool write_out(struct engine *engine)
{
	uint64_t until_ms = now_ms() + PATIENCE_MS;
	bool is_final = false;
	int error = -EAGAIN;

	forget_unreadable(engine);
	while (error != 0 && !is_final) {
		unsigned long long left;

		error = flush_until(engine, now_ms(), until_ms); /* after a soft limit it is tried again */
		if (error == 0)
			error = end_write_backs(engine, until_ms);
		engine_lock(engine);
		is_final = engine->gone_too_long || atomic_load(&engine->stolen);
		left = pages_left(engine);
		engine_unlock(engine);
		if (error != -EAGAIN)
			continue;
		log_line("the end waits for the server: %llu pages are still to be written (%llu MiB)", left,
			 left * SLOT_BYTES >> 20);
		until_ms = NO_END;
	}
	return error == 0;
}

void engine_destroy(struct engine *engine)
{
	bool all_written = engine->own_region && write_out(engine);

	engine_lock(engine);
	engine->abandon = !all_written;
	if (engine->own_region && !all_written)
		log_line("%llu pages are given up that the server did not take", pages_left(engine));
	engine->stop = true;
	pthread_cond_signal(&engine->work);
	engine_unlock(engine);
	pthread_join(engine->flusher, NULL);
	free_engine(engine);
}

bool engine_is_encrypted(const struct engine *engine)
{
	return is_encrypted(engine);
}

uint64_t engine_size_bytes(const struct engine *engine)
{
	return engine->size_bytes;
}

struct region_header *engine_region(const struct engine *engine)
{
	return engine->region.header;
}
