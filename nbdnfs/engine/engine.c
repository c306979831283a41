/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

/* How many pieces of one large request are in flight at once. */
#define PIECES 16

struct engine {
	/* constant after engine_create() */
	struct nfsio *io;
	uint64_t size_bytes;
};

int engine_create(const struct nfsio_options *options, struct engine **out, struct nfsio_failure *why)
{
	struct engine *engine = calloc(1, sizeof(*engine));
	struct nfsio_stat st;
	int error;

	if (engine == NULL) {
		*why = (struct nfsio_failure){ .error = -ENOMEM };
		return -ENOMEM;
	}
	error = nfsio_open(options, &engine->io, why);
	if (error != 0) {
		free(engine);
		return error;
	}
	nfsio_opened_stat(engine->io, &st);
	engine->size_bytes = st.size_bytes;
	if (st.size_bytes == 0 || st.size_bytes % ENGINE_PAGE_BYTES != 0) {
		*why = (struct nfsio_failure){ .phase = NFSIO_OPEN, .error = -EINVAL };
		snprintf(why->message, sizeof(why->message), "its size, %llu bytes, is no multiple of %d",
			 (unsigned long long)st.size_bytes, ENGINE_PAGE_BYTES);
		engine_destroy(engine);
		return -EINVAL;
	}
	*out = engine;
	return 0;
}

void engine_destroy(struct engine *engine)
{
	nfsio_close(engine->io);
	free(engine);
}

uint64_t engine_size_bytes(const struct engine *engine)
{
	return engine->size_bytes;
}

static int check_range(const struct engine *engine, uint64_t offset_bytes, uint64_t length_bytes)
{
	if (offset_bytes % ENGINE_PAGE_BYTES != 0 || length_bytes % ENGINE_PAGE_BYTES != 0 || length_bytes == 0 ||
	    offset_bytes > engine->size_bytes || length_bytes > engine->size_bytes - offset_bytes)
		return -EINVAL;
	return 0;
}

/* `data` is only read from when op is NFSIO_WRITE. */
static int transfer(struct engine *engine, enum nfsio_op op, uint8_t *data, uint64_t offset_bytes,
		    uint64_t length_bytes)
{
	uint32_t piece_bytes = nfsio_max_transfer_bytes(engine->io);
	int error = check_range(engine, offset_bytes, length_bytes);

	while (error == 0 && length_bytes > 0) {
		struct nfsio_req reqs[PIECES];
		size_t count = 0;

		while (count < PIECES && length_bytes > 0) {
			uint32_t now_bytes = length_bytes < piece_bytes ? (uint32_t)length_bytes : piece_bytes;

			reqs[count++] = (struct nfsio_req){
				.op = op, .data = data, .offset_bytes = offset_bytes, .length_bytes = now_bytes
			};
			data += now_bytes;
			offset_bytes += now_bytes;
			length_bytes -= now_bytes;
		}
		error = nfsio_transfer(engine->io, reqs, count);
		for (size_t i = 0; error == 0 && i < count; i++)
			if (reqs[i].moved_bytes != reqs[i].length_bytes)
				error = -EIO; /* the file ends before the device: it was cut */
	}
	return error;
}

int engine_read(struct engine *engine, uint8_t *data, uint64_t offset_bytes, uint64_t length_bytes)
{
	return transfer(engine, NFSIO_READ, data, offset_bytes, length_bytes);
}

int engine_write(struct engine *engine, const uint8_t *data, uint64_t offset_bytes, uint64_t length_bytes)
{
	return transfer(engine, NFSIO_WRITE, (uint8_t *)data, offset_bytes, length_bytes);
}

int engine_flush(struct engine *engine)
{
	return 0; /* each write that has returned is stable already */
}

int engine_trim(struct engine *engine, uint64_t offset_bytes, uint64_t length_bytes)
{
	/* Nothing is cached, and the file is never punched: a hole would need space again when memory is short. */
	return check_range(engine, offset_bytes, length_bytes);
}
