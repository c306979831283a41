/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the parts of nbd share; nothing else includes it. loop.h has the contract. Each part calls those above it only.
 *
 * protocol.h          numbers and bytes
 * handshake.c         from a connected socket to the first request
 * places.c            where requests and their data lie
 * replies.c           replies that are ready, and sending them
 * waiters.c           the threads that do what waits
 * requests.c          what a request has the engine do
 * receive.c           the bytes of the client, and the requests in them
 * loop.c              create, poll, destroy
 */
#ifndef NBDNFS_NBD_INTERNAL_H
#define NBDNFS_NBD_INTERNAL_H

#include "base/assert.h"
#include "nbd/loop.h"

#include <errno.h>
#include <pthread.h>
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

#endif
