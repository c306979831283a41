/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Create and destroy. */
#include "block/internal.h"

#include "base/log.h"
#include "base/thread.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(ENGINE_CONNECTIONS_MAX <= REGION_CONNECTIONS, "each connection has its place in the region");

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

static enum region_version new_region_version(const struct engine *engine)
{
	return engine->options.encrypt ? REGION_ENCRYPTED : REGION_PLAIN;
}

/*
 * Its size is what the server says, and so is what the region locks. A region that a worker has left is taken over
 * whatever its size: it is in memory already, with acknowledged pages. Returns 0, or -EFBIG and *why.
 */
static int check_memory(const struct engine *engine, struct nfsio_failure *why)
{
	uint64_t bytes = region_size_bytes(engine->size_bytes, engine->options.region_pages,
					   new_region_version(engine));
	uint64_t memory_bytes = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGE_SIZE);
	uint64_t limit_bytes = memory_bytes / ENGINE_MEMORY_SHARE;
	char message[sizeof(why->message)];
	struct stat st;

	if (limit_bytes < ENGINE_MEMORY_MIN_BYTES)
		limit_bytes = ENGINE_MEMORY_MIN_BYTES;
	if (bytes <= limit_bytes)
		return 0;
	if (engine->options.region_fd >= 0 && fstat(engine->options.region_fd, &st) == 0 && st.st_size > 0)
		return 0;
	snprintf(message, sizeof(message),
		 "its %llu GiB and a region of %llu MiB need %llu MiB of locked memory, and at most %llu MiB may be"
		 " locked on this machine (an eighth of its memory, or 64 MiB)",
		 (unsigned long long)(engine->size_bytes >> 30),
		 (unsigned long long)engine->options.region_pages * SLOT_BYTES >> 20, (unsigned long long)(bytes >> 20),
		 (unsigned long long)(limit_bytes >> 20));
	return fail(why, -EFBIG, message);
}

static bool knows_file(const struct engine *engine)
{
	return engine->known.file.length_bytes > 0;
}

/* Is what was opened the file of the region that was adopted? nfsio has looked at one that was known, and its bytes. */
static bool is_regions_file(const struct engine *engine, const struct nfsio_stat *st)
{
	const struct region_identity *identity = &engine->region.header->identity;

	return st->size_bytes == identity->device_bytes &&
	       (nfsio_was_known(engine->ios[0]) ||
		st->fileid == (knows_file(engine) ? engine->known.fileid : identity->fileid));
}

static int fail_region(struct nfsio_failure *why, int error, const char *message)
{
	return fail(why, error, message[0] != '\0' ? message : strerror(-error));
}

/* The region is mapped. Returns 0, or -errno and *why. */
static int begin_encryption(const struct engine *engine, struct nfsio_failure *why)
{
	if (engine_is_encrypted(engine) && cipher_init() != 0)
		return fail(why, -ENOSYS, "libsodium cannot be used on this machine");
	if (engine_is_encrypted(engine) != engine->options.encrypt)
		log_line("pages are%s encrypted, as when the device started; the setting counts when it starts again",
			 engine_is_encrypted(engine) ? "" : " not");
	return 0;
}

/*
 * Map the region that an earlier worker has left, if one has: it says where the file is, and how to recognise it.
 * Returns 0, or -errno and *why.
 */
static int adopt_region(struct engine *engine, struct nfsio_failure *why)
{
	char message[128];
	int error;

	if (engine->own_region)
		return 0;
	error = region_adopt(&engine->region, engine->options.region_fd, hash_path(engine->options.nfs.url), message,
			     sizeof(message));
	if (error == -ENOENT)
		return 0;
	if (error != 0)
		return fail_region(why, error, message);
	engine->adopted = true;
	last_place_read(&engine->region, &engine->known, sizeof(engine->known));
	return begin_encryption(engine, why);
}

/* Map a new region, or compare the file that was opened with the one that was adopted. */
static int map_region(struct engine *engine, const struct nfsio_stat *st, struct nfsio_failure *why)
{
	struct region_identity identity = {
		.device_bytes = engine->size_bytes,
		.fileid = st->fileid,
		.path_hash = hash_path(engine->options.nfs.url),
	};
	const struct region_plan plan = {
		.slot_count = engine->options.region_pages,
		.version = new_region_version(engine),
		.clear_bytes = engine->options.clear_bytes,
	};
	char message[128];
	int error;

	if (engine->adopted)
		return is_regions_file(engine, st) ? 0 : fail(why, -EINVAL, REGION_OF_ANOTHER_FILE);
	error = region_map(&engine->region, engine->options.region_fd, &identity, &plan, message, sizeof(message));
	return error == 0 ? begin_encryption(engine, why) : fail_region(why, error, message);
}

/* Returns 0, or -errno and *why. */
static int make_cache(struct engine *engine, struct nfsio_failure *why)
{
	struct cache *cache = cache_create(&engine->region);

	engine_lock(engine); /* a connection's thread may look for samples */
	engine->cache = cache;
	engine_unlock(engine);
	return cache != NULL ? 0 : fail(why, -ENOMEM, "");
}

/* Returns 0, or -errno and *why. */
static int make_buffers(struct engine *engine, struct nfsio_failure *why)
{
	size_t long_bytes = (size_t)RUN_PAGES_MAX * SLOT_BYTES, short_bytes = (size_t)SHORT_RUN_PAGES * SLOT_BYTES;
	unsigned long_buffers = nfsio_has_names(engine->ios[0]) ? LIBNFS_LONG_BUFFERS : LONG_BUFFERS;
	size_t bytes = long_buffers * long_bytes + SHORT_WRITE_BACKS * short_bytes;
	uint8_t *at = aligned_alloc(SLOT_BYTES, bytes);

	if (at == NULL)
		return fail(why, -ENOMEM, "");
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

/* What recognising the file takes, which may be when it is opened. Returns 0, or -errno and *why. */
static int prepare_samples(struct engine *engine, struct nfsio_failure *why)
{
	size_t bytes = (size_t)engine->options.connections * SLOT_BYTES;

	engine->samples = aligned_alloc(SLOT_BYTES, bytes);
	if (engine->samples == NULL)
		return fail(why, -ENOMEM, "");
	memset(engine->samples, 0, bytes); /* as make_buffers() */
	engine->options.nfs.samples = &file_samples;
	engine->options.nfs.sample_context = engine;
	return engine->adopted ? make_cache(engine, why) : 0;
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

/* A READ that is refused fails after so long, where there is no soft limit. */
#define REFUSED_READ_MS 30000

/* Does the server refuse the handle in a way that says nothing of the file? It may be another server by now. */
static bool refuses_handle(const struct nfsio_failure *why)
{
	switch (why->error) {
	case -EACCES:
	case -EIO:
	case -EINVAL:
	case -EPERM:
	case -EPROTO:
		return why->phase == NFSIO_CONNECT;
	default:
		return false;
	}
}

/*
 * By the handle that the last worker knew, which needs neither the name nor mountd, and by its name only where the
 * server does not take that. Returns 0, or -errno and *why.
 */
static int open_first(struct engine *engine, struct nfsio_options *options, struct nfsio_failure *why)
{
	int error;

	options->sample_page = engine->samples;
	options->known = knows_file(engine) ? &engine->known : NULL;
	error = nfsio_create(options, &engine->ios[0], why);
	if (error != 0 && options->known != NULL && refuses_handle(why)) {
		options->known = NULL;
		error = nfsio_create(options, &engine->ios[0], why);
	}
	options->known = NULL;
	if (error == 0)
		engine->io_count = 1;
	else if (why->phase == NFSIO_OPEN && error == -EINVAL && why->message[0] == '\0')
		fail(why, error, REGION_OF_ANOTHER_FILE); /* it was compared with the one that is known */
	return error;
}

static int open_connections(struct engine *engine, struct nfsio_failure *why)
{
	struct nfsio_options options = engine->options.nfs;
	int error;

	options.looks = engine->owner_watch != NULL;
	options.refused_read_ms = options.soft_limit_ms > 0 ? options.soft_limit_ms : REFUSED_READ_MS;
	error = open_first(engine, &options, why);
	options.quiet = true; /* the first one logs what there is to say about the server */
	options.like = engine->ios[0];
	while (error == 0 && engine->io_count < engine->options.connections) {
		options.sample_page = engine->samples + (size_t)engine->io_count * SLOT_BYTES;
		error = nfsio_create(&options, &engine->ios[engine->io_count], why);
		if (error == 0)
			engine->io_count++;
	}
	return error;
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

/* What the connections tell about the file and the server. Returns 0, or -errno and *why. */
static int take_file_facts(struct engine *engine, struct nfsio_stat *st, struct nfsio_failure *why)
{
	char message[128];

	nfsio_opened_stat(engine->ios[0], st);
	engine->size_bytes = st->size_bytes;
	engine->piece_bytes = nfsio_max_transfer_bytes(engine->ios[0]);
	if (!nfsio_has_commit(engine->ios[0]))
		engine->options.stable_writes = true;
	if (st->size_bytes > 0 && st->size_bytes % SLOT_BYTES == 0)
		return 0;
	snprintf(message, sizeof(message), "its size, %llu bytes, is not a positive multiple of %u",
		 (unsigned long long)st->size_bytes, SLOT_BYTES);
	return fail(why, -EINVAL, message);
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
	return error == 0 ? 0 : fail(why, error, "");
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
		return fail(why, -ENOMEM, "");
	engine->options.nfs.may_write = owner_watch_may_write;
	engine->options.nfs.may_write_context = engine->owner_watch;
	return 0;
}

int engine_create(const struct engine_options *options, struct engine **out, struct nfsio_failure *why)
{
	struct engine *engine = calloc(1, sizeof(*engine));
	struct nfsio_stat st;
	int error;

	if (engine == NULL)
		return fail(why, -ENOMEM, "");
	engine->options = *options;
	engine->own_region = options->region_fd < 0;
	init_locks(engine);
	error = adopt_region(engine, why);
	if (error == 0)
		error = prepare_samples(engine, why);
	if (error == 0)
		error = create_owner_watch(engine, why);
	if (error == 0)
		error = open_connections(engine, why);
	if (error == 0)
		error = take_file_facts(engine, &st, why);
	if (error == 0)
		error = check_memory(engine, why);
	if (error == 0)
		error = map_region(engine, &st, why);
	if (error == 0 && engine->cache == NULL)
		error = make_cache(engine, why);
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

void engine_destroy(struct engine *engine)
{
	bool all_written = false, is_final = false;

	while (engine->own_region && !all_written && !is_final) {
		all_written = engine_flush(engine) == 0; /* after a soft limit it is tried again */
		engine_lock(engine);
		is_final = engine->gone_too_long || atomic_load(&engine->stolen);
		engine_unlock(engine);
	}
	engine_lock(engine);
	engine->abandon = !all_written;
	if (engine->own_region && !all_written)
		log_line("%u pages are given up that the server did not take", cache_unstable_count(engine->cache));
	engine->stop = true;
	pthread_cond_signal(&engine->work);
	engine_unlock(engine);
	pthread_join(engine->flusher, NULL);
	free_engine(engine);
}

bool engine_is_encrypted(const struct engine *engine)
{
	return engine->region.keys != NULL;
}

uint64_t engine_size_bytes(const struct engine *engine)
{
	return engine->size_bytes;
}

struct region_header *engine_region(const struct engine *engine)
{
	return engine->region.header;
}
