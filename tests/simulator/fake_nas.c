/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The fake NAS's disk, with a cache that it loses, its power, and its faults. */
#include "fake_nas.h"

#include <stdio.h>
#include <string.h>

struct nas nas;
int64_t stolen_at_ns;

static uint8_t current_bytes[PAGES_MAX * PAGE_BYTES], stable_bytes[PAGES_MAX * PAGE_BYTES];
static uint64_t unstable_pages[PAGES_MAX / 64]; /* as bits */
/* A page that is right on the disk is read wrongly so often at most: the engine reads it again three times. */
#define WRONG_READS_MAX 2
/* which of its READs were to be wrong; every second one is, until it is written */
static uint8_t wrong_reads[PAGES_MAX];

uint64_t disk_bytes(void)
{
	return (uint64_t)options.pages * PAGE_BYTES;
}

uint8_t *disk_current(uint64_t offset_bytes)
{
	return current_bytes + offset_bytes;
}

const uint8_t *nas_stable_page(uint32_t page)
{
	return stable_bytes + (size_t)page * PAGE_BYTES;
}

void disk_write(uint64_t offset_bytes, const uint8_t *data, uint32_t bytes, bool stably)
{
	memcpy(current_bytes + offset_bytes, data, bytes);
	if (stably)
		memcpy(stable_bytes + offset_bytes, data, bytes);
	for (uint64_t page = offset_bytes / PAGE_BYTES; page * PAGE_BYTES < offset_bytes + bytes; page++) {
		if (!stably)
			unstable_pages[page / 64] |= (uint64_t)1 << page % 64;
		wrong_reads[page] = 0;
	}
}

void disk_commit(void)
{
	for (uint32_t word = 0; word * 64 < options.pages; word++) {
		for (uint64_t bits = unstable_pages[word]; bits != 0; bits &= bits - 1) {
			size_t at = (word * 64 + (size_t)__builtin_ctzll(bits)) * PAGE_BYTES;

			memcpy(stable_bytes + at, current_bytes + at, PAGE_BYTES);
		}
		unstable_pages[word] = 0;
	}
}

bool disk_read_is_wrong(uint64_t page)
{
	if (wrong_reads[page] > WRONG_READS_MAX * 2 - 2)
		return false;
	return wrong_reads[page]++ % 2 == 0;
}

/* Of each page in the cache, any sectors may have reached the disk, and the others have not. */
void nas_lose_cache(void)
{
	for (uint32_t word = 0; word * 64 < options.pages; word++) {
		for (uint64_t bits = unstable_pages[word]; bits != 0; bits &= bits - 1) {
			size_t at = (word * 64 + (size_t)__builtin_ctzll(bits)) * PAGE_BYTES;
			uint64_t sectors = rng_next(&nas.power);

			if (rng_chance(&nas.power, 768)) /* most of them whole */
				sectors = sectors & 1 ? 0xff : 0;
			for (uint32_t sector = 0; sector < PAGE_BYTES / SECTOR_BYTES; sector++) {
				size_t from = at + sector * SECTOR_BYTES;

				if (sectors >> sector & 1)
					memcpy(stable_bytes + from, current_bytes + from, SECTOR_BYTES);
			}
			memcpy(current_bytes + at, stable_bytes + at, PAGE_BYTES);
		}
		unstable_pages[word] = 0;
	}
	nas.verifier++;
}

/* ---- handles ---- */

uint32_t nas_handle(enum nas_object object, uint8_t *handle)
{
	uint32_t words[HANDLE_BYTES_MAX / 4] = { 0x6e617321, object, nas.generations[object] };
	uint32_t bytes = 16 + 4 * ((object + nas.generations[object]) % 13);

	for (uint32_t i = 3; i < bytes / 4; i++)
		words[i] = ~i; /* no byte of it may be left out */
	memcpy(handle, words, bytes);
	return bytes;
}

uint32_t nas_file_handle(uint8_t *handle)
{
	return nas_handle(OBJECT_FILE, handle);
}

uint32_t nas_other_handle(uint8_t *handle)
{
	return nas_handle(OBJECT_OTHER, handle);
}

uint64_t nas_other_id(void)
{
	return nas.other_has_number ? NAS_FILE_ID : 5000u + OBJECT_OTHER;
}

uint32_t nas_root_handle(uint8_t *handle)
{
	return nas_handle(OBJECT_ROOT, handle);
}

/* ---- power, and other faults ---- */

bool nas_is_reachable(void)
{
	return nas.has_power;
}

bool nas_is_listening(void)
{
	return nas.has_power && nas.is_serving;
}

static void choose_limits(void)
{
	static const uint32_t limits[] = { 4096, 6000, 8192, 65536, 131072, 1u << 20 };

	nas.read_max_bytes = limits[rng_below(&nas.faults, 6)];
	nas.write_max_bytes = limits[rng_below(&nas.faults, 6)];
}

/* The handle that workers know is of no use any more. */
static void forget_use(void)
{
	nas.forgotten++;
	nas.used_since_ns = NEVER;
	nas.is_handed_on = false;
}

static void lose_power(void)
{
	nas.has_power = false;
	nas.epoch++;
	calls_cut();
	nas_lose_cache();
	conns_server_down(rng_chance(&nas.power, 768));
	result.nas_crashes++;
	if (options.faults >> FAULT_limits & 1 && !faults_are_over())
		choose_limits();
	if (options.faults >> FAULT_stale & 1 && rng_chance(&nas.faults, 256)) {
		nas.fsid++;
		forget_use();
	}
}

/* The service ends and begins again; the machine and its cache stay. */
static void restart(bool begins)
{
	nas.is_serving = !begins;
	if (!begins)
		return;
	nas.epoch++;
	nas.verifier++;
	conns_server_down(false);
}

/* Handles that the server has forgotten: the file's, and perhaps those above it. */
static void forget_handles(void)
{
	nas.generations[OBJECT_FILE]++;
	nas.forgotten_at_ns = now_ns;
	forget_use();
	if (rng_chance(&nas.faults, 512)) {
		nas.generations[OBJECT_DIRECTORY]++;
		if (rng_chance(&nas.faults, 512))
			nas.generations[OBJECT_ROOT]++;
	}
}

static void choose_refusal(void)
{
	static const uint32_t statuses[] = { 28, 5, 69, 13, 30, 10006 }; /* NOSPC IO DQUOT ACCES ROFS SERVERFAULT */

	nas.refusal = statuses[rng_below(&nas.faults, 6)];
	nas.refuses_reads = rng_chance(&nas.faults, 256);
}

static void write_record(const char *owner)
{
	char text[RECORD_BYTES + 1];
	int length = snprintf(text, sizeof(text), "nbdnfs owner 1\nrefreshed 0000000000\nstate held\nhost %s\n"
			      "claimed 2026-01-01T00:00:00Z\nnonce %u", owner, nas.generations[OBJECT_RECORD]);

	memset(nas.record, '\n', sizeof(nas.record));
	memcpy(nas.record, text, (size_t)length);
	if (strcmp(owner, "us") == 0)
		memcpy(nas.record + length, OWNER_IDENTITY, strlen(OWNER_IDENTITY));
}

static void steal(void)
{
	if (stolen_at_ns != NEVER)
		return;
	nas.generations[OBJECT_RECORD]++;
	if (rng_chance(&nas.faults, 768))
		write_record("them");
	else if (rng_chance(&nas.faults, 512))
		nas.record_is_gone = true;
	else
		memset(nas.record, 0, sizeof(nas.record)); /* it is damaged */
	stolen_at_ns = servers_ns();
	/* while the owner cannot look: the network is cut, or the machine sleeps */
	if (rng_chance(&nas.faults, 340))
		fault_partition(rng_between(&nas.faults, 30 * S, 120 * S));
	else if (rng_chance(&nas.faults, 512))
		fault_sleep(rng_between(&nas.faults, 50 * S, 120 * S));
}

void nas_fault(enum fault fault, bool begins)
{
	switch (fault) {
	case FAULT_nas_crash:
		if (begins)
			lose_power();
		else
			nas.has_power = true;
		break;
	case FAULT_nas_restart:
		restart(begins);
		break;
	case FAULT_stale:
		if (begins)
			forget_handles();
		break;
	case FAULT_refuse:
	case FAULT_owner_refused:
		if (begins)
			choose_refusal();
		break;
	case FAULT_replaced:
		nas.is_replaced = begins;
		forget_use();
		nas.generations[OBJECT_OTHER] += begins;
		nas.other_has_number = rng_chance(&nas.faults, 512);
		nas.other_byte = rng_chance(&nas.faults, 512) ? 0 : (uint8_t)rng_next(&nas.faults);
		/* with the number, one page would be enough: a server that lost some writes still has the file */
		nas.other_page = nas.other_has_number ? UINT32_MAX : rng_below(&nas.faults, options.pages);
		break;
	case FAULT_thief:
		if (begins)
			steal();
		break;
	default:
		break;
	}
}

void nas_reset(void)
{
	size_t bytes = (size_t)disk_bytes();

	memset(current_bytes, 0, bytes);
	memset(stable_bytes, 0, bytes);
	memset(unstable_pages, 0, sizeof(unstable_pages));
	memset(wrong_reads, 0, sizeof(wrong_reads));
	nas = (struct nas){ .has_power = true, .is_serving = true, .fsid = 77, .read_max_bytes = 1u << 20,
			    .write_max_bytes = 1u << 20, .used_since_ns = NEVER };
	nas.calls.state = options.seed ^ 0xca115;
	nas.faults.state = options.seed ^ 0xfa017;
	nas.power.state = options.seed ^ 0x90e5;
	nas.verifier = rng_next(&nas.power);
	if (options.faults >> FAULT_limits & 1)
		choose_limits();
	stolen_at_ns = NEVER;
	write_record("us");
	calls_reset();
}
