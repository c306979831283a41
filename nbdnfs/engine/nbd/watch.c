/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Waiting for the client, the NAS and other threads, with epoll(7). The client's socket is edge-triggered (EPOLLET):
 * what was peeked at stays in it (socket.c), and poll(2) would report that every time. If epoll(7) fails, ppoll(2) is
 * used instead, and nothing is peeked at.
 *
 * While the loop gives the rest of a request time to arrive, it does not wait for the client, because each of its sends
 * would end the wait. That wait takes microseconds, so ppoll(2) is used for it.
 */
#include "nbd/internal.h"

#include "base/log.h"

#include <limits.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

/* The first descriptor of the engine's. */
#define ENGINES 2

void nbd_watch_start(struct nbd_loop *loop)
{
	int offset_bytes = 0;

	loop->may_peek = loop->watch_fd >= 0 && setsockopt(loop->fd, SOL_SOCKET, SO_PEEK_OFF, &offset_bytes,
							   sizeof(offset_bytes)) == 0;
}

void nbd_watch_stop(struct nbd_loop *loop)
{
	if (loop->watch_fd >= 0)
		close(loop->watch_fd);
	loop->watch_fd = -1;
	loop->may_peek = false;
}

/* Which events of the client to wait for. */
static struct pollfd client_poll(const struct nbd_loop *loop, bool tells_once)
{
	bool has_replies = loop->replies.head != NULL;
	bool may_receive = !loop->ended && !loop->lacks_place && !loop->receive_lacks_memory && !nbd_gathers(loop);

	return (struct pollfd){
		.fd = loop->ended && !has_replies ? -1 : loop->fd,
		.events = (short)((tells_once || may_receive ? POLLIN : 0) |
				  (has_replies && !loop->send_lacks_memory ? POLLOUT : 0)),
	};
}

/*
 * Register one descriptor, change its events, or remove it. It is open: no other thread closes it while this one polls
 * it. The kernel has already removed one that was closed. Returns false if epoll(7) fails.
 */
static bool tell_of(struct nbd_loop *loop, unsigned i, const struct pollfd *wanted, bool is_known)
{
	struct epoll_event event = { .events = (uint32_t)wanted->events, .data.u32 = i };

	if (wanted->events == 0) {
		(void)epoll_ctl(loop->watch_fd, EPOLL_CTL_DEL, wanted->fd, NULL);
		return true;
	}
	if (i == 0)
		event.events |= EPOLLET | EPOLLRDHUP;
	if (!is_known && epoll_ctl(loop->watch_fd, EPOLL_CTL_ADD, wanted->fd, &event) == 0)
		return true;
	if (!is_known && errno != EEXIST)
		return false;
	return epoll_ctl(loop->watch_fd, EPOLL_CTL_MOD, wanted->fd, &event) == 0;
}

/* Register what has changed. Returns false if epoll(7) fails. */
static bool tell(struct nbd_loop *loop, const struct pollfd fds[POLLED], uint32_t opened)
{
	bool has_opened = opened != loop->watched_opened;

	for (unsigned i = 0; i < POLLED; i++) {
		struct pollfd *watched = &loop->watched[i];
		bool is_known = watched->fd == fds[i].fd && !(has_opened && i >= ENGINES);

		if (fds[i].fd >= 0 && !(is_known && watched->events == fds[i].events) &&
		    !tell_of(loop, i, &fds[i], is_known))
			return false;
		*watched = (struct pollfd){ .fd = fds[i].events != 0 ? fds[i].fd : -1, .events = fds[i].events };
	}
	loop->watched_opened = opened;
	return true;
}

static int wait_by_epoll(struct nbd_loop *loop, struct pollfd fds[POLLED], uint64_t now_us, uint64_t until_us)
{
	struct epoll_event events[POLLED];
	uint64_t ms = until_us > now_us ? (until_us - now_us + 999) / 1000 : 0;
	int most_ms = until_us == NO_TIME ? -1 : ms < INT_MAX ? (int)ms : INT_MAX;
	int count = epoll_wait(loop->watch_fd, events, POLLED, most_ms);

	for (int i = 0; i < count; i++)
		fds[events[i].data.u32].revents = (short)events[i].events;
	return count;
}

static int wait_by_poll(struct pollfd fds[POLLED], uint64_t now_us, uint64_t until_us)
{
	uint64_t us = until_us > now_us ? until_us - now_us : 0;
	struct timespec time = { .tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000) * 1000 };

	return ppoll(fds, POLLED, until_us == NO_TIME ? NULL : &time, NULL);
}

bool nbd_watch(struct nbd_loop *loop, struct pollfd fds[POLLED], uint32_t opened, uint64_t now_us, uint64_t until_us)
{
	int count;

	fds[0] = client_poll(loop, true);
	if (loop->watch_fd >= 0 && !nbd_gathers(loop) && !tell(loop, fds, opened)) {
		log_line("epoll fails (%s): going on with poll, which takes more processor time", strerror(errno));
		nbd_watch_stop(loop);
	}
	if (loop->watch_fd >= 0 && !nbd_gathers(loop)) {
		count = wait_by_epoll(loop, fds, now_us, until_us);
	} else {
		if (loop->watch_fd < 0 && loop->peeked_bytes > 0)
			nbd_take_out(loop);
		fds[0] = client_poll(loop, false);
		count = wait_by_poll(fds, now_us, until_us);
	}
	if (count < 0)
		return false;
	loop->readable |= (fds[0].revents & POLLIN) != 0;
	loop->will_end |= (fds[0].revents & (EPOLLRDHUP | POLLHUP | POLLERR)) != 0;
	loop->has_left |= (fds[0].revents & (POLLHUP | POLLERR)) != 0;
	return true;
}
