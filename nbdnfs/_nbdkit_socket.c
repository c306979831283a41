/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * read(2) and send(2) for nbdkit, which the worker preloads (LD_PRELOAD): the same to the caller, with fewer wake-ups
 * over a Unix socket. Not a Python module. docs/decisions/0016 has the figures.
 *
 * A thread that sleeps in read(2) on a Unix socket is woken whenever the peer takes in something that was sent to it
 * (net/unix/af_unix.c: unix_write_space() wakes who waits for input, too). poll(2) hears only what it asked for.
 * nbdkit always has a thread there, waiting for the next request.
 *
 * nbdkit sends the head of a reply and its data by two calls, the first with MSG_MORE, which a Unix socket ignores
 * and the reader is woken for both. Here the head waits for the data.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))
/* No longer than that is the head of a reply: the data of a request are read without asking whether they are there. */
#define HEAD_BYTES_MAX 64

/* What waits for the next send() on its socket. Each thread's own; initial-exec: there from the start, no malloc(). */
static __thread __attribute__((tls_model("initial-exec"))) struct {
	size_t bytes;
	int fd;
	char data[HEAD_BYTES_MAX];
} head;

static ssize_t plain_read(int fd, void *buffer, size_t bytes)
{
	struct iovec all = { .iov_base = buffer, .iov_len = bytes };

	return readv(fd, &all, 1);
}

EXPORTED ssize_t read(int fd, void *buffer, size_t bytes)
{
	if (bytes == 0 || bytes > HEAD_BYTES_MAX)
		return plain_read(fd, buffer, bytes);
	for (;;) {
		struct pollfd input = { .fd = fd, .events = POLLIN };
		ssize_t found = recvfrom(fd, buffer, bytes, MSG_DONTWAIT, NULL, NULL);

		if (found >= 0)
			return found;
		if (errno == ENOTSOCK)
			return plain_read(fd, buffer, bytes);
		if (errno != EAGAIN || (fcntl(fd, F_GETFL) & O_NONBLOCK))
			return -1;
		if (poll(&input, 1, -1) < 0)
			return -1; /* a signal: read() would say the same */
	}
}

/* The head, and what belongs to it. */
static ssize_t send_with_head(int fd, const void *data, size_t bytes, int flags)
{
	for (;;) {
		struct iovec parts[2] = {
			{ .iov_base = head.data, .iov_len = head.bytes },
			{ .iov_base = (void *)data, .iov_len = bytes },
		};
		struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };
		ssize_t sent = sendmsg(fd, &message, flags);

		if (sent < 0) {
			if (errno != EINTR && errno != EAGAIN)
				head.bytes = 0; /* the connection is over */
			return -1;
		}
		if ((size_t)sent > head.bytes) {
			sent -= (ssize_t)head.bytes;
			head.bytes = 0;
			return sent;
		}
		/* not more than the head has gone, and the caller is owed an answer for his part */
		head.bytes -= (size_t)sent;
		memmove(head.data, head.data + sent, head.bytes);
		if (head.bytes == 0)
			return sendto(fd, data, bytes, flags, NULL, 0);
	}
}

EXPORTED ssize_t send(int fd, const void *data, size_t bytes, int flags)
{
	if (head.bytes > 0 && fd == head.fd)
		return send_with_head(fd, data, bytes, flags);
	if (!(flags & MSG_MORE) || bytes > HEAD_BYTES_MAX)
		return sendto(fd, data, bytes, flags, NULL, 0);
	memcpy(head.data, data, bytes);
	head.bytes = bytes;
	head.fd = fd;
	return (ssize_t)bytes;
}
