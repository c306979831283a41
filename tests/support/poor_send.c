/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fault tool, for LD_PRELOAD: a machine that has little memory. Each send(2) over a Unix stream socket fails twice for
 * want of it, and goes well then. One thread at a time.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <sys/socket.h>

static unsigned calls;

ssize_t send(int fd, const void *data, size_t bytes, int flags)
{
	static ssize_t (*real)(int, const void *, size_t, int);
	int domain = 0, type = 0;
	socklen_t length = sizeof(int);

	if (real == NULL)
		*(void **)&real = dlsym(RTLD_NEXT, "send");
	getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length);
	getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length);
	if (domain == AF_UNIX && type == SOCK_STREAM && ++calls % 3 != 0) {
		errno = calls % 3 == 1 ? ENOBUFS : ENOMEM;
		return -1;
	}
	return real(fd, data, bytes, flags);
}
