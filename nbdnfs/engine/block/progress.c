/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The engine's lock, and the requests that wait for what other threads do under it.
 *
 * The lock is dropped here only, and each time those that wait are woken if anything has happened that they may wait
 * for: no caller has to think of it, and none broadcasts for nothing. The cache notes what happens to slots
 * (cache_take_changed()), engine->changed the rest.
 */
#include "block/internal.h"

#include <unistd.h>

void engine_lock(struct engine *engine)
{
	pthread_mutex_lock(&engine->lock);
}

/* What one of the attendant's requests waits for may have come. */
static void call_attendant(struct engine *engine)
{
	uint64_t one = 1;

	engine->attendant_waits = false;
	atomic_store(&engine->attendant_progress, true);
	if (!pthread_equal(engine->attendant, pthread_self())) /* else it looks before it polls */
		(void)!write(engine->attendant_fd, &one, sizeof(one));
}

static void wake_waiting(struct engine *engine)
{
	bool changed = (engine->cache != NULL && cache_take_changed(engine->cache)) || engine->changed;

	assert_locked(&engine->lock);
	engine->changed = false;
	/* a request that is not waiting yet looks for itself first, under the lock */
	if (changed && engine->waiting > 0)
		pthread_cond_broadcast(&engine->progress);
	if (changed && engine->attendant_waits)
		call_attendant(engine);
}

void engine_unlock(struct engine *engine)
{
	wake_waiting(engine);
	pthread_mutex_unlock(&engine->lock);
}

static struct timespec at(uint64_t ms)
{
	return (struct timespec){ .tv_sec = (time_t)(ms / 1000), .tv_nsec = (long)(ms % 1000) * 1000000 };
}

static void wait_until(struct engine *engine, pthread_cond_t *condition, uint64_t end_ms)
{
	struct timespec end = at(end_ms);

	wake_waiting(engine);
	if (end_ms == NO_END)
		pthread_cond_wait(condition, &engine->lock);
	else
		pthread_cond_timedwait(condition, &engine->lock, &end);
}

void engine_wait(struct engine *engine, uint64_t end_ms)
{
	engine->waiting++;
	wait_until(engine, &engine->progress, end_ms);
	engine->waiting--;
}

void engine_wait_for_work(struct engine *engine, uint64_t end_ms)
{
	wait_until(engine, &engine->work, end_ms);
}
