/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What calls of the cache cost under the engine's lock, at their worst, for regions and devices of several sizes, and
 * what a page costs outside of it, plain and encrypted:
 *
 *   .venv/bin/python -m pytest -s tests/engine/test_cache_cost.py
 *
 * Arguments: SLOTS:GIB. Prints nanoseconds for each call; *scan* is the same by looking at every slot or page
 * (cache_reference.c).
 */
#include "region/cache_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

bool reference_is_stable(const struct cache *cache, uint64_t sequence);
bool reference_is_takable(const struct cache *cache, uint64_t since);
bool reference_known_page(const struct cache *cache, uint64_t from, uint64_t *page);
uint64_t reference_filled_page(const struct cache *cache, uint64_t from);

#define CHUNK_BYTES (2u << 20)
#define CALLS 10000
#define SCANS 3

static double now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec * 1e9 + (double)ts.tv_nsec;
}

#define TIME(what, calls, call)                                                                    \
	do {                                                                                       \
		double began_ns = now_ns();                                                        \
                                                                                                   \
		for (int i_ = 0; i_ < (calls); i_++)                                               \
			call;                                                                      \
		printf("  %-36s %12.0f ns\n", what, (now_ns() - began_ns) / (calls));              \
	} while (0)

/* A region whose slots all have the same few pages of data: what they hold does not matter. */
static void make_region(struct region *region, uint32_t slot_count, uint64_t device_bytes)
{
	uint64_t bytes = ((uint64_t)slot_count * SLOT_BYTES + CHUNK_BYTES - 1) / CHUNK_BYTES * CHUNK_BYTES;
	int fd = memfd_create("chunk", 0);

	*region = (struct region){ .slot_count = slot_count, .page_count = device_bytes / SLOT_BYTES };
	region->slots = calloc(slot_count, sizeof(*region->slots));
	region->narrow_entries = calloc(region->page_count, sizeof(*region->narrow_entries));
	region->filled = calloc((region->page_count + 63) / 64, sizeof(*region->filled));
	region->data = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (region->slots == NULL || region->narrow_entries == NULL || region->filled == NULL || fd < 0 ||
	    region->data == MAP_FAILED || ftruncate(fd, CHUNK_BYTES) < 0)
		abort();
	for (uint64_t at = 0; at < bytes; at += CHUNK_BYTES)
		if (mmap(region->data + at, CHUNK_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) ==
		    MAP_FAILED)
			abort();
}

/* Everything is written, but for the last page of the device. */
static void fill_slots(struct cache *cache, uint8_t *data)
{
	uint64_t last = cache->region->page_count - 1;

	for (uint32_t slot = 0; slot + 1 < cache->region->slot_count; slot++)
		cache_write(cache, slot, data, 1, false);
	cache_write(cache, last, data, 1, false);
}

static void measure(uint32_t slot_count, uint64_t gib)
{
	struct region region;
	struct cache *cache;
	struct page_run run;
	static uint8_t data[RUN_PAGES_MAX * SLOT_BYTES];
	uint64_t last, page, taken = 0;
	uint64_t proof;

	make_region(&region, slot_count, gib << 30);
	last = region.page_count - 1;
	cache = cache_create(&region);
	if (cache == NULL)
		abort();
	printf("%u slots, %llu GiB\n", slot_count, (unsigned long long)gib);
	data[0] = 1;
	fill_slots(cache, data);
	cache_hold(cache, 0, slot_count, 1);
	TIME("oldest dirty, all others held", CALLS, taken += cache_oldest_dirty(cache));
	TIME("  scan", SCANS, taken += reference_is_takable(cache, 0));
	TIME("next run, all others held", CALLS, taken += cache_next_page_run(cache, RUN_PAGES_MAX));
	TIME("end of the hold", 1, cache_end_holds(cache, 1));
	TIME("take and end a run of 32", (int)slot_count / RUN_PAGES_MAX, {
		if (cache_take_page_run(cache, RUN_PAGES_MAX, &run, data))
			cache_page_run_stable(cache, &run);
	});
	while (cache_take_page_run(cache, RUN_PAGES_MAX, &run, data))
		cache_page_run_stable(cache, &run);
	TIME("is it stable, all clean", CALLS, taken += cache_is_stable(cache, cache_sequence(cache)));
	TIME("  scan", SCANS, taken += reference_is_stable(cache, cache_sequence(cache)));
	for (page = 0; page < slot_count; page++)
		cache_trim(cache, page);
	TIME("known page, at the far end", CALLS, taken += cache_known_page(cache, 0, &page, &proof));
	TIME("  scan", SCANS, taken += reference_known_page(cache, 0, &page));
	memset(data, 0, SLOT_BYTES);
	TIME("materialise a page, at the far end", CALLS, {
		cache_write(cache, last, data, 1, true);
		page = 0;
		cache_materialise(cache, &page, 64);
	});
	TIME("  scan", SCANS, taken += reference_filled_page(cache, 0));
	cache_destroy(cache);
	if (taken == 0)
		abort();
}

/* Per page: a WRITE makes a proof and seals, a READ opens, which is both. The least of several rounds. */
static void measure_pages(const char *name, const struct region *region)
{
	enum { STEPS = 3, ROUNDS = 20, PAGES = 500 };
	static const char *const steps[STEPS] = { "proof of a page", "seal a page", "open a page" };
	static uint8_t data[SLOT_BYTES];
	uint64_t proof, found = 0;

	for (size_t at = 0; at < SLOT_BYTES; at++)
		data[at] = (uint8_t)(at * 7 + at / 256);
	proof = proof_of(region, data);
	printf("%s\n", name);
	for (int step = 0; step < STEPS; step++) {
		double least_ns = 0;

		for (int round = 0; round < ROUNDS; round++) {
			double began_ns = now_ns(), ns;

			for (int page = 1; page <= PAGES; page++)
				if (step == 0)
					found += proof_of(region, data);
				else if (step == 1)
					proof_seal(region, (uint64_t)page, proof, data);
				else
					found += proof_open(region, (uint64_t)page, proof, data);
			ns = (now_ns() - began_ns) / PAGES;
			least_ns = round == 0 || ns < least_ns ? ns : least_ns;
		}
		printf("  %-36s %12.0f ns\n", steps[step], least_ns);
	}
	if (found == 0)
		abort();
}

int main(int argc, char **argv)
{
	struct region region = { .page_count = 1000 };
	static const char *const names[] = { "SipHash and XChaCha20", "UMAC and AES" };
	struct cipher_keys keys;

	measure_pages("plain", &region);
	for (enum cipher_kind kind = CIPHER_XCHACHA20; kind <= CIPHER_AES; kind++) {
		if (cipher_init(kind) != 0 || cipher_make_keys(&keys) != 0)
			return 71;
		region.cipher = cipher_begin(kind, &keys);
		if (region.cipher == NULL)
			return 71;
		measure_pages(names[kind], &region);
		cipher_end(region.cipher);
	}
	for (int i = 1; i < argc; i++) {
		unsigned slots, gib;

		if (sscanf(argv[i], "%u:%u", &slots, &gib) != 2)
			return 64;
		measure(slots, gib);
	}
	return 0;
}
