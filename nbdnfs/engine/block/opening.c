/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The file and the region. A new region is for the file that was opened; one that an earlier worker has left comes
 * first, because it says where the file is and how to recognise it.
 */
#include "block/internal.h"

#include "base/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int engine_fail(struct nfsio_failure *why, int error, const char *message)
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

/*
 * Its size is what the server says, and so is what the region locks. A region that a worker has left is taken over
 * whatever its size: it is in memory already, with acknowledged pages. Returns 0, or -EFBIG and *why.
 */
static int check_memory(const struct engine *engine, struct nfsio_failure *why)
{
	uint64_t bytes = region_size_bytes(engine->size_bytes, engine->options.region_pages,
					   engine->options.region_version);
	uint64_t memory_bytes = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGE_SIZE);
	uint64_t limit_bytes = memory_bytes / ENGINE_MEMORY_SHARE;
	char message[sizeof(why->message)];

	if (limit_bytes < ENGINE_MEMORY_MIN_BYTES)
		limit_bytes = ENGINE_MEMORY_MIN_BYTES;
	if (bytes <= limit_bytes || engine->adopted)
		return 0;
	snprintf(message, sizeof(message),
		 "its %llu GiB and a region of %llu MiB need %llu MiB of locked memory, and at most %llu MiB may be"
		 " locked on this machine (an eighth of its memory, or 64 MiB)",
		 (unsigned long long)(engine->size_bytes >> 30),
		 (unsigned long long)engine->options.region_pages * SLOT_BYTES >> 20, (unsigned long long)(bytes >> 20),
		 (unsigned long long)(limit_bytes >> 20));
	return engine_fail(why, -EFBIG, message);
}

/* Returns 0, or -errno and *why. */
static int make_cache(struct engine *engine, struct nfsio_failure *why)
{
	struct cache *cache = cache_create(&engine->region);

	engine_lock(engine); /* a connection's thread may look for samples */
	engine->cache = cache;
	engine_unlock(engine);
	return cache != NULL ? 0 : engine_fail(why, -ENOMEM, "");
}

static int fail_region(struct nfsio_failure *why, int error, const char *message)
{
	return engine_fail(why, error, message[0] != '\0' ? message : strerror(-error));
}

/* The region is mapped. Returns 0, or -errno and *why. */
static int begin_encryption(const struct engine *engine, struct nfsio_failure *why)
{
	if (is_encrypted(engine) && cipher_init(engine->region.cipher->kind) != 0)
		return engine_fail(why, -ENOSYS, "libsodium cannot be used on this machine");
	if (is_encrypted(engine) != region_is_encrypted(engine->options.region_version))
		log_line("pages are%s encrypted, as when the device started; the setting counts when it starts again",
			 is_encrypted(engine) ? "" : " not");
	return 0;
}

/* Of the region's file. A worker that kept no place was killed early, or is of an older version. */
static void read_known(struct engine *engine)
{
	const struct region_identity *identity = &engine->region.header->identity;
	struct nfsio_known *known = &engine->known;

	if (!last_place_read(&engine->region, known, sizeof(*known)))
		*known = (struct nfsio_known){
			.size_bytes = identity->device_bytes,
			.fileid = identity->fileid,
		};
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
	read_known(engine);
	return begin_encryption(engine, why);
}

/* What recognising the file takes, which may be when it is opened. Returns 0, or -errno and *why. */
static int prepare_samples(struct engine *engine, struct nfsio_failure *why)
{
	size_t bytes = (size_t)engine->options.connections * SLOT_BYTES;

	engine->samples = aligned_alloc(SLOT_BYTES, bytes);
	if (engine->samples == NULL)
		return engine_fail(why, -ENOMEM, "");
	memset(engine->samples, 0, bytes); /* as make_buffers() */
	engine->options.nfs.samples = &file_samples;
	engine->options.nfs.sample_context = engine;
	return engine->adopted ? make_cache(engine, why) : 0;
}

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
	struct nfsio_known by_name = engine->known;
	int error;

	options->sample_page = engine->samples;
	options->known = engine->adopted ? &engine->known : NULL;
	error = nfsio_create(options, &engine->ios[0], why);
	if (error != 0 && options->known != NULL && by_name.mount_bytes > 0 && refuses_handle(why)) {
		by_name.file.length_bytes = 0; /* another file may have the name, and even the number */
		options->known = &by_name;
		error = nfsio_create(options, &engine->ios[0], why);
	}
	options->known = NULL;
	if (error == 0)
		engine->io_count = 1;
	else if (why->phase == NFSIO_RECOGNISE)
		engine_fail(why, error, REGION_OF_ANOTHER_FILE);
	return error;
}

/* A READ that is refused fails after so long, where there is no soft limit. */
#define REFUSED_READ_MS 30000

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
		else if (why->phase == NFSIO_RECOGNISE)
			error = engine_fail(why, -EAGAIN, "another file was given its name while it was opened");
	}
	return error;
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
	return engine_fail(why, -EINVAL, message);
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
		.version = engine->options.region_version,
		.clear_bytes = engine->options.clear_bytes,
	};
	char message[128];
	int error;

	if (engine->adopted) /* nfsio has recognised the file, which may only have grown */
		return st->size_bytes == engine->region.header->identity.device_bytes
			       ? 0
			       : engine_fail(why, -EINVAL, REGION_OF_ANOTHER_FILE);
	error = region_map(&engine->region, engine->options.region_fd, &identity, &plan, message, sizeof(message));
	return error == 0 ? begin_encryption(engine, why) : fail_region(why, error, message);
}

int engine_open(struct engine *engine, struct nfsio_failure *why)
{
	struct nfsio_stat st;
	int error = adopt_region(engine, why);

	if (error == 0)
		error = prepare_samples(engine, why);
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
	return error;
}
