/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What struct engine must say when no request is under way: nobody waits, nothing is lent. */
#include "block/internal.h"

#include "sim.h"

#include <string.h>

/* Eight bytes of zeros in a row are not from a random number generator. */
static bool has_zeros(const struct cipher_keys *keys)
{
	static const uint8_t zeros[8];
	uint8_t bytes[sizeof(keys->tag) + sizeof(keys->stream)];

	memcpy(bytes, keys->tag, sizeof(keys->tag));
	memcpy(bytes + sizeof(keys->tag), keys->stream, sizeof(keys->stream));
	for (size_t at = 0; at < sizeof(bytes); at += 8)
		if (memcmp(bytes + at, zeros, 8) == 0)
			return true;
	return false;
}

bool block_knows_directory(const struct engine *engine)
{
	for (unsigned i = 0; i < engine->io_count; i++)
		if (!nfs_knows_directory(engine->ios[i]))
			return false; /* the server has put the look-up off */
	return true;
}

void check_idle_block(struct engine *engine)
{
	if (options.encrypt && (engine->region.cipher == NULL || has_zeros(&engine->region.header->keys)))
		sim_fail("pages are to be encrypted, and the keys are not random");
	if (engine->waiting != 0 || engine->waiting_for_stable != 0 || engine->waiting_for_slot != 0)
		sim_fail("no request is under way, and the engine counts %u that wait, %u for the NAS, %u for a slot",
			 engine->waiting, engine->waiting_for_stable, engine->waiting_for_slot);
	for (unsigned i = 0; i < REGION_REQUESTS; i++)
		if (atomic_load(&waits(engine)->request_since_ms[i]) != 0)
			sim_fail("no request is under way, and the region says that one is");
	for (unsigned i = 0; i < engine->io_count; i++) {
		if (engine->lent[i])
			sim_fail("no request is under way, and connection %u is lent", i);
		check_idle_nfs(engine->ios[i], i);
	}
}
