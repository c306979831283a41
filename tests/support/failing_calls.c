/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fault tool, for LD_PRELOAD: counts a process's calls of the C library, and kills it at one of them, or has one fail.
 *
 * Counted are calls of the program and its libraries, once counting has begun: not those that the C library makes
 * within itself, such as a child's before exec. Each call is two points, before and after it is made: a keeper that is
 * killed after sendmsg(2) has sent. The counters lie in memory that a process shares with its parent.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

struct steps {
	volatile int counting;
	volatile uint32_t points, calls; /* so far; `calls` are those that can fail */
	uint32_t kill_at;                /* a point, 0: none */
	uint32_t fail_at, way;           /* a call, and which of its errors */
	volatile uint32_t ways;          /* how many errors that call has; 0: it has not been reached */
	volatile int failed;             /* whether that call has that error, and has failed with it */
	char name[32];                   /* of the last call that was counted, or the one that failed */
};

static struct steps none, *steps = &none;
static volatile int is_counted; /* of this process, and not of its parent */

struct steps *steps_share(void);
void steps_begin_on(int number);

/* To be called before fork(2). */
struct steps *steps_share(void)
{
	steps = mmap(NULL, sizeof(*steps), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	return steps;
}

static void begin(int number)
{
	(void)number;
	steps->counting = 1;
}

/* In the process whose calls are counted. Counting begins with this signal, or before. */
void steps_begin_on(int number)
{
	struct sigaction action = { .sa_handler = begin, .sa_flags = SA_RESTART };

	sigaction(number, &action, NULL);
	is_counted = 1;
}

static void point(const char *name)
{
	uint32_t number;

	if (!is_counted || !steps->counting)
		return;
	number = __sync_add_and_fetch(&steps->points, 1);
	if (!steps->failed)
		strncpy(steps->name, name, sizeof(steps->name) - 1);
	if (number == steps->kill_at)
		syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
}

/* The error with which this call is to fail, of a list that ends with 0; 0: none. */
static int failure(const char *name, const int *errors)
{
	uint32_t number, ways = 0;

	if (!is_counted || !steps->counting || errors[0] == 0)
		return 0;
	number = __sync_add_and_fetch(&steps->calls, 1);
	if (number != steps->fail_at)
		return 0;
	strncpy(steps->name, name, sizeof(steps->name) - 1);
	while (errors[ways] != 0)
		ways++;
	steps->ways = ways;
	if (steps->way >= ways)
		return 0;
	steps->failed = 1;
	return errors[steps->way];
}

#define ERRORS(...) ((const int[]){ __VA_ARGS__, 0 })
#define NO_ERRORS ((const int[]){ 0 })

/* `type name parameters`, called with `arguments`: fails with -1 (`bad`) and one of `errors` in errno. */
#define CALL(type, name, parameters, arguments, bad, errors)                                                           \
	type name parameters;                                                                                          \
	type name parameters                                                                                           \
	{                                                                                                              \
		static type(*real) parameters;                                                                         \
		type result;                                                                                           \
		int error;                                                                                             \
                                                                                                                       \
		if (real == NULL)                                                                                      \
			*(void **)&real = dlsym(RTLD_NEXT, #name);                                                     \
		point(#name);                                                                                          \
		error = failure(#name, errors);                                                                        \
		if (error != 0) {                                                                                      \
			errno = error;                                                                                 \
			return bad;                                                                                    \
		}                                                                                                      \
		result = real arguments;                                                                               \
		error = errno;                                                                                         \
		point(#name);                                                                                          \
		errno = error;                                                                                         \
		return result;                                                                                         \
	}

/* The same for a call that returns its error. */
#define RETURNS_ERROR(name, parameters, arguments, errors)                                                             \
	int name parameters;                                                                                           \
	int name parameters                                                                                            \
	{                                                                                                              \
		static int(*real) parameters;                                                                          \
		int error;                                                                                             \
                                                                                                                       \
		if (real == NULL)                                                                                      \
			*(void **)&real = dlsym(RTLD_NEXT, #name);                                                     \
		point(#name);                                                                                          \
		error = failure(#name, errors);                                                                        \
		if (error == 0)                                                                                        \
			error = real arguments;                                                                        \
		point(#name);                                                                                          \
		return error;                                                                                          \
	}

/* So many need no memory (fs/select.c: POLL_STACK_ALLOC). */
#define POLL_ON_STACK 30u
#define OPEN_ERRORS ERRORS(EMFILE, ENFILE, ENOMEM, EINTR, ENOSPC)
#define NEW_ERRORS ERRORS(EMFILE, ENFILE, ENOMEM)

static int flags_can_block(int fd, int flags)
{
	return (flags & MSG_DONTWAIT) == 0 && (syscall(SYS_fcntl, fd, F_GETFL) & O_NONBLOCK) == 0;
}

/* Of a call that moves bytes: EAGAIN only where the descriptor does not block. */
#define MOVE_ERRORS(fd, flags) (steps->counting && flags_can_block(fd, flags) ? ERRORS(EINTR) : ERRORS(EINTR, EAGAIN))
/* Of a receiving call: EAGAIN only where there is nothing. That is an answer, and not for want of memory. */
static int has_input(int fd)
{
	struct pollfd polled = { .fd = fd, .events = POLLIN };
	struct timespec at_once = { 0 };

	return syscall(SYS_ppoll, &polled, 1, &at_once, NULL, 0) == 1;
}

#define RECEIVE_ERRORS(fd, flags)                                                                                      \
	(steps->counting && (flags_can_block(fd, flags) || has_input(fd)) ? ERRORS(EINTR, ENOMEM) :                    \
									    ERRORS(EINTR, EAGAIN, ENOMEM))
#define SOCKET_ERRORS(fd, flags)                                                                                       \
	(steps->counting && flags_can_block(fd, flags) ? ERRORS(EINTR, ENOMEM) : ERRORS(EINTR, EAGAIN, ENOMEM))

#define OPEN(name)                                                                                                     \
	int name(const char *path, int flags, ...);                                                                    \
	int name(const char *path, int flags, ...)                                                                     \
	{                                                                                                              \
		static int (*real)(const char *, int, ...);                                                            \
		va_list ap;                                                                                            \
		int error, result;                                                                                     \
		mode_t mode;                                                                                           \
                                                                                                                       \
		va_start(ap, flags);                                                                                   \
		mode = flags & O_CREAT ? va_arg(ap, mode_t) : 0;                                                       \
		va_end(ap);                                                                                            \
		if (real == NULL)                                                                                      \
			*(void **)&real = dlsym(RTLD_NEXT, #name);                                                     \
		point("open");                                                                                         \
		error = failure("open", flags & O_CREAT ? OPEN_ERRORS : ERRORS(EMFILE, ENFILE, ENOMEM, EINTR));        \
		if (error != 0) {                                                                                      \
			errno = error;                                                                                 \
			return -1;                                                                                     \
		}                                                                                                      \
		result = real(path, flags, mode);                                                                      \
		error = errno;                                                                                         \
		point("open");                                                                                         \
		errno = error;                                                                                         \
		return result;                                                                                         \
	}

OPEN(open)
OPEN(open64)
CALL(ssize_t, read, (int fd, void *to, size_t bytes), (fd, to, bytes), -1, MOVE_ERRORS(fd, 0))
CALL(ssize_t, pread64, (int fd, void *to, size_t bytes, off64_t at), (fd, to, bytes, at), -1, ERRORS(EINTR))
CALL(ssize_t, pread, (int fd, void *to, size_t bytes, off_t at), (fd, to, bytes, at), -1, ERRORS(EINTR))
CALL(ssize_t, write, (int fd, const void *from, size_t bytes), (fd, from, bytes), -1, MOVE_ERRORS(fd, 0))
CALL(ssize_t, pwrite64, (int fd, const void *from, size_t bytes, off64_t at), (fd, from, bytes, at), -1,
     ERRORS(EINTR, ENOSPC, ENOMEM))
CALL(ssize_t, pwrite, (int fd, const void *from, size_t bytes, off_t at), (fd, from, bytes, at), -1,
     ERRORS(EINTR, ENOSPC, ENOMEM))
RETURNS_ERROR(posix_fallocate64, (int fd, off64_t at, off64_t bytes), (fd, at, bytes), ERRORS(ENOSPC, EINTR))
RETURNS_ERROR(posix_fallocate, (int fd, off_t at, off_t bytes), (fd, at, bytes), ERRORS(ENOSPC, EINTR))
CALL(int, ftruncate64, (int fd, off64_t bytes), (fd, bytes), -1, ERRORS(EINTR))
CALL(int, ftruncate, (int fd, off_t bytes), (fd, bytes), -1, ERRORS(EINTR))
CALL(int, close, (int fd), (fd), -1, NO_ERRORS)
CALL(int, fstat64, (int fd, struct stat64 *found), (fd, found), -1, ERRORS(ENOMEM))
CALL(int, fstat, (int fd, struct stat *found), (fd, found), -1, ERRORS(ENOMEM))
CALL(int, stat64, (const char *path, struct stat64 *found), (path, found), -1, ERRORS(ENOMEM))
CALL(int, stat, (const char *path, struct stat *found), (path, found), -1, ERRORS(ENOMEM))
CALL(int, lstat64, (const char *path, struct stat64 *found), (path, found), -1, ERRORS(ENOMEM))
CALL(int, lstat, (const char *path, struct stat *found), (path, found), -1, ERRORS(ENOMEM))
CALL(int, mkdir, (const char *path, mode_t mode), (path, mode), -1, ERRORS(ENOSPC, ENOMEM))
CALL(int, unlink, (const char *path), (path), -1, ERRORS(ENOMEM))
CALL(int, rmdir, (const char *path), (path), -1, ERRORS(ENOMEM))
CALL(DIR *, opendir, (const char *path), (path), NULL, NEW_ERRORS)
CALL(ssize_t, readlink, (const char *path, char *to, size_t bytes), (path, to, bytes), -1, ERRORS(ENOMEM))
CALL(int, socket, (int domain, int type, int protocol), (domain, type, protocol), -1, NEW_ERRORS)
CALL(int, socketpair, (int domain, int type, int protocol, int pair[2]), (domain, type, protocol, pair), -1, NEW_ERRORS)
CALL(int, pipe2, (int pair[2], int flags), (pair, flags), -1, NEW_ERRORS)
CALL(int, memfd_create, (const char *name, unsigned flags), (name, flags), -1, NEW_ERRORS)
CALL(int, fchmod, (int fd, mode_t mode), (fd, mode), -1, ERRORS(EINTR))
CALL(int, flock, (int fd, int operation), (fd, operation), -1, ERRORS(EINTR, ENOLCK))
CALL(ssize_t, sendmsg, (int fd, const struct msghdr *message, int flags), (fd, message, flags), -1,
     SOCKET_ERRORS(fd, flags))
CALL(ssize_t, recvmsg, (int fd, struct msghdr *message, int flags), (fd, message, flags), -1, RECEIVE_ERRORS(fd, flags))
CALL(ssize_t, send, (int fd, const void *from, size_t bytes, int flags), (fd, from, bytes, flags), -1,
     SOCKET_ERRORS(fd, flags))
CALL(ssize_t, recv, (int fd, void *to, size_t bytes, int flags), (fd, to, bytes, flags), -1, RECEIVE_ERRORS(fd, flags))
CALL(int, shutdown, (int fd, int how), (fd, how), -1, NO_ERRORS)
CALL(int, poll, (struct pollfd * fds, nfds_t count, int timeout_ms), (fds, count, timeout_ms), -1,
     count <= POLL_ON_STACK ? ERRORS(EINTR) : ERRORS(EINTR, ENOMEM))
CALL(pid_t, waitpid, (pid_t pid, int *status, int options), (pid, status, options), -1, ERRORS(EINTR))
CALL(int, kill, (pid_t pid, int number), (pid, number), -1, NO_ERRORS)
RETURNS_ERROR(posix_spawn,
	      (pid_t * pid, const char *path, const posix_spawn_file_actions_t *actions,
	       const posix_spawnattr_t *attributes, char *const argv[], char *const environment[]),
	      (pid, path, actions, attributes, argv, environment), ERRORS(ENOMEM, EAGAIN, EMFILE))

void *mmap64(void *address, size_t bytes, int protection, int flags, int fd, off64_t offset);
void *mmap64(void *address, size_t bytes, int protection, int flags, int fd, off64_t offset)
{
	int error;

	if (fd >= 0) {
		point("mmap");
		error = failure("mmap", ERRORS(ENOMEM));
		if (error != 0) {
			errno = error;
			return MAP_FAILED;
		}
	}
	return (void *)syscall(SYS_mmap, address, bytes, protection, flags, fd, offset);
}

/* Only copies of descriptors count: what else it does cannot fail. */
int fcntl64(int fd, int command, ...);
int fcntl64(int fd, int command, ...)
{
	static int (*real)(int, int, ...);
	va_list ap;
	long value;
	int error = 0, result;

	va_start(ap, command);
	value = va_arg(ap, long);
	va_end(ap);
	if (real == NULL)
		*(void **)&real = dlsym(RTLD_NEXT, "fcntl64");
	if (command == F_DUPFD || command == F_DUPFD_CLOEXEC) {
		point("fcntl");
		error = failure("fcntl", ERRORS(EMFILE));
	}
	if (error != 0) {
		errno = error;
		return -1;
	}
	result = real(fd, command, value);
	if (command == F_DUPFD || command == F_DUPFD_CLOEXEC) {
		error = errno;
		point("fcntl");
		errno = error;
	}
	return result;
}

/* CPython makes these without a function of the C library's. */
long syscall(long number, ...)
{
	static long (*real)(long, ...);
	long values[6], result;
	int error = 0;
	va_list ap;

	va_start(ap, number);
	for (int i = 0; i < 6; i++)
		values[i] = va_arg(ap, long);
	va_end(ap);
	if (real == NULL)
		*(void **)&real = dlsym(RTLD_NEXT, "syscall");
	if (number == SYS_pidfd_open || number == SYS_pidfd_send_signal) {
		point("pidfd");
		if (number == SYS_pidfd_open)
			error = failure("pidfd_open", NEW_ERRORS);
	}
	if (error != 0) {
		errno = error;
		return -1;
	}
	result = real(number, values[0], values[1], values[2], values[3], values[4], values[5]);
	if (number == SYS_pidfd_open || number == SYS_pidfd_send_signal) {
		error = errno;
		point("pidfd");
		errno = error;
	}
	return result;
}
