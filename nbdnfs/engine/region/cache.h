/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * cache: which slot of the region holds which page, and what has to happen to it next. No I/O, no threads, no clock.
 *
 * The caller holds one lock around every call (struct engine's). A slot is in one of these states:
 *
 *   FREE         it holds no page
 *   FETCHING     read-ahead has asked the NAS for its page; there is nothing to read yet
 *   DIRTY        the NAS does not have its bytes
 *   WRITING      a copy of its bytes is on its way to the NAS
 *   UNCOMMITTED  the NAS has its bytes, but may lose them until a COMMIT
 *   CLEAN        the NAS has its bytes, stably; the slot may be reused
 *
 * A page that is written while its slot is WRITING becomes DIRTY when that write-back ends. Its older write is stable
 * then if that write-back was; else it is when a later one is.
 *
 * A page without a slot may be *filled*: it repeats one 32-bit word, which lies in the region's page table.
 *
 * Each write gets the next sequence number.
 */
#ifndef NBDNFS_CACHE_H
#define NBDNFS_CACHE_H

#include <stdbool.h>
#include <stdint.h>

#include "region/region.h"

#define NO_SLOT UINT32_MAX

struct cache;

/* Takes over what the region holds: dirty pages are still dirty. NULL when there is no memory. */
struct cache *cache_create(struct region *region);
void cache_destroy(struct cache *cache);

/*
 * Has anything happened since the last call that a wait may be for? A slot became free or clean (CACHE_FULL,
 * CACHE_NO_SLOT), a write became stable or was dropped (cache_is_stable(), cache_page_is_stable()), or a page is not
 * being fetched any more (CACHE_WAIT). When one of these becomes true, this says true.
 */
bool cache_take_changed(struct cache *cache);

/* ---- requests ---- */

enum cache_lookup { CACHE_HIT, CACHE_MISS, CACHE_WAIT };

/* Copy a page out. CACHE_WAIT: it is being fetched. `data` is written on CACHE_HIT only. */
enum cache_lookup cache_read(struct cache *cache, uint64_t page, uint8_t *data);

/* CACHE_FULL: nothing was stored, there is no slot; wait for a write-back to end. */
enum cache_store { CACHE_STORED, CACHE_FILLED, CACHE_FULL };

/*
 * Store a page; `proof` is its own (proof.h). With `may_fill`, a page that repeats one word becomes filled
 * (CACHE_FILLED), and the NAS does not get it before cache_materialise().
 */
enum cache_store cache_write(struct cache *cache, uint64_t page, const uint8_t *data, uint64_t proof, bool may_fill);

/*
 * Forget a page: its writes are not unstable any more. A write-back of it goes on; its slot is reused only after that.
 */
void cache_trim(struct cache *cache, uint64_t page);

/* The sequence number of the newest write. */
uint64_t cache_sequence(const struct cache *cache);

/* Is every write up to `sequence` on the NAS, stably? Filled pages are not looked at: cache_materialise() first. */
bool cache_is_stable(const struct cache *cache, uint64_t sequence);
bool cache_page_is_stable(const struct cache *cache, uint64_t page, uint64_t sequence);

/*
 * Give filled pages slots, from *page on and at most `most`, so that they are written back. CACHE_MATERIALISED: the
 * whole device is done. CACHE_MORE: call again, with *page as it was left. CACHE_NO_SLOT: the same, once a slot is free
 * or clean.
 */
enum cache_materialise { CACHE_MATERIALISED, CACHE_MORE, CACHE_NO_SLOT };
enum cache_materialise cache_materialise(struct cache *cache, uint64_t *page, uint32_t most);

/* How many pages are filled: the NAS has none of them. */
uint64_t cache_filled_count(const struct cache *cache);

/* The proof of what the page is on the NAS, NO_PROOF when that is not known. */
uint64_t cache_proof(const struct cache *cache, uint64_t page);

/*
 * A page that the NAS has stably as it was last written, with its proof: the first from `from` on, and from the
 * device's start after its end. None that the NAS has as zeros: these do not tell the file from a new one. Returns
 * false when there is none.
 */
bool cache_known_page(const struct cache *cache, uint64_t from, uint64_t *page, uint64_t *proof);

/* ---- writing back ---- */

#define RUN_PAGES_MAX 32

/* Adjacent pages of the device that travel to the NAS together. */
struct page_run {
	uint64_t first_page;
	uint32_t count;
	/*
	 * One of the pages was written again before the NAS had an older write stably. That one is stable only when
	 * this run is: if it is overtaken in turn, as soon as it is written FILE_SYNC, and perhaps never with COMMITs.
	 */
	bool is_overtaken;
	uint32_t slots[RUN_PAGES_MAX];
	uint64_t proofs[RUN_PAGES_MAX];
};

/*
 * Take the run around the oldest dirty page that is not held, at most `most` pages, and copy it to `data`, as it was
 * written to the device. Returns false when no page can be taken.
 */
bool cache_take_page_run(struct cache *cache, uint32_t most, struct page_run *run, uint8_t *data);

/* The number of pages that it would take. */
uint32_t cache_next_page_run(const struct cache *cache, uint32_t most);

/*
 * Write none of these pages back before `until`, a time by the caller's clock. Reads and writes are not affected. Up to
 * HOLDS holds are remembered exactly; with more, all pages are held until the last of them ends.
 */
#define HOLDS 32
void cache_hold(struct cache *cache, uint64_t first_page, uint64_t count, uint64_t until);
/* End the holds that are over at `now`. Returns whether others remain. */
bool cache_end_holds(struct cache *cache, uint64_t now);

/* The NAS has the run: stably, or under write verifier `verifier` until the next COMMIT. */
void cache_page_run_stable(struct cache *cache, const struct page_run *run);
void cache_page_run_uncommitted(struct cache *cache, const struct page_run *run, uint64_t verifier);
/* It does not: the pages are dirty as before. */
void cache_page_run_failed(struct cache *cache, const struct page_run *run);

/* Remember which pages a COMMIT covers that is sent now. Returns their number. */
uint32_t cache_commit_begin(struct cache *cache);
/*
 * The COMMIT returned `verifier`: of the pages that it covers, those written under it are clean. The others were lost
 * by a server that restarted, and are dirty again; returns their number.
 */
uint32_t cache_commit_done(struct cache *cache, uint64_t verifier);
void cache_commit_failed(struct cache *cache);

/* The sequence number of the oldest write that could be taken now; 0 when there is none. */
uint64_t cache_oldest_dirty(const struct cache *cache);
uint32_t cache_dirty_count(const struct cache *cache); /* without those that are being written */
uint32_t cache_uncommitted_count(const struct cache *cache);
uint32_t cache_unstable_count(const struct cache *cache); /* all that the NAS does not have stably */

/* ---- reading ahead ---- */

/*
 * Reserve free or clean slots for up to `count` pages from `first_page` on, for fetch number `fetch`. Returns the
 * number of pages, and their proofs, which hold until the fetch ends or their pages are written or trimmed. It stops at
 * the first page that the cache has already, and when slots run out.
 */
uint32_t cache_fetch_begin(struct cache *cache, uint64_t first_page, uint32_t count, uint64_t fetch, uint64_t *proofs);
/*
 * Fetch number `fetch` has ended: `data` holds the pages, and `are_right` whether each agrees with its proof from
 * cache_fetch_begin(). Pages that were written or trimmed meanwhile stay as they are; those that are not right are
 * dropped. `data` NULL: the fetch failed.
 */
void cache_fetch_done(struct cache *cache, uint64_t first_page, uint32_t count, uint64_t fetch, const uint8_t *data,
		      const bool *are_right);

/* The number of pages that were read ahead and dropped unread since the last call. */
uint32_t cache_take_wasted(struct cache *cache);
/* The number of pages that were read ahead and then read since the last call. */
uint32_t cache_take_used(struct cache *cache);

#endif
