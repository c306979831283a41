/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "region/region.h"

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

/* Is it a region, of this version, for this file? */
static int check(const struct region_header *header, size_t bytes, const struct region_identity *identity,
		 char *message, size_t message_bytes)
{
	if (memcmp(header->magic, MAGIC, sizeof(MAGIC)) != 0) {
		snprintf(message, message_bytes, "it is not a region");
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
		snprintf(message, message_bytes, "the region has %zu bytes, which is not what it says", bytes);
		return -EPROTO;
	}
	return 0;
}

int region_map(struct region *region, int fd, const struct region_identity *identity, uint32_t slot_count,
	       char *message, size_t message_bytes)
{
	bool own = fd < 0;
	void *memory = MAP_FAILED;
	struct stat st;
	int error;

	*region = (struct region){ .fd = own ? memfd_create("nbdnfs-region", MFD_CLOEXEC) : dup(fd) };
	message[0] = '\0';
	if (region->fd < 0)
		return -errno;
	if (fstat(region->fd, &st) < 0) {
		error = -errno;
		goto fail;
	}
	/* flock is the open file's, which dup() shares: a descriptor of our own is opened through /proc */
	if (!own) {
		char path[64];
		int reopened;

		snprintf(path, sizeof(path), "/proc/self/fd/%d", region->fd);
		reopened = open(path, O_RDWR | O_CLOEXEC);
		if (reopened < 0) {
			error = -errno;
			goto fail;
		}
		close(region->fd);
		region->fd = reopened;
	}
	if (flock(region->fd, LOCK_EX | LOCK_NB) < 0) {
		error = errno == EWOULDBLOCK ? -EBUSY : -errno;
		snprintf(message, message_bytes, "the region is in use by another worker");
		goto fail;
	}
	region->bytes = st.st_size > 0 ? (size_t)st.st_size : region_size_bytes(identity->device_bytes, slot_count);
	if (st.st_size == 0 && ftruncate(region->fd, (off_t)region->bytes) < 0) {
		error = -errno;
		goto fail;
	}
	memory = mmap(NULL, region->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, region->fd, 0);
	if (memory == MAP_FAILED) {
		error = -errno;
		goto fail;
	}
	/* MAP_POPULATE does nothing in a process that locks on fault (mm/gup.c: populate_vma_page_range) */
	for (size_t at = 0; at < region->bytes; at += PAGE_BYTES)
		atomic_fetch_or((_Atomic uint8_t *)memory + at, 0);
	madvise(memory, region->bytes, MADV_DONTDUMP); /* other processes' pages: not for a core file */
	region->header = memory;
	if (region->bytes >= sizeof(struct region_header) && region->header->magic[0] == '\0' &&
	    region_size_bytes(identity->device_bytes, slot_count) == region->bytes) {
		/* new, or its maker was killed before it had put anything in */
		region->header->version = REGION_VERSION;
		region->header->slot_count = slot_count;
		region->header->identity = *identity;
		region->header->region_bytes = region->bytes;
		atomic_thread_fence(memory_order_release);
		memcpy(region->header->magic, MAGIC, sizeof(MAGIC));
	} else {
		error = region->bytes < sizeof(struct region_header)
				? -EPROTO
				: check(region->header, region->bytes, identity, message, message_bytes);
		if (error != 0)
			goto fail;
	}
	struct layout at = lay_out(identity->device_bytes, region->header->slot_count);

	region->slot_count = region->header->slot_count;
	region->page_count = identity->device_bytes / PAGE_BYTES;
	region->slots = (void *)((char *)memory + at.slots);
	region->page_table = (void *)((char *)memory + at.page_table);
	region->filled = (void *)((char *)memory + at.filled);
	region->data = (uint8_t *)memory + at.data;
	count(&region->header->generation, 1);
	return 0;
fail:
	if (memory != MAP_FAILED)
		munmap(memory, region->bytes);
	close(region->fd);
	return error;
}

void region_unmap(struct region *region)
{
	munmap(region->header, region->bytes);
	close(region->fd);
}

void count_duration(_Atomic uint64_t *histogram, uint64_t us)
{
	unsigned bucket = us == 0 ? 0 : 64 - (unsigned)__builtin_clzll(us);

	count(&histogram[bucket < HISTOGRAM_BUCKETS ? bucket : HISTOGRAM_BUCKETS - 1], 1);
}
