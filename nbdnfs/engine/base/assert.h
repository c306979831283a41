/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * assert() for invariants, in every build: a worker that ends here is replaced and replays the region, one that goes on
 * may write wrong bytes. Nothing here costs more than a comparison of values that are at hand.
 */
#ifndef NBDNFS_ASSERT_H
#define NBDNFS_ASSERT_H

#ifdef NDEBUG
#error "build without NDEBUG"
#endif

#include <assert.h>
#include <errno.h>
#include <pthread.h>

/* The mutex is locked, by some thread. No system call. */
static inline void assert_locked(pthread_mutex_t *mutex)
{
	int status = pthread_mutex_trylock(mutex);

	assert(status == EBUSY);
	(void)status;
}

#endif
