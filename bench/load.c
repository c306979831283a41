/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A load for benchmarks: requests of one size, `depth` of them under way, for a number of seconds.
 *
 *   load nbd SOCKET  read|write random|sequential BLOCK_BYTES DEPTH SECONDS
 *   load nfs URL     read|write random|sequential BLOCK_BYTES DEPTH SECONDS
 *
 * `nbd` is a client of whatever serves on that Unix socket; `nfs` is the limit: libnfs's asynchronous API and
 * nothing else, writes stable. Prints one line of JSON: operations, seconds, operations and bytes a second, and
 * the median and 99th percentile of the latency in microseconds. Writes end with a FLUSH, which is counted in.
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <nfsc/libnfs.h>

#define DEPTH_MAX 64
#define LATENCIES_MAX (1 << 22)

static struct {
	bool write, sequential;
	uint32_t block_bytes, depth;
	double seconds;
} job;

static uint64_t device_bytes, next_block, operations;
static uint64_t random_state = 88172645463325252u;
static uint32_t *latencies_us;
static uint64_t latency_count;

static void die(const char *what)
{
	fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* xorshift64: the same blocks in every run */
static uint64_t random_number(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state;
}

static uint64_t next_offset(void)
{
	uint64_t blocks = device_bytes / job.block_bytes;

	return (job.sequential ? next_block++ % blocks : random_number() % blocks) * job.block_bytes;
}

/* Incompressible, and different for each request: no server can take a short cut. */
static void fill(uint8_t *data)
{
	for (uint32_t at = 0; at < job.block_bytes; at += 512) {
		uint64_t word = random_number();

		memcpy(data + at, &word, sizeof(word));
	}
}

static void note(uint64_t started_ns)
{
	operations++;
	if (latency_count < LATENCIES_MAX)
		latencies_us[latency_count++] = (uint32_t)((now_ns() - started_ns) / 1000);
}

/* ---- nbd ---- */

struct __attribute__((packed)) nbd_request {
	uint32_t magic;
	uint16_t flags, type;
	uint64_t cookie, offset;
	uint32_t length;
};

struct __attribute__((packed)) nbd_reply {
	uint32_t magic, error;
	uint64_t cookie;
};

static void send_all(int fd, const void *data, size_t length)
{
	while (length > 0) {
		ssize_t sent = send(fd, data, length, MSG_NOSIGNAL);

		if (sent < 0)
			die("send");
		data = (const char *)data + sent;
		length -= (size_t)sent;
	}
}

static void receive_all(int fd, void *data, size_t length)
{
	while (length > 0) {
		ssize_t got = recv(fd, data, length, 0);

		if (got <= 0)
			die("receive");
		data = (char *)data + got;
		length -= (size_t)got;
	}
}

/* Fixed newstyle with NBD_OPT_EXPORT_NAME: enough for a client that trusts its server. */
static int nbd_connect(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct __attribute__((packed)) {
		uint64_t magic, option_magic;
		uint16_t flags;
	} hello;
	struct __attribute__((packed)) {
		uint32_t client_flags;
		uint64_t magic;
		uint32_t option, length;
	} choice = { htobe32(3), htobe64(0x49484156454f5054), htobe32(1), 0 };
	struct __attribute__((packed)) {
		uint64_t size;
		uint16_t flags;
	} export;
	int size = 4 << 20;
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
	setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
		die(path);
	receive_all(fd, &hello, sizeof(hello));
	send_all(fd, &choice, sizeof(choice));
	receive_all(fd, &export, sizeof(export));
	device_bytes = be64toh(export.size);
	return fd;
}

static void nbd_send(int fd, uint16_t type, uint64_t cookie, uint64_t offset, const uint8_t *data, uint32_t length)
{
	struct nbd_request request = { htobe32(0x25609513), 0, htobe16(type), htobe64(cookie), htobe64(offset),
				       htobe32(length) };

	send_all(fd, &request, sizeof(request));
	if (type == 1)
		send_all(fd, data, length);
}

static uint64_t nbd_receive(int fd, uint8_t *data, uint32_t length)
{
	struct nbd_reply reply;

	receive_all(fd, &reply, sizeof(reply));
	if (reply.magic != htobe32(0x67446698) || reply.error != 0) {
		errno = (int)be32toh(reply.error);
		die("reply");
	}
	receive_all(fd, data, length);
	return be64toh(reply.cookie);
}

static void run_nbd(const char *path)
{
	int fd = nbd_connect(path);
	uint64_t started_ns[DEPTH_MAX], end_ns = now_ns() + (uint64_t)(job.seconds * 1e9);
	uint8_t *data = malloc(job.block_bytes);
	uint32_t under_way = 0;
	bool last = false;

	for (uint32_t slot = 0; slot < job.depth; slot++) {
		fill(data);
		started_ns[slot] = now_ns();
		nbd_send(fd, job.write, slot, next_offset(), data, job.block_bytes);
		under_way++;
	}
	while (under_way > 0) {
		uint64_t slot = nbd_receive(fd, data, job.write ? 0 : job.block_bytes);

		note(started_ns[slot]);
		under_way--;
		last = last || now_ns() >= end_ns;
		if (last)
			continue;
		fill(data);
		started_ns[slot] = now_ns();
		nbd_send(fd, job.write, slot, next_offset(), data, job.block_bytes);
		under_way++;
	}
	if (job.write) {
		nbd_send(fd, 3, 0, 0, NULL, 0);
		nbd_receive(fd, data, 0);
	}
	nbd_send(fd, 2, 0, 0, NULL, 0);
	close(fd);
	free(data);
}

/* ---- nfs ---- */

static struct nfs_context *nfs;
static struct nfsfh *file;
static uint64_t nfs_end_ns;
static uint32_t nfs_under_way;

struct nfs_slot {
	uint8_t *data;
	uint64_t started_ns;
};

static void nfs_issue(struct nfs_slot *slot);

static void nfs_done(int status, struct nfs_context *context, void *data, void *arg)
{
	struct nfs_slot *slot = arg;

	(void)context;
	if (status != (int)job.block_bytes) {
		errno = status < 0 ? -status : EIO;
		die("transfer");
	}
#ifndef LIBNFS_API_V2
	if (!job.write)
		memcpy(slot->data, data, job.block_bytes);
#endif
	note(slot->started_ns);
	nfs_under_way--;
	if (now_ns() < nfs_end_ns)
		nfs_issue(slot);
}

static void nfs_issue(struct nfs_slot *slot)
{
	uint64_t offset = next_offset();
	int status;

	fill(slot->data);
	slot->started_ns = now_ns();
#ifdef LIBNFS_API_V2
	status = job.write ? nfs_pwrite_async(nfs, file, slot->data, job.block_bytes, offset, nfs_done, slot)
			   : nfs_pread_async(nfs, file, slot->data, job.block_bytes, offset, nfs_done, slot);
#else
	status = job.write ? nfs_pwrite_async(nfs, file, offset, job.block_bytes, (char *)slot->data, nfs_done, slot)
			   : nfs_pread_async(nfs, file, offset, job.block_bytes, nfs_done, slot);
#endif
	if (status < 0)
		die("issue");
	nfs_under_way++;
}

static void run_nfs(const char *text)
{
	struct nfs_slot slots[DEPTH_MAX];
	struct nfs_stat_64 st;
	struct nfs_url *url;

	nfs = nfs_init_context();
	url = nfs_parse_url_full(nfs, text);
	if (url == NULL || nfs_mount(nfs, url->server, url->path) != 0 ||
	    nfs_open(nfs, url->file, O_RDWR | (job.write ? O_SYNC : 0), &file) != 0 ||
	    nfs_fstat64(nfs, file, &st) != 0) {
		fprintf(stderr, "load: %s\n", nfs_get_error(nfs));
		exit(1);
	}
	device_bytes = st.nfs_size;
	nfs_end_ns = now_ns() + (uint64_t)(job.seconds * 1e9);
	for (uint32_t i = 0; i < job.depth; i++) {
		slots[i].data = malloc(job.block_bytes);
		nfs_issue(&slots[i]);
	}
	while (nfs_under_way > 0) {
		struct pollfd fd = { .fd = nfs_get_fd(nfs), .events = (short)nfs_which_events(nfs) };

		if (poll(&fd, 1, 10000) <= 0)
			die("poll");
		if (nfs_service(nfs, fd.revents) < 0)
			die("service");
	}
}

/* ---- both ---- */

static int compare(const void *a, const void *b)
{
	uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;

	return left < right ? -1 : left > right;
}

int main(int argc, char **argv)
{
	uint64_t started_ns;
	double seconds;

	if (argc != 8) {
		fprintf(stderr, "usage: load nbd|nfs TARGET read|write random|sequential BLOCK_BYTES DEPTH SECONDS\n");
		return 64;
	}
	job.write = strcmp(argv[3], "write") == 0;
	job.sequential = strcmp(argv[4], "sequential") == 0;
	job.block_bytes = (uint32_t)atoi(argv[5]);
	job.depth = (uint32_t)atoi(argv[6]);
	job.seconds = atof(argv[7]);
	if (job.depth < 1 || job.depth > DEPTH_MAX || job.block_bytes < 512) {
		fprintf(stderr, "load: a depth of 1 to %d, blocks of 512 bytes or more\n", DEPTH_MAX);
		return 64;
	}
	latencies_us = malloc(LATENCIES_MAX * sizeof(*latencies_us));
	started_ns = now_ns();
	(strcmp(argv[1], "nfs") == 0 ? run_nfs : run_nbd)(argv[2]);
	seconds = (double)(now_ns() - started_ns) / 1e9;
	qsort(latencies_us, latency_count, sizeof(*latencies_us), compare);
	printf("{\"operations\": %llu, \"seconds\": %.3f, \"per_second\": %.0f, \"bytes_per_second\": %.0f, "
	       "\"median_us\": %u, \"p99_us\": %u}\n",
	       (unsigned long long)operations, seconds, (double)operations / seconds,
	       (double)operations * job.block_bytes / seconds, latencies_us[latency_count / 2],
	       latencies_us[latency_count * 99 / 100]);
	return 0;
}
