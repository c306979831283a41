/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * XDR, and what the parts of the wire share; nothing else includes it. wire_answer.c calls wire_call.c, not vice
 * versa.
 */
#ifndef NBDNFS_WIRE_INTERNAL_H
#define NBDNFS_WIRE_INTERNAL_H

#include "nfs/wire.h"

#include <endian.h>
#include <stddef.h>
#include <string.h>

/* RFC 5531 */
#define LAST_FRAGMENT 0x80000000u
#define CALL 0u
#define REPLY 1u
#define RPC_VERSION 2u
#define MSG_ACCEPTED 0u
#define SUCCESS 0u
#define AUTH_NONE 0u
#define AUTH_SYS 1u
#define MAX_AUTH_BYTES 400u
/* RFC 1813 */
#define NFS_PROGRAM 100003u
#define NFS_VERSION 3u
#define UNSTABLE 0u
#define FILE_SYNC 2u
#define SIZE_OF_FATTR3 84u
#define SIZE_OF_WCC_ATTR 24u

/* An answer to READ with attributes: mark, reply, verifier, status, attributes, count, eof, length of the data. */
#define READ_HEAD_BYTES 132u

static inline uint8_t *xdr_put32(uint8_t *at, uint32_t value)
{
	value = htobe32(value);
	memcpy(at, &value, sizeof(value));
	return at + sizeof(value);
}

static inline uint8_t *xdr_put64(uint8_t *at, uint64_t value)
{
	value = htobe64(value);
	memcpy(at, &value, sizeof(value));
	return at + sizeof(value);
}

static inline uint32_t xdr_padded(uint32_t bytes)
{
	return (bytes + 3) & ~3u;
}

/* Reads from `at` on. When less is left than a function needs, `ran_out` is set, and its result means nothing. */
struct xdr_reader {
	const uint8_t *at, *end;
	bool ran_out;
};

static inline const uint8_t *xdr_get(struct xdr_reader *reader, uint32_t bytes)
{
	const uint8_t *at = reader->at;

	if ((size_t)(reader->end - at) < bytes) {
		reader->ran_out = true;
		return NULL;
	}
	reader->at += bytes;
	return at;
}

static inline uint32_t xdr_get32(struct xdr_reader *reader)
{
	const uint8_t *at = xdr_get(reader, 4);
	uint32_t value = 0;

	if (at != NULL)
		memcpy(&value, at, sizeof(value));
	return be32toh(value);
}

static inline uint64_t xdr_get64(struct xdr_reader *reader)
{
	uint64_t high = xdr_get32(reader);

	return high << 32 | xdr_get32(reader);
}

/* wire_call.c */

struct wire_call *wire_find_call(const struct wire *wire, uint32_t xid);
void wire_forget_call(struct wire *wire, struct wire_call *call);

#endif
