/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * cache: which slot of the region holds which page, and what has to happen to it. No I/O, no threads, no clock.
 *
 * The caller holds one lock around every call (the engine's). A page is in one of these states:
 *
 *   FETCHING  read-ahead has asked the NAS for it; nothing to read yet
 *   DIRTY     the NAS must still be told
 *   WRITING   a write of it is under way; written again meanwhile, it is DIRTY as well
 *   UNCOMMITTED  the NAS has it, but may forget it until a COMMIT
 *   CLEAN     the NAS has these very bytes, stably; the slot may be reused
 *   FREE      no page
 *
 * and, without a slot, it may be *filled*: one 32-bit word over and over, kept in the region's page table.
 *
 * Sequence numbers: each write gets the next one; cache_is_stable() tells whether everything up to one is on
 * the NAS.
 */
#ifndef NBDNFS_CACHE_H
#define NBDNFS_CACHE_H

#include <stdbool.h>
#include <stdint.h>

#include "region/region.h"

#define NO_SLOT UINT32_MAX

struct cache;

/* Takes over what the region holds: dirty pages are dirty still. NULL when there is no memory. */
struct cache *cache_create(struct region *region);
void cache_destroy(struct cache *cache);

/* ---- requests ---- */

enum cache_lookup { CACHE_HIT, CACHE_MISS, CACHE_WAIT };

/* Copy a page out. CACHE_WAIT: a fetch of it is under way. `data` is written on CACHE_HIT only. */
enum cache_lookup cache_read(struct cache *cache, uint64_t page, uint8_t *data);

/* What became of a write. CACHE_FULL: nothing, there is no slot; wait for a run to be done. */
enum cache_store { CACHE_STORED, CACHE_FILLED, CACHE_FULL };

/*
 * Take a page in; `crc` is its checksum. With `may_fill` a page of one word is kept in the page table, and the
 * NAS does not get it before cache_materialise().
 */
enum cache_store cache_write(struct cache *cache, uint64_t page, const uint8_t *data, uint32_t crc, bool may_fill);

/* Forget a page. A write of it that is under way goes on, and nothing is written to the page before its end. */
void cache_trim(struct cache *cache, uint64_t page);

/* The sequence number of the newest write. */
uint64_t cache_sequence(const struct cache *cache);

/* Is every write up to `sequence` on the NAS, stably? Filled pages count only after cache_materialise(). */
bool cache_is_stable(const struct cache *cache, uint64_t sequence);
bool cache_page_is_stable(const struct cache *cache, uint64_t page, uint64_t sequence);

/*
 * Give filled pages slots, from *page on, so that they travel like others. Returns true when all of the device
 * is done, false when there was no slot left: wait for a run to be done and go on.
 */
bool cache_materialise(struct cache *cache, uint64_t *page);

/* What a page's bytes must have as CRC-32C, 0 when that is not known. */
uint32_t cache_checksum(const struct cache *cache, uint64_t page);

/*
 * A page of which the NAS has these very bytes, if it has kept its word: the first from `from` on, around the device's
 * end. False when there is none.
 */
bool cache_known_page(const struct cache *cache, uint64_t from, uint64_t *page, uint32_t *crc);

/* ---- writing back ---- */

#define RUN_PAGES_MAX 32

/* Pages that lie side by side on the device, on their way to the NAS. */
struct page_run {
	uint64_t first_page;
	uint32_t count;
	uint32_t slots[RUN_PAGES_MAX];
};

/*
 * Take the run around the oldest dirty page that is not held, `most` pages at most, and copy it to `data`. Returns
 * false when nothing is dirty that could be taken.
 */
bool cache_take_page_run(struct cache *cache, uint32_t most, struct page_run *run, uint8_t *data);

/* How many pages it would take. */
uint32_t cache_next_page_run(const struct cache *cache, uint32_t most);

/*
 * Take none of these pages before `until`, a time of the caller's. They are read and written as ever. What is held
 * at once is remembered exactly for HOLDS calls; with more, everything is held until the last of them ends.
 */
#define HOLDS 32
void cache_hold(struct cache *cache, uint64_t first_page, uint64_t count, uint64_t until);
/* End those that are over at `now`. True while there are others. */
bool cache_end_holds(struct cache *cache, uint64_t now);

/* The NAS has the run: stably, or under `verifier` until the next commit. */
void cache_page_run_stable(struct cache *cache, const struct page_run *run);
void cache_page_run_uncommitted(struct cache *cache, const struct page_run *run, uint64_t verifier);
/* It has not: the pages are dirty as before. */
void cache_page_run_failed(struct cache *cache, const struct page_run *run);

/* The number of pages that a commit that is sent now would cover; remembers them. 0: there are none. */
uint32_t cache_commit_begin(struct cache *cache);
/* It returned `verifier`: those written under it are clean, the others dirty again. Returns the number of those. */
uint32_t cache_commit_done(struct cache *cache, uint64_t verifier);
void cache_commit_failed(struct cache *cache);

/* The oldest write that could be taken now; 0 when there is none. */
uint64_t cache_oldest_dirty(const struct cache *cache);
uint32_t cache_dirty_count(const struct cache *cache);       /* dirty, and not under way */
uint32_t cache_uncommitted_count(const struct cache *cache);
uint32_t cache_unstable_count(const struct cache *cache);    /* all that the NAS does not have for good */

/* ---- reading ahead ---- */

/*
 * Reserve slots for up to `count` pages from `first_page` on that nobody has, and none that is dirty is given
 * up for them. Returns how many pages the fetch covers (it stops at the first page that is held), 0 for none.
 */
uint32_t cache_fetch_begin(struct cache *cache, uint64_t first_page, uint32_t count, uint64_t fetch);
/*
 * `data` holds the pages, `crcs` their checksums. Those that were written or trimmed meanwhile stay as they are;
 * those whose checksum is wrong are dropped: whoever reads one asks the NAS. `data` NULL: the fetch failed.
 */
void cache_fetch_done(struct cache *cache, uint64_t first_page, uint32_t count, uint64_t fetch, const uint8_t *data,
		      const uint32_t *crcs);

/* How many pages were read ahead and dropped unread since the last call. */
uint32_t cache_take_wasted(struct cache *cache);
/* How many pages that were read ahead have been read since the last call. */
uint32_t cache_take_used(struct cache *cache);

#endif
