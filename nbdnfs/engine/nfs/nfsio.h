/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * nfsio: one file on one NFS server, over one connection at a time.
 *
 * A connection is disposable: after any transport error it is thrown away and a new one is made. Requests belong to
 * their callers, which see nothing of that: what was in flight is sent again.
 *
 * libnfs mounts, looks up and opens the file. With NFSIO_OVER_WIRE its context is thrown away then: the connections are
 * made to the file's handle, and nothing goes through libnfs any more (wire.h), not even where the server forgets it.
 * Nothing outside this room calls libnfs.
 *
 * Threads: nfsio_create() starts one I/O thread, which nfsio_join() ends. Every other function may be called from any
 * thread at any time between the two.
 */
#ifndef NBDNFS_NFSIO_H
#define NBDNFS_NFSIO_H

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nfs/wire.h"

enum nfsio_op {
	NFSIO_READ,
	NFSIO_WRITE,          /* FILE_SYNC: stable when it is done */
	/*
	 * NFSv3: needs a COMMIT under the same verifier, unless `stable` says otherwise. It becomes NFSIO_WRITE where
	 * the server changes its verifier again and again.
	 */
	NFSIO_WRITE_UNSTABLE,
	NFSIO_COMMIT,         /* NFSv3: the whole file; its only result is the verifier */
	NFSIO_LOOKUP,         /* nfsio_look()'s own */
};

/*
 * How transfers travel over NFSv3; NFSv4 always goes over libnfs. Over a wire (wire.h) there is no libnfs context once
 * the connection is made, and so there are no name operations.
 */
enum nfsio_transport { NFSIO_OVER_LIBNFS, NFSIO_OVER_WIRE };

/* What failed. NFSIO_RECOGNISE: the file was opened, and is not the one that is known. */
enum nfsio_phase { NFSIO_CONNECT, NFSIO_MOUNT, NFSIO_OPEN, NFSIO_RECOGNISE, NFSIO_NAME };

/*
 * The condition of the file and of the connection. In all but NFSIO_UP, nfsio tries to connect for as long as it
 * takes.
 */
enum nfsio_condition {
	NFSIO_UP,
	NFSIO_LINK_DOWN,      /* there is no connection */
	NFSIO_FILE_DELETED,   /* gone: the server has no such file, or has not mounted its file system yet */
	NFSIO_FILE_REPLACED,  /* gone: the server has another file under its name */
};

/* Why something failed. `message` is libnfs's text, "" when there is none. */
struct nfsio_failure {
	enum nfsio_phase phase;
	int error;              /* -errno */
	char message[256];
};

/* An NFSv3 handle. */
struct nfsio_handle {
	uint32_t length_bytes;  /* 0: there is none */
	uint8_t bytes[WIRE_HANDLE_BYTES_MAX];
};

/*
 * What is known of a file, for another nfsio that opens it later, perhaps in another process: plain bytes. The handle
 * of one that was opened over libnfs, which may be of NFSv4, is only for comparison.
 */
struct nfsio_known {
	uint64_t size_bytes, fsid, fileid;
	uint32_t port;          /* where the NFS server listens */
	uint32_t mount_bytes;   /* so much of the URL's directory, decoded, is what is mounted; 0: over libnfs */
	struct nfsio_handle file, directory; /* both may be unknown */
};

/*
 * How the file is recognised when the server has another handle for it (its disk has another number after a boot), as
 * opposed to a new file that has the old one's number: by pages whose bytes are known. Called in nfsio's thread,
 * without a lock.
 */
struct nfsio_samples {
	/* With the number of the try. False when no page is known, else its place, and what is_right() is given. */
	bool (*choose)(void *context, unsigned number, uint64_t *offset_bytes, uint64_t *proof);
	/* Is the page that the server returned the one that is known? It may change `data`. */
	bool (*is_right)(void *context, uint64_t offset_bytes, uint64_t proof, uint8_t *data);
};

/* For how long the server has said the same: note_told(). All 0: it has not. */
struct nfsio_told {
	int64_t last_ms;        /* CLOCK_MONOTONIC: when it last said so */
	int64_t for_ms;
};

/* One request. The caller's, which keeps it in place, with its data, until `done` is called. */
struct nfsio_req {
	/* set by the caller */
	enum nfsio_op op;
	uint32_t length_bytes;  /* at most nfsio_max_transfer_bytes() */
	uint64_t offset_bytes;
	uint8_t *data;          /* writes only read from it */
	void (*done)(struct nfsio_req *req); /* called once, in some thread, without locks; must not block */
	void *context;          /* for `done` */
	int64_t waits_since_ms; /* CLOCK_MONOTONIC: soft_limit_ms counts from then. 0: from now, and nfsio sets it */

	/* result */
	int error;              /* 0 or -errno */
	uint32_t moved_bytes;   /* less than length_bytes on error, or where a read met the end of the file */
	uint64_t verifier;      /* of a write or a COMMIT (RFC 1813: writeverf3) */
	bool stable;            /* a write that needs no COMMIT */
	bool resent;            /* a write that was also sent on a connection that broke, and may arrive twice */

	/* nfsio_look()'s own: a call on another file or directory than the one that is open */
	const struct nfsio_handle *handle; /* NULL: on that one */
	struct nfsio_handle *found; /* NFSIO_LOOKUP's result */
	int64_t fail_at_ms;     /* CLOCK_MONOTONIC: then it fails, with -ETIMEDOUT. 0: never */
	uint32_t repeat_after_ms; /* not answered for so long, it is sent again. 0: as transfers are */

	/* nfsio's own, guarded by its lock */
	struct nfsio *io;
	struct nfsio_batch *batch;
	struct wire_call call;
	int64_t give_up_at_ms;  /* while in flight: then it is sent again over a new connection */
	int64_t sent_at_ms;     /* while in flight, with a soft limit: when it was sent last */
	struct nfsio_told refused; /* a READ: how long the server has refused it over this connection */
	unsigned ends;          /* a READ: how often it met the end of the file */
	unsigned restarts;      /* a write: how often all of it was sent again for another verifier */
	struct nfsio_req *prev, *next;
};

struct nfsio;

struct nfsio_options {
	const char *url;        /* an NFS URL: path (percent-encoded), version, ports, uid and gid come from it */
	const char *address;    /* the server's numeric address, used in place of the URL's host */
	bool create;            /* make the file where there is none */
	bool exclusive;         /* with create: fail with EEXIST where there is one */
	bool read_only;
	/*
	 * Open nothing: there are name operations only, in the URL's directory, whatever file the URL names. Over
	 * libnfs.
	 */
	bool names_only;
	enum nfsio_transport transport;
	/*
	 * NULL, or another nfsio for the same URL: what is opened must be its file. Over a wire, what that one knows of
	 * it is not asked for again. Not used after nfsio_create().
	 */
	struct nfsio *like;
	/*
	 * NULL, or what an earlier nfsio knew of the file, which is recognised as after a reconnect. Over a wire, it is
	 * opened by its handle, whatever has become of its name or of mountd; over libnfs, or where its handle has no
	 * length, by its name. Not used after nfsio_create().
	 */
	const struct nfsio_known *known;
	/* NULL: another handle is the file's if number and size fit. */
	const struct nfsio_samples *samples;
	void *sample_context;
	uint8_t *sample_page;   /* room for 4096 bytes; the I/O thread's own */
	bool quiet;             /* log nothing that another connection to the same server logs */
	uint32_t mode;          /* permission bits of a new file */
	unsigned connect_timeout_s; /* of the first attempt; it doubles each time that it was too short */
	/*
	 * When nothing is received for so long while calls are outstanding, the connection is tested; a transfer that
	 * alone is not answered for four times as long is sent again over a new connection: silence.c. No transfer
	 * fails because the server is slow. 0: 15 s.
	 */
	unsigned silence_ms;
	/*
	 * Reads, and what nfsio_transfer() runs, fail with -EIO after waiting for so long ("soft" in nfs(5)), or
	 * up to a second later where they were sent late. 0: never ("hard").
	 */
	unsigned soft_limit_ms;
	/*
	 * A READ that the server refuses is retried for this long, or for gone_limit_ms if permission is denied and
	 * there is no soft limit; then it fails with that error. 0: it fails at once, for any error.
	 */
	unsigned refused_read_ms;
	/* They fail with -ESTALE, at once, when the file has been gone for so long. 0: never. */
	unsigned gone_limit_ms;
	/*
	 * Called each time that a write is about to be sent, after a reconnect again. Returns 0 (send it), -EAGAIN (ask
	 * again soon) or another -errno, with which the write fails. Called with nfsio's lock held. NULL: send all.
	 */
	int (*may_write)(void *context);
	void *may_write_context;
	bool looks;             /* nfsio_look() will be called */
};

struct nfsio_stat {
	uint64_t size_bytes, used_bytes, fileid, nlink;
	uint64_t mtime_us;       /* by the server's clock, since the epoch */
	uint32_t mode, uid, gid; /* mode as in stat(2), with the file type */
};

/*
 * Mount and open. Returns 0 and *io, or -errno and *why: the first failure is final. Later, a broken connection is
 * replaced for as long as it takes.
 */
int nfsio_create(const struct nfsio_options *options, struct nfsio **io, struct nfsio_failure *why);

/*
 * Close the connection and have everything that waits for it fail, now and from now on. For callers whose threads must
 * end before nfsio_destroy(), which may not be called while another function runs.
 */
void nfsio_stop(struct nfsio *io);

/*
 * Stop, fail what still waits with -ECANCELED, and join the thread: no callback is called from here on. For callers
 * with several nfsios whose callbacks look at the others: all are joined before one is destroyed.
 */
void nfsio_join(struct nfsio *io);

/* Join, if that has not been done, and free everything. */
void nfsio_destroy(struct nfsio *io);

/* The file as it was opened. */
void nfsio_opened_stat(const struct nfsio *io, struct nfsio_stat *st);

/* The file as it was last recognised. */
void nfsio_known(struct nfsio *io, struct nfsio_known *known);

/* How things stand. */
struct nfsio_state {
	enum nfsio_condition condition;
	bool gone_too_long;     /* the file is gone, for so long that reads fail */
	uint64_t connects;      /* the number of connections that have been made */
	int64_t silent_since_ms; /* CLOCK_MONOTONIC: the start of the silence that last cost a connection, or 0 */
};
void nfsio_state(struct nfsio *io, struct nfsio_state *state);

/*
 * Another connection to the server was silent from `since_ms` on, and turned out dead: what ended it may have ended
 * this one. If nothing has been received over this one since then, it is replaced when no request waits, and tested
 * at once otherwise. Does not block.
 */
void nfsio_suspect(struct nfsio *io, int64_t since_ms);

/*
 * Have `changed` called whenever the state has changed, in nfsio's thread and without a lock, and once before this
 * returns. Two threads may call it at the same time.
 */
typedef void (*nfsio_changed_fn)(void *context);
void nfsio_watch(struct nfsio *io, nfsio_changed_fn changed, void *context);

/*
 * Keep two times up to date from now on, by CLOCK_MONOTONIC in ms: when an answer came, or a connection was made, last,
 * over this one or any other that is given the same place; and since when this one has waited for answers without a
 * pause, 0 while it waits for none. A request without a connection to go out on waits, too. Both places outlive
 * nfsio_join().
 */
void nfsio_note_waits(struct nfsio *io, _Atomic uint64_t *last_received_ms, _Atomic uint64_t *waiting_since_ms);

/*
 * Keep up to date from now on until when the server may still carry out a WRITE that was sent twice, for a process
 * after this one: NFSIO_TWINS_UNDER_WAY from before the connection is closed that such a WRITE went over, until all of
 * them are answered over another; then the time of that answer by CLOCK_MONOTONIC, and limit_ms. Outlives nfsio_join().
 */
#define NFSIO_TWINS_UNDER_WAY UINT64_MAX
void nfsio_note_twins(struct nfsio *io, _Atomic uint64_t *twins_until_ms, uint32_t limit_ms);

/* Has the last answer shown that the file has no name any more? The server may keep it while it is open. */
bool nfsio_is_unlinked(const struct nfsio *io);

/*
 * The least size that the file has had since it was opened; UINT64_MAX while that is what it had then. Beyond it, the
 * file does not have what was written, whatever its size is now.
 */
uint64_t nfsio_truncated_bytes(const struct nfsio *io);

/*
 * The most that one request may move: what the server took in one READ and one WRITE when the file was opened, at most
 * 1 MiB. Where a later connection takes less, a request is more than one call.
 */
uint32_t nfsio_max_transfer_bytes(const struct nfsio *io);

/* Start a request. Allocates nothing of its own. */
void nfsio_submit(struct nfsio *io, struct nfsio_req *req);

/* Requests that one thread waits for together. In place until nfsio_batch_wait() returns; guarded by nfsio's lock. */
struct nfsio_batch {
	struct nfsio *io;
	size_t waiting;
	bool sleeping;
	pthread_cond_t all_done;
};

/* Start several requests; their `done` is not called. */
void nfsio_batch_start(struct nfsio *io, struct nfsio_batch *batch, struct nfsio_req *reqs, size_t count);
void nfsio_batch_wait(struct nfsio_batch *batch);

/*
 * Run one request and wait for it. Returns its error; -EBADF for a write to what was opened `read_only`,
 * and for everything with `names_only`.
 */
int nfsio_transfer(struct nfsio *io, struct nfsio_req *req);

/*
 * The attendant: a thread that polls several connections, and more, and receives over all of them. It takes the I/O
 * thread's place for as long as there is a connection; the I/O thread still makes new ones. The attendant never waits
 * for a request: a `done` that is called in it may not, and nfsio_transfer() may be called by other threads only.
 * nfsio_attend() makes the calling thread the attendant. `wake_fd`, an eventfd(2) of the caller's, is written to when
 * there is a connection again. Every `tick_ms` the I/O thread looks whether it has something to do, although it is
 * called then. nfsio_before_poll() fills in what to poll, and returns for how many ms, -1: any. Without `events` it is
 * to be polled no more; without a number it is closed. Where *opened, a count of sockets, has changed, a number may be
 * another's. nfsio_after_poll() receives and calls back, in that thread.
 */
#define NFSIO_POLLED 3
void nfsio_attend(struct nfsio *io, int wake_fd, uint32_t tick_ms);
int nfsio_before_poll(struct nfsio *io, struct pollfd fds[NFSIO_POLLED], uint32_t *opened);
void nfsio_after_poll(struct nfsio *io, const struct pollfd fds[NFSIO_POLLED]);
/* The attendant stops: the I/O thread receives again. */
void nfsio_leave(struct nfsio *io);

/* Are there NFSIO_WRITE_UNSTABLE and NFSIO_COMMIT? Over NFSv3 only: libnfs hides the verifier of NFSv4. */
bool nfsio_has_commit(const struct nfsio *io);

/* Are there name operations? Over libnfs only. */
bool nfsio_has_names(const struct nfsio *io);

/*
 * Name operations, relative to the URL's directory ("/name"). Each returns 0, or -errno and *why; -EOPNOTSUPP where
 * there are none. A call that the server puts off (JUKEBOX) is sent again, and fails with -EAGAIN after a second.
 *
 * Unlike transfers they fail in the end, with -ETIMEDOUT. stat and fstat are sent again after 2 x silence_ms without an
 * answer, and fail after 4 x silence_ms. link, rename and unlink are not sent again: the second one may fail although
 * the first one did its work, and only the caller can find out. They fail with -ECONNRESET when the connection breaks,
 * and after 2 x silence_ms without an answer. -ENOTCONN: there was no connection for 4 x silence_ms, and the server has
 * done nothing.
 */
int nfsio_stat(struct nfsio *io, const char *path, struct nfsio_stat *st, struct nfsio_failure *why);
int nfsio_lstat(struct nfsio *io, const char *path, struct nfsio_stat *st, struct nfsio_failure *why);
int nfsio_fstat(struct nfsio *io, struct nfsio_stat *st, struct nfsio_failure *why);
int nfsio_link(struct nfsio *io, const char *old_path, const char *new_path, struct nfsio_failure *why);
int nfsio_rename(struct nfsio *io, const char *old_path, const char *new_path, struct nfsio_failure *why);
int nfsio_unlink(struct nfsio *io, const char *path, struct nfsio_failure *why);

/* As stat: may be sent again. */
int nfsio_chmod(struct nfsio *io, const char *path, uint32_t mode, struct nfsio_failure *why);

/* The file system of the URL's directory (RFC 1813, FSSTAT): its size, and what this user may still take of it. */
struct nfsio_space {
	uint64_t total_bytes, available_bytes;
};

/* As stat. */
int nfsio_space(struct nfsio *io, struct nfsio_space *space, struct nfsio_failure *why);

/* Names, each with its NUL, one behind the other. */
struct nfsio_names {
	char *text;             /* NULL where there are none; the caller's, for free() */
	size_t length_bytes;
};

/* What the URL's directory has, but for "." and "..". As stat. -EFBIG: the names have more than 64 MiB. */
int nfsio_list(struct nfsio *io, struct nfsio_names *names, struct nfsio_failure *why);

/* A look at a small file, and a change to the very file that was read, even if its name belongs to another by then. */
struct nfsio_look {
	uint32_t limit_ms;      /* it fails with -ETIMEDOUT after so long. 0: never, over a wire; see there */
	/*
	 * A call of it that the server does not answer for so long, though it answers others, is sent again over a new
	 * connection. 0: 4 x silence_ms.
	 */
	uint32_t repeat_after_ms;
	/* Called every 250 ms while the look is not done, by the calling thread, without a lock. May be NULL. */
	void (*waiting)(struct nfsio_look *look);
	_Atomic(const char *) step; /* the procedure that is waited for, or that failed */
	bool asks_file;         /* no file has the name: again when the open file can be read (not names_only) */
	uint8_t *data;          /* filled from the start of the file */
	uint32_t room_bytes;
	uint32_t found_bytes;
	/*
	 * Decides by what was read whether `change` is written. Called in some thread, perhaps with nfsio's lock held.
	 * NULL: it is not.
	 */
	bool (*wants_change)(struct nfsio_look *look);
	const uint8_t *change;
	uint32_t change_bytes;
	uint32_t change_offset;
	bool changed;
};

/*
 * Find the file that has the name now, read, change. On an error not all of it was done; `changed` says whether the
 * server has taken the change.
 *
 * Over a wire, the calls are requests like others: they wait for a connection, and are sent again over a new one. Over
 * libnfs, the look fails with -ENOTCONN without a connection, and with -ECONNRESET or -ETIMEDOUT when that breaks or is
 * given up.
 */
int nfsio_look(struct nfsio *io, const char *path, struct nfsio_look *look, struct nfsio_failure *why);

#endif
