/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fault tool, for LD_PRELOAD: a machine that has little memory. On Unix sockets every third send of a message and every
 * third receive fails for want of it, and the other sends send little. No receive is cut short: one that brings less
 * than it has room for has emptied the socket, says epoll(7). Each thread has a count of its sends and one of its
 * receives: what fails goes well when it is tried again, whatever else is called in between. With one count for all, a
 * thread that makes three calls in turns would find that always the same one fails.
 *
 * While `no_send` is set no send goes well.
 *
 * With LAST_WATCHED in the environment sockets go well, and the epoll(7) of a loop takes so many descriptors, no more.
 * It is known by the first of them, which has EPOLLET; Python's own have none.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>

static _Thread_local unsigned sends, receives;
atomic_bool no_send;

static int is_poor(int fd)
{
	struct sockaddr_storage address;
	socklen_t length = sizeof(address);

	return getenv("LAST_WATCHED") == NULL && getsockname(fd, (struct sockaddr *)&address, &length) == 0 &&
	       address.ss_family == AF_UNIX;
}

/* At most so many bytes, of the first piece alone, so that nothing is copied here. */
static void shorten(struct msghdr *message, size_t most)
{
	if (message->msg_iovlen > 1)
		message->msg_iovlen = 1;
	if (message->msg_iovlen == 1 && message->msg_iov->iov_len > most)
		message->msg_iov->iov_len = most;
}

/* Which call this is; it fails where that is 0. */
static unsigned next(unsigned *calls)
{
	unsigned number = (*calls)++;

	errno = number % 2 ? ENOBUFS : ENOMEM;
	return number % 3 == 0 ? 0 : number;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
	static ssize_t (*real)(int, const struct msghdr *, int);
	unsigned number = 1;
	struct msghdr less = *message;
	struct iovec piece;

	if (real == NULL)
		*(void **)&real = dlsym(RTLD_NEXT, "sendmsg");
	if (is_poor(fd) && message->msg_iovlen > 0) {
		number = next(&sends);
		number = no_send ? 0 : number;
		piece = message->msg_iov[0];
		less.msg_iov = &piece;
		shorten(&less, number * 37 % 5000 + 1);
	}
	return number == 0 ? -1 : real(fd, &less, flags);
}

/* The engine's alone, in the handshake: Python's have no such flag. */
ssize_t send(int fd, const void *data, size_t length, int flags)
{
	static ssize_t (*real)(int, const void *, size_t, int);

	if (real == NULL)
		*(void **)&real = dlsym(RTLD_NEXT, "send");
	if ((flags & MSG_NOSIGNAL) != 0 && is_poor(fd) && next(&sends) == 0)
		return -1;
	return real(fd, data, length, flags);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
	static ssize_t (*real)(int, struct msghdr *, int);

	if (real == NULL)
		*(void **)&real = dlsym(RTLD_NEXT, "recvmsg");
	if (is_poor(fd) && message->msg_iovlen > 0 && next(&receives) == 0)
		return -1;
	return real(fd, message, flags);
}

int epoll_ctl(int fd, int operation, int of, struct epoll_event *event)
{
	static int (*real)(int, int, int, struct epoll_event *);
	static _Thread_local int loop = -1, watched; /* a loop has a thread of its own */
	const char *last = getenv("LAST_WATCHED");

	if (real == NULL)
		*(void **)&real = dlsym(RTLD_NEXT, "epoll_ctl");
	if (operation == EPOLL_CTL_ADD && (event->events & EPOLLET) != 0) {
		loop = fd;
		watched = 0;
	}
	if (last != NULL && operation == EPOLL_CTL_ADD && fd == loop && ++watched > atoi(last)) {
		errno = ENOSPC;
		return -1;
	}
	return real(fd, operation, of, event);
}
