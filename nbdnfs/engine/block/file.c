/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The state of the file and of the connections to it, for counters and log. */
#include "block/internal.h"

#include "base/log.h"

uint64_t file_truncated_bytes(const struct engine *engine)
{
	uint64_t least = UINT64_MAX;

	for (unsigned i = 0; i < engine->io_count; i++)
		if (nfsio_truncated_bytes(engine->ios[i]) < least)
			least = nfsio_truncated_bytes(engine->ios[i]);
	return least;
}

static bool is_unlinked(const struct engine *engine)
{
	for (unsigned i = 0; i < engine->io_count; i++)
		if (nfsio_is_unlinked(engine->ios[i]))
			return true;
	return false;
}

/* What answers to transfers have shown. */
static enum region_file shown_state(const struct engine *engine)
{
	if (is_unlinked(engine))
		return REGION_FILE_DELETED;
	return file_truncated_bytes(engine) < UINT64_MAX ? REGION_FILE_TRUNCATED : REGION_FILE_THERE;
}

/* What connecting has found says more than that. Lock held. */
static enum region_file file_state(const struct engine *engine)
{
	switch (engine->condition) {
	case NFSIO_FILE_DELETED:
		return REGION_FILE_DELETED;
	case NFSIO_FILE_REPLACED:
		return REGION_FILE_REPLACED;
	case NFSIO_UP:
	case NFSIO_LINK_DOWN:
		break;
	}
	return shown_state(engine);
}

void file_look_locked(struct engine *engine)
{
	_Atomic uint64_t *counter = &counters(engine)->file_state;
	enum region_file state = file_state(engine);
	bool had_no_name = engine->has_no_name;

	assert_locked(&engine->lock);
	if (atomic_load_explicit(counter, memory_order_relaxed) == state)
		return;
	set_counter(counter, state);
	engine->has_no_name = state == REGION_FILE_DELETED && is_unlinked(engine);
	if (state == REGION_FILE_TRUNCATED)
		log_line("the file was truncated to %llu bytes: what lay beyond is lost, reading it is an error",
			 (unsigned long long)file_truncated_bytes(engine));
	else if (engine->has_no_name)
		log_line("the file was deleted on the server and survives only while open: stop using it now");
	else if (had_no_name && state == REGION_FILE_THERE)
		log_line("the file has a name on the server again");
}

void file_look(struct engine *engine)
{
	if (shown_state(engine) == REGION_FILE_THERE &&
	    atomic_load_explicit(&counters(engine)->file_state, memory_order_relaxed) == REGION_FILE_THERE)
		return;
	engine_lock(engine);
	file_look_locked(engine);
	engine_unlock(engine);
}

/* A page by which nfsio recognises the file. In nfsio's threads, without a lock. */
static bool sample_page(void *context, unsigned number, uint64_t *offset_bytes, uint64_t *proof)
{
	struct engine *engine = context;
	uint64_t page = 0;
	bool found = false;

	engine_lock(engine);
	/* spread over the device: where one page is wrong, its neighbours may be, too */
	if (engine->cache != NULL)
		found = cache_known_page(engine->cache, number * 0x9e3779b97f4a7c15u % engine->region.page_count, &page,
					 proof);
	engine_unlock(engine);
	*offset_bytes = page * SLOT_BYTES;
	return found;
}

/* Whether it is the page, as the server returned it. In nfsio's threads. */
static bool is_sample(void *context, uint64_t offset_bytes, uint64_t proof, uint8_t *data)
{
	struct engine *engine = context;

	return proof_open(&engine->region, offset_bytes / SLOT_BYTES, proof, data);
}

const struct nfsio_samples file_samples = { .choose = sample_page, .is_right = is_sample };

/* The next worker is to find the file where this connection has found it. Lock held. */
static void keep_place(struct engine *engine, const struct nfsio_known *known)
{
	_Static_assert(sizeof(*known) <= LAST_PLACE_DATA_BYTES, "it fits");
	assert_locked(&engine->lock);
	last_place_keep(&engine->region, known, sizeof(*known));
}

/* The condition of a connection has changed: sum up all of them. In nfsio's threads, without a lock. */
static void condition_changed(void *context)
{
	const struct watched *watched = context;
	struct engine *engine = watched->engine;
	struct nfsio_known known;
	enum nfsio_condition worst = NFSIO_UP;
	uint64_t connects = 0;
	int64_t silent_since_ms = 0;
	bool link_down = false;

	nfsio_known(watched->io, &known);
	engine_lock(engine);
	keep_place(engine, &known);
	engine->gone_too_long = false;
	for (unsigned i = 0; i < engine->io_count; i++) {
		struct nfsio_state state;

		nfsio_state(engine->ios[i], &state);
		connects += state.connects;
		engine->is_down[i] = state.condition != NFSIO_UP;
		engine->gone_too_long |= state.gone_too_long;
		link_down |= state.condition == NFSIO_LINK_DOWN;
		if (state.condition > worst)
			worst = state.condition;
		if (state.silent_since_ms > silent_since_ms)
			silent_since_ms = state.silent_since_ms;
	}
	set_counter(&counters(engine)->disconnected, link_down);
	set_counter(&counters(engine)->reconnects, engine->reconnects_before + connects - engine->io_count);
	engine->condition = worst;
	file_look_locked(engine);
	engine->changed = true;
	engine_unlock(engine);
	for (unsigned i = 0; silent_since_ms != 0 && i < engine->io_count; i++)
		nfsio_suspect(engine->ios[i], silent_since_ms);
}

void file_watch(struct engine *engine, unsigned number)
{
	struct watched *watched = &engine->watched[number];

	*watched = (struct watched){ .engine = engine, .io = engine->ios[number] };
	nfsio_watch(watched->io, condition_changed, watched);
}
