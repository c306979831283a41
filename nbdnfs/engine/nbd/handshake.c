/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The server's side of NBD's fixed newstyle negotiation: one export, whatever name the client asks for. No TLS, no
 * structured replies. It may wait for the client: nothing else is to be done before, and a client that leaves is seen.
 */
#include "nbd/internal.h"
#include "nbd/protocol.h"

#include <errno.h>
#include <sys/socket.h>

/* The most that an option may carry: the longest name (4096), and requests for information. */
#define OPTION_BYTES_MAX 8192
#define FLAGS (NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM | \
	       NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_CAN_MULTI_CONN)
/* Behind the flags where the client does not ask to leave them out. */
#define ZEROES 124

/* While the kernel has no memory for a call. */
#define RETRY_MS 10

/* Is a call that has failed to be made again? For want of memory in a moment: the client has not left. */
static bool is_to_repeat(int error)
{
	bool lacks_memory;

	if (nbd_lacks_memory(&lacks_memory, error))
		nanosleep(&(struct timespec){ .tv_nsec = RETRY_MS * 1000000L }, NULL);
	return lacks_memory || error == EINTR;
}

static int receive_all(int fd, uint8_t *data, size_t length)
{
	while (length > 0) {
		ssize_t got = recv(fd, data, length, 0);

		if (got == 0 || (got < 0 && !is_to_repeat(errno)))
			return -ECONNRESET;
		data += got > 0 ? got : 0;
		length -= got > 0 ? (size_t)got : 0;
	}
	return 0;
}

static int send_all(int fd, const uint8_t *data, size_t length)
{
	while (length > 0) {
		ssize_t sent = send(fd, data, length, MSG_NOSIGNAL);

		if (sent < 0 && !is_to_repeat(errno))
			return -ECONNRESET;
		data += sent > 0 ? sent : 0;
		length -= sent > 0 ? (size_t)sent : 0;
	}
	return 0;
}

static int answer(int fd, uint32_t option, uint32_t kind, const uint8_t *data, uint32_t length)
{
	uint8_t head[20], *at = head;
	int error;

	at = put_be64(at, NBD_OPTION_REPLY_MAGIC);
	at = put_be32(at, option);
	at = put_be32(at, kind);
	put_be32(at, length);
	error = send_all(fd, head, sizeof(head));
	return error == 0 ? send_all(fd, data, length) : error;
}

/* Option 1 has no reply, but the export at once. */
static int answer_export_name(int fd, uint64_t size_bytes, bool no_zeroes)
{
	uint8_t data[10 + ZEROES] = { 0 };

	put_be16(put_be64(data, size_bytes), FLAGS);
	return send_all(fd, data, no_zeroes ? 10 : sizeof(data));
}

/* A name, and numbers of information that is wanted: is the option complete? */
static bool is_well_formed(const uint8_t *data, uint32_t length)
{
	uint32_t name, wanted;

	if (length < 6)
		return false;
	name = be32_at(data);
	if (name > length - 6)
		return false;
	wanted = be16_at(data + 4 + name);
	return length == 6 + name + 2 * wanted;
}

/* Options 6 and 7. */
static int answer_info(int fd, uint32_t option, uint64_t size_bytes, const uint8_t *data, uint32_t length)
{
	uint8_t export[12], blocks[14], *at = blocks;
	int error;

	if (!is_well_formed(data, length))
		return answer(fd, option, NBD_REP_ERROR(NBD_REP_ERR_INVALID), NULL, 0);
	put_be16(put_be64(put_be16(export, NBD_INFO_EXPORT), size_bytes), FLAGS);
	at = put_be16(at, NBD_INFO_BLOCK_SIZE);
	at = put_be32(at, PAGE_BYTES);
	at = put_be32(at, PAGE_BYTES);
	put_be32(at, REQUEST_BYTES_MAX);
	error = answer(fd, option, NBD_REP_INFO, export, sizeof(export));
	if (error == 0)
		error = answer(fd, option, NBD_REP_INFO, blocks, sizeof(blocks));
	return error == 0 ? answer(fd, option, NBD_REP_ACK, NULL, 0) : error;
}

/* The one export has an empty name. */
static int answer_list(int fd, uint32_t length)
{
	const uint8_t name_bytes[4] = { 0 };
	int error;

	if (length != 0)
		return answer(fd, NBD_OPT_LIST, NBD_REP_ERROR(NBD_REP_ERR_INVALID), NULL, 0);
	error = answer(fd, NBD_OPT_LIST, NBD_REP_SERVER, name_bytes, sizeof(name_bytes));
	return error == 0 ? answer(fd, NBD_OPT_LIST, NBD_REP_ACK, NULL, 0) : error;
}

static int skip(int fd, uint32_t length)
{
	uint8_t data[512];
	int error = 0;

	while (error == 0 && length > 0) {
		uint32_t now = length < sizeof(data) ? length : (uint32_t)sizeof(data);

		error = receive_all(fd, data, now);
		length -= now;
	}
	return error;
}

/* One option. 0: another one follows. 1: the client may send requests. -errno as nbd_handshake(). */
static int take_option(int fd, uint64_t size_bytes, bool no_zeroes)
{
	uint8_t head[16], data[OPTION_BYTES_MAX];
	uint32_t option, length;
	int error = receive_all(fd, head, sizeof(head));

	if (error != 0)
		return error;
	if (be64_at(head) != NBD_OPTION_MAGIC)
		return -EPROTO;
	option = be32_at(head + 8);
	length = be32_at(head + 12);
	if (length > sizeof(data)) {
		error = skip(fd, length);
		return error != 0 ? error : answer(fd, option, NBD_REP_ERROR(NBD_REP_ERR_TOO_BIG), NULL, 0);
	}
	error = receive_all(fd, data, length);
	if (error != 0)
		return error;
	switch (option) {
	case NBD_OPT_EXPORT_NAME:
		error = answer_export_name(fd, size_bytes, no_zeroes);
		return error != 0 ? error : 1;
	case NBD_OPT_ABORT:
		(void)answer(fd, option, NBD_REP_ACK, NULL, 0); /* it may have left already */
		return -ECONNRESET;
	case NBD_OPT_LIST:
		return answer_list(fd, length);
	case NBD_OPT_INFO:
	case NBD_OPT_GO:
		error = answer_info(fd, option, size_bytes, data, length);
		return error != 0 ? error : option == NBD_OPT_GO && is_well_formed(data, length);
	default:
		return answer(fd, option, NBD_REP_ERROR(NBD_REP_ERR_UNSUP), NULL, 0);
	}
}

int nbd_handshake(int fd, uint64_t size_bytes)
{
	uint8_t hello[18], flags[4];
	int error;

	put_be16(put_be64(put_be64(hello, NBD_MAGIC), NBD_OPTION_MAGIC), NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES);
	error = send_all(fd, hello, sizeof(hello));
	if (error == 0)
		error = receive_all(fd, flags, sizeof(flags));
	if (error == 0 && (be32_at(flags) & ~(uint32_t)(NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES)) != 0)
		error = -EPROTO;
	while (error == 0)
		error = take_option(fd, size_bytes, (be32_at(flags) & NBD_NO_ZEROES) != 0);
	return error == 1 ? 0 : error;
}
