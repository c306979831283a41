/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef NBDNFS_THREAD_H
#define NBDNFS_THREAD_H

#include <pthread.h>
#include <stddef.h>

#define THREAD_STACK_BYTES (256 * 1024)
#define TOUCHED_STACK_BYTES (40 * 1024)

/*
 * Have the calling thread's stack faulted further down than it will ever go: a first touch later would be a
 * page fault in the path that frees memory. Twice what a thread was seen to use, with resets, a silent and a full server:
 * 20 KiB (Rss of the stacks in /proc/PID/smaps, with nothing touched here).
 */
__attribute__((noinline, unused)) static void touch_stack(void)
{
	volatile char pages[TOUCHED_STACK_BYTES];

	for (size_t at = 0; at < sizeof(pages); at += 4096)
		pages[at] = 0;
}

/*
 * Start a thread of the engine's, with a small stack, of which it is to touch what it needs, and all signals blocked,
 * which are for the program's own threads. Returns 0 or -errno.
 */
int thread_start(pthread_t *thread, void *(*run)(void *arg), void *arg);

#endif
