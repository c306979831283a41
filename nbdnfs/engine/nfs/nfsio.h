/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * nfsio: one file on one NFS server, over one disposable libnfs context.
 *
 * Nothing outside nfsio*.c calls libnfs. A context is thrown away after any transport error and a new one is
 * mounted; requests belong to their callers, who see nothing of that: what was in flight is issued again.
 *
 * libnfs makes the connection: it mounts, looks up and opens. Whose `only_transfers` is set has the context thrown away
 * then, and READ, WRITE and COMMIT go over its connection without libnfs (wire.h).
 *
 * Threads: nfsio_create() starts one I/O thread, which nfsio_destroy() ends. Every other function may be called
 * from any thread at any time between the two.
 */
#ifndef NBDNFS_NFSIO_H
#define NBDNFS_NFSIO_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nfs/wire.h"

enum nfsio_op {
	NFSIO_READ,
	NFSIO_WRITE,          /* stable (FILE_SYNC) when it is done */
	NFSIO_WRITE_UNSTABLE, /* NFSv3: needs a COMMIT under the same verifier, unless `stable` says otherwise */
	NFSIO_COMMIT,         /* NFSv3: all of the file; only its verifier counts */
};

/*
 * How transfers travel. Over a wire (wire.h) libnfs makes the connection and is then thrown away: there are no name
 * operations.
 */
enum nfsio_transport { NFSIO_OVER_LIBNFS, NFSIO_OVER_WIRE };

/* What the server was asked when it failed. */
enum nfsio_phase { NFSIO_CONNECT, NFSIO_MOUNT, NFSIO_OPEN, NFSIO_NAME };

/* What is known of the file and of the way to it. All but NFSIO_UP are being mended, for as long as it takes. */
enum nfsio_condition {
	NFSIO_UP,
	NFSIO_LINK_DOWN,     /* there is no connection */
	NFSIO_FILE_DELETED,  /* the server answers and has no such file, or has not mounted what it lies on yet */
	NFSIO_FILE_REPLACED, /* the server has another file under its name */
};

/* Why something failed. `message` is libnfs's own words, "" when it had none. */
struct nfsio_failure {
	enum nfsio_phase phase;
	int error;              /* -errno */
	char message[256];
};

/* One request. The caller's, to keep in place from nfsio_submit() on until `done` is called. */
struct nfsio_req {
	/* set by the caller */
	enum nfsio_op op;
	uint32_t length_bytes;  /* at most nfsio_max_transfer_bytes() */
	uint64_t offset_bytes;
	uint8_t *data;          /* only read from by the writes */
	void (*done)(struct nfsio_req *req); /* called once, by some thread, without locks; must not block */
	void *context;            /* for `done` */

	/* result */
	int error;              /* 0 or -errno */
	uint32_t moved_bytes;   /* less than length_bytes only on error, or when a read met the end of the file */
	uint64_t verifier;      /* of the server that took the write or the commit (RFC 1813: writeverf3) */
	bool stable;            /* a write that needs no COMMIT */

	bool resent;            /* a write: also on its way on a connection that has broken, where it may yet arrive */

	/* nfsio's own, guarded by its lock */
	struct nfsio *io;
	struct nfsio_batch *batch;
	struct wire_call call;
	int64_t queued_at_ms, issued_at_ms;
	struct nfsio_req *prev, *next;
};

struct nfsio_options {
	const char *url;        /* an NFS URL: path, file, version, ports, uid and gid come from it */
	const char *address;    /* the server's numeric address, used in place of the URL's host */
	bool create;            /* make the file when it is not there */
	bool exclusive;         /* with create: fail with EEXIST when it is */
	bool read_only;
	enum nfsio_transport transport; /* over NFSv3; NFSv4 always goes over libnfs */
	bool quiet;             /* another connection to the same server tells when it goes and comes */
	uint32_t mode;          /* permission bits of a new file */
	unsigned connect_timeout_s; /* for the first attempt; a server that is slower is given more by each that follows */
	/*
	 * A connection over which nothing comes for so long, while requests wait, is looked into, see look_into_silence() in
	 * silence.c. No request fails for being slow. 0: 15 s.
	 */
	unsigned silence_ms;
	/*
	 * What somebody waits for (every read, and what nfsio_transfer() runs) fails with -EIO
	 * when it has waited for so long ("soft" of nfs(5)), 0: never ("hard") ...
	 */
	unsigned soft_limit_ms;
	/* ... and at once, with -ESTALE, when the server has answered for so long that the file is gone. 0: never. */
	unsigned gone_limit_ms;
	/*
	 * Asked each time that a write is about to go out, also again after a reconnect: 0: let it, -EAGAIN: ask again
	 * soon, another -errno: the write fails with it. NULL: let all of them. Called with nfsio's lock held.
	 */
	int (*may_write)(void *context);
	void *may_write_context;
};

struct nfsio_stat {
	uint64_t size_bytes, used_bytes, fileid, nlink;
	uint64_t mtime_us;       /* by the server's clock, since the epoch */
	uint32_t mode, uid, gid; /* mode as in stat(2), with the file type */
};

struct nfsio;

/*
 * Mount and open, once. Returns 0 and *io, or -errno and *why. The first failure is final; after a success a
 * lost connection is made again for ever.
 */
int nfsio_create(const struct nfsio_options *options, struct nfsio **io, struct nfsio_failure *why);

/*
 * Give up the connection and have everything that waits for it fail, now and from now on. For who has threads to end
 * before nfsio_destroy(), which may not be called while another function runs.
 */
void nfsio_stop(struct nfsio *io);

/*
 * Fails what is still waiting with -ECANCELED, and joins the thread: nothing is called back from here on. For who has
 * several, whose callbacks look at the others: all are ended before one is closed.
 */
void nfsio_join(struct nfsio *io);

/* Ends it, if that has not been done, and frees everything. */
void nfsio_destroy(struct nfsio *io);

/* The file as it was opened. */
void nfsio_opened_stat(const struct nfsio *io, struct nfsio_stat *st);

/*
 * How it stands. `lost`: the file is gone, and for so long that reads fail. `connects`: how many connections there
 * have been.
 */
struct nfsio_state {
	enum nfsio_condition condition;
	bool gone_too_long;
	uint64_t connects;
	int64_t silent_since_ms; /* CLOCK_MONOTONIC: from when on a connection was waited for in vain, 0: none was */
};
void nfsio_state(struct nfsio *io, struct nfsio_state *state);

/*
 * Another connection to the server is dead, which has been waited for since then: what ended it may have ended this one. Where nothing has
 * come over it since, it is made anew if nobody waits for it, and else looked into at once. Returns soon.
 */
void nfsio_suspect(struct nfsio *io, int64_t since_ms);

/*
 * Have `changed` called whenever the state has changed, by nfsio's thread and without a lock, and once before this
 * returns. It may come to be called by two threads at once.
 */
void nfsio_watch(struct nfsio *io, void (*changed)(void *context), void *context);

/* Has the server said that the file has no name any more? It may serve it as long as it has it open. */
bool nfsio_is_unlinked(const struct nfsio *io);

/*
 * How the file is recognised where the server knows it by another handle, as after a boot that gave its disk another
 * number, or as a new file that was given the old one's number: by pages whose bytes are known. `sample` is
 * called by nfsio's thread, without a lock, with the number of the try; it returns false when it knows no page, else
 * the page's place and CRC-32C. `page` is for the bytes, 4096 of them.
 */
void nfsio_recognise(struct nfsio *io, bool (*sample)(void *context, unsigned number, uint64_t *offset_bytes, uint32_t *crc),
		     void *context, uint8_t *page);

/*
 * The least size that the file has been seen with since it was opened; UINT64_MAX while that is not less than
 * it was then. What the file has from there on is not what was written, whatever its size is by now.
 */
uint64_t nfsio_truncated_bytes(const struct nfsio *io);

/* The most that one request may move: what the server takes in one READ and one WRITE, 1 MiB at most. */
uint32_t nfsio_max_transfer_bytes(const struct nfsio *io);

/* Start a request. Allocates nothing of its own. */
void nfsio_submit(struct nfsio *io, struct nfsio_req *req);

/* Requests that one thread waits for together. In place until nfsio_batch_wait() returns; guarded by io's lock. */
struct nfsio_batch {
	struct nfsio *io;
	size_t waiting;
	bool sleeping;
	pthread_cond_t all_done;
};

/* Start requests at once; their `done` is not called. */
void nfsio_batch_start(struct nfsio *io, struct nfsio_batch *batch, struct nfsio_req *reqs, size_t count);
void nfsio_batch_wait(struct nfsio_batch *batch);

/* Run one request and wait for it. Returns its error; -EBADF for a write to what was opened `read_only`. */
int nfsio_transfer(struct nfsio *io, struct nfsio_req *req);

/* Whether NFSIO_WRITE_UNSTABLE and NFSIO_COMMIT can be asked for: the verifier is seen over NFSv3 only. */
bool nfsio_has_commit(const struct nfsio *io);

/* Whether there is still a libnfs context, when it is connected. */
bool nfsio_has_names(const struct nfsio *io);

/*
 * Name operations, relative to the URL's directory ("/name"). Each returns 0, or -errno and *why; -EOPNOTSUPP where
 * nfsio_has_names() says no. Unlike
 * transfers they fail when the connection is lost: a RENAME that was sent twice may fail although the first did
 * its work, and only the caller can tell.
 */
int nfsio_stat(struct nfsio *io, const char *path, struct nfsio_stat *st, struct nfsio_failure *why);
int nfsio_fstat(struct nfsio *io, struct nfsio_stat *st, struct nfsio_failure *why);
int nfsio_link(struct nfsio *io, const char *old_path, const char *new_path, struct nfsio_failure *why);
int nfsio_rename(struct nfsio *io, const char *old_path, const char *new_path, struct nfsio_failure *why);
int nfsio_unlink(struct nfsio *io, const char *path, struct nfsio_failure *why);

/* A look at a small file, and a change to the very file that was seen, whatever has its name by then. */
struct nfsio_look {
	uint8_t *data;          /* filled from the file's beginning */
	uint32_t room_bytes;
	uint32_t found_bytes;
	/*
	 * Decides by what was found whether `change` is written. Called by some thread, with nfsio's lock held; NULL: it
	 * is not.
	 */
	bool (*wants_change)(struct nfsio_look *look);
	const uint8_t *change;
	uint32_t change_bytes;
	uint32_t change_offset;
	bool changed;
};

/*
 * Open the file that has the name now, read, change, close. The change may get lost with the server. An error says
 * that not all of it was done; `changed` is true when the server has taken the change.
 */
int nfsio_look(struct nfsio *io, const char *path, struct nfsio_look *look, struct nfsio_failure *why);

#endif
