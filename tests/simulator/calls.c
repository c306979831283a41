/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Locks, time, memory, and the region's file. Each function stands in for the one of the same name in the C library. */
#include "sim.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>

#include "wrapped.h"

/* ---- where the worker may be killed, and which call fails ---- */

static uint32_t points_left;    /* until the worker is killed; 0: it is not to be */

void crash_soon(uint32_t points)
{
	points_left = points;
}

void crash_point(void)
{
	if (current == THREADS_MAX)
		return;
	result.points++;
	if ((points_left > 0 && --points_left == 0) || result.points == options.crash_at) {
		worker_kill();
		thread_yield(); /* never comes back */
	}
}

uint32_t call_fails(uint32_t variants)
{
	if (current == THREADS_MAX)
		return 0;
	result.failable++;
	if (result.failable != options.fail_at || options.fail_variant >= variants)
		return 0;
	result.failed_calls++;
	return 1 + options.fail_variant;
}

void __wrap___assert_fail(const char *text, const char *file, unsigned line, const char *function)
{
	sim_fail("assertion in %s:%u, %s(): %s", file, line, function, text);
	abort();
}

/* ---- mutexes ---- */

struct mutex {
	uint64_t waiting;       /* threads, as bits */
	uint32_t owner;         /* plus 1; 0: none */
};
_Static_assert(sizeof(struct mutex) <= sizeof(pthread_mutex_t), "they take its place");

int __wrap_pthread_mutex_init(pthread_mutex_t *it, const pthread_mutexattr_t *attributes)
{
	(void)attributes;
	memset(it, 0, sizeof(*it));
	return 0;
}

int __wrap_pthread_mutex_destroy(pthread_mutex_t *it)
{
	if (((struct mutex *)(void *)it)->owner != 0)
		sim_fail("a mutex is destroyed that is locked");
	return 0;
}

static void lock(struct mutex *mutex)
{
	while (mutex->owner != 0) {
		if (mutex->owner == current + 1)
			sim_fail("a thread locks a mutex that it has locked");
		mutex->waiting |= thread_bit();
		thread_block(NEVER);
	}
	mutex->waiting &= ~thread_bit();
	mutex->owner = current + 1;
}

static void unlock(struct mutex *mutex)
{
	if (mutex->owner != current + 1)
		sim_fail("a mutex is unlocked by a thread that has not locked it");
	mutex->owner = 0;
	threads_wake(mutex->waiting);
}

int __wrap_pthread_mutex_lock(pthread_mutex_t *it)
{
	crash_point();
	thread_preempt();
	lock((struct mutex *)(void *)it);
	return 0;
}

int __wrap_pthread_mutex_trylock(pthread_mutex_t *it)
{
	struct mutex *mutex = (struct mutex *)(void *)it;

	if (mutex->owner != 0)
		return EBUSY;
	mutex->owner = current + 1;
	return 0;
}

int __wrap_pthread_mutex_unlock(pthread_mutex_t *it)
{
	unlock((struct mutex *)(void *)it);
	crash_point();
	thread_preempt();
	return 0;
}

/* ---- conditions ---- */

struct condition {
	uint64_t waiting;       /* threads, as bits */
};

static struct rng wakes;

int __wrap_pthread_cond_init(pthread_cond_t *it, const pthread_condattr_t *attributes)
{
	(void)attributes;
	memset(it, 0, sizeof(*it));
	return 0;
}

int __wrap_pthread_cond_destroy(pthread_cond_t *it)
{
	if (((struct condition *)(void *)it)->waiting != 0)
		sim_fail("a condition is destroyed that a thread waits for");
	return 0;
}

static int wait_for(pthread_cond_t *it, pthread_mutex_t *of, int64_t until_ns)
{
	struct condition *condition = (struct condition *)(void *)it;
	struct mutex *mutex = (struct mutex *)(void *)of;
	uint64_t me = thread_bit();
	bool is_late = false;

	crash_point();
	condition->waiting |= me;
	unlock(mutex);
	if (rng_chance(&wakes, 4)) {
		thread_yield(); /* POSIX: a wait may end for no reason */
	} else {
		while (condition->waiting & me && now_ns < until_ns)
			thread_block(until_ns);
		is_late = (condition->waiting & me) != 0;
	}
	condition->waiting &= ~me;
	lock(mutex);
	return is_late ? ETIMEDOUT : 0;
}

int __wrap_pthread_cond_wait(pthread_cond_t *it, pthread_mutex_t *of)
{
	return wait_for(it, of, NEVER);
}

#define CLOCK_BEGINS_NS (3600 * S)

int __wrap_pthread_cond_timedwait(pthread_cond_t *it, pthread_mutex_t *of, const struct timespec *until)
{
	return wait_for(it, of, until->tv_sec * S + until->tv_nsec - CLOCK_BEGINS_NS);
}

int __wrap_pthread_cond_signal(pthread_cond_t *it)
{
	struct condition *condition = (struct condition *)(void *)it;
	uint64_t waiting = condition->waiting;

	if (waiting == 0)
		return 0;
	for (uint32_t number = rng_below(&wakes, (uint32_t)__builtin_popcountll(waiting)); number > 0; number--)
		waiting &= waiting - 1;
	waiting &= -waiting;
	condition->waiting &= ~waiting;
	threads_wake(waiting);
	return 0;
}

int __wrap_pthread_cond_broadcast(pthread_cond_t *it)
{
	struct condition *condition = (struct condition *)(void *)it;
	uint64_t waiting = condition->waiting;

	condition->waiting = 0;
	threads_wake(waiting);
	return 0;
}

/* ---- threads ---- */

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*body)(void *), void *argument)
{
	(void)attributes;
	crash_point();
	if (call_fails(1))
		return EAGAIN;
	*thread = thread_new(body, argument);
	return 0;
}

pthread_t __wrap_pthread_self(void)
{
	return current;
}

int __wrap_pthread_join(pthread_t thread, void **value)
{
	(void)value;
	while (!threads[thread].ended) {
		threads[thread].joiners |= thread_bit();
		thread_block(NEVER);
	}
	threads[thread].used = false;
	return 0;
}

int __wrap_pthread_sigmask(int how, const sigset_t *set, sigset_t *before)
{
	(void)how, (void)set, (void)before;
	return 0;
}

int __wrap_sched_yield(void)
{
	crash_point();
	thread_yield();
	return 0;
}

/* ---- time ---- */

int __wrap_clock_gettime(clockid_t clock, struct timespec *ts)
{
	int64_t ns = now_ns + CLOCK_BEGINS_NS + (clock == CLOCK_BOOTTIME ? slept_ns : 0);

	ts->tv_sec = ns / S;
	ts->tv_nsec = ns % S;
	return 0;
}

int __wrap_nanosleep(const struct timespec *length, struct timespec *left)
{
	(void)left;
	crash_point();
	thread_sleep(length->tv_sec * S + length->tv_nsec);
	return 0;
}

/* ---- chance, and who we are ---- */

static struct rng entropy;

ssize_t __wrap_getrandom(void *buffer, size_t bytes, unsigned flags)
{
	(void)flags;
	if (call_fails(1)) {
		errno = ENOSYS;
		return -1;
	}
	for (size_t at = 0; at < bytes; at++)
		((uint8_t *)buffer)[at] = (uint8_t)rng_next(&entropy);
	return (ssize_t)bytes;
}

pid_t __wrap_getpid(void)
{
	return 1000 + (pid_t)(result.worker_crashes + result.hang_ups);
}

/* ---- memory: all of it goes when the worker ends ---- */

#define MEMORY_BYTES (64u << 20)

static _Alignas(4096) uint8_t memory[MEMORY_BYTES];
static size_t memory_used;
uint64_t live_allocations;

void memory_reset(void)
{
	memory_used = 0;
	live_allocations = 0;
	points_left = 0;
	wakes.state = options.seed ^ 0x3a4e5 ^ (result.worker_crashes + result.hang_ups) << 32;
	entropy.state = options.seed ^ 0xe47409 ^ (result.worker_crashes + result.hang_ups) << 32;
}

void memory_rewind(void)
{
	memory_used = 0;
}

static void *take(size_t alignment, size_t bytes)
{
	size_t at = (memory_used + alignment - 1) / alignment * alignment;

	if (call_fails(1))
		return NULL;
	if (at + bytes > MEMORY_BYTES) {
		sim_fail("the worker has allocated more than %u bytes", MEMORY_BYTES);
		return NULL;
	}
	memory_used = at + bytes;
	live_allocations++;
	return memory + at;
}

void *__wrap_malloc(size_t bytes)
{
	return take(16, bytes);
}

void *__wrap_calloc(size_t count, size_t bytes)
{
	void *it = take(16, count * bytes);

	if (it != NULL)
		memset(it, 0, count * bytes);
	return it;
}

void *__wrap_aligned_alloc(size_t alignment, size_t bytes)
{
	return take(alignment, bytes);
}

void *__wrap_realloc(void *before, size_t bytes)
{
	(void)before, (void)bytes;
	sim_fail("realloc() is not expected here");
	return NULL;
}

static char *copy_text(const char *text, size_t bytes)
{
	char *copy = take(1, bytes + 1);

	if (copy != NULL) {
		memcpy(copy, text, bytes);
		copy[bytes] = '\0';
	}
	return copy;
}

char *__wrap_strndup(const char *text, size_t most)
{
	return copy_text(text, strnlen(text, most));
}

char *__wrap_strdup(const char *text)
{
	return copy_text(text, strlen(text));
}

void __wrap_free(void *it)
{
	if (it == NULL)
		return;
	if ((uint8_t *)it < memory || (uint8_t *)it >= memory + MEMORY_BYTES) {
		sim_fail("free() of what was not allocated");
		return;
	}
	live_allocations--;
}

/* ---- the region's file ---- */

#define REGION_FD 900

_Alignas(4096) uint8_t region_memory[REGION_BYTES_LIMIT];
uint64_t region_bytes;
static bool region_is_open, region_is_locked, region_is_mapped;

void region_let_go(void)
{
	region_is_open = region_is_locked = region_is_mapped = false;
}

void region_forget(void)
{
	region_let_go();
	memset(region_memory, 0, region_bytes);
	region_bytes = 0;
}

static int fails_with(int error)
{
	errno = error;
	return -1;
}

int __wrap_open(const char *path, int flags, ...)
{
	static const int errors[] = { 0, EMFILE, ENFILE, ENOMEM };
	uint32_t failure;

	(void)path, (void)flags;
	crash_point();
	if ((failure = call_fails(3)) != 0)
		return fails_with(errors[failure]);
	region_is_open = true;
	return REGION_FD;
}

int __wrap_memfd_create(const char *name, unsigned flags)
{
	(void)name, (void)flags;
	sim_fail("the worker makes a region of its own");
	return fails_with(EMFILE);
}

int __wrap_fstat(int fd, struct stat *st)
{
	crash_point();
	if (fd != REGION_FD && fd != CALLERS_REGION_FD)
		return fails_with(EBADF);
	if (call_fails(1))
		return fails_with(EOVERFLOW);
	memset(st, 0, sizeof(*st));
	st->st_size = (off_t)region_bytes;
	return 0;
}

int __wrap_flock(int fd, int operation)
{
	static const int errors[] = { 0, ENOLCK, EINTR };
	uint32_t failure;

	(void)operation;
	crash_point();
	if (fd != REGION_FD)
		return fails_with(EBADF);
	if ((failure = call_fails(2)) != 0)
		return fails_with(errors[failure]);
	if (region_is_locked)
		return fails_with(EWOULDBLOCK);
	region_is_locked = true;
	return 0;
}

int __wrap_ftruncate(int fd, off_t bytes)
{
	static const int errors[] = { 0, ENOSPC, EINTR, ENOMEM };
	uint32_t failure;

	crash_point();
	if (fd != REGION_FD)
		return fails_with(EBADF);
	if ((failure = call_fails(3)) != 0)
		return fails_with(errors[failure]);
	if ((uint64_t)bytes > sizeof(region_memory))
		return fails_with(ENOSPC);
	region_bytes = (uint64_t)bytes;
	return 0;
}

void *__wrap_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
	(void)address, (void)protection, (void)flags, (void)offset;
	crash_point();
	if (fd < 0) /* the worker's own memory, which ends with it */
		return (address = __wrap_aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)) ? address : MAP_FAILED;
	if (fd != REGION_FD || bytes > region_bytes || call_fails(1)) {
		errno = ENOMEM;
		return MAP_FAILED;
	}
	region_is_mapped = true;
	return region_memory;
}

int __wrap_munmap(void *address, size_t bytes)
{
	(void)bytes;
	crash_point();
	if (!is_in_region(address)) {
		__wrap_free(address);
		return 0;
	}
	if (address != region_memory || !region_is_mapped)
		sim_fail("munmap() of what is not mapped");
	region_is_mapped = false;
	return 0;
}

/* What does not change what is mapped; failures of these are not looked at. */
int __wrap_madvise(void *address, size_t bytes, int advice)
{
	(void)address, (void)bytes, (void)advice;
	crash_point();
	return call_fails(1) ? fails_with(EAGAIN) : 0;
}

int __wrap_fchmod(int fd, mode_t mode)
{
	(void)fd, (void)mode;
	crash_point();
	return call_fails(1) ? fails_with(EPERM) : 0;
}

int __wrap_fcntl(int fd, int command, ...)
{
	(void)fd, (void)command;
	crash_point();
	return call_fails(1) ? fails_with(EPERM) : 0;
}

bool close_region(int fd)
{
	if (fd != REGION_FD)
		return false;
	region_is_open = region_is_locked = false;
	return true;
}

/* ---- bytes that are copied into the region: the worker may be killed in the middle ---- */

bool is_in_region(const void *at)
{
	return (const uint8_t *)at >= region_memory && (const uint8_t *)at < region_memory + sizeof(region_memory);
}

void *__wrap_memcpy(void *to, const void *from, size_t bytes)
{
	size_t half = bytes / 16 * 8;

	if (current == THREADS_MAX || !is_in_region(to))
		return __real_memcpy(to, from, bytes);
	result.copied_pages += bytes == PAGE_BYTES;
	if (has_store_hooks) {
		copy_to_region(to, from, bytes);
		return to;
	}
	crash_point();
	__real_memcpy(to, from, half);
	crash_point();
	__real_memcpy((uint8_t *)to + half, (const uint8_t *)from + half, bytes - half);
	crash_point();
	return to;
}
