/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * wire: READ, WRITE, COMMIT and NULL of NFSv3 over a TCP connection that somebody else has made (RFC 5531, RFC 1813).
 *
 * libnfs allocates for each call and each answer, copies what they carry, and looks through a table of 16 KiB each time
 * that it is called. Nothing here allocates: a call goes out from the caller's memory, and the bytes of a READ are
 * received where the caller wants them.
 *
 * The caller serialises all functions on one wire. None of them blocks.
 */
#ifndef NBDNFS_WIRE_H
#define NBDNFS_WIRE_H

#include <stdbool.h>
#include <stdint.h>

enum wire_procedure { WIRE_NULL = 0, WIRE_READ = 6, WIRE_WRITE = 7, WIRE_COMMIT = 21 };

/* One call. The caller's, to keep in place, with its data, until it is answered or the wire has ended. */
struct wire_call {
	enum wire_procedure procedure;
	uint32_t length_bytes;
	uint64_t offset_bytes;
	uint8_t *data;          /* only read from by WIRE_WRITE */
	bool stable;            /* WIRE_WRITE: FILE_SYNC, else UNSTABLE */

	/* the wire's own */
	uint32_t xid;
	struct wire_call *prev, *next;
};

struct wire_answer {
	struct wire_call *call;
	uint32_t status;        /* nfsstat3; what follows was sent with 0 only, but for the sizes */
	uint32_t count_bytes;   /* read or written; what was read lies in the call's data */
	bool end_of_file;
	bool stable;            /* a write that needs no COMMIT */
	uint64_t verifier;      /* of a write or a commit */
	/* the file's, as far as the server has told */
	bool has_size, has_size_before;
	uint64_t size_bytes, size_before_bytes;
	uint32_t links;         /* with has_size */
};

/* Room for the handle (NFS3_FHSIZE), and for all that comes before the data of a call, or of an answer. */
#define WIRE_HANDLE_BYTES_MAX 64
#define WIRE_CALL_BYTES_MAX 256
#define WIRE_IN_BYTES 1024

struct wire {
	int fd;                 /* -1: none */
	uint32_t next_xid;

	/* the beginning of each call, as it is sent: what NULL has of it, and what calls on the file have */
	uint8_t begin[WIRE_CALL_BYTES_MAX];
	uint32_t null_bytes, begin_bytes;

	struct wire_call *first, *last; /* not answered yet, in the order in which they were sent */
	struct wire_call null;

	/* a call that the socket has not taken whole: its head, its data, what pads that, and how much of all is gone */
	uint8_t out[WIRE_CALL_BYTES_MAX];
	const uint8_t *out_data;
	uint32_t out_bytes, out_data_bytes, out_pad_bytes, out_done_bytes;

	uint8_t in[WIRE_IN_BYTES]; /* what has come and is not understood yet */
	uint32_t in_bytes;
	uint32_t skip_bytes;    /* that come next, or after the data, and mean nothing */
	uint32_t read_head_bytes; /* what the last READ's answer had before its data */
	struct wire_answer answer; /* of the READ whose data is being received */
	uint32_t data_bytes, data_left_bytes; /* of it */
	bool reading;           /* `answer` waits for its data */
	bool drained;           /* the socket had no more than what came last */
	bool has_received;         /* something has come; for the caller to clear */
};

void wire_init(struct wire *wire);

/* Takes `fd` over: connected, with nothing under way. */
void wire_open(struct wire *wire, int fd, const uint8_t *handle, uint32_t handle_bytes, uint32_t uid, uint32_t gid);

/* Closes the connection. The calls that it has are forgotten. */
void wire_close(struct wire *wire);

static inline bool wire_is_up(const struct wire *wire)
{
	return wire->fd >= 0;
}

/* Is there room for another call, now? If not, there is after wire_flush() has returned true. */
static inline bool wire_has_room(const struct wire *wire)
{
	return wire->out_bytes == 0;
}

/* Sends a call, where there is room. Returns 0 or -errno: the connection is good for nothing then. */
int wire_send(struct wire *wire, struct wire_call *call);

/* Sends a NULL, whose answer is told by has_received alone. Nothing, when there is no room, or one is under way. */
int wire_send_null(struct wire *wire);

/* The rest of what did not fit into the socket. Returns 0 or -errno. */
int wire_flush(struct wire *wire);

/*
 * The next answer. Returns 1 and *answer; 0 when there is none yet; -errno when the connection is good for nothing:
 * -EOPNOTSUPP when that is because of an answer which RPC allows and this here does not understand.
 */
int wire_receive(struct wire *wire, struct wire_answer *answer);

#endif
