/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Bytes out of the client's socket.
 *
 * When a request leaves the socket, the kernel wakes every thread that sleeps on the client's end, because there is
 * room again (unix_write_space()). The thread that waits for replies is woken for nothing. While a client reads, its
 * requests are therefore only peeked at, each time from where the last peek ended (SO_PEEK_OFF). They leave the socket
 * after the next replies have been sent, when that thread is awake anyway.
 */
#include "nbd/internal.h"
#include "nbd/protocol.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define PEEKED_BYTES_MAX (2 * PEEK_BYTES)

bool nbd_can_peek(const struct nbd_loop *loop)
{
	return loop->may_peek && loop->peeked_bytes <= PEEKED_BYTES_MAX - PEEK_BYTES;
}

ssize_t nbd_receive_pieces(struct nbd_loop *loop, const struct iovec *pieces, size_t count, bool peeks)
{
	uint8_t known[PEEKED_BYTES_MAX];
	size_t known_bytes = peeks ? 0 : loop->peeked_bytes, room_bytes = known_bytes;
	struct iovec all[3] = { { known, known_bytes } };
	struct msghdr message = { .msg_iov = all, .msg_iovlen = count + 1 };
	ssize_t got;

	assert(count <= 2 && known_bytes <= sizeof(known));
	for (size_t i = 0; i < count; i++) {
		all[i + 1] = pieces[i];
		room_bytes += pieces[i].iov_len;
	}
	got = recvmsg(loop->fd, &message, MSG_DONTWAIT | (peeks ? MSG_PEEK : 0));
	/* epoll(7): where less comes than there is room for, nothing is left, and more will be told of */
	if (!loop->will_end && (got < 0 ? errno == EAGAIN : (size_t)got < room_bytes))
		loop->readable = false;
	if (got <= 0)
		return got;
	if (peeks) {
		loop->peeked_bytes += (size_t)got;
		return got;
	}
	if ((size_t)got < known_bytes)
		known_bytes = (size_t)got;
	loop->peeked_bytes -= known_bytes;
	errno = EAGAIN;
	return (size_t)got > known_bytes ? got - (ssize_t)known_bytes : -1;
}

void nbd_take_out(struct nbd_loop *loop)
{
	(void)nbd_receive_pieces(loop, NULL, 0, false);
}
