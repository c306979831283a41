/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * XDR, and what the parts of the wire share; nothing else includes it. Each part calls those above it only.
 *
 * wire_call.c       open and close, and calls
 * wire_parse.c      what an answer says
 * wire_fragments.c  answers in several fragments
 * wire_answer.c     answers in one, and receiving
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
#define PROG_UNAVAIL 1u
#define SYSTEM_ERR 5u
#define AUTH_ERROR 1u
#define AUTH_NONE 0u
#define AUTH_SYS 1u
#define MAX_AUTH_BYTES 400u
/* RFC 1813 */
#define NFS_PROGRAM 100003u
#define NFS_VERSION 3u
#define MOUNT_PROGRAM 100005u
#define MOUNT_VERSION 3u
/* RFC 1833 */
#define PORTMAP_PROGRAM 100000u
#define TCP 6u
#define ADDRESS_BYTES_MAX 128u /* of a universal address; the longest over IPv6 has 53 */
#define UNSTABLE 0u
#define FILE_SYNC 2u
#define SIZE_OF_FATTR3 84u
#define SIZE_OF_WCC_ATTR 24u

/* An answer to READ with attributes: mark, reply, verifier, status, attributes, count, eof, length of the data. */
#define READ_HEAD_BYTES 132u

/* The longest record that is accepted: no READ asks for more data, and the rest of an answer is small. */
#define WIRE_RECORD_BYTES_MAX (1024u * 1024 + 4096)
/* As the length of a message whose end is not known yet. */
#define WIRE_LENGTH_UNKNOWN UINT32_MAX

/* The head of an answer, parsed. */
struct wire_head {
	struct wire_answer answer;
	uint32_t head_bytes;    /* up to the data */
	uint32_t data_bytes;
	uint32_t tail_bytes;    /* of the record, after the data; parse_record() sets it */
};

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

/* wire_parse.c */

/*
 * Parse the head of an answer. `at` has `bytes` of it, without record marks; it has message_bytes in all. Returns 1 and
 * *head, 0 when not all of the head is there yet, -EACCES when the server refuses our credentials, or -EPROTO.
 */
int wire_parse(const struct wire *wire, const uint8_t *at, uint32_t bytes, uint32_t message_bytes,
	       struct wire_head *head);
/* The handle in an answer lies in memory that is about to change: keep it. */
void wire_keep_handle(struct wire *wire, struct wire_answer *answer);
/* The first `bytes` in `in` are done with. */
void wire_drop_in(struct wire *wire, uint32_t bytes);
/*
 * read_head_bytes of an answer lie in `in`, what follows from the beginning of the call's data on. Its head is in truth
 * head_bytes long: move the got_bytes of data behind it to where they belong.
 */
void wire_place_data(struct wire *wire, struct wire_call *call, uint32_t head_bytes, uint32_t got_bytes);

/* wire_fragments.c */

/* The record whose mark is the first in `in` has several fragments. */
void wire_begin_fragments(struct wire *wire);
/* Digest what is in `in`. Returns 1 and wire->answer, 0 when that needs more, or -EPROTO or -EACCES. */
int wire_digest_fragments(struct wire *wire);
/* `bytes` of the answer to `call` were received as for wire_place_data(), marks and all. As wire_digest_fragments(). */
int wire_sort_fragments(struct wire *wire, struct wire_call *call, uint32_t bytes);

/* Is what comes next data of a READ, in a fragment? */
static inline bool wire_fragment_has_data(const struct wire *wire)
{
	return wire->fragmented && wire->has_head && wire->in_bytes == 0 && wire->data_left_bytes > 0 &&
	       wire->fragment_left_bytes > 0;
}

#endif
