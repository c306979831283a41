/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A plugin of QEMU's TCG that counts the instructions a guest executes, by address:
 * -plugin instructions.so,counts=PATH. Whenever PATH.ask appears, it writes "ADDRESS COUNT" lines to PATH, in
 * hexadecimal and decimal, since the start, and removes PATH.ask. bench/vm_profile.py says whose the addresses are.
 *
 * Debian's QEMU comes without the header. What is declared here is version 1 of the interface, which QEMU 7.2 accepts:
 * https://www.qemu.org/docs/master/devel/tcg-plugins.html
 */
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))
#define API_VERSION 1
#define INLINE_ADD_U64 0 /* the only inline operation of that version */

struct qemu_plugin_tb;
typedef void (*translated)(uint64_t id, struct qemu_plugin_tb *tb);
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, translated callback);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *tb, int operation, void *target, uint64_t value);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);

EXPORTED int qemu_plugin_version = API_VERSION;
EXPORTED int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv);

#define BLOCKS_LOG2 22
#define BLOCKS (1u << BLOCKS_LOG2) /* each program that starts has addresses of its own */
#define USER_BYTES 256ull /* user space is counted by so many, the kernel by block */
#define LOOK_EVERY_NS 10000000

/* A block's address never changes once it is set; its count is QEMU's to add to. */
static struct block {
	_Atomic uint64_t address;
	uint64_t count;
} blocks[BLOCKS];
static const char *path;

static struct block *block_at(uint64_t address)
{
	uint64_t at = (address * 0x9e3779b97f4a7c15u) >> (64 - BLOCKS_LOG2);

	for (unsigned tries = 0; tries < BLOCKS; tries++, at = (at + 1) % BLOCKS) {
		uint64_t empty = 0;

		if (atomic_compare_exchange_strong(&blocks[at].address, &empty, address) || empty == address)
			return &blocks[at];
	}
	fprintf(stderr, "instructions.so: more than %u blocks\n", BLOCKS);
	abort();
}

static void count(uint64_t id, struct qemu_plugin_tb *tb)
{
	uint64_t address = qemu_plugin_tb_vaddr(tb);
	struct block *block = block_at(address >> 63 ? address : address & ~(USER_BYTES - 1));

	(void)id;
	qemu_plugin_register_vcpu_tb_exec_inline(tb, INLINE_ADD_U64, &block->count, qemu_plugin_tb_n_insns(tb));
}

static bool write_counts(const char *to)
{
	FILE *file = fopen(to, "w");

	if (file == NULL)
		return false;
	for (unsigned at = 0; at < BLOCKS; at++)
		if (blocks[at].count > 0)
			fprintf(file, "%" PRIx64 " %" PRIu64 "\n", blocks[at].address, blocks[at].count);
	return fclose(file) == 0;
}

/* Ends with QEMU. */
static void *answer(void *unused)
{
	char ask[4096], written[4096];

	(void)unused;
	snprintf(ask, sizeof(ask), "%s.ask", path);
	snprintf(written, sizeof(written), "%s.new", path);
	do {
		if (access(ask, F_OK) == 0 && write_counts(written) && rename(written, path) == 0)
			unlink(ask);
	} while (nanosleep(&(struct timespec){.tv_nsec = LOOK_EVERY_NS}, NULL) == 0 || errno == EINTR);
	return NULL;
}

int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv)
{
	pthread_t thread;

	(void)info;
	if (argc != 1 || strncmp(argv[0], "counts=", 7) != 0) {
		fprintf(stderr, "instructions.so: give it counts=PATH, and nothing else\n");
		return -1;
	}
	path = strdup(argv[0] + 7);
	qemu_plugin_register_vcpu_tb_trans_cb(id, count);
	return path == NULL || pthread_create(&thread, NULL, answer, NULL) ? -1 : 0;
}
