/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * wire: some procedures of NFSv3 (RFC 1813, RFC 5531) over a TCP connection that the caller has made: READ, WRITE and
 * COMMIT for transfers; NULL, GETATTR, LOOKUP, READLINK and FSINFO to find a file and to learn what the server takes.
 * Over connections to other daemons: MNT of mountd (RFC 1813, 5.2), GETPORT and GETADDR of portmapper (RFC 1833).
 *
 * libnfs allocates for each call and each answer, copies their data, and scans a table of 16 KiB each time that it is
 * called. Nothing here allocates: a call is sent from the caller's memory, and the data of a READ is received into it.
 *
 * The caller serialises all functions on one wire. None of them blocks.
 */
#ifndef NBDNFS_WIRE_H
#define NBDNFS_WIRE_H

#include <stdbool.h>
#include <stdint.h>

enum wire_procedure {
	WIRE_NULL = 0,
	WIRE_GETATTR = 1,
	WIRE_LOOKUP = 3,
	WIRE_READLINK = 5,
	WIRE_READ = 6,
	WIRE_WRITE = 7,
	WIRE_FSINFO = 19,
	WIRE_COMMIT = 21,
	/* of other programs: the numbers are ours */
	WIRE_MNT = 256,
	WIRE_GETPORT,           /* portmapper's, version 2: over IPv4 */
	WIRE_GETADDR,           /* version 3: over IPv6 */
};

/*
 * One call. The caller's, which keeps it in place, with its handle and its data, until it is answered or the wire is
 * closed.
 */
struct wire_call {
	enum wire_procedure procedure;
	const uint8_t *handle;  /* of the file, in WIRE_LOOKUP of the directory; for NFSv3, but WIRE_NULL has none */
	uint32_t handle_bytes;  /* 1 to WIRE_HANDLE_BYTES_MAX */
	uint32_t length_bytes;  /* of the data; 0 where a procedure has none */
	uint64_t offset_bytes;
	uint8_t *data;          /* WIRE_READ, WIRE_READLINK: filled. WIRE_WRITE: sent. WIRE_LOOKUP, WIRE_MNT: the name */
	bool stable;            /* WIRE_WRITE: FILE_SYNC, else UNSTABLE */
	uint32_t program, version; /* WIRE_GETPORT, WIRE_GETADDR: whose port is asked for */

	/* the wire's own */
	uint32_t xid;
	struct wire_call *prev, *next;
};

struct wire_answer {
	struct wire_call *call;
	uint32_t status;        /* nfsstat3 (mountstat3 has the same numbers), or WIRE_NOT_NOW; unless 0, there are at
				   most the file's attributes */
	uint32_t count_bytes;   /* read or written; what was read lies in the call's data */
	bool end_of_file;
	bool stable;            /* a write that needs no COMMIT */
	uint64_t verifier;      /* of a write or a commit */

	/* the file's, where the server sent them; of WIRE_LOOKUP, those of the file that was found */
	bool has_attributes;
	uint32_t type;          /* ftype3: WIRE_REGULAR, ... */
	uint32_t links;
	uint64_t size_bytes, fsid, fileid;
	bool has_size_before;   /* of a write or a commit */
	uint64_t size_before_bytes;

	/* of WIRE_LOOKUP and WIRE_MNT; the bytes are the wire's, in place until its next wire_receive() or wire_close() */
	const uint8_t *handle;
	uint32_t handle_bytes;
	/* of WIRE_FSINFO: the most that a READ and a WRITE may move, and how much they had better move */
	uint32_t read_max_bytes, read_preferred_bytes, write_max_bytes, write_preferred_bytes;
	uint32_t port;          /* of WIRE_GETPORT and WIRE_GETADDR; 0: the program is not there */
};

/* NFS3ERR_JUKEBOX; also where RPC says that the program is not there, or that the system has failed */
#define WIRE_NOT_NOW 10008u

/* ftype3 */
#define WIRE_REGULAR 1u
#define WIRE_DIRECTORY 2u
#define WIRE_LINK 5u

/* A name that WIRE_LOOKUP takes: NAME_MAX. */
#define WIRE_NAME_BYTES_MAX 255
/* A path that WIRE_MNT takes (MNTPATHLEN), and room for the target of a symbolic link. */
#define WIRE_PATH_BYTES_MAX 1024
/* Room for a handle (NFS3_FHSIZE), for what comes before the data of a call, and for that of an answer. */
#define WIRE_HANDLE_BYTES_MAX 64
#define WIRE_CALL_BYTES_MAX 256
#define WIRE_IN_BYTES 1024

struct wire {
	int fd;                 /* -1: none */
	uint32_t next_xid;

	/* the beginning of each call, as it is sent, up to its arguments */
	uint8_t begin[WIRE_CALL_BYTES_MAX];
	uint32_t begin_bytes;

	struct wire_call *first, *last; /* not answered yet, in the order of sending */
	struct wire_call null;

	/* a call that the socket has not taken whole: head, data, padding, and how much of these is sent */
	uint8_t out[WIRE_CALL_BYTES_MAX];
	const uint8_t *out_data;
	uint32_t out_bytes, out_data_bytes, out_pad_bytes, out_done_bytes;

	uint8_t in[WIRE_IN_BYTES]; /* received and not parsed yet */
	uint32_t in_bytes;
	uint32_t skip_bytes;    /* to be skipped next, or after the data */
	uint32_t read_head_bytes; /* the length of the last READ's answer up to its data */
	struct wire_answer answer; /* of the READ whose data is being received */
	uint32_t data_bytes, data_left_bytes; /* of it */
	bool reading;           /* `answer` waits for its data */
	uint8_t found_handle[WIRE_HANDLE_BYTES_MAX]; /* of the last WIRE_LOOKUP or WIRE_MNT */
	/* a record of several fragments is being received */
	bool fragmented, is_last_fragment;
	bool has_head;          /* `answer` has it, and waits for data_left_bytes and the record's end */
	uint32_t fragment_left_bytes;
	uint32_t record_bytes;  /* of the fragments so far, with their marks */
	uint8_t message[WIRE_IN_BYTES]; /* the beginning of it, without marks */
	uint32_t message_bytes;
	bool drained;           /* the last recvmsg(2) emptied the socket */
	bool has_received;      /* something was received; the caller clears it */
};

void wire_init(struct wire *wire);

/* Take over `fd`, a connected socket with nothing in flight. Calls are made with these credentials (AUTH_SYS). */
void wire_open(struct wire *wire, int fd, uint32_t uid, uint32_t gid);

/* Close the connection. Calls that are not answered yet are forgotten. */
void wire_close(struct wire *wire);

static inline bool wire_is_up(const struct wire *wire)
{
	return wire->fd >= 0;
}

/* Is there room for another call? If not, call wire_flush() when the socket is writable. */
static inline bool wire_has_room(const struct wire *wire)
{
	return wire->out_bytes == 0;
}

/* Send a call, where there is room. Returns 0, or -errno: close the wire then. */
int wire_send(struct wire *wire, struct wire_call *call);

/* Send a NULL, whose answer only sets has_received. Does nothing when there is no room, or one is in flight. */
int wire_send_null(struct wire *wire);

/* Send the rest of what did not fit into the socket. Returns 0, or -errno: close the wire then. */
int wire_flush(struct wire *wire);

/*
 * The next answer. Returns 1 and *answer; 0 when there is none yet; -errno when the wire must be closed: -EPROTO for an
 * answer that RFC 5531 and RFC 1813 do not allow, or that refuses the call for good; -EACCES for one that refuses our
 * credentials.
 */
int wire_receive(struct wire *wire, struct wire_answer *answer);

#endif
