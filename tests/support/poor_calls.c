/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fault tool, for LD_PRELOAD: a machine that has little memory. In a process that shares the memory of the one that was
 * loaded, and is not it, each call of the function that POOR_CALL names fails twice for want of memory, and goes well
 * then.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <unistd.h>

static ssize_t (*real_send)(int, const void *, size_t, int);
static ssize_t (*real_recv)(int, void *, size_t, int);
static ssize_t (*real_recvmsg)(int, struct msghdr *, int);
static ssize_t (*real_pread)(int, void *, size_t, off_t);
static int (*real_flock)(int, int);
static const char *name;
static pid_t loaded;
static unsigned calls;

/* Now: what the dynamic linker needs for it may be gone later. */
__attribute__((constructor)) static void find(void)
{
	*(void **)&real_send = dlsym(RTLD_NEXT, "send");
	*(void **)&real_recv = dlsym(RTLD_NEXT, "recv");
	*(void **)&real_recvmsg = dlsym(RTLD_NEXT, "recvmsg");
	*(void **)&real_pread = dlsym(RTLD_NEXT, "pread");
	*(void **)&real_flock = dlsym(RTLD_NEXT, "flock");
	name = getenv("POOR_CALL");
	loaded = getpid();
}

static bool fails(const char *call)
{
	if (name == NULL || strcmp(name, call) != 0 || getpid() == loaded || ++calls % 3 == 0)
		return false;
	errno = calls % 3 == 1 ? ENOBUFS : ENOMEM;
	return true;
}

ssize_t send(int fd, const void *data, size_t bytes, int flags)
{
	int domain = 0, type = 0;
	socklen_t length = sizeof(int);

	getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length);
	getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length);
	/* over other sockets, it is the kernel that a test has refuse */
	return domain == AF_UNIX && type == SOCK_STREAM && fails("send") ? -1 : real_send(fd, data, bytes, flags);
}

ssize_t recv(int fd, void *data, size_t bytes, int flags)
{
	return fails("recv") ? -1 : real_recv(fd, data, bytes, flags);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
	return fails("recvmsg") ? -1 : real_recvmsg(fd, message, flags);
}

ssize_t pread(int fd, void *data, size_t bytes, off_t offset)
{
	return fails("pread") ? -1 : real_pread(fd, data, bytes, offset);
}

/* pread(2) as it is called with _FILE_OFFSET_BITS=64, which Python.h sets: the same, where off_t has 64 bits. */
ssize_t pread64(int fd, void *data, size_t bytes, off_t offset)
{
	return pread(fd, data, bytes, offset);
}

int flock(int fd, int operation)
{
	return fails("flock") ? -1 : real_flock(fd, operation);
}
