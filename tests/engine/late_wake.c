/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fault tool, for LD_PRELOAD: while `armed` is set, the thread that wakes the loop for the last of WAKES requests stops
 * for half a second before it does, and the loop is slow enough to find all of them at once. `was_closed` says that the
 * descriptor of the wake-up was closed by then.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/epoll.h>
#include <unistd.h>

#define WAKES 10

atomic_bool armed;
atomic_int wakes;
atomic_bool was_closed;
static _Thread_local bool is_loop;

ssize_t write(int fd, const void *data, size_t length)
{
	static ssize_t (*real)(int, const void *, size_t);

	if (real == NULL)
		*(void **)&real = dlsym(RTLD_NEXT, "write");
	if (atomic_load(&armed) && length == 8 && !is_loop && atomic_fetch_add(&wakes, 1) == WAKES - 1) {
		usleep(500000);
		if (fcntl(fd, F_GETFD) < 0 && errno == EBADF)
			atomic_store(&was_closed, true);
	}
	return real(fd, data, length);
}

int epoll_wait(int fd, struct epoll_event *events, int most, int timeout_ms)
{
	static int (*real)(int, struct epoll_event *, int, int);
	int found;

	if (real == NULL)
		*(void **)&real = dlsym(RTLD_NEXT, "epoll_wait");
	is_loop = true;
	found = real(fd, events, most, timeout_ms);
	if (atomic_load(&armed))
		usleep(20000);
	return found;
}
