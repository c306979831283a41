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

_Static_assert(sizeof(off_t) == 8, "build with -D_FILE_OFFSET_BITS=64");

/* Is it a region, of this version, for this path, and whole? Returns 0, or -errno and `message`. */
static int check(const struct region_header *header, uint64_t bytes, uint64_t path_hash, char *message,
		 size_t message_bytes)
{
	if (memcmp(header->magic, MAGIC, sizeof(MAGIC)) != 0) {
		snprintf(message, message_bytes, "the file is not a region");
		return -EPROTO;
	}
	if (header->version < REGION_PLAIN || header->version > REGION_AES) {
		snprintf(message, message_bytes, "the region has version %u, this knows %u to %u", header->version,
			 REGION_PLAIN, REGION_AES);
		return -EPROTO;
	}
	if (header->identity.path_hash != path_hash) {
		snprintf(message, message_bytes, REGION_OF_ANOTHER_FILE);
		return -EINVAL;
	}
	if (header->region_bytes != bytes || header->identity.device_bytes > REGION_DEVICE_BYTES_MAX ||
	    header->slot_count > REGION_SLOTS_MAX ||
	    region_size_bytes(header->identity.device_bytes, header->slot_count, header->version) != bytes) {
		snprintf(message, message_bytes, "the region has %llu bytes, and its header says otherwise",
			 (unsigned long long)bytes);
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
static int lock_and_map(struct region *region, uint64_t new_bytes, char *message, size_t message_bytes)
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
	if (st.st_size > 0)
		new_bytes = (uint64_t)st.st_size;
	if (new_bytes > REGION_BYTES_MAX) {
		snprintf(message, message_bytes, "a region of %llu MiB does not fit in the address space",
			 (unsigned long long)(new_bytes >> 20));
		return -EFBIG;
	}
	region->bytes = (size_t)new_bytes;
	if (st.st_size == 0 && ftruncate(region->fd, (off_t)region->bytes) < 0)
		return -errno;
	memory = mmap(NULL, region->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, region->fd, 0);
	if (memory == MAP_FAILED)
		return -errno;
	/* MAP_POPULATE does nothing in a process that locks on fault (mm/gup.c: populate_vma_page_range) */
	for (size_t at = 0; at < region->bytes; at += SLOT_BYTES)
		atomic_fetch_or((_Atomic uint8_t *)memory + at, 0);
	madvise(memory, region->bytes, MADV_DONTDUMP); /* other processes' pages do not belong in a core file */
	region->header = memory;
	return 0;
}

/* Lay out a region that is new, or whose maker was killed before it had put anything in. Returns 0 or -errno. */
static int make_header(struct region *region, const struct region_identity *identity, const struct region_plan *plan)
{
	uint64_t magic;

	region->header->version = plan->version;
	region->header->slot_count = plan->slot_count;
	region->header->identity = *identity;
	region->header->region_bytes = region->bytes;
	if (region_is_encrypted(plan->version)) {
		int error = cipher_make_keys(&region->header->keys);

		if (error != 0)
			return error;
		region->header->clear_bytes = plan->clear_bytes;
	}
	memcpy(&magic, MAGIC, sizeof(magic));
	atomic_store_explicit((_Atomic uint64_t *)(void *)region->header->magic, magic, memory_order_release);
	return 0;
}

/*
 * Others than root's processes may not open it through /proc, and none can truncate it under a worker. Seals are
 * refused by a memfd that an earlier version has made; it stays as it was.
 */
static void protect(const struct region *region)
{
	fchmod(region->fd, 0600);
	fcntl(region->fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL);
}

/* Returns 0 or -ENOMEM. */
static int set_parts(struct region *region)
{
	struct region_header *header = region->header;
	struct region_layout at = region_lay_out(header->identity.device_bytes, header->slot_count, header->version);

	assert(at.end == region->bytes);
	region->slot_count = header->slot_count;
	region->page_count = header->identity.device_bytes / SLOT_BYTES;
	region->slots = (void *)((char *)header + (size_t)at.slots);
	if (region_is_encrypted(header->version)) {
		region->wide_entries = (void *)((char *)header + (size_t)at.page_table);
		region->clear_pages = header->clear_bytes / SLOT_BYTES;
		region->cipher = cipher_begin(header->version == REGION_AES ? CIPHER_AES : CIPHER_XCHACHA20,
					      &header->keys);
		if (region->cipher == NULL)
			return -ENOMEM;
	} else {
		region->narrow_entries = (void *)((char *)header + (size_t)at.page_table);
	}
	region->filled = (void *)((char *)header + (size_t)at.filled);
	region->data = (uint8_t *)header + (size_t)at.data;
	return 0;
}

/* It is locked, mapped and whole: begin to use it. Returns 0 or -ENOMEM. */
static int begin(struct region *region)
{
	int error;

	protect(region);
	error = set_parts(region);
	if (error == 0)
		count(&region->header->generation, 1);
	return error;
}

int region_adopt(struct region *region, int fd, uint64_t path_hash, char *message, size_t message_bytes)
{
	struct stat st;
	int error;

	message[0] = '\0';
	*region = (struct region){ .fd = -1 };
	if (fstat(fd, &st) < 0)
		return -errno;
	if (st.st_size == 0)
		return -ENOENT;
	region->fd = reopen(fd);
	if (region->fd < 0)
		return region->fd;
	error = lock_and_map(region, 0, message, message_bytes);
	if (error == 0 && region->bytes < sizeof(struct region_header)) {
		snprintf(message, message_bytes, "the file is not a region");
		error = -EPROTO;
	}
	if (error == 0 && region->header->magic[0] == '\0')
		error = -ENOENT;
	if (error == 0)
		error = check(region->header, region->bytes, path_hash, message, message_bytes);
	if (error == 0)
		error = begin(region);
	if (error != 0)
		region_unmap(region);
	return error;
}

int region_map(struct region *region, int fd, const struct region_identity *identity, const struct region_plan *plan,
	       char *message, size_t message_bytes)
{
	uint64_t new_bytes = region_size_bytes(identity->device_bytes, plan->slot_count, plan->version);
	int error;

	message[0] = '\0';
	if (plan->slot_count > REGION_SLOTS_MAX || identity->device_bytes > REGION_DEVICE_BYTES_MAX) {
		snprintf(message, message_bytes, "a region has at most %u pages, and a device %llu GiB",
			 REGION_SLOTS_MAX, REGION_DEVICE_BYTES_MAX >> 30);
		return -EFBIG;
	}
	*region = (struct region){ 0 };
	region->fd = fd < 0 ? memfd_create("nbdnfs-region", MFD_CLOEXEC | MFD_ALLOW_SEALING) : reopen(fd);
	if (region->fd < 0)
		return fd < 0 ? -errno : region->fd;
	error = lock_and_map(region, new_bytes, message, message_bytes);
	if (error == 0 && region->bytes < sizeof(struct region_header)) {
		snprintf(message, message_bytes, "the file is not a region");
		error = -EPROTO;
	}
	if (error == 0 && region->header->magic[0] == '\0' && region->bytes == new_bytes)
		error = make_header(region, identity, plan);
	else if (error == 0)
		error = check(region->header, region->bytes, identity->path_hash, message, message_bytes);
	if (error == 0 && memcmp(&region->header->identity, identity, sizeof(*identity)) != 0) {
		snprintf(message, message_bytes, REGION_OF_ANOTHER_FILE);
		error = -EINVAL;
	}
	if (error == 0)
		error = begin(region);
	if (error != 0)
		region_unmap(region);
	return error;
}

void region_unmap(struct region *region)
{
	if (region->header != NULL)
		munmap(region->header, region->bytes);
	close(region->fd);
	if (region->cipher != NULL)
		cipher_end(region->cipher);
	*region = (struct region){ .fd = -1 };
}

void region_discard(struct region *region)
{
	cipher_forget_keys(&region->header->keys);
	region_unmap(region);
}

void count_duration(_Atomic uint64_t *histogram, uint64_t us)
{
	unsigned bucket = us == 0 ? 0 : 64 - (unsigned)__builtin_clzll(us);

	count(&histogram[bucket < HISTOGRAM_BUCKETS ? bucket : HISTOGRAM_BUCKETS - 1], 1);
}
