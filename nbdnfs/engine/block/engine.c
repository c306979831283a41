/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Create and destroy, and the file's owner. See engine.h for what is promised, internal.h for the other parts.
 */
#include "block/internal.h"

#include "base/log.h"
#include "base/thread.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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
	unsigned long_buffers = nfsio_has_names(engine->ios[0]) ? LIBNFS_LONG_BUFFERS : LONG_BUFFERS;
	size_t bytes = long_buffers * long_bytes + SHORT_WRITE_BACKS * short_bytes + engine->io_count * PAGE_BYTES;
	uint8_t *at = aligned_alloc(PAGE_BYTES, bytes);

	if (at == NULL)
		return -ENOMEM;
	memset(at, 0, bytes); /* touched now, not in an emergency */
	engine->buffers = at;
	for (; engine->spare_count < long_buffers; at += long_bytes)
		engine->spare[engine->spare_count++] = at;
	for (unsigned i = 0; i < LONG_WRITE_BACKS; i++)
		engine->write_backs[i] = (struct write_back){ .engine = engine, .pages_max = RUN_PAGES_MAX };
	for (unsigned i = LONG_WRITE_BACKS; i < WRITE_BACKS; i++, at += short_bytes)
		engine->write_backs[i] = (struct write_back){ .engine = engine, .pages_max = SHORT_RUN_PAGES, .data = at };
	for (struct fetch *fetch = engine->fetches; fetch < engine->fetches + FETCHES; fetch++)
		*fetch = (struct fetch){ .engine = engine };
	engine->samples = at;
	return 0;
}

/* The owner's word on the file. No lock held. */
static void owner_changed(void *context, enum owner_state state)
{
	struct engine *engine = context;

	set_counter(&counters(engine)->owner_state, state);
	if (state != OWNER_STOLEN)
		return;
	if (engine->options.exit_status_when_stolen != 0)
		_exit(engine->options.exit_status_when_stolen);
	pthread_mutex_lock(&engine->lock);
	atomic_store(&engine->stolen, true);
	pthread_cond_broadcast(&engine->progress);
	pthread_cond_signal(&engine->work);
	pthread_mutex_unlock(&engine->lock);
}

static void close_connections(struct engine *engine)
{
	/* the thread of one looks at all of them: condition_changed() of file.c */
	for (unsigned i = 0; i < engine->io_count; i++)
		nfsio_stop(engine->ios[i]);
	for (unsigned i = 0; i < engine->io_count; i++)
		nfsio_join(engine->ios[i]);
	if (engine->names != NULL && engine->names != engine->ios[0])
		nfsio_destroy(engine->names);
	engine->names = NULL;
	while (engine->io_count > 0)
		nfsio_destroy(engine->ios[--engine->io_count]);
}

static int open_connections(struct engine *engine, struct nfsio_failure *why)
{
	struct nfsio_options options = engine->options.nfs;
	int error = 0;

	while (error == 0 && engine->io_count < engine->options.connections) {
		error = nfsio_create(&options, &engine->ios[engine->io_count], why);
		if (error == 0)
			engine->io_count++;
		options.quiet = true; /* the first one tells what there is to tell about the server */
	}
	options.transport = NFSIO_OVER_LIBNFS;
	if (error == 0 && engine->owner_watch != NULL && nfsio_has_names(engine->ios[0]))
		engine->names = engine->ios[0];
	else if (error == 0 && engine->owner_watch != NULL)
		error = nfsio_create(&options, &engine->names, why);
	if (error != 0)
		close_connections(engine);
	return error;
}

static void stop_owner(struct engine *engine)
{
	if (engine->owner_watch == NULL)
		return;
	nfsio_stop(engine->names); /* it may wait for the server */
	owner_watch_destroy(engine->owner_watch);
	engine->owner_watch = NULL;
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
		engine->owner_watch = owner_watch_create(&options->owner);
		if (engine->owner_watch == NULL) {
			error = fail(why, -ENOMEM, "");
			goto fail_free;
		}
		engine->options.nfs.may_write = owner_watch_may_write;
		engine->options.nfs.may_write_context = engine->owner_watch;
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
	flusher_hold_replay(engine);
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
	if (engine->owner_watch != NULL) {
		error = owner_watch_start(engine->owner_watch, engine->names, owner_changed, engine, why);
		if (error != 0)
			goto fail_unmap;
	}
	error = thread_start(&engine->flusher, flusher_thread, engine);
	if (error != 0) {
		fail(why, error, "");
		goto fail_owner;
	}
	for (unsigned i = 0; i < engine->io_count; i++)
		file_watch(engine, engine->ios[i], engine->samples + (size_t)i * PAGE_BYTES);
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
	if (engine->owner_watch != NULL)
		owner_watch_destroy(engine->owner_watch);
	free(engine);
	return error;
}

void engine_destroy(struct engine *engine)
{
	bool all_written = false, is_final = false;

	while (engine->own_region && !all_written && !is_final) {
		all_written = engine_flush(engine) == 0; /* soft: its end is no reason to forget what is in memory */
		pthread_mutex_lock(&engine->lock);
		is_final = engine->gone_too_long || atomic_load(&engine->stolen);
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
