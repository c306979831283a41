/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the parts of nfsio share; nothing else includes it. nfsio.h has the contract. Each part calls those above it
 * only. What only the makers of connections share is in connecting.h.
 *
 * libnfs_calls.[ch]   what is peculiar to libnfs: its versions' signatures, its errors
 * wire*.[ch]           NFSv3 without libnfs; knows nothing of the rest
 * reserved_port.[ch]   a local port below 1024 that no daemon wants; knows nothing of the rest
 * probe.[ch]           is the server alive? A connection of its own; knows nothing of the rest
 * queue.c              where requests lie, how they end, and which thread is woken
 * name_queue.c         the same for operations on names
 * answers.c            what the server's answers mean, whichever transport received them
 * waiting.c            what goes on while there is no connection
 * connect_wire.c       a new connection to a file whose handle is known
 * find_wire.c          a file's handle by its name, where the server has forgotten the one that was known
 * connect_libnfs.c     the first connection, to a file that has only a name: context, mount, open
 * recognise.c          is it still the file that was opened?
 * connect.c            which of these, and to the right file
 * transport_libnfs.c   struct transport over libnfs: NFSv4, and NFSv3 where that is asked for
 * transport_wire.c     struct transport over a wire
 * silence.c            the time-outs: what is sent again over a new connection, and when
 * name_calls.c         operations on names over libnfs: calls and answers
 * exchange.c           sending what waits, and receiving
 * attend.c             receiving by a thread that polls more than this
 * requests.c           what callers submit and wait for
 * state.c              what is known of the file and of the way to it
 * names.c              what callers wait for: stat, link, rename, unlink, and what a directory has
 * look.c               a look at a small file beside the one that is open
 * io_thread.c          the I/O thread: receiving, and connecting again
 * known.c              what an earlier connection, or an earlier worker, knew of the file
 * open.c               open and close
 *
 * A submitting thread writes its calls to the socket itself; the I/O thread receives, reconnects, and sends what did
 * not fit into the socket. Where there is an attendant (nfsio_attend()), that one receives and sends. A thread that
 * waits for a batch, with nothing else in flight, receives in the I/O thread's place: its answer needs no other thread
 * to wake it. libnfs is not thread-safe: every call on a published context is made under `lock`.
 */
#ifndef NBDNFS_NFSIO_INTERNAL_H
#define NBDNFS_NFSIO_INTERNAL_H

#include "base/assert.h"
#include "nfs/nfsio.h"
#include "nfs/libnfs_calls.h"
#include "nfs/probe.h"
#include "nfs/wire.h"

#include <stdatomic.h>
#include <stdio.h>
#include <sys/socket.h>
#include <time.h>

/* How often the time limits of requests are checked while there is no connection. */
#define AWAY_TICK_MS 250
/* The pause before a call is sent again that the server has put off. */
#define RETRY_LATER_MS 200
/* What is put off for longer fails, looks excepted: how long to go on is for the caller to say. */
#define PUT_OFF_LIMIT_MS 1000
/* A server that is asked again at once, and has not answered for longer, is silent: note_told(). */
#define TOLD_GAP_LIMIT_MS 2000
/* How often nfsio_look.waiting is called. */
#define WAITING_TICK_MS 250

enum name_call { CALL_STAT, CALL_LSTAT, CALL_FSTAT, CALL_LINK, CALL_RENAME, CALL_UNLINK, CALL_CHMOD, CALL_SPACE,
		 CALL_LIST, CALL_LOOK };

/* One name operation, on its caller's stack. Guarded by io->lock. */
struct name_op {
	struct nfsio *io;
	enum name_call call;
	const char *path, *new_path;
	int64_t fail_at_ms;     /* then it fails, unless it is outstanding */
	int64_t send_at_ms;     /* not before: the server has put it off */
	/* while it is outstanding */
	int64_t give_up_at_ms;  /* then it is taken for dropped by a server that answers others: silence.c */
	int64_t limit_at_ms;    /* then the connection is given up in any case */
	bool sent;              /* outstanding, or it was */
	bool put_off;           /* the server has last answered "later" */
	int64_t put_off_since_ms; /* 0: it has not yet */
	bool done;
	struct nfsio_failure *why; /* error 0 until it fails */
	void *argument;         /* by `call`: a struct nfsio_stat, nfsio_space or nfsio_names, or CHMOD's mode */
	struct nfsio_look *look; /* NULL but for nfsio_look() */
	struct nfsfh *fh;       /* the file that `look` has opened */
	int look_error;
	pthread_cond_t finished;
	struct name_op *next;
};

struct req_list {
	struct nfsio_req *head, *tail;
};

/*
 * One libnfs call on a context that is not published yet. It lives as long as the context: one that is destroyed in the
 * middle of a call still calls back.
 */
struct step {
	bool done;
	bool insists;           /* goes on after `stop`: its deadline is short */
	int error;
	void *data;             /* what a successful call made */
	struct nfsio_stat st;
	uint64_t fileid;
	uint8_t *data_read;     /* where it goes; `room` bytes were asked for */
	uint32_t room;
	uint32_t count;         /* how many bytes were read */
};

/* Where one of a server's programs listens. */
struct server_port {
	struct sockaddr_storage address;
	socklen_t address_bytes; /* 0: not known */
};

/* Where a file is: its server, and its handle there. */
struct place {
	struct server_port peer;
	uint8_t handle[128];    /* NFS4_FHSIZE */
	uint32_t handle_bytes;  /* 0: not known */
};

/* Which thread polls the connection and receives. */
enum receiver { RECEIVER_NONE, RECEIVER_IO_THREAD, RECEIVER_WAITER, RECEIVER_ATTENDANT };

struct nfsio {
	/* constant after nfsio_create() */
	char *url, *address;
	char *url_directory, *url_file; /* the URL's path, decoded; the directory is "/" at least */
	char *mount_path;       /* the part of the directory that the server exports */
	char *prefix;           /* the rest of it, "" or "/sub/dir" */
	struct nfsio_options options;
	struct nfsio_stat opened;
	uint32_t max_transfer_bytes;
	int version;
	bool expects_file;      /* the I/O thread's own: what is opened must be the file that is known below */
	bool opened_once;       /* the I/O thread's own: `opened` is valid */
	enum nfsio_transport transport_kind; /* of all connections: options.transport over NFSv3, libnfs over NFSv4 */
	int backoff_ms;         /* the I/O thread's own: the pause before the next attempt to connect, 0: none */
	int64_t patience_ms;    /* the I/O thread's own: how long an attempt to connect may take */
	bool refused_port;      /* the I/O thread's own: the last attempt found no server at the known port */
	bool refusal_logged;    /* the I/O thread's own: the connection before this one ended as `refused` says, too */
	struct nfsio_told gone; /* the I/O thread's own: for how long the file has been found gone */
	int64_t away_since_ms;  /* the I/O thread's own */
	bool logged[NFSIO_FILE_REPLACED + 1]; /* the I/O thread's own: which conditions, since away_since_ms */
	int wake_fd;            /* an eventfd: written to wake the I/O thread out of poll() */
	pthread_t thread;
	bool ended;             /* the closing thread's own: `thread` has been joined */

	unsigned contexts;      /* the I/O thread's own: the number that it has made */
	struct step step;       /* the I/O thread's own: the call that it waits for while connecting */

	atomic_bool stop;       /* set once, by nfsio_stop() */
	_Atomic uint64_t truncated_bytes; /* nfsio_truncated_bytes() */
	atomic_bool unlinked;   /* nfsio_is_unlinked() */

	pthread_mutex_t lock;   /* guards everything below */
	pthread_cond_t io_work; /* the I/O thread has something to do, and is not in poll() */
	enum receiver receiver;
	bool io_thread_polls;
	int attendant_fd;       /* nfsio_attend(): written to have it look again; -1: there is none */
	uint32_t attended_tick_ms;
	bool is_let_go;         /* the attendant has been told to stop polling this connection */
	unsigned batches;       /* threads in nfsio_batch_wait() */
	unsigned detached;      /* requests and name operations in flight that no batch waits for */
	int64_t waited_at_ms;   /* when a waiter last received */
	pthread_cond_t settled; /* signalled with first_done */
	bool first_done;        /* the first attempt to connect has ended */
	struct nfsio_failure *first_failure; /* nfsio_create()'s caller's, until first_done */

	const struct transport *transport; /* of the connection; NULL while there is none */
	/* of transport_wire */
	struct wire wire;       /* the I/O thread's own while there is no connection */
	uint32_t read_max_bytes, write_max_bytes; /* what the server takes in one call over this connection */

	/* the file as it was last recognised; changed by the I/O thread alone, while there is no connection */
	struct place place;
	uint64_t fsid, fileid;  /* fsid 0 over libnfs */
	uint64_t handles;       /* how often the handle has changed: see verifier_of() */

	/* over a wire: for nfsio_look(), and to find the file again; changed like `place` */
	struct nfsio_handle directory; /* the URL's directory; length 0: not known */
	bool directory_is_stale; /* the next connection is to find it by its name first */
	bool directory_found;   /* and was found the last time */
	unsigned directory_seeks; /* how often that was asked for, since a LOOKUP in it went well */
	int64_t directory_sought_ms; /* when it was last, or 0 */

	/* of transport_libnfs */
	struct nfs_context *nfs;
	struct nfsfh *fh;
	nfs_fh3 fh3;            /* points into fh */

	struct nfsio_state state;
	nfsio_changed_fn changed; /* of nfsio_watch(); NULL: not called yet */
	void *changed_context;
	bool broken;            /* the connection met an error: the I/O thread throws it away */
	bool rest_has_pages;    /* of what the socket has not taken yet, some may be a WRITE's: check_rest() */
	int refused;            /* why wire_receive() ended the connection: -EPROTO, -EACCES; 0: something else did */
	bool useful;            /* a transfer was answered over it */
	bool discarding;        /* a context is being destroyed: its callbacks mean nothing */
	struct req_list pending;  /* to be issued, in this order */
	struct req_list inflight; /* issued on the connection */
	struct req_list finished; /* for give_back() */
	struct req_list later;    /* to be pending at later_at_ms: after JUKEBOX, or without memory */
	int64_t later_at_ms;
	int64_t refusal_told_ms; /* when a READ was last refused, or 0 */

	int64_t silent_since_ms; /* when something was last received, or first waited for after that */
	int64_t silence_ms;     /* see look_into_silence(): options.silence_ms, or a multiple of it */
	int64_t deadline_ms;    /* nothing outstanding is given up before; it may have been answered meanwhile */
	int64_t polls_until_ms; /* when the poll() that began last ends at the latest; 0 after it */
	int64_t connected_at_ms; /* when the last connection was made */
	int64_t last_received_ms; /* when something was last received, or the connection was made: note_heard() */
	bool waits;             /* for an answer, or for a connection to send a request over */
	_Atomic uint64_t *noted_received_ms, *noted_waiting_ms; /* nfsio_note_waits(): where both are noted, or NULL */
	_Atomic uint64_t *noted_twins_ms; /* nfsio_note_twins(), or NULL */
	uint32_t twin_limit_ms;
	int64_t suspect_since_ms; /* nfsio_suspect(): to be tested if nothing was received since. 0: not suspect */
	int64_t given_up_at_ms; /* when silence last cost a connection, 0: never */
	struct probe probe;     /* beside the connection, while that is tested */
	int64_t probed_at_ms;   /* when the probe began or ended */

	struct nfsio_req touch; /* NFSv4: keeps the lease alive */
	uint8_t touch_byte;
	bool touching;
	struct name_op *name_ops; /* outstanding on `nfs` */
	struct name_op *waiting_names; /* to be sent */
};

/* A connection that is not published yet. */
struct connection {
	/* over libnfs; else `nfs` is NULL, and the connection is io->wire */
	struct nfs_context *nfs;
	struct nfsfh *fh;
	nfs_fh3 fh3;

	struct nfsio_stat st;   /* over a wire: size, type, links and file number are sure */
	uint64_t fsid;
	struct place place;
	uint32_t read_max_bytes, write_max_bytes; /* at most 1 MiB */
	struct nfsio_handle root; /* of what was mounted */
	struct nfsio_handle directory; /* the URL's; length 0: not asked for, or not found */
	int64_t deadline_ms;    /* of the attempt that made it */
};

/*
 * How transfers travel. A connection gets one when it is put to use, and keeps it. Every function is called with the
 * lock held, while there is a connection, and does not block; where the connection turns out to be of no use, it sets
 * io->broken.
 */
struct transport {
	/* Send a request. Negative: there was no memory for it; try later. */
	int (*issue)(struct nfsio *io, struct nfsio_req *req);
	/* Can another one be issued now? */
	bool (*has_room)(const struct nfsio *io);
	/* Let the socket have what has been issued; NULL where issue() has done that. */
	void (*push)(struct nfsio *io);
	/* Ask the server for any answer at all. Not 0: call again later. */
	int (*send_null)(struct nfsio *io);
	/* What to poll, for what, and what to do then. */
	int (*socket)(const struct nfsio *io);
	short (*events)(const struct nfsio *io);
	void (*serve)(struct nfsio *io, short revents);
	/* Close the connection. Nothing in flight is answered any more. */
	void (*close)(struct nfsio *io);
};

extern const struct transport transport_libnfs, transport_wire;

/* Lock held. */
static inline bool is_up(const struct nfsio *io)
{
	return io->transport != NULL;
}

static inline int64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/*
 * The server has said something again that is an error once it has gone on for long. Returns for how long it has; the
 * time in which the server said nothing does not count: what it says next may be the last of it.
 */
static inline int64_t note_told(struct nfsio_told *told)
{
	int64_t now = now_ms(), gap_ms = told->last_ms == 0 ? 0 : now - told->last_ms;

	told->for_ms += gap_ms < TOLD_GAP_LIMIT_MS ? gap_ms : TOLD_GAP_LIMIT_MS;
	told->last_ms = now;
	return told->for_ms;
}

static inline void set_failure(struct nfsio_failure *why, enum nfsio_phase phase, int error, const char *text)
{
	why->phase = phase;
	why->error = error;
	snprintf(why->message, sizeof(why->message), "%s", text != NULL ? text : "");
}

/* queue.c, all with the lock held, which give_back() drops meanwhile. */
void req_list_push(struct req_list *list, struct nfsio_req *req);
void req_list_remove(struct req_list *list, struct nfsio_req *req);
void req_list_prepend(struct req_list *to, struct req_list *from);
void call_attendant(struct nfsio *io);
void wake_poller(struct nfsio *io);
void call_io_thread(struct nfsio *io);
void wake_io_thread(struct nfsio *io);
void note_twins(struct nfsio *io);
void req_enqueue(struct nfsio *io, struct nfsio_req *req, struct nfsio_batch *batch);
void req_finish(struct req_list *list, struct nfsio_req *req, int error);
void req_finish_all(struct req_list *list, int error);
int is_hopeless(const struct nfsio *io, const struct nfsio_req *req, int64_t now);
void fail_hopeless(struct nfsio *io);
void try_later(struct nfsio *io, struct req_list *list, struct nfsio_req *req);
void give_back(struct nfsio *io);

/* answers.c, all with the lock held. Something was received, or the connection made, at that time by now_ms(): */
void note_heard(struct nfsio *io, int64_t at_ms);
void note_received(struct nfsio *io);
bool counts_as_answer(struct nfsio *io, int rpc_status);
void note_size(struct nfsio *io, uint64_t bytes);
void note_links(struct nfsio *io, uint32_t links);
void note_moved(struct nfsio *io, struct nfsio_req *req, uint32_t count, bool end_of_file);
void note_written3(struct nfsio *io, struct nfsio_req *req, uint32_t count, bool stable, uint64_t verifier);
void note_committed3(struct nfsio *io, struct nfsio_req *req, uint64_t verifier);
void note_refused(struct nfsio *io, struct nfsio_req *req, int error);
void note_refused3(struct nfsio *io, struct nfsio_req *req, int status);
bool seek_directory(struct nfsio *io);
void note_refused_elsewhere3(struct nfsio *io, struct nfsio_req *req, int status);

/* names.c. `op` is on the caller's stack. Without the lock; waits. */
int name_call(struct nfsio *io, struct name_op *op, enum name_call call, const char *path, const char *new_path,
	      struct nfsio_failure *why);

/* exchange.c, with the lock held, which receive() drops meanwhile. */
void issue_pending(struct nfsio *io);
void note_waiting(struct nfsio *io);
void receive(struct nfsio *io);
/* Its two halves, for a thread that polls more than this: what to poll, and for how many ms; what to do then. */
int before_poll(struct nfsio *io, struct pollfd fds[NFSIO_POLLED]);
void after_poll(struct nfsio *io, const struct pollfd fds[NFSIO_POLLED]);

/* requests.c: nfsio_submit() with the lock held. */
void submit(struct nfsio *io, struct nfsio_req *req);

/* silence.c, with the lock held. `now` is by now_ms(), of the moment or shortly before. */
int64_t note_outstanding(struct nfsio *io, int64_t now, int64_t repeat_after_ms, int64_t limit_at_ms);
int silence_sleep_ms(const struct nfsio *io, int64_t now);
void look_into_silence(struct nfsio *io, int64_t now);

/* name_queue.c, all with the lock held. */
void name_op_finish(struct name_op *op, int error, const char *text);
void name_op_sent(struct name_op *op);
void name_op_put_off(struct name_op *op);
bool name_op_may_repeat(const struct name_op *op);
void name_ops_interrupted(struct nfsio *io);
void fail_late_names(struct nfsio *io);
void name_ops_finish_all(struct nfsio *io, int error);

/* name_calls.c, with the lock held. */
void issue_names(struct nfsio *io);

/* waiting.c, for the I/O thread and without the lock. */
void log_down(struct nfsio *io, enum nfsio_condition condition, const char *reason);
void tend_waiting(struct nfsio *io);
int syn_limit_ms(const struct nfsio *io);
void tune_socket(int fd);
uint32_t transfer_limit(uint64_t servers);

/* io_thread.c. What nfsio_create() starts, with the nfsio as `arg`. */
void *io_thread(void *arg);

#endif
