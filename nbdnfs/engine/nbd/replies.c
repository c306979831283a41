/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Replies that are ready, and sending them: many with one sendmsg(2), which never waits. */
#include "nbd/internal.h"
#include "nbd/protocol.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define REPLIES_AT_ONCE 32

/* For a client, of any -errno: those that the protocol knows. */
static uint32_t error_number(int error)
{
	switch (error) {
	case 0:
		return 0;
	case -EPERM:
	case -EROFS:
		return NBD_EPERM;
	case -ENOMEM:
		return NBD_ENOMEM;
	case -EINVAL:
		return NBD_EINVAL;
	case -ENOSPC:
	case -EDQUOT:
	case -EFBIG:
		return NBD_ENOSPC;
	default:
		return NBD_EIO;
	}
}

void nbd_reply(struct nbd_loop *loop, struct request *request, int error)
{
	uint8_t *at = put_be32(request->head, NBD_REPLY_MAGIC);

	assert(error <= 0 && error != -EAGAIN && error != -EINPROGRESS);
	engine_note_result(&request->step);
	request->error = error;
	at = put_be32(at, error_number(error));
	memcpy(at, &request->cookie, sizeof(request->cookie));
	queue_push(&loop->replies, request);
}

/* The data that follows the head. */
static size_t data_bytes(const struct request *request)
{
	return request->type == NBD_CMD_READ && request->error == 0 ? request->length_bytes : 0;
}

/* Take `sent` bytes off the queue, and free the places of what has gone. */
static void note_sent(struct nbd_loop *loop, size_t sent)
{
	loop->sent_bytes += sent;
	while (loop->replies.head != NULL) {
		size_t length = NBD_REPLY_BYTES + data_bytes(loop->replies.head);

		if (loop->sent_bytes < length)
			return;
		loop->sent_bytes -= length;
		nbd_place_free(loop, queue_pop(&loop->replies));
	}
	assert(loop->sent_bytes == 0);
}

static void drop_replies(struct nbd_loop *loop)
{
	while (loop->replies.head != NULL)
		nbd_place_free(loop, queue_pop(&loop->replies));
	loop->sent_bytes = 0;
}

/* What is to be sent next. Returns how many. */
static size_t gather(const struct nbd_loop *loop, struct iovec *pieces)
{
	size_t count = 0, skip = loop->sent_bytes;

	for (struct request *request = loop->replies.head; request != NULL && count + 2 <= 2 * REPLIES_AT_ONCE;
	     request = request->next) {
		struct iovec parts[2] = {
			{ .iov_base = request->head, .iov_len = NBD_REPLY_BYTES },
			{ .iov_base = request->data, .iov_len = data_bytes(request) },
		};

		for (unsigned i = 0; i < 2; i++) {
			if (skip >= parts[i].iov_len) {
				skip -= parts[i].iov_len;
				continue;
			}
			parts[i].iov_base = (uint8_t *)parts[i].iov_base + skip;
			parts[i].iov_len -= skip;
			pieces[count++] = parts[i];
			skip = 0;
		}
	}
	return count;
}

void nbd_send_replies(struct nbd_loop *loop)
{
	bool has_sent = false;

	while (loop->replies.head != NULL && !loop->gone) {
		struct iovec pieces[2 * REPLIES_AT_ONCE];
		struct msghdr message = { .msg_iov = pieces, .msg_iovlen = gather(loop, pieces) };
		ssize_t sent = sendmsg(loop->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);

		has_sent |= sent >= 0;
		if (sent >= 0)
			note_sent(loop, (size_t)sent);
		else if (errno == EAGAIN || nbd_lacks_memory(&loop->send_lacks_memory, errno))
			break;
		else if (errno != EINTR)
			nbd_client_left(loop);
	}
	if (loop->gone)
		drop_replies(loop);
	else if (has_sent && loop->peeked_bytes > 0)
		nbd_take_out(loop); /* now the client is awake */
}
