/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "region/region.h"

#include "base/assert.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const char MAGIC[8] = "nbdnfs\0";

static size_t round_up(size_t bytes)
{
	return (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
}

/* Where each part begins. */
struct layout {
	size_t slots, page_table, filled, data, end;
};

static struct layout lay_out(uint64_t device_bytes, uint32_t slot_count)
{
	uint64_t pages = device_bytes / PAGE_BYTES;
	struct layout at;

	at.slots = round_up(sizeof(struct region_header));
	at.page_table = at.slots + round_up(slot_count * sizeof(region_slot));
	at.filled = at.page_table + round_up(pages * sizeof(uint32_t));
	at.data = at.filled + round_up((pages + 63) / 64 * sizeof(uint64_t));
	at.end = at.data + (size_t)slot_count * PAGE_BYTES;
	return at;
}

size_t region_size_bytes(uint64_t device_bytes, uint32_t slot_count)
{
	return lay_out(device_bytes, slot_count).end;
}

/* Is it a region, of this version, for this backing file? Returns 0, or -errno and `message`. */
static int check(const struct region_header *header, size_t bytes, const struct region_identity *identity,
		 char *message, size_t message_bytes)
{
	if (memcmp(header->magic, MAGIC, sizeof(MAGIC)) != 0) {
		snprintf(message, message_bytes, "the file is not a region");
		return -EPROTO;
	}
	if (header->version != REGION_VERSION) {
		snprintf(message, message_bytes, "the region has version %u, this is version %u", header->version,
			 REGION_VERSION);
		return -EPROTO;
	}
	if (memcmp(&header->identity, identity, sizeof(*identity)) != 0) {
		snprintf(message, message_bytes, "the region belongs to another backing file");
		return -EINVAL;
	}
	if (header->region_bytes != bytes || region_size_bytes(identity->device_bytes, header->slot_count) != bytes) {
		snprintf(message, message_bytes, "the region has %zu bytes, and its header says otherwise", bytes);
		return -EPROTO;
	}
	return 0;
}

/* Open the region's file once more: flock(2) belongs to the open file, which dup(2) would share with the caller. */
static int reopen(int fd)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	fd = open(path, O_RDWR | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

/* Lock the region's file and map all of it, in memory. Returns 0 or -errno and `message`. */
static int lock_and_map(struct region *region, size_t new_bytes, char *message, size_t message_bytes)
{
	struct stat st;
	void *memory;

	if (fstat(region->fd, &st) < 0)
		return -errno;
	if (flock(region->fd, LOCK_EX | LOCK_NB) < 0) {
		int error = errno == EWOULDBLOCK ? -EBUSY : -errno;

		snprintf(message, message_bytes, "the region is in use by another worker");
		return error;
	}
	region->bytes = st.st_size > 0 ? (size_t)st.st_size : new_bytes;
	if (st.st_size == 0 && ftruncate(region->fd, (off_t)region->bytes) < 0)
		return -errno;
	memory = mmap(NULL, region->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, region->fd, 0);
	if (memory == MAP_FAILED)
		return -errno;
	/* MAP_POPULATE does nothing in a process that locks on fault (mm/gup.c: populate_vma_page_range) */
	for (size_t at = 0; at < region->bytes; at += PAGE_BYTES)
		atomic_fetch_or((_Atomic uint8_t *)memory + at, 0);
	madvise(memory, region->bytes, MADV_DONTDUMP); /* other processes' pages do not belong in a core file */
	region->header = memory;
	return 0;
}

/* Lay out a region that is new, or whose maker was killed before it had put anything in. */
static void make_header(struct region *region, const struct region_identity *identity, uint32_t slot_count)
{
	uint64_t magic;

	region->header->version = REGION_VERSION;
	region->header->slot_count = slot_count;
	region->header->identity = *identity;
	region->header->region_bytes = region->bytes;
	memcpy(&magic, MAGIC, sizeof(magic));
	atomic_store_explicit((_Atomic uint64_t *)(void *)region->header->magic, magic, memory_order_release);
}

static void set_parts(struct region *region)
{
	struct region_header *header = region->header;
	struct layout at = lay_out(header->identity.device_bytes, header->slot_count);

	assert(at.end == region->bytes);
	region->slot_count = header->slot_count;
	region->page_count = header->identity.device_bytes / PAGE_BYTES;
	region->slots = (void *)((char *)header + at.slots);
	region->page_table = (void *)((char *)header + at.page_table);
	region->filled = (void *)((char *)header + at.filled);
	region->data = (uint8_t *)header + at.data;
}

int region_map(struct region *region, int fd, const struct region_identity *identity, uint32_t slot_count,
	       char *message, size_t message_bytes)
{
	size_t new_bytes = region_size_bytes(identity->device_bytes, slot_count);
	int error;

	message[0] = '\0';
	*region = (struct region){ .fd = fd < 0 ? memfd_create("nbdnfs-region", MFD_CLOEXEC) : reopen(fd) };
	if (region->fd < 0)
		return fd < 0 ? -errno : region->fd;
	error = lock_and_map(region, new_bytes, message, message_bytes);
	if (error == 0 && region->bytes < sizeof(struct region_header)) {
		snprintf(message, message_bytes, "the file is not a region");
		error = -EPROTO;
	}
	if (error == 0 && region->header->magic[0] == '\0' && region->bytes == new_bytes)
		make_header(region, identity, slot_count);
	else if (error == 0)
		error = check(region->header, region->bytes, identity, message, message_bytes);
	if (error != 0) {
		region_unmap(region);
		return error;
	}
	set_parts(region);
	count(&region->header->generation, 1);
	return 0;
}

void region_unmap(struct region *region)
{
	if (region->header != NULL)
		munmap(region->header, region->bytes);
	close(region->fd);
}

void count_duration(_Atomic uint64_t *histogram, uint64_t us)
{
	unsigned bucket = us == 0 ? 0 : 64 - (unsigned)__builtin_clzll(us);

	count(&histogram[bucket < HISTOGRAM_BUCKETS ? bucket : HISTOGRAM_BUCKETS - 1], 1);
}
