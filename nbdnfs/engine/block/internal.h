/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the parts of the engine share; nothing else includes it. engine.h has the contract. Each part calls those
 * above it only. What guards what is said in struct engine.
 *
 * progress.c          the lock, and waking those that wait
 * streams.[ch]        which readers walk the device, and what to read ahead for them
 * file.c              the state of the file and of the connections, for counters and log
 * flusher.c           write-backs and COMMITs, and the thread that starts them
 * read_ahead.c        fetches of what a reader will want next
 * common.c            what all requests have in common
 * reads.c             reads, which wait
 * writes.c            write, flush and trim, which wait
 * steps.c             read and write in steps, which do not
 * attend.c            the thread that makes them, and receives
 * opening.c           the file and the region, and which comes first
 * engine.c            create and destroy
 */
#ifndef NBDNFS_ENGINE_INTERNAL_H
#define NBDNFS_ENGINE_INTERNAL_H

#include "base/assert.h"
#include "region/cache.h"
#include "region/last_place.h"
#include "region/proof.h"
#include "block/engine.h"
#include "block/streams.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

/*
 * Write-backs and read-aheads in flight at once, and what one of each moves at most. Short write-backs are for pages
 * without neighbours: a server that is a millisecond away takes many of them in the time of one. They never split a
 * run: one that is longer waits for a long write-back.
 */
#define LONG_WRITE_BACKS 12
#define SHORT_WRITE_BACKS 8
#define WRITE_BACKS (LONG_WRITE_BACKS + SHORT_WRITE_BACKS)
#define SHORT_RUN_PAGES 4
#define FETCHES 8
#define FETCH_PAGES RUN_PAGES_MAX
/* Buffers of RUN_PAGES_MAX pages, shared by long write-backs and fetches: there are seldom many of both. */
#define LONG_BUFFERS 14
/* The same over libnfs, which allocates as much again for each call. */
#define LIBNFS_LONG_BUFFERS 10
/* Fetches, which do not call the flusher when they end, never have all of them. */
_Static_assert(FETCHES < LIBNFS_LONG_BUFFERS, "buffers that are left to write-backs");

/* A write-back in flight, or a place for one. */
struct write_back {
	struct nfsio_req req;   /* first: the write-back is found from it */
	struct engine *engine;
	struct page_run pages;
	uint8_t *data;          /* pages_max pages; a long write-back has them while it is busy */
	uint32_t pages_max;
	uint64_t started_us;
	bool busy;              /* guarded by engine->lock */
};

/* A read-ahead in flight, or a place for one. */
struct fetch {
	struct nfsio_req req;   /* first: the fetch is found from it */
	struct engine *engine;
	uint64_t first_page;
	uint64_t number;
	uint32_t count;
	uint64_t proofs[FETCH_PAGES]; /* of its pages */
	uint8_t *data;          /* FETCH_PAGES pages, while it is busy */
	uint64_t started_us;
	bool busy;              /* guarded by engine->lock */
};

/* A connection whose condition file.c is told. */
struct watched {
	struct engine *engine;
	struct nfsio *io;
};

struct engine {
	/* constant after engine_create() */
	struct engine_options options;
	/*
	 * The first is for write-backs, read-ahead, and reads that find no other idle. Each of the others is lent to
	 * one reader at a time, which receives its answer itself (nfs/requests.c): no other thread has to wake it.
	 */
	struct nfsio *ios[ENGINE_CONNECTIONS_MAX];
	unsigned io_count;
	struct region region;
	uint64_t size_bytes;
	uint64_t reconnects_before; /* of workers before this one */
	uint32_t piece_bytes;
	bool own_region;
	bool adopted;           /* the region is an earlier worker's */
	struct nfsio_known known; /* what that knew of the file */
	uint8_t *buffers;       /* of write-backs and fetches */
	uint8_t *samples;       /* a page for each connection's thread */
	struct watched watched[ENGINE_CONNECTIONS_MAX];
	pthread_t flusher;
	struct owner_watch *owner_watch; /* NULL: ownership is not looked at */

	atomic_bool attendant_progress; /* engine_take_progress(); set under `lock` */
	atomic_bool stolen;     /* another machine owns the file: requests fail; set once, under `lock` */

	/*
	 * Guards everything below, and the cache. Completions take it, in nfsio's thread and without nfsio's lock.
	 * While it is held, nfsio's lock is taken by nfsio_state() alone; all other calls of nfsio drop it first,
	 * except nfsio_truncated_bytes() and nfsio_is_unlinked(), which take no lock.
	 */
	pthread_mutex_t lock;   /* taken and dropped by progress.c alone */
	pthread_cond_t work;    /* the flusher has something to do */
	pthread_cond_t progress; /* what a request waits for may have come; progress.c alone uses it */
	uint32_t waiting;       /* the number of threads that wait for `progress` */
	pthread_t attendant;    /* the thread, where attendant_fd is not -1 */
	int attendant_fd;       /* written to when the attendant should look */
	bool attendant_waits;   /* for `progress`, with some request */
	bool changed;           /* the state of the file or of ownership has changed: wake those that wait */
	struct cache *cache;    /* NULL at first: no page is known */
	struct streams streams;
	struct write_back write_backs[WRITE_BACKS]; /* the long ones first */
	uint8_t *spare[LONG_BUFFERS]; /* buffers that are not in use */
	unsigned spare_count;
	unsigned write_backs_busy;
	struct fetch fetches[FETCHES];
	struct nfsio_req commit;
	bool committing;
	bool starved;           /* a write-back is wanted and none is free: the next completion starts it */
	bool flusher_rests;     /* it waits for `work` without a time limit */
	bool stop;              /* the flusher ends once the NAS has everything, or `abandon` is set */
	bool abandon;
	bool lacks_file_sync;   /* the server answers FILE_SYNC with less: only COMMITs make writes stable */
	uint32_t waiting_for_stable; /* the number of requests that wait for the NAS */
	uint32_t waiting_for_slot;
	bool lent[ENGINE_CONNECTIONS_MAX]; /* ios that a reader has */
	bool is_down[ENGINE_CONNECTIONS_MAX]; /* ios that have told so */
	uint64_t fetch_number;
	uint64_t aged_sequence; /* writes up to it are old enough to be written back */
	uint64_t refused_until_ms; /* until when pages that the server refused are held */
	uint64_t commit_refused_until_ms;
	uint64_t refused_pause_ms;
	uint64_t refused_sequence; /* the newest write when the server last refused one */
	uint64_t progress_at_ms; /* when the NAS last took a write or a COMMIT */
	uint64_t held_until_ms; /* until when pages are held because of twins or a replay */
	unsigned commits_in_vain; /* COMMITs in a row with another verifier than a write before it */
	uint64_t distrust_until_ms; /* until when no write depends on a verifier */
	enum nfsio_condition condition; /* the worst of the connections; NFSIO_UP at first */
	bool has_no_name;       /* answers have shown that the file is deleted, and that was logged */
	bool gone_too_long;     /* the file is gone, for so long that waiting for it is an error */
};

static inline uint64_t now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000 + (uint64_t)ts.tv_nsec / 1000;
}

static inline uint64_t now_ms(void)
{
	return now_us() / 1000;
}

static inline struct region_counters *counters(struct engine *engine)
{
	return &engine->region.header->counters;
}

static inline struct region_waits *waits(struct engine *engine)
{
	return &engine->region.header->waits;
}

/* engine_is_encrypted(), for opening.c as well. */
static inline bool is_encrypted(const struct engine *engine)
{
	return engine->region.cipher != NULL;
}

/* Count what the NAS does not have stably. Lock held. */
static inline void note_unstable(struct engine *engine)
{
	set_counter(&counters(engine)->unstable_pages, cache_unstable_count(engine->cache));
}

/* Half full of pages to write back; those that only wait for a COMMIT have a limit of their own. Lock held. */
static inline bool is_half_full(const struct engine *engine)
{
	return cache_unstable_count(engine->cache) - cache_uncommitted_count(engine->cache) >=
	       engine->region.slot_count / 2;
}

/* At most what the server moves in one READ or WRITE, but at least a page: nfsio splits it where that is more. */
static inline uint32_t pages_at_once(const struct engine *engine, uint32_t wanted)
{
	uint32_t most = engine->piece_bytes / SLOT_BYTES;

	return wanted <= most ? wanted : most > 0 ? most : 1;
}

/* progress.c */

/* Guards what struct engine says. */
void engine_lock(struct engine *engine);
/* Drop the lock, and wake the requests whose wait may be over. */
void engine_unlock(struct engine *engine);
/*
 * Wait for `progress`, or until `end_ms` by now_ms(). NO_END: no time limit, for what ends by itself; the caller says
 * why it does. Lock held; dropped while waiting.
 */
#define NO_END UINT64_MAX
void engine_wait(struct engine *engine, uint64_t end_ms);
/* The same for `work`. */
void engine_wait_for_work(struct engine *engine, uint64_t end_ms);

/* file.c */

/* The least size that the file has had, UINT64_MAX where that is all of it. With or without the lock. */
uint64_t file_truncated_bytes(const struct engine *engine);
/* Note whether an answer has shown that the file was truncated or deleted. Takes the lock if so. */
void file_look(struct engine *engine);
/* The same with the lock held. */
void file_look_locked(struct engine *engine);
/* By which nfsio recognises the file, with the engine as their context. In nfsio's threads; they take the lock. */
extern const struct nfsio_samples file_samples;
/* Have connection `number` report its condition. Takes the lock. */
void file_watch(struct engine *engine, unsigned number);

/* opening.c */

/* Returns `error`, and *why says so. */
int engine_fail(struct nfsio_failure *why, int error, const char *message);
/*
 * Open the connections, and map the region with its cache. Returns 0, or -errno and *why; what has been made by then is
 * the caller's.
 */
int engine_open(struct engine *engine, struct nfsio_failure *why);

/* flusher.c */

/* The thread; `arg` is the engine. Takes the lock. */
void *flusher_thread(void *arg);
/* Wake the flusher, unless a completion will go on anyway. Lock held. */
void flusher_call(struct engine *engine);
/* Hold back what the last worker may still have under way. Without the lock: engine_create() alone knows the engine. */
void flusher_hold_replay(struct engine *engine);

/* read_ahead.c */

/* These pages are being read: fetch what their reader will want next. Takes the lock. */
void readahead_follow(struct engine *engine, uint64_t page, uint32_t pages);

/* common.c */

/* Pages of a request that are looked up, checksummed and fetched in one go. */
#define BATCH_PAGES 64

int check_range(const struct engine *engine, uint64_t offset_bytes, uint64_t length_bytes);
/*
 * A request has begun at `since_ms`, by now_ms(). Returns its place in the region, where other processes see how long
 * it takes; NULL where all are taken. Takes no lock.
 */
_Atomic uint64_t *request_began(struct engine *engine, uint64_t since_ms);
void request_ended(_Atomic uint64_t *place);
/* A read or a write of so many bytes has ended, by now_us() at its begin; a read with an I/O error, or 0. */
void note_read(struct engine *engine, uint64_t length_bytes, uint64_t started_us, int error);
void note_write(struct engine *engine, uint64_t length_bytes, uint64_t started_us);
/* What a request returns that has met no error. */
int result_of(struct engine *engine);
/*
 * May a request that waits for the NAS since `since_ms` go on waiting, and until when? No: the file is stolen or gone
 * too long, or the mount is soft and the NAS has taken nothing for too long. Lock held.
 */
bool may_wait(struct engine *engine, uint64_t since_ms, uint64_t *end_ms);
/* Until when may a read that has waited since `since_ms`? NO_END: the mount is hard. */
uint64_t read_ends_ms(const struct engine *engine, uint64_t since_ms);
/*
 * May the page be kept as a word alone? Not with FUA, and not where a request may wait for an older write to it: that
 * one would never reach the NAS, nor would this one before the next FLUSH. It has a slot then, which takes this write.
 * Lock held.
 */
bool may_fill(const struct engine *engine, uint64_t page, bool fua);
/*
 * Ask the NAS for a page, with the request before it where that is possible, else with one more: `*used` counts them.
 * Returns the request, for a reader that has waited since `since_ms`.
 */
struct nfsio_req *add_read(const struct engine *engine, struct nfsio_req *reqs, uint32_t *used, uint64_t page,
			   uint8_t *target, uint64_t since_ms);
/*
 * Is a page that the NAS returned what was written to it? 0, -EIO, or -EAGAIN: it is not, since a write after the READ
 * was sent makes them differ (its bytes are in a slot, or on the NAS already), or the server is wrong. *proof is what
 * it was compared with. Takes the lock.
 */
int check_page(struct engine *engine, uint64_t page, uint8_t *data, uint64_t *proof);

/* writes.c */

/*
 * As engine_flush(), uncounted, for a request that has waited since `since_ms`. -EAGAIN: it is not over at `until_ms`,
 * by now_ms(), and goes on. Takes the lock.
 */
int flush_until(struct engine *engine, uint64_t since_ms, uint64_t until_ms);

/* Wait for write-backs that are under way, also of pages that were trimmed since. As flush_until(). */
int end_write_backs(struct engine *engine, uint64_t until_ms);

#endif
