/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What all requests have in common. */
#include "block/internal.h"

#include <errno.h>

int check_range(const struct engine *engine, uint64_t offset_bytes, uint64_t length_bytes)
{
	if (offset_bytes % SLOT_BYTES != 0 || length_bytes % SLOT_BYTES != 0 || length_bytes == 0 ||
	    offset_bytes > engine->size_bytes || length_bytes > engine->size_bytes - offset_bytes)
		return -EINVAL;
	return 0;
}

_Atomic uint64_t *request_began(struct engine *engine, uint64_t since_ms)
{
	for (unsigned i = 0; i < REGION_REQUESTS; i++) {
		_Atomic uint64_t *place = &waits(engine)->request_since_ms[i];
		uint64_t none = 0;

		if (atomic_compare_exchange_strong_explicit(place, &none, since_ms, memory_order_relaxed,
							    memory_order_relaxed))
			return place;
	}
	return NULL;
}

void request_ended(_Atomic uint64_t *place)
{
	if (place != NULL)
		set_counter(place, 0);
}

void note_read(struct engine *engine, uint64_t length_bytes, uint64_t started_us, int error)
{
	if (error != 0) {
		count(&engine->region.header->failed_reads, 1);
		set_counter(&engine->region.header->failed_read_ms, now_ms());
	}
	count(&counters(engine)->reads, 1);
	count(&counters(engine)->read_bytes, length_bytes);
	count_duration(counters(engine)->read_us, now_us() - started_us);
}

void note_write(struct engine *engine, uint64_t length_bytes, uint64_t started_us)
{
	count(&counters(engine)->writes, 1);
	count(&counters(engine)->written_bytes, length_bytes);
	count_duration(counters(engine)->write_us, now_us() - started_us);
}

int result_of(struct engine *engine)
{
	return atomic_load(&engine->stolen) ? -EIO : 0;
}

bool may_fill(const struct engine *engine, uint64_t page, bool fua)
{
	return !fua && (engine->waiting_for_stable == 0 || cache_page_is_stable(engine->cache, page, UINT64_MAX));
}

bool may_wait(struct engine *engine, uint64_t since_ms, uint64_t *end_ms)
{
	uint64_t limit_ms = engine->options.nfs.soft_limit_ms;

	if (engine->gone_too_long || atomic_load(&engine->stolen))
		return false;
	if (limit_ms == 0) {
		*end_ms = NO_END; /* a hard mount: for as long as the server takes */
		return true;
	}
	*end_ms = since_ms;
	if (engine->progress_at_ms > *end_ms)
		*end_ms = engine->progress_at_ms;
	if (engine->held_until_ms > *end_ms)
		*end_ms = engine->held_until_ms; /* the holds are the engine's doing, not the server's */
	*end_ms += limit_ms;
	return now_ms() < *end_ms;
}

uint64_t read_ends_ms(const struct engine *engine, uint64_t since_ms)
{
	uint64_t limit_ms = engine->options.nfs.soft_limit_ms;

	return limit_ms == 0 ? NO_END : since_ms + limit_ms;
}

struct nfsio_req *add_read(const struct engine *engine, struct nfsio_req *reqs, uint32_t *used, uint64_t page,
			   uint8_t *target, uint64_t since_ms)
{
	struct nfsio_req *last = *used > 0 ? &reqs[*used - 1] : NULL;

	if (last != NULL && last->data + last->length_bytes == target &&
	    last->length_bytes + SLOT_BYTES <= engine->piece_bytes) {
		last->length_bytes += SLOT_BYTES;
		return last;
	}
	reqs[*used] = (struct nfsio_req){
		.op = NFSIO_READ,
		.offset_bytes = page * SLOT_BYTES,
		.length_bytes = SLOT_BYTES,
		.data = target,
		.waits_since_ms = (int64_t)since_ms,
	};
	return &reqs[(*used)++];
}

int check_page(struct engine *engine, uint64_t page, uint8_t *data, uint64_t *proof)
{
	enum cache_lookup newer = CACHE_MISS;

	engine_lock(engine);
	*proof = cache_proof(engine->cache, page);
	if (*proof == NO_PROOF) /* filled since, perhaps: the server's bytes cannot be checked, nor decrypted */
		newer = cache_read(engine->cache, page, data);
	engine_unlock(engine);
	if (newer == CACHE_HIT)
		return 0;
	if (!proof_open(&engine->region, page, *proof, data))
		return -EAGAIN;
	if (*proof != NO_PROOF)
		return 0;
	/* beyond a truncation the file may have zeros again, which are not what was written */
	return (page + 1) * SLOT_BYTES <= file_truncated_bytes(engine) ? 0 : -EIO;
}
