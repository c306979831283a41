/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Receiving by a thread that polls more than this connection. */
#include "nfs/internal.h"

void nfsio_attend(struct nfsio *io, int wake_fd, uint32_t tick_ms)
{
	pthread_mutex_lock(&io->lock);
	assert(io->attendant_fd < 0);
	io->attendant_fd = wake_fd;
	io->attended_tick_ms = tick_ms;
	pthread_mutex_unlock(&io->lock);
}

/* The attendant lets go of a connection that the I/O thread is to throw away. Lock held. */
static void let_go(struct nfsio *io)
{
	if (io->receiver != RECEIVER_ATTENDANT)
		return;
	io->is_let_go = false;
	io->receiver = RECEIVER_NONE;
	call_io_thread(io);
}

/* Have it stop polling while the sockets are open: once it lets go, the I/O thread closes them. Lock held. */
static void stop_polling(struct nfsio *io, struct pollfd fds[NFSIO_POLLED])
{
	io->is_let_go = true;
	fds[0] = (struct pollfd){ .fd = io->transport->socket(io) };
	fds[2] = (struct pollfd){ .fd = io->probe.fd };
}

int nfsio_before_poll(struct nfsio *io, struct pollfd fds[NFSIO_POLLED], uint32_t *opened)
{
	int timeout_ms = -1;

	for (int i = 0; i < NFSIO_POLLED; i++)
		fds[i] = (struct pollfd){ .fd = -1 };
	pthread_mutex_lock(&io->lock);
	assert(io->attendant_fd >= 0);
	if (!is_up(io) || io->broken || atomic_load(&io->stop)) {
		if (io->receiver == RECEIVER_ATTENDANT && !io->is_let_go) {
			stop_polling(io, fds);
			timeout_ms = 0;
		} else {
			let_go(io); /* publish() calls the attendant again */
		}
	} else if (io->receiver != RECEIVER_WAITER) { /* one that waits for its answer still calls the attendant then */
		io->receiver = RECEIVER_ATTENDANT; /* the I/O thread notices when its poll() ends */
		timeout_ms = before_poll(io, fds);
	}
	*opened = (uint32_t)io->state.connects + io->probe.opened;
	pthread_mutex_unlock(&io->lock);
	return timeout_ms;
}

void nfsio_after_poll(struct nfsio *io, const struct pollfd fds[NFSIO_POLLED])
{
	pthread_mutex_lock(&io->lock);
	if (io->receiver == RECEIVER_ATTENDANT) {
		io->polls_until_ms = 0;
		if (!io->is_let_go)
			after_poll(io, fds);
	}
	pthread_mutex_unlock(&io->lock);
}

void nfsio_leave(struct nfsio *io)
{
	pthread_mutex_lock(&io->lock);
	io->attendant_fd = -1;
	let_go(io);
	call_io_thread(io);
	pthread_mutex_unlock(&io->lock);
}
