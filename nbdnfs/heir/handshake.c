/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The client's side of NBD's newstyle handshake, up to the first request: what nbdnfs/kernel/nbd_handshake.py does.
 * It reads no byte more than that, and what the server may send is bounded.
 */
#include "heir.h"

#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#define TIMEOUT_MS 5000
#define REPLIES_MAX 64

/* doc/proto.md of the NBD project */
#define FIXED_NEWSTYLE 1
#define NO_ZEROES 2
#define REPLY_MAGIC 0x3e889045565a9ULL
#define OPT_GO 7
#define REP_ACK 1
#define REP_INFO 3
#define INFO_EXPORT 0

static const char greeting[16] = "NBDMAGICIHAVEOPT";

static bool receive(struct heir *heir, void *into, size_t bytes, int64_t until_ms)
{
	char *at = into;

	while (bytes > 0) {
		int64_t left_ms = until_ms - heir_now_ms();
		ssize_t got;

		if (left_ms <= 0 || !heir_is_readable(heir->sock, (int)left_ms))
			return false;
		got = recv(heir->sock, at, bytes, MSG_DONTWAIT);
		if (got < 0 && heir_is_of_want(errno)) {
			poll(NULL, 0, HEIR_AGAIN_MS);
			continue;
		}
		if (got <= 0)
			return false;
		at += got;
		bytes -= (size_t)got;
	}
	return true;
}

static uint64_t big_endian(const char *at, size_t bytes)
{
	uint64_t value = 0;

	for (size_t i = 0; i < bytes; i++)
		value = value << 8 | (uint8_t)at[i];
	return value;
}

static bool greet(struct heir *heir, int64_t until_ms)
{
	uint32_t flags;

	if (!receive(heir, heir->buffer, sizeof(greeting) + 2, until_ms) ||
	    memcmp(heir->buffer, greeting, sizeof(greeting)) != 0)
		return false;
	flags = (uint32_t)big_endian(heir->buffer + sizeof(greeting), 2);
	if ((flags & FIXED_NEWSTYLE) == 0)
		return false;
	flags = htobe32(flags & (FIXED_NEWSTYLE | NO_ZEROES));
	return heir_send(heir, heir->sock, &flags, sizeof(flags)) &&
	       heir_send(heir, heir->sock, heir->option, heir->option_bytes);
}

const char *heir_negotiate(struct heir *heir)
{
	int64_t until_ms = heir_now_ms() + TIMEOUT_MS;
	bool has_export = false;

	if (!greet(heir, until_ms))
		return "it does not greet as an NBD server";
	for (int i = 0; i < REPLIES_MAX; i++) {
		uint64_t kind, bytes;

		if (!receive(heir, heir->buffer, 20, until_ms))
			return "it breaks the NBD handshake off";
		if (big_endian(heir->buffer, 8) != REPLY_MAGIC || big_endian(heir->buffer + 8, 4) != OPT_GO)
			return "it answers another option";
		kind = big_endian(heir->buffer + 12, 4);
		bytes = big_endian(heir->buffer + 16, 4);
		if (bytes > sizeof(heir->buffer) || !receive(heir, heir->buffer, bytes, until_ms))
			return "it breaks the NBD handshake off";
		if (kind == REP_ACK)
			return has_export ? NULL : "it acknowledges before it gives the size of the export";
		if (kind != REP_INFO || bytes < 2)
			return "it refuses the export";
		if (big_endian(heir->buffer, 2) == INFO_EXPORT) {
			if (bytes != 12 || big_endian(heir->buffer + 2, 8) >> 63 != 0)
				return "it gives no size of the export";
			has_export = true;
		}
	}
	return "it does not end the NBD handshake";
}
