/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the parts of nbd share; nothing else includes it. loop.h has the contract. Each part calls those above it only.
 *
 * protocol.h          numbers and bytes
 * handshake.c         from a connected socket to the first request
 * socket.c            bytes out of the client's socket
 * places.c            where requests and their data lie
 * replies.c           replies that are ready, and sending them
 * waiters.c           the threads that do what waits
 * requests.c          what a request has the engine do
 * receive.c           the bytes of the client, and the requests in them
 * watch.c             waiting for the client, the NAS and other threads
 * loop.c              create, run, destroy
 */
#ifndef NBDNFS_NBD_INTERNAL_H
#define NBDNFS_NBD_INTERNAL_H

#include "base/assert.h"
#include "nbd/loop.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sys/uio.h>
#include <time.h>

#define PAGE_BYTES SLOT_BYTES
/* Requests under way at once. nbdnfs has the kernel send 16. */
#define REQUESTS 64
/* Their data lies in pieces side by side, as many as bits in a word. */
#define PIECES 64u
#define PIECE_BYTES (32u * 1024)
/* The largest read or write. The kernel's are 128 KiB (drivers/block/nbd.c sets max_sectors to 256). */
#define REQUEST_BYTES_MAX (32u * PIECE_BYTES)
#define RECEIVED_BYTES (64u * 1024)
/* What is polled: the client, the wake-ups of other threads, and what the engine says. */
#define POLLED (2 + ENGINE_POLLED)
/* Threads that do what waits: one for reads, which go on while the NAS takes no writes, and the others for the rest. */
#define WAITERS 3

struct request {
	struct engine_request step; /* first: the request is found from it */
	struct nbd_loop *loop;
	uint64_t cookie;        /* as it came */
	uint16_t type, flags;
	uint64_t offset_bytes;
	uint32_t length_bytes;
	uint8_t *data;          /* in the arena; NULL: it has none */
	unsigned first_piece, pieces;
	int error;              /* 0 or -errno, once it has ended. -EINPROGRESS: engine_read_end() is next */
	uint8_t head[16];       /* of its reply */
	struct request *next;
};

struct request_queue {
	struct request *head, *tail;
};

struct nbd_loop {
	/* constant after nbd_loop_create() */
	struct engine *engine;
	int fd, wake_fd;
	uint32_t tick_ms;
	uint8_t *arena;         /* PIECES * PIECE_BYTES */
	uint8_t *zeros;         /* PAGE_BYTES */
	struct nfsio_req *reqs; /* one for each page of the arena */
	pthread_t thread;       /* that runs the loop */

	/* the loop's own */
	struct request requests[REQUESTS];
	struct request_queue free;
	unsigned free_count;
	uint64_t taken_pieces;  /* a bit for each */
	uint8_t *received;      /* RECEIVED_BYTES */
	size_t received_begin, received_end; /* what has not been looked at */
	size_t peeked_bytes;    /* so much of what has been received, or looked at, still lies in the socket */
	bool may_peek;          /* the socket and epoll(7) can do that */
	bool last_was_read;     /* of the requests */
	bool readable;          /* there may be more to receive: epoll(7) says that once */
	bool will_end;          /* the client sends no more, and the end is still to be received */
	bool has_left;          /* it does not receive either */
	struct request *filling; /* a write whose data is coming */
	uint32_t filled_bytes;
	uint32_t skip_bytes;    /* the data of a write that was refused is still to come */
	/* the kernel had no memory for it: again, in a moment. Neither holds up the other: receiving frees memory */
	bool send_lacks_memory, receive_lacks_memory;
	bool lacks_place;       /* there is a request that finds no place */
	uint64_t gather_until_us; /* the client is in the middle of a request, which is left to come: 0, or until */
	uint32_t gather_us;     /* how long that was, for this request */
	unsigned gather_shift;  /* it is so often doubled for a request of several pages */
	unsigned gathered_enough; /* and was long enough so many times in a row */
	unsigned in_vain;       /* how often that brought nothing for a last page; then, how many had no wait */
	bool ended;             /* nothing more is received: the client has disconnected, or broken the protocol */
	bool gone;              /* nobody receives replies */
	bool broke_protocol;    /* that is why it has ended */
	struct request_queue replies; /* ready, in this order */
	size_t sent_bytes;      /* of the first */
	struct request_queue fetches; /* reads that wait for read-ahead */
	struct request_queue writes; /* writes that wait for room, in this order */
	uint64_t looked_at_us;  /* when these two were last looked at */
	int watch_fd;           /* epoll(7); -1: ppoll(2) has to do */
	struct pollfd watched[POLLED]; /* what epoll(7) knows; fd -1: nothing */
	uint32_t watched_opened; /* engine_before_poll()'s, of then */
	struct request_queue answered; /* reads that the NAS has answered */

	pthread_mutex_t lock;   /* guards what follows */
	pthread_cond_t work;    /* there is something in `waiting`, or `stop` is set */
	struct request_queue waiting; /* for a waiter */
	pthread_cond_t reads_work; /* the same for `waiting_reads` */
	struct request_queue waiting_reads; /* for the first waiter */
	struct request_queue ended_elsewhere; /* ended, or answered, in another thread */
	bool stop;
	pthread_t waiters[WAITERS];
	unsigned waiter_count;  /* the creating thread's own */
};

static inline void queue_push(struct request_queue *queue, struct request *request)
{
	request->next = NULL;
	if (queue->tail != NULL)
		queue->tail->next = request;
	else
		queue->head = request;
	queue->tail = request;
}

static inline struct request *queue_pop(struct request_queue *queue)
{
	struct request *request = queue->head;

	if (request != NULL)
		queue->head = request->next;
	if (queue->head == NULL)
		queue->tail = NULL;
	return request;
}

#define NO_TIME UINT64_MAX

static inline uint64_t nbd_now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* Is there something to receive, and room for it? */
static inline bool nbd_can_receive(const struct nbd_loop *loop)
{
	return loop->readable && !loop->ended && !loop->lacks_place && !loop->receive_lacks_memory &&
	       loop->gather_until_us == 0;
}

static inline bool nbd_gathers(const struct nbd_loop *loop)
{
	return !loop->ended && loop->gather_until_us > 0;
}

/* Is that all that is wrong with a call? It is tried again soon; not at once, as who frees memory may need the CPU. */
static inline bool nbd_lacks_memory(bool *lacks_memory, int error)
{
	*lacks_memory = error == ENOBUFS || error == ENOMEM;
	return *lacks_memory;
}

/* handshake.c */

/* Waits for the client. 0: it may send requests. -ECONNRESET: it has left. -EPROTO: it speaks something else. */
int nbd_handshake(int fd, uint64_t size_bytes);

/* socket.c */

/* The room for a look at what a client that reads has sent. */
#define PEEK_BYTES 448 /* 16 requests */
/* Is there a way to peek, and room for it? */
bool nbd_can_peek(const struct nbd_loop *loop);
/*
 * Receive into at most two pieces, or peek. What has been peeked at before is not received again. Returns what
 * recvmsg(2) does; -1 and EAGAIN where only that was there.
 */
ssize_t nbd_receive_pieces(struct nbd_loop *loop, const struct iovec *pieces, size_t count, bool peeks);
/* Take what has been peeked at out of the socket. Where that fails, it stays there for the next time. */
void nbd_take_out(struct nbd_loop *loop);

/* places.c */

void nbd_places_init(struct nbd_loop *loop);
/* With room for `length_bytes` of data, at most REQUEST_BYTES_MAX. NULL: there is no place now. */
struct request *nbd_place_take(struct nbd_loop *loop, uint32_t length_bytes);
void nbd_place_free(struct nbd_loop *loop, struct request *request);
/* What has been received is done. A write that was only begun gives its place back: nothing else would. */
void nbd_receive_no_more(struct nbd_loop *loop);
/* The same for a client that is gone: its replies are dropped. */
void nbd_client_left(struct nbd_loop *loop);

/* replies.c */

/* The request has ended: 0 or -errno. */
void nbd_reply(struct nbd_loop *loop, struct request *request, int error);
/* Send what is ready, as far as the socket takes it. */
void nbd_send_replies(struct nbd_loop *loop);

/* waiters.c */

/* 0 or -errno. */
int nbd_waiters_start(struct nbd_loop *loop);
/* What they do has ended. */
void nbd_waiters_stop(struct nbd_loop *loop);
/* Have one do it. */
void nbd_leave_to_waiter(struct nbd_loop *loop, struct request *request);
/* What other threads have ended since the last call: waiters, or the engine's. */
struct request_queue nbd_take_ended_elsewhere(struct nbd_loop *loop);
/* A read was answered, in whatever thread. */
void nbd_note_answered(struct engine_request *step);

/* requests.c */

/*
 * All of it has come. A write's data may lie in `payload`, not the request's own, and is used or copied before this
 * returns; NULL: it lies in its place.
 */
void nbd_begin_request(struct nbd_loop *loop, struct request *request, const uint8_t *payload);
/* Go on with what has been answered, or has ended elsewhere. */
void nbd_end_requests(struct nbd_loop *loop, struct request_queue ended);
/* Go on with what waits for the engine's progress. */
void nbd_go_on(struct nbd_loop *loop);

/* receive.c */

/* Receive once, and begin what requests there are. */
void nbd_receive(struct nbd_loop *loop);
/* Begin requests that have been received, as far as they find places. Returns whether there was one. */
bool nbd_take_requests(struct nbd_loop *loop);

/* watch.c */

/* The client has shaken hands. */
void nbd_watch_start(struct nbd_loop *loop);
void nbd_watch_stop(struct nbd_loop *loop);
/*
 * Wait until something has come, or until_us by CLOCK_MONOTONIC, NO_TIME: for ever. fds[0] is the client's, and all of
 * it is left to this; the others are filled in. Returns false where that ended early: nothing is known then.
 */
bool nbd_watch(struct nbd_loop *loop, struct pollfd fds[POLLED], uint32_t opened, uint64_t now_us, uint64_t until_us);

#endif
