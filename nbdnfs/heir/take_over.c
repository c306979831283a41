/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the heir does: it activates the parked standby, shakes hands with it, and gives its socket to the kernel. The
 * same as serving.py does, with a standby that only it has.
 */
#include "heir.h"

#include <errno.h>
#include <linux/netlink.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif

#define LOOK_EVERY_MS 1000
#define ANSWER_MS 5000
/* How often the socket is offered, and for how long: see give_to_kernel(). */
#define OFFER_EVERY_MS 100
#define OFFERS 30
/* When the first offer may be made, counted from the end of keeper and worker: see settle(). */
#define SETTLE_MS 300

/* The ancillary message of worker_handle.py: pid, NUL, recipe, and three descriptors. False: somebody has taken it. */
static bool take_standby(struct heir *heir)
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(HEIR_ANCILLARY_DESCRIPTORS * sizeof(int))];
	} control;
	struct iovec part = { heir->buffer, sizeof(heir->buffer) };
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)
	};
	struct cmsghdr *rights;
	int descriptors[HEIR_ANCILLARY_DESCRIPTORS];
	ssize_t bytes;

	while ((bytes = recvmsg(heir->standby, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)) < 0) {
		if (!heir_is_of_want(errno) || !heir_has_device(heir))
			return false;
		poll(NULL, 0, HEIR_AGAIN_MS);
	}
	rights = bytes > 0 ? CMSG_FIRSTHDR(&message) : NULL;
	if (rights == NULL || rights->cmsg_type != SCM_RIGHTS || rights->cmsg_len != CMSG_LEN(sizeof(descriptors)))
		return false;
	memcpy(descriptors, CMSG_DATA(rights), sizeof(descriptors));
	heir->sock = descriptors[0];
	heir->peer = descriptors[1];
	heir->pidfd = descriptors[2];
	for (size_t i = 0; i < sizeof(heir->pid) - 1 && i < (size_t)bytes && heir->buffer[i] != '\0'; i++)
		heir->pid[i] = heir->buffer[i];
	return true;
}

bool heir_send(struct heir *heir, int socket, const void *data, size_t bytes)
{
	for (;;) {
		ssize_t sent = send(socket, data, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (sent >= 0)
			return sent == (ssize_t)bytes;
		if (!heir_is_of_want(errno) && errno != EAGAIN)
			return false;
		if (heir_is_readable(heir->pidfd, HEIR_AGAIN_MS) || !heir_has_device(heir))
			return false;
	}
}

/* Until the standby greets. NULL, or why it never will. */
static const char *wait_for_greeting(struct heir *heir)
{
	for (;;) {
		struct pollfd polled[] = { { .fd = heir->sock, .events = POLLIN },
					   { .fd = heir->pidfd, .events = POLLIN } };

		/* for as long as it takes: the standby waits for its server. A next keeper ends that, by ending us. */
		poll(polled, 2, LOOK_EVERY_MS);
		if (heir_is_readable(heir->pidfd, 0))
			return "it has ended";
		if (heir_is_readable(heir->sock, 0))
			return NULL;
		if (!heir_has_device(heir))
			return "the device is not attached any more";
	}
}

/*
 * Two threads of the kernel learn of the dead socket: one that sends, and the one that receives. What the second one
 * does when it comes to it is to shut down whatever socket the device has then (drivers/block/nbd.c: recv_work). So the
 * new one is not offered at once.
 */
static void settle(int64_t since_ms)
{
	int64_t left_ms = since_ms + SETTLE_MS - heir_now_ms();

	if (left_ms > 0)
		poll(NULL, 0, (int)left_ms);
}

/* RECONFIGURE, once: 0, or an errno. Of late answers to earlier requests there are none: all of them are awaited. */
static int offer(struct heir *heir)
{
	uint32_t descriptor = (uint32_t)heir->sock;
	int64_t until_ms;

	memcpy(heir->request + heir->request_descriptor_at, &descriptor, sizeof(descriptor));
	/* no time limit: the kernel works inside send(2) */
	if (send(heir->netlink, heir->request, heir->request_bytes, MSG_NOSIGNAL) != (ssize_t)heir->request_bytes)
		return errno;
	until_ms = heir_now_ms() + ANSWER_MS;
	for (;;) {
		struct nlmsghdr header;
		struct nlmsgerr answer;
		int64_t left_ms = until_ms - heir_now_ms();
		ssize_t bytes;

		if (left_ms <= 0 || !heir_is_readable(heir->netlink, (int)left_ms))
			return ETIMEDOUT;
		bytes = recv(heir->netlink, heir->buffer, sizeof(heir->buffer), MSG_DONTWAIT);
		if (bytes < 0)
			return errno; /* ENOBUFS: there was no memory for the answer */
		if (bytes < (ssize_t)(NLMSG_HDRLEN + sizeof(int)))
			return EPROTO;
		memcpy(&header, heir->buffer, sizeof(header));
		if (header.nlmsg_type != NLMSG_ERROR)
			continue;
		memcpy(&answer.error, heir->buffer + NLMSG_HDRLEN, sizeof(answer.error));
		return -answer.error;
	}
}

/*
 * The kernel takes a socket for a dead one only, and acknowledges what it ignores (drivers/block/nbd.c:
 * nbd_genl_reconfigure). It learns from its own worker thread that the old one is dead, which may be later than this.
 * So the socket is offered several times: once it is taken, the other offers are ignored. There is no second standby.
 */
static const char *give_to_kernel(struct heir *heir)
{
	struct pollfd peer = { .fd = heir->peer };

	for (int i = 0; i < OFFERS; i++) {
		int error = offer(heir);

		if (error != 0 && !heir_is_of_want(error) && error != ETIMEDOUT && error != EAGAIN)
			return "the kernel refuses it";
		if (heir_is_readable(heir->pidfd, OFFER_EVERY_MS))
			return "it has ended";
	}
	close(heir->sock); /* now only the kernel has it, or nobody */
	heir->sock = -1;
	return poll(&peer, 1, 0) == 0 ? NULL : "the kernel has not taken its socket: the old one lives";
}

void heir_take_over(struct heir *heir)
{
	const int64_t since_ms = heir_now_ms();
	const char *wrong;
	bool is_activated;

	/* a next keeper, or `nbdnfs down`, may be at work; and it may all be over */
	if (!heir_try_lock(heir) || !heir_has_device(heir) || !take_standby(heir))
		return;
	is_activated = heir_send(heir, heir->standby, heir->activation, heir->activation_bytes);
	wrong = is_activated ? wait_for_greeting(heir) : "it cannot be activated";
	if (wrong == NULL)
		wrong = heir_negotiate(heir);
	if (wrong == NULL) {
		settle(since_ms);
		wrong = give_to_kernel(heir);
	}
	if (wrong == NULL) {
		heir_say(heir, "keeper and worker had ended: the heir has connected the standby, process ", heir->pid);
		return;
	}
	syscall(SYS_pidfd_send_signal, heir->pidfd, SIGKILL, NULL, 0); /* as it is, it serves nobody */
	heir_say(heir, "keeper and worker have ended, and the heir cannot connect the standby: ", wrong);
}
