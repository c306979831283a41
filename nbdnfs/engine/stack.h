/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef NBDNFS_STACK_H
#define NBDNFS_STACK_H

#include <stddef.h>

#define THREAD_STACK_BYTES (256 * 1024)
#define TOUCHED_STACK_BYTES (64 * 1024)

/*
 * Have the calling thread's stack faulted further down than it will ever go: a first touch later would be a
 * page fault in the path that frees memory. CPython's and libnfs's calls need far less.
 */
__attribute__((noinline, unused)) static void touch_stack(void)
{
	volatile char pages[TOUCHED_STACK_BYTES];

	for (size_t at = 0; at < sizeof(pages); at += 4096)
		pages[at] = 0;
}

#endif
