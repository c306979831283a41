/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the parts of the engine share; nobody else includes it. engine.h has what the engine promises. Each part calls
 * those above it only. Who may touch what, and when, stands in struct engine.
 *
 * file.c       what has become of the file, and of the connections to it
 * flusher.c    write-backs and COMMITs, and the thread that sees to them
 * read_ahead.c  fetches of what a reader will want next
 * requests.c   read, write, FLUSH and trim
 * engine.c            create and destroy, and the file's owner
 */
#ifndef NBDNFS_ENGINE_INTERNAL_H
#define NBDNFS_ENGINE_INTERNAL_H

#include "region/cache.h"
#include "block/engine.h"
#include "block/streams.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

/*
 * Write-backs and read-aheads under way at once, and what one of each moves at most. Short runs are for pages that
 * lie alone: a server that is a millisecond away takes many of them in the time of one. They take no more than lies
 * together anyway; what is longer waits for a long one rather than being cut to pieces.
 */
#define LONG_WRITE_BACKS 12
#define SHORT_WRITE_BACKS 8
#define WRITE_BACKS (LONG_WRITE_BACKS + SHORT_WRITE_BACKS)
#define SHORT_RUN_PAGES 4
#define FETCHES 4
#define FETCH_PAGES RUN_PAGES_MAX
/* Buffers of RUN_PAGES_MAX pages, for long runs and for fetches: few of the one are under way beside many of the other. */
#define LONG_BUFFERS 14
/* The same where libnfs makes the calls, and allocates as much again for each. */
#define LIBNFS_LONG_BUFFERS 10

/* A write-back under way, or a place for one. */
struct write_back {
	struct nfsio_req req;   /* first: its owner is found from it */
	struct engine *engine;
	struct page_run pages;
	uint8_t *data;          /* pages_max pages; a long run has them while it is busy */
	uint32_t pages_max;
	uint64_t started_us;
	bool busy;              /* guarded by engine->lock */
};

/* A read-ahead under way, or a place for one. */
struct fetch {
	struct nfsio_req req;
	struct engine *engine;
	uint64_t first_page;
	uint64_t number;
	uint32_t count;
	uint8_t *data;          /* FETCH_PAGES pages, while it is busy */
	uint64_t started_us;
	bool busy;              /* guarded by engine->lock */
};

struct engine {
	/* constant after engine_create() */
	struct engine_options options;
	/*
	 * The first is for write-backs, read-ahead, and reads that find no other idle. Each of the others is lent to one
	 * reader at a time, who receives his answer himself (transfer.c): nobody has to be woken to hand it to him.
	 */
	struct nfsio *ios[ENGINE_CONNECTIONS_MAX];
	unsigned io_count;
	struct nfsio *names;    /* for the owner: ios[0], where that has names, or one of its own; NULL without an owner */
	struct region region;
	uint64_t size_bytes;
	uint64_t reconnects_before; /* of workers before this one */
	uint32_t piece_bytes;
	bool own_region;
	uint8_t *buffers;       /* of the runs and fetches, and the samples */
	uint8_t *samples;       /* a page for each connection's thread */
	pthread_t flusher;
	struct owner_watch *owner_watch;    /* NULL: nobody asked for one */

	atomic_bool stolen;     /* somebody else has the file: nothing works any more; set once, under `lock` */

	/*
	 * Guards everything below, and the cache. It is never held over a call of nfsio, but for nfsio_state(), and for
	 * nfsio_truncated_bytes() and nfsio_is_unlinked(), which only read an atomic: completions take it. They run in
	 * nfsio's thread, without any lock of its own.
	 */
	pthread_mutex_t lock;
	pthread_cond_t work;    /* the flusher has something to do */
	pthread_cond_t progress; /* slots became clean or free, a fetch ended, or the file or the way to it changed */
	struct cache *cache;
	struct streams streams;
	struct write_back write_backs[WRITE_BACKS]; /* the long ones first */
	uint8_t *spare[LONG_BUFFERS]; /* that nobody has */
	unsigned spare_count;
	unsigned write_backs_busy;
	struct fetch fetches[FETCHES];
	struct nfsio_req commit;
	bool committing;
	bool starved;           /* a run is wanted and none is free: the next one that is done goes on, by itself */
	bool flusher_rests;     /* until it is called */
	bool stop;              /* the flusher is to end, once the NAS has all or `abandon` is set */
	bool abandon;
	uint32_t waiting_for_stable; /* requests that wait for the NAS */
	uint32_t waiting_for_slot;
	bool lent[ENGINE_CONNECTIONS_MAX]; /* ios that have their reader */
	uint64_t fetch_number;
	uint64_t aged_sequence; /* what was written up to it is old enough to go */
	uint64_t refused_until_ms; /* what the server refuses is held back until then, and no commit before the other */
	uint64_t commit_refused_until_ms;
	uint64_t refused_pause_ms;
	uint64_t refused_sequence; /* what had been written when it refused last */
	uint64_t progress_at_ms; /* when the NAS last took something */
	uint64_t held_until_ms; /* until when pages are held back from it */
	bool gone_too_long;     /* the file is gone, and waiting for it is an error */
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

/* Counts what the NAS does not have for good. Lock held. */
static inline void note_unstable(struct engine *engine)
{
	set_counter(&counters(engine)->unstable_pages, cache_unstable_count(engine->cache));
}

/* Of what must still travel; what only waits for a COMMIT has a limit of its own. Lock held. */
static inline bool is_half_full(const struct engine *engine)
{
	return cache_unstable_count(engine->cache) - cache_uncommitted_count(engine->cache) >=
	       engine->region.slot_count / 2;
}

/* No more than the server moves in one READ or WRITE; of a very small one the transport makes several. */
static inline uint32_t pages_at_once(const struct engine *engine, uint32_t wanted)
{
	uint32_t most = engine->piece_bytes / PAGE_BYTES;

	return wanted <= most ? wanted : most > 0 ? most : 1;
}

/* file.c */

/* How much of the file has always been there; UINT64_MAX: all of it. With or without the lock. */
uint64_t file_truncated_bytes(const struct engine *engine);
/* Some answer may have told that the file is shorter than it was, or has lost its name. Takes the lock, if so. */
void file_look(struct engine *engine);
/* The same with the lock held. */
void file_look_locked(struct engine *engine);
/* Has nfsio recognise the file (`page` is for a sample), and tell how the connection stands. Takes the lock. */
void file_watch(struct engine *engine, struct nfsio *io, uint8_t *page);

/* flusher.c */

/* What engine_create() starts, with the engine as `arg`. Takes the lock. */
void *flusher_thread(void *arg);
/* There is something to do, unless all runs are under way. Lock held. */
void flusher_call(struct engine *engine);
/* Holds back what a worker before this one has left. Lock not needed: engine_create() alone knows the engine. */
void flusher_hold_replay(struct engine *engine);

/* read_ahead.c */

/* These pages have been asked for: fetches what their walker will want next. Takes the lock. */
void readahead_follow(struct engine *engine, uint64_t page, uint32_t pages);

#endif
