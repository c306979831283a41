/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The simulator: the engine's own C (nbdnfs/engine/{base,region,nfs,block,nbd}) on a simulated machine.
 * docs/decisions/0030 has the reasons. One process, one real thread; everything that happens follows from the seed.
 *
 * world.c      clock, events, threads (coroutines), who runs next, the trace's hash
 * calls.c      the C library's calls that the engine makes: locks, time, memory, the region's file
 * network.c    sockets, eventfd, poll(2); what a network does to them
 * fake_nas.c   the NFSv3 server: pages that it may lose, its answers, its faults
 * fake_open.c  instead of libnfs: the first open hands the handle over
 * load.c       requests, and what each of them may return
 * nbd_client.c the kernel's NBD client, where the loop serves the device
 * nbd_socket.c the socket between the two
 * worker.c     one worker after the other on one region
 * inside_*.c   what the engine's own structures must say when nothing is under way
 * stores.c     every store to the region, in the build that has them
 * simulate.c   options, seeds, and the report
 *
 * The engine's calls come here by `ld --wrap`: the engine is compiled from its own files, without a change.
 */
#ifndef NBDNFS_SIM_H
#define NBDNFS_SIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE_BYTES 4096u
#define PAGES_MAX 1024u
#define THREADS_MAX 48u
/* With those of the engine, there are no more threads. */
#define REQUESTERS_MAX 32u
#define NEVER INT64_MAX
#define US 1000ll
#define MS 1000000ll
#define S 1000000000ll

/* ---- random numbers: a stream for each purpose, so that taking one fault away leaves the others alone ---- */

struct rng {
	uint64_t state;
};

static inline uint64_t rng_next(struct rng *rng)
{
	uint64_t z = (rng->state += 0x9e3779b97f4a7c15u); /* SplitMix64 */

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
	z = (z ^ z >> 27) * 0x94d049bb133111ebu;
	return z ^ z >> 31;
}

static inline uint32_t rng_below(struct rng *rng, uint32_t limit)
{
	return (uint32_t)((rng_next(rng) >> 32) * limit >> 32);
}

/* True in `of_1024` cases of 1024. */
static inline bool rng_chance(struct rng *rng, uint32_t of_1024)
{
	return (rng_next(rng) >> 54) < of_1024;
}

static inline int64_t rng_between(struct rng *rng, int64_t least, int64_t most)
{
	return least + (int64_t)(rng_next(rng) % (uint64_t)(most - least + 1));
}

/* ---- faults ---- */

/* Each has a name on the command line, and windows of time in which it strikes. */
#define FAULTS(X)                                                                                                      \
	X(worker_crash) X(nas_crash) X(nas_restart) X(partition) X(reset) X(blackhole) X(slow) X(drop_answer)          \
	X(drop_request) X(jukebox) X(refuse) X(short_transfer) X(verifier_flutter) X(stale) X(corrupt_read) X(limits)  \
	X(fragments) X(stability) X(suspend) X(thief) X(owner_refused) X(replaced) X(hang_up)

enum fault {
#define X(name) FAULT_##name,
	FAULTS(X)
#undef X
	FAULT_COUNT
};

/* What does not make a request wait: a run that has nothing else is *calm*, and is held to limits of time. */
#define CALM_FAULTS                                                                                                    \
	(1u << FAULT_short_transfer | 1u << FAULT_corrupt_read | 1u << FAULT_limits | 1u << FAULT_fragments)

/* How requests are chosen. */
enum habit {
	HABIT_MIXED,
	HABIT_REWRITES, /* a page or two, again and again, while others flush */
	HABIT_WALKS,    /* over a small device, reading ahead, with READs of which some take very long */
	HABIT_HOLES,    /* as mixed, and connections that fall silent are all that happens */
	HABIT_COUNT
};

/* ---- options: what a seed means, and what the command line changes of it ---- */

struct sim_options {
	uint64_t seed;
	uint32_t requests;
	uint32_t pages, slots, threads, connections, read_ahead_pages;
	uint32_t preempt;       /* of 1024: how often a thread is interrupted where it could be */
	uint32_t faults;        /* bits of enum fault */
	int64_t fault_gap_ns, fault_length_ns; /* the mean of the times without and with a fault */
	int64_t latency_ns;     /* what the server takes for a call, in the middle */
	int64_t late_ns;        /* what it takes at the most, also for calls whose connection is gone */
	uint32_t send_buffer_bytes;
	uint32_t hot_pages;     /* most requests go there */
	uint32_t pause_chance;  /* of 1024: a requester thinks for a while */
	uint32_t round;         /* requests between two times that all requesters wait for each other; 0: never */
	uint32_t words_of_8;    /* of 8 pages, how many repeat one word */
	uint32_t read_factor;   /* how much longer READs take */
	bool encrypt, stable_writes, owner;
	bool aes;               /* with `encrypt`: by AES, else by XChaCha20 */
	bool loop;              /* the device is served by the loop, over a socket, and not by calls of the engine */
	uint32_t loop_tick_ms;
	uint32_t client_buffer_bytes; /* of that socket, in each direction */
	uint32_t client_errors; /* of 1024: a call on it finds no memory, is interrupted, or has nothing to move */
	uint32_t client_pause;  /* of 1024: the client does not receive for a while */
	uint32_t soft_limit_ms; /* a request that waits for the server for so long is an error; 0: never */
	enum habit habit;
	uint64_t crash_at;      /* the worker is killed at this point; 0: not */
	uint64_t fail_at;       /* this call fails; 0: none */
	uint32_t fail_variant;
	bool verbose;
};

/* What a run has done. */
struct sim_result {
	bool failed;
	char why[512];
	uint64_t trace;         /* equal for equal runs */
	int64_t time_ns;
	uint64_t page_ops, requests, worker_crashes, nas_crashes, connections;
	uint64_t loop_requests, hang_ups; /* of `requests`, by the loop; workers that ended because their client left */
	uint64_t calls_nfs, points, failable, failed_calls, stores;
	uint64_t copied_pages;  /* whole pages that were copied into the region */
	uint64_t faults[FAULT_COUNT];
};

extern struct sim_options options;
extern struct sim_result result;

/* ---- world.c ---- */

struct thread {
	void *stack_pointer;
	void *(*body)(void *);
	void *argument;
	uint64_t joiners;       /* threads that wait for its end, as bits */
	int64_t wake_at_ns;     /* NEVER: without a limit */
	bool used, ended;
};

extern int64_t now_ns;          /* since the simulation began; CLOCK_MONOTONIC has an hour more */
extern int64_t slept_ns;        /* CLOCK_BOOTTIME is ahead by so much */
extern unsigned current;        /* the running thread; THREADS_MAX: none, an event */
extern struct thread threads[THREADS_MAX];

typedef void (*event_fn)(void *a, uint64_t b, uint64_t c);

void world_reset(void);
/* Run until world_stop(), or a failure. */
void world_run(void);
void world_stop(void);
void event_at(int64_t at_ns, event_fn fn, void *a, uint64_t b, uint64_t c);

unsigned thread_new(void *(*body)(void *), void *argument);
/* Stop the running thread until thread_wake() or wake_at_ns. */
void thread_block(int64_t wake_at_ns);
void thread_wake(unsigned thread);
void threads_wake(uint64_t mask);
/* Let others run, perhaps. */
void thread_yield(void);
void thread_preempt(void);
void threads_drop(void);
void thread_sleep(int64_t ns);
static inline int64_t servers_ns(void)
{
	return now_ns + slept_ns;
}

static inline uint64_t thread_bit(void)
{
	return (uint64_t)1 << current;
}

/* Part of the trace: whatever differs between two runs shows here. */
void trace(uint64_t what);

/* The run has failed: something that must not be. Does not return where a thread runs. */
__attribute__((format(printf, 1, 2))) void sim_fail(const char *format, ...);

/* ---- calls.c ---- */

/* Here the worker may be killed. */
void crash_point(void);
/* The worker is to be killed after so many more points. */
void crash_soon(uint32_t points);
/* A call that may fail. Returns the variant of its failure from 1 on, or 0. */
uint32_t call_fails(uint32_t variants);
void memory_reset(void);
/* Everything was freed: begin again. */
void memory_rewind(void);
extern uint64_t live_allocations;

extern uint8_t region_memory[];
extern uint64_t region_bytes;
bool is_in_region(const void *at);
void region_forget(void);       /* another run */
void region_let_go(void);       /* the process has ended */

/* ---- network.c ---- */

/* A descriptor that the worker is started with: its end of nbd_socket.c. */
int network_client_fd(void);
/* The client has sent (POLLIN), or received (POLLOUT), or anything else (0): a poll(2) of it may end differently. */
void network_client_changed(short what);

struct connection_end;          /* a connection as the server sees it */

void network_reset(void);
/* The worker has ended: its sockets are closed. */
void network_close_all(void);
void network_fault(enum fault fault, bool begins);
extern int64_t lost_at_ns;      /* when the worker last closed a connection that had been made */
/* The worker receives nothing of the server. */
extern struct silence {
	int64_t from_ns, to_ns; /* to_ns: of the one before, which was longer than a second */
	bool has_twins;         /* it has closed a connection by then: what it sends again may be held back */
} silence_now, silence_before;
/* What the server does with a connection. */
struct sim_conn *conn_hold(struct sim_conn *conn);
void conn_let_go(struct sim_conn *conn);
bool conn_is_open(const struct sim_conn *conn);
bool conn_has_client(const struct sim_conn *conn);
/* When the client sent the last of the next `count` bytes, by the server's clock; 0: as soon as it had woken up. */
int64_t conn_sent_ns(struct sim_conn *conn, uint32_t count);
/* Room for an answer of `bytes`, to be filled before conn_answer(). */
uint8_t *conn_room(struct sim_conn *conn, uint32_t bytes);
void conn_answer(struct sim_conn *conn, uint32_t bytes);
void conn_reset_by_server(struct sim_conn *conn);
void conns_server_down(bool silently);

/* ---- fake_nas.c ---- */

void nas_reset(void);
bool nas_is_listening(void);
bool nas_is_reachable(void);
/* Bytes of whole or partial calls. Returns how many it took. */
uint32_t nas_receive(struct sim_conn *conn, const uint8_t *bytes, uint32_t count);
void nas_fault(enum fault fault, bool begins);
/* The power is cut, and comes back. */
void nas_lose_cache(void);
/* The worker has been killed: what it had under way is done soon, or never (0011). */
void nas_hurry(void);
void nas_worker_starts(void);
const uint8_t *nas_stable_page(uint32_t page);
uint32_t nas_file_handle(uint8_t *handle);
uint32_t nas_root_handle(uint8_t *handle);
/* The file that has the name while the real one is replaced. */
uint32_t nas_other_handle(uint8_t *handle);
uint64_t nas_other_id(void);
#define NAS_FILE_ID 4711u
#define NAS_PORT 2049u
#define MOUNT_PORT 20048u
#define OWNER_IDENTITY "\nboot 11111111-1111-1111-1111-111111111111\n"
#define OWNER_PATH "/.swap.owner"
extern int64_t stolen_at_ns;    /* by the server's clock, which does not sleep; NEVER: it was not */

/* ---- faults, in simulate.c ---- */

bool fault_is_active(enum fault fault);
/* Is nothing else in this run than calm faults and those of `besides`, as bits? */
bool run_is_calm(uint32_t besides);
bool faults_are_over(void);
void faults_end(void);
/* The network is cut for so long, whatever else strikes. */
void fault_partition(int64_t length_ns);
/* The machine sleeps for so long. */
void fault_sleep(int64_t length_ns);
extern int64_t woke_at_ns;      /* from the last sleep */

/* ---- load.c ---- */

void load_reset(void);
void *load_thread(void *argument);
/* The worker has ended: what was under way is asked again. One that was killed may have been writing. */
void load_interrupted(bool was_killed);
/* The device has replied to this requester: 0 or -errno. */
void load_ended(uint32_t number, int error);
void load_check_all(void);
void load_check_torn(void);
void load_flush(void);
void *load_requester(uint32_t number);
/* A page of the file as the server receives it: encrypted as it should be. */
void load_check_sealed(uint32_t page, const uint8_t *data);
/* Does the engine know a page by which it can recognise the file? False where that is not certain. */
bool load_is_recognisable(void);
/* What waits for longest, as text. */
const char *load_oldest(void);

/* ---- nbd_client.c ---- */

struct nbd_ask {
	uint16_t type, flags;   /* as in NBD */
	uint64_t offset_bytes;
	uint32_t length_bytes;
	uint8_t *data;
};

void nbd_client_reset(void);
/* A thread of the kernel: from the handshake to the end of this connection. */
void *nbd_client_thread(void *argument);
/* Send a request, and wait until load_ended() has been called for it. A requester has one at a time. */
void nbd_client_ask(uint32_t number, const struct nbd_ask *ask);
/* All requests are done: disconnect. */
void nbd_client_finish(void);
/* Is the handshake over, and neither of them has left? */
bool nbd_client_is_up(void);
bool nbd_client_has_disconnected(void);
/* The client leaves once it has sent so many bytes more. */
void nbd_client_hang_up_soon(uint32_t bytes);
/* The worker has ended, and no thread runs. */
void nbd_client_interrupted(bool was_killed);

/* ---- nbd_socket.c; the worker's calls are in wrapped.h ---- */

void nbd_socket_reset(void);
void nbd_socket_connect(void);
/* The kernel's end: whether that can be (the other end has it), and how many bytes moved. */
bool nbd_socket_takes_bytes(void);
bool nbd_socket_brings_bytes(void);
uint32_t nbd_socket_put(const uint8_t *bytes, uint32_t count);
uint32_t nbd_socket_take(uint8_t *bytes, uint32_t count);
void nbd_socket_hang_up(void);
bool nbd_socket_was_left(void);
/* Until the worker has done something with it, or nbd_socket_wake_kernel(). */
void nbd_socket_wait(void);
void nbd_socket_wake_kernel(void);

/* ---- worker.c ---- */

struct engine;
extern struct engine *worker_engine;
/* A worker has started: from then on the region says where the file is, and its directory where that was found. */
extern bool worker_place_is_known, worker_directory_is_known;
void worker_reset(void);
void worker_start(void);
/* Kill it as soon as no thread runs. */
void worker_kill(void);
/* It ends by itself: exit(3). Does not return. */
void worker_exit(void);
bool worker_kill_is_due(void);
void worker_killed(void);
void worker_requester_ended(void);

/* ---- inside_block.c, inside_nfs.c ---- */

struct nfsio;
void check_idle_block(struct engine *engine);
void check_idle_nfs(struct nfsio *io, unsigned number);
bool block_knows_directory(const struct engine *engine);
bool nfs_knows_directory(const struct nfsio *io);

/* ---- stores.c ---- */

extern const bool has_store_hooks;
void copy_to_region(void *to, const void *from, size_t bytes);

#endif
