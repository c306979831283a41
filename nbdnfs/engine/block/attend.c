/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The attendant: the thread that makes requests in steps, and receives. It attends the connection that pages are
 * written over, and one more for its reads, which do not queue behind them; all other connections stay with their own
 * threads.
 */
#include "block/internal.h"

static unsigned attended(const struct engine *engine)
{
	return engine->io_count < ENGINE_ATTENDED ? engine->io_count : ENGINE_ATTENDED;
}

void engine_attend(struct engine *engine, int wake_fd, uint32_t tick_ms)
{
	engine_lock(engine);
	assert(engine->attendant_fd < 0);
	engine->attendant = pthread_self();
	engine->attendant_fd = wake_fd;
	for (unsigned i = 1; i < attended(engine); i++)
		engine->lent[i] = true; /* to the attendant, for good */
	engine_unlock(engine);
	for (unsigned i = 0; i < attended(engine); i++)
		nfsio_attend(engine->ios[i], wake_fd, tick_ms);
}

int engine_before_poll(struct engine *engine, struct pollfd fds[ENGINE_POLLED], uint32_t *opened)
{
	int timeout_ms = -1;

	*opened = 0;
	for (unsigned i = 0; i < ENGINE_POLLED; i++)
		fds[i] = (struct pollfd){ .fd = -1 };
	for (unsigned i = 0; i < attended(engine); i++) {
		uint32_t its;
		int ms = nfsio_before_poll(engine->ios[i], fds + (size_t)i * NFSIO_POLLED, &its);

		*opened += its;
		if (ms >= 0 && (timeout_ms < 0 || ms < timeout_ms))
			timeout_ms = ms;
	}
	return atomic_load(&engine->attendant_progress) ? 0 : timeout_ms;
}

void engine_after_poll(struct engine *engine, const struct pollfd fds[ENGINE_POLLED])
{
	for (unsigned i = 0; i < attended(engine); i++)
		nfsio_after_poll(engine->ios[i], fds + (size_t)i * NFSIO_POLLED);
}

bool engine_take_progress(struct engine *engine)
{
	return atomic_exchange(&engine->attendant_progress, false);
}

void engine_leave(struct engine *engine)
{
	for (unsigned i = 0; i < attended(engine); i++)
		nfsio_leave(engine->ios[i]);
	engine_lock(engine);
	assert(engine->attendant_fd >= 0 && pthread_equal(engine->attendant, pthread_self()));
	engine->attendant_fd = -1;
	engine->attendant_waits = false;
	for (unsigned i = 1; i < attended(engine); i++)
		engine->lent[i] = false;
	engine_unlock(engine);
}
