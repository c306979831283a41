/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The heir's life: it closes what is not its own, and waits. While the keeper lives it does nothing. While the worker
 * lives without a keeper, it looks four times a second whether there is a next keeper, or no device any more.
 */
#include "heir.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define STDERR 2
#define LOOK_EVERY_MS 250
#define LOCK_TRIES 3

int64_t heir_now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

bool heir_is_readable(int descriptor, int timeout_ms)
{
	struct pollfd polled = { .fd = descriptor, .events = POLLIN };

	return poll(&polled, 1, timeout_ms) == 1;
}

void heir_say(struct heir *heir, const char *text, const char *more)
{
	struct iovec parts[] = {
		{ heir->label, strlen(heir->label) },
		{ (void *)text, strlen(text) },
		{ (void *)more, strlen(more) },
		{ "\n", 1 },
	};
	ssize_t written = writev(STDERR, parts, 4);

	(void)written; /* it is for people only */
}

/*
 * Others rely on the ends of sockets being closed when the keeper ends, and so does the keeper's lock: all that is not
 * the heir's own is closed at once. Its descriptors are copies of the keeper's, and any closing is of copies.
 */
static void close_others(const struct heir *heir)
{
	const int kept[] = { STDERR, heir->channel, heir->keeper, heir->netlink, heir->lock, heir->backend };
	unsigned from = 0;

	for (;;) {
		unsigned next = ~0U;

		for (size_t i = 0; i < sizeof(kept) / sizeof(kept[0]); i++)
			if ((unsigned)kept[i] >= from && (unsigned)kept[i] < next)
				next = (unsigned)kept[i];
		if (next != from)
			syscall(SYS_close_range, from, next == ~0U ? ~0U : next - 1, 0);
		if (next == ~0U)
			return;
		from = next + 1;
	}
}

bool heir_is_of_want(int error)
{
	return error == ENOMEM || error == ENOBUFS || error == EINTR;
}

bool heir_has_device(struct heir *heir)
{
	char found[sizeof(heir->backend_text) + 1];
	ssize_t bytes = pread(heir->backend, found, sizeof(found), 0);

	if (bytes < 0 && (heir_is_of_want(errno) || errno == EAGAIN))
		return true;
	return bytes == (ssize_t)heir->backend_bytes && memcmp(found, heir->backend_text, heir->backend_bytes) == 0;
}

/* A file that has been removed locks nothing out: the next keeper's is another one. */
bool heir_try_lock(struct heir *heir)
{
	struct stat file;

	if (fstat(heir->lock, &file) != 0 || file.st_nlink == 0)
		return false;
	for (int tries = 0; flock(heir->lock, LOCK_EX | LOCK_NB) != 0; tries++) {
		/* for a moment a command has it, that looks whether it is free (name_lock.py: holder) */
		if (errno == EWOULDBLOCK ? tries >= LOCK_TRIES : !heir_is_of_want(errno))
			return false;
		poll(NULL, 0, HEIR_AGAIN_MS);
	}
	return true;
}

static void forget(int *descriptor)
{
	if (*descriptor >= 0)
		close(*descriptor);
	*descriptor = -1;
}

/* One message of the keeper replaces the one before. False at the end of the heir's task. */
static bool take_message(struct heir *heir, const char *data, size_t bytes, const int *descriptors, int count)
{
	int next = 0;

	if (bytes == 0) { /* the keeper has ended, or is about to: its pidfd says when */
		forget(&heir->channel);
		return true;
	}
	forget(&heir->worker);
	forget(&heir->standby);
	if ((data[0] & HEIR_HAS_WORKER) != 0 && next < count)
		heir->worker = descriptors[next++];
	if ((data[0] & HEIR_HAS_STANDBY) != 0 && next < count)
		heir->standby = descriptors[next++];
	while (next < count)
		close(descriptors[next++]);
	heir->activation_bytes = bytes - 1;
	memcpy(heir->activation, data + 1, bytes - 1);
	return (data[0] & HEIR_END) == 0;
}

/* All that the keeper has told so far. False as above. */
static bool take_messages(struct heir *heir)
{
	while (heir->channel >= 0) {
		char data[HEIR_MESSAGE_BYTES_MAX];
		union {
			struct cmsghdr header;
			char room[CMSG_SPACE(2 * sizeof(int))];
		} control;
		struct iovec part = { data, sizeof(data) };
		struct msghdr message = {
			.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)
		};
		struct cmsghdr *rights;
		int descriptors[2], count = 0;
		ssize_t bytes = recvmsg(heir->channel, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

		if (bytes < 0 && errno == EAGAIN)
			return true;
		if (bytes < 0 && heir_is_of_want(errno)) {
			poll(NULL, 0, HEIR_AGAIN_MS);
			continue;
		}
		if (bytes < 0)
			bytes = 0; /* as at its end */
		rights = bytes > 0 ? CMSG_FIRSTHDR(&message) : NULL;
		if (rights != NULL && rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS) {
			count = (int)((rights->cmsg_len - CMSG_LEN(0)) / sizeof(int));
			memcpy(descriptors, CMSG_DATA(rights), (size_t)count * sizeof(int));
		}
		if (!take_message(heir, data, (size_t)bytes, descriptors, count))
			return false;
	}
	return true;
}

/* Without a keeper: whether its place is free and its device is there. The lock is free again afterwards. */
static bool is_wanted(struct heir *heir)
{
	if (!heir_has_device(heir) || !heir_try_lock(heir))
		return false;
	flock(heir->lock, LOCK_UN);
	return true;
}

/*
 * The keeper's heap, which is most of its memory: nothing of it is the heir's, and the next keeper needs as much. Not
 * by brk(3), which has notes of its own. The extension is linked with "now": to bind a function, the dynamic linker
 * would read what it has in the heap.
 */
static void give_heap_back(struct heir *heir)
{
	if (heir->heap != 0)
		syscall(SYS_brk, heir->heap);
	heir->heap = 0;
}

/* Until keeper and worker have ended. False where there is nothing to do then. */
static bool guard(struct heir *heir)
{
	for (;;) {
		bool has_keeper = !heir_is_readable(heir->keeper, 0);
		struct pollfd polled[] = {
			{ .fd = heir->channel, .events = POLLIN },
			{ .fd = has_keeper ? heir->keeper : -1, .events = POLLIN },
			{ .fd = has_keeper ? -1 : heir->worker, .events = POLLIN },
		};

		if (!has_keeper)
			give_heap_back(heir);
		/* before anything is decided: what a keeper that has ended has sent is all there */
		if (!take_messages(heir))
			return false;
		if (!has_keeper && heir->standby < 0)
			return false;
		if (!has_keeper && (heir->worker < 0 || heir_is_readable(heir->worker, 0)))
			return true;
		if (!has_keeper && !is_wanted(heir))
			return false;
		polled[0].fd = heir->channel;
		polled[2].fd = has_keeper ? -1 : heir->worker;
		/* for ever, while there is a keeper: its end is an event */
		poll(polled, 3, has_keeper ? -1 : LOOK_EVERY_MS);
	}
}

int heir_live(struct heir *heir)
{
	char ready = HEIR_READY;

	prctl(PR_SET_NAME, heir->command, 0, 0, 0); /* first: by this it is known, and can be ended, from here on */
	close_others(heir);
	heir_has_device(heir); /* once, now: the kernel allocates a buffer for the file, and keeps it */
	if (send(heir->channel, &ready, 1, MSG_NOSIGNAL | MSG_DONTWAIT) == 1 && guard(heir))
		heir_take_over(heir);
	return 0;
}
