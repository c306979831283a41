/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What calls.c and network.c share: the C library's functions that `ld --wrap` sends there. */
#ifndef NBDNFS_SIM_WRAPPED_H
#define NBDNFS_SIM_WRAPPED_H

#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>

/* Room for any region of the simulator's; what the worker is given as the region's descriptor. */
#define REGION_BYTES_LIMIT (4u << 20)
#define CALLERS_REGION_FD 901

bool close_region(int fd);

/* nbd_socket.c */
ssize_t nbd_socket_send(const struct msghdr *message, int flags);
ssize_t nbd_socket_receive(const struct msghdr *message, int flags);
short nbd_socket_ready(short wanted);
void nbd_socket_worker_closes(void);
void nbd_socket_peek_behind(void);

ssize_t __real_write(int fd, const void *buffer, size_t bytes);
void *__real_memcpy(void *to, const void *from, size_t bytes);
void *__wrap_memcpy(void *to, const void *from, size_t bytes);

_Noreturn void __wrap___assert_fail(const char *text, const char *file, unsigned line, const char *function);
int __wrap_pthread_mutex_init(pthread_mutex_t *it, const pthread_mutexattr_t *attributes);
int __wrap_pthread_mutex_destroy(pthread_mutex_t *it);
int __wrap_pthread_mutex_lock(pthread_mutex_t *it);
int __wrap_pthread_mutex_trylock(pthread_mutex_t *it);
int __wrap_pthread_mutex_unlock(pthread_mutex_t *it);
int __wrap_pthread_cond_init(pthread_cond_t *it, const pthread_condattr_t *attributes);
int __wrap_pthread_cond_destroy(pthread_cond_t *it);
int __wrap_pthread_cond_wait(pthread_cond_t *it, pthread_mutex_t *of);
int __wrap_pthread_cond_timedwait(pthread_cond_t *it, pthread_mutex_t *of, const struct timespec *until);
int __wrap_pthread_cond_signal(pthread_cond_t *it);
int __wrap_pthread_cond_broadcast(pthread_cond_t *it);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*body)(void *), void *argument);
pthread_t __wrap_pthread_self(void);
int __wrap_pthread_join(pthread_t thread, void **value);
int __wrap_pthread_sigmask(int how, const sigset_t *set, sigset_t *before);
int __wrap_sched_yield(void);
int __wrap_clock_gettime(clockid_t clock, struct timespec *ts);
int __wrap_nanosleep(const struct timespec *length, struct timespec *left);
ssize_t __wrap_getrandom(void *buffer, size_t bytes, unsigned flags);
pid_t __wrap_getpid(void);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_aligned_alloc(size_t alignment, size_t bytes);
void *__wrap_realloc(void *before, size_t bytes);
char *__wrap_strndup(const char *text, size_t most);
char *__wrap_strdup(const char *text);
void __wrap_free(void *it);
int __wrap_open(const char *path, int flags, ...);
int __wrap_memfd_create(const char *name, unsigned flags);
int __wrap_fstat(int fd, struct stat *st);
int __wrap_flock(int fd, int operation);
int __wrap_ftruncate(int fd, off_t bytes);
void *__wrap_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset);
int __wrap_munmap(void *address, size_t bytes);
int __wrap_madvise(void *address, size_t bytes, int advice);
int __wrap_fchmod(int fd, mode_t mode);
int __wrap_fcntl(int fd, int command, ...);

int __wrap_socket(int domain, int type, int protocol);
int __wrap_connect(int fd, const struct sockaddr *address, socklen_t bytes);
int __wrap_bind(int fd, const struct sockaddr *address, socklen_t bytes);
int __wrap_setsockopt(int fd, int level, int name, const void *value, socklen_t bytes);
int __wrap_getsockopt(int fd, int level, int name, void *value, socklen_t *bytes);
int __wrap_getpeername(int fd, struct sockaddr *address, socklen_t *bytes);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags);
ssize_t __wrap_recvmsg(int fd, struct msghdr *message, int flags);
ssize_t __wrap_send(int fd, const void *buffer, size_t bytes, int flags);
ssize_t __wrap_recv(int fd, void *buffer, size_t bytes, int flags);
int __wrap_eventfd(unsigned value, int flags);
ssize_t __wrap_read(int fd, void *buffer, size_t bytes);
ssize_t __wrap_write(int fd, const void *buffer, size_t bytes);
int __wrap_close(int fd);
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout_ms);
int __wrap_epoll_create1(int flags);
int __wrap_epoll_ctl(int fd, int operation, int of, struct epoll_event *event);
int __wrap_epoll_wait(int fd, struct epoll_event *found, int most, int timeout_ms);
int __wrap_ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask);

#endif
