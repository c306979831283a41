/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * region: shared memory (a memfd) that outlives a worker. It holds the pages that were acknowledged to the kernel and
 * that the NAS does not have yet, so that the next worker can write them.
 *
 *   header | slot table | page table | filled bitmap | slot data
 *
 * The page table has an entry for each page of the device: the proof of what was last written (proof.h; 0: unknown),
 * or, where the filled bitmap has the page's bit, the 32-bit word that the whole page repeats. A filled page
 * lives here alone: the NAS does not have it until a FLUSH writes it.
 *
 * The version says whether pages are encrypted on the NAS. It is chosen when the region is laid out, and stays, as the
 * keys do: what is on the NAS can be read in this way alone. Slots are never encrypted: they are locked memory.
 *
 *   REGION_PLAIN                  entries of 4 bytes, which are CRC-32Cs; the only one of early versions of nbdnfs
 *   REGION_XCHACHA20, REGION_AES  entries of 8 bytes, which are tags, and keys in the header (base/cipher.h)
 *
 * A worker may be killed between any two instructions. Only what was acknowledged must survive, so each change is made
 * in an order that keeps the old state until the new one is complete; see cache.c.
 *
 * One process maps a region at a time: it holds a lock on the open file (flock(2)), which the kernel drops when the
 * process ends. All fields are in the machine's own byte order.
 */
#ifndef NBDNFS_REGION_H
#define NBDNFS_REGION_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/cipher.h"

/* What one slot holds: a page of the device, which is what "page" means in the engine. The kernel's may be larger. */
#define SLOT_BYTES 4096u
enum region_version { REGION_PLAIN = 2, REGION_XCHACHA20 = 3, REGION_AES = 4 };

static inline bool region_is_encrypted(enum region_version version)
{
	return version != REGION_PLAIN;
}

/* Room for sums that do not wrap, and for page numbers in slot_value() and page_set.h. */
#define REGION_DEVICE_BYTES_MAX (1ull << 48)
#define REGION_SLOTS_MAX (1u << 28)
/* What one mapping can have: on a 32-bit machine less than a device of 4 TiB asks for. */
#define REGION_BYTES_MAX (SIZE_MAX / 2)

/* What a slot holds, as the next worker finds it. FETCHING and WRITING exist in the worker's own memory only. */
enum slot_content { SLOT_FREE = 0, SLOT_CLEAN = 1, SLOT_DIRTY = 2 };

#define REGION_OF_ANOTHER_FILE "the region belongs to another backing file"

/* The backing file that a region belongs to: as it was when the region was laid out (last_place.h: since then). */
struct region_identity {
	uint64_t device_bytes;
	uint64_t fileid;
	uint64_t path_hash;
};

/* The state of the backing file on the server. */
enum region_file {
	REGION_FILE_THERE = 0,
	REGION_FILE_DELETED = 1,
	REGION_FILE_REPLACED = 2,
	REGION_FILE_TRUNCATED = 3, /* stays until the next worker, even if the file has its length again */
};

#define HISTOGRAM_BUCKETS 32

/* Written by the worker without locks, read by other processes: each number is whole, but not of one moment. */
#define REGION_COUNTERS(X)                                                                         \
	X(reads) X(writes) X(flushes) X(trims)      /* NBD requests */                              \
	X(read_bytes) X(written_bytes)                                                             \
	X(hit_pages) X(missed_pages)                /* read pages found in the region, and not */   \
	X(filled_pages_written)                     /* pages of one word, which do not travel */    \
	X(nfs_reads) X(nfs_read_bytes)                                                             \
	X(nfs_writes) X(nfs_written_bytes) X(nfs_commits)                                          \
	X(read_ahead_pages) X(read_ahead_hits) X(read_ahead_wasted)                                \
	X(stalls)                                   /* writes that had to wait for a slot */        \
	X(write_errors)                             /* write-backs that the server refused */       \
	X(lost_uncommitted_pages)                   /* lost by a server that restarted; written again */ \
	X(checksum_rereads) X(checksum_failures)                                                   \
	X(replayed_pages)                           /* found dirty by a new worker */               \
	X(reconnects)                                                                              \
	X(unstable_pages)                           /* now: pages that the NAS does not have stably */ \
	X(nfs_in_flight)                            /* now: write-backs and read-aheads */ \
	X(write_back_error)                         /* now: errno of the last refusal, 0 when none */ \
	X(disconnected)                             /* now: 1 while a connection is link_down */    \
	X(file_state)                               /* now: an enum region_file */                  \
	X(twins_until_ms)                           /* CLOCK_MONOTONIC; see nfsio_note_twins() */ \
	X(owner_state)                              /* now: enum owner_state */

/* Bucket n counts what took less than 2^n microseconds. */
#define REGION_HISTOGRAMS(X) X(read_us) X(write_us) X(nfs_read_us) X(nfs_write_us)

struct region_counters {
#define X(name) _Atomic uint64_t name;
	REGION_COUNTERS(X)
#undef X
#define X(name) _Atomic uint64_t name[HISTOGRAM_BUCKETS];
	REGION_HISTOGRAMS(X)
#undef X
};

/* Requests that are timed at once: the most threads that nbdkit has for one connection. Others are not timed. */
#define REGION_REQUESTS 16
#define REGION_CONNECTIONS 16

/*
 * What is waited for now. Times are CLOCK_MONOTONIC in ms, which all processes share; 0: nothing, or never. Written
 * without locks, as the counters are. A worker that hangs leaves the times that it began to wait at, and these age.
 */
struct region_waits {
	_Atomic uint64_t writer;        /* the generation whose worker writes this; of another one it is out of date */
	_Atomic uint64_t last_received_ms; /* an answer came, or a connection was made; any of them */
	_Atomic uint64_t waiting_since_ms[REGION_CONNECTIONS]; /* for answers, without a pause */
	_Atomic uint64_t request_since_ms[REGION_REQUESTS]; /* NBD requests, in no order */
};

struct region_header {
	char magic[8];                  /* "nbdnfs\0\0"; written last when a region is made */
	uint32_t version;
	uint32_t slot_count;
	struct region_identity identity;
	uint64_t region_bytes;
	_Atomic uint64_t generation;    /* the number of workers that have mapped it */
	struct region_counters counters;
	struct region_waits waits;      /* zeros in a region that an earlier version has made */
	/* Of an encrypted one; zeros in others. Constant once the magic is there. The keys are written nowhere else. */
	struct cipher_keys keys;
	uint64_t clear_bytes;           /* so much of the device is not encrypted: its first page of the kernel */
	/* NBD reads that ended with an I/O error, and when the last did, in ms; 0 in a region of an earlier version */
	_Atomic uint64_t failed_reads, failed_read_ms;
};

/*
 * Other processes read the header by offset (nbdnfs/region.py), and the next worker may be of another build.
 * Whoever changes one of these numbers adds a version, and changes the table in Python with it.
 */
#define REGION_COUNTER_COUNT 31
#define REGION_HISTOGRAM_COUNT 4
_Static_assert(offsetof(struct region_header, magic) == 0, "layout");
_Static_assert(offsetof(struct region_header, version) == 8, "layout");
_Static_assert(offsetof(struct region_header, slot_count) == 12, "layout");
_Static_assert(offsetof(struct region_header, identity) == 16, "layout");
_Static_assert(sizeof(struct region_identity) == 24, "layout");
_Static_assert(offsetof(struct region_header, region_bytes) == 40, "layout");
_Static_assert(offsetof(struct region_header, generation) == 48, "layout");
_Static_assert(offsetof(struct region_header, counters) == 56, "layout");
_Static_assert(offsetof(struct region_counters, read_us) == REGION_COUNTER_COUNT * 8, "layout");
_Static_assert(sizeof(struct region_counters) ==
		       (REGION_COUNTER_COUNT + REGION_HISTOGRAM_COUNT * HISTOGRAM_BUCKETS) * 8,
	       "layout");
_Static_assert(offsetof(struct region_header, waits) == 56 + sizeof(struct region_counters), "layout");
_Static_assert(sizeof(struct region_waits) == (2 + REGION_CONNECTIONS + REGION_REQUESTS) * 8, "layout");
#define REGION_KEYS_OFFSET 1600
_Static_assert(REGION_KEYS_OFFSET == 56 + sizeof(struct region_counters) + sizeof(struct region_waits), "layout");
_Static_assert(offsetof(struct region_header, keys) == REGION_KEYS_OFFSET, "layout");
_Static_assert(offsetof(struct region_header, clear_bytes) == REGION_KEYS_OFFSET + 64, "layout");
_Static_assert(offsetof(struct region_header, failed_reads) == REGION_KEYS_OFFSET + 72, "layout");
_Static_assert(offsetof(struct region_header, failed_read_ms) == REGION_KEYS_OFFSET + 80, "layout");
_Static_assert(sizeof(struct region_header) == REGION_KEYS_OFFSET + 88, "layout");
_Static_assert(sizeof(struct region_header) <= SLOT_BYTES, "layout: the slot table begins after one slot's bytes");

/*
 * One 64-bit store publishes a slot: content in the low two bits, the page number above. Guarded by the cache's lock;
 * atomic because the worker may be killed at any instruction.
 */
typedef _Atomic uint64_t region_slot;
_Static_assert(sizeof(region_slot) == 8, "layout");
_Static_assert(sizeof(_Atomic uint32_t) == 4, "layout: an entry of the page table");
_Static_assert(sizeof(_Atomic uint64_t) == 8, "layout: an entry of the page table");

struct region {
	int fd;
	size_t bytes;
	struct region_header *header;
	region_slot *slots;
	/* The page table, guarded by the cache's lock: one of these, the other NULL. See region_entry(). */
	_Atomic uint32_t *narrow_entries;
	_Atomic uint64_t *wide_entries;
	_Atomic uint64_t *filled;       /* guarded by the cache's lock */
	uint8_t *data;                  /* slot n's page at n * SLOT_BYTES */
	uint32_t slot_count;
	uint64_t page_count;
	uint64_t clear_pages;           /* of an encrypted one: so many from the first on are not */
	struct cipher *cipher;          /* NULL: the pages are not encrypted */
};

/* Where each part begins. In 64 bits on every machine: what does not fit is refused, and must not wrap before that. */
struct region_layout {
	uint64_t slots, page_table, filled, data, end;
};

static inline uint64_t region_round_up(uint64_t bytes)
{
	return (bytes + SLOT_BYTES - 1) / SLOT_BYTES * SLOT_BYTES;
}

static inline struct region_layout region_lay_out(uint64_t device_bytes, uint32_t slot_count,
						  enum region_version version)
{
	uint64_t pages = device_bytes / SLOT_BYTES;
	uint64_t entry_bytes = region_is_encrypted(version) ? sizeof(uint64_t) : sizeof(uint32_t);
	struct region_layout at;

	at.slots = region_round_up(sizeof(struct region_header));
	at.page_table = at.slots + region_round_up(slot_count * (uint64_t)sizeof(region_slot));
	at.filled = at.page_table + region_round_up(pages * entry_bytes);
	at.data = at.filled + region_round_up((pages + 63) / 64 * sizeof(uint64_t));
	at.end = at.data + (uint64_t)slot_count * SLOT_BYTES;
	return at;
}

/* The size of a region with `slot_count` slots for a device of `device_bytes`. */
static inline uint64_t region_size_bytes(uint64_t device_bytes, uint32_t slot_count, enum region_version version)
{
	return region_lay_out(device_bytes, slot_count, version).end;
}

/* How a region is laid out that is new. One that was made before stays as it is. */
struct region_plan {
	uint32_t slot_count;
	enum region_version version;
	uint64_t clear_bytes;   /* of an encrypted one: what is not encrypted from the device's start */
};

/*
 * Map the region behind `fd`, which remains the caller's; with fd -1, make a memfd of the region's own. An empty one is
 * laid out for `identity` as planned. The file gets mode 0600, and cannot be resized any more. Returns 0 and *region,
 * or -errno and a text in `message`: -EBUSY when another process has mapped it, -EPROTO when it is of another version
 * or damaged, -EINVAL when it belongs to another backing file, -EFBIG when it does not fit in the address space.
 */
int region_map(struct region *region, int fd, const struct region_identity *identity, const struct region_plan *plan,
	       char *message, size_t message_bytes);
/*
 * The same for a region that another worker has laid out, for whatever file; path_hash must be as it was. The caller
 * compares the rest of region->header->identity. -ENOENT: nothing has been laid out.
 */
int region_adopt(struct region *region, int fd, uint64_t path_hash, char *message, size_t message_bytes);
void region_unmap(struct region *region);
/* The same of a region that is not needed again: its keys are overwritten first. */
void region_discard(struct region *region);

/* The page's entry in the page table. */
static inline uint64_t region_entry(const struct region *region, uint64_t page)
{
	return region->wide_entries != NULL ?
		       atomic_load_explicit(&region->wide_entries[page], memory_order_relaxed) :
		       atomic_load_explicit(&region->narrow_entries[page], memory_order_relaxed);
}

static inline void region_set_entry(struct region *region, uint64_t page, uint64_t entry)
{
	if (region->wide_entries != NULL)
		atomic_store_explicit(&region->wide_entries[page], entry, memory_order_release);
	else
		atomic_store_explicit(&region->narrow_entries[page], (uint32_t)entry, memory_order_release);
}

static inline uint64_t slot_value(uint64_t page, enum slot_content content)
{
	return page << 2 | content;
}

static inline uint64_t slot_page(uint64_t value)
{
	return value >> 2;
}

static inline enum slot_content slot_content(uint64_t value)
{
	return value & 3;
}

static inline void set_counter(_Atomic uint64_t *counter, uint64_t value)
{
	atomic_store_explicit(counter, value, memory_order_relaxed);
}

static inline void count(_Atomic uint64_t *counter, uint64_t amount)
{
	atomic_fetch_add_explicit(counter, amount, memory_order_relaxed);
}

/* Add one to the bucket of `us`. */
void count_duration(_Atomic uint64_t *histogram, uint64_t us);

#endif
