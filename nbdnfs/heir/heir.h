/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The heir: a process in the keeper's memory, which goes on with the parked standby when keeper and worker have both
 * ended. docs/decisions/0031. It allocates nothing, starts nothing and opens nothing: what it needs it has.
 */
#ifndef NBDNFS_HEIR_H
#define NBDNFS_HEIR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define HEIR_ACTIVATION_BYTES_MAX 128
#define HEIR_MESSAGE_BYTES_MAX (1 + HEIR_ACTIVATION_BYTES_MAX)

/* What the keeper tells: one byte, the descriptors of what it says there is, in this order, and what activates. */
#define HEIR_HAS_WORKER 1  /* pidfd of the process that serves, or is about to */
#define HEIR_HAS_STANDBY 2 /* control socket of the parked standby */
#define HEIR_END 4	   /* there is nothing to guard any more */

/* How soon what the kernel had no memory for is done again. */
#define HEIR_AGAIN_MS 100

/* What heir ▸ keeper sends, once: it has closed all descriptors that are not its own. */
#define HEIR_READY 'r'

/* In the queue of a parked standby's control socket: worker_handle.py. */
#define HEIR_ANCILLARY_BYTES_MAX 16384
#define HEIR_ANCILLARY_DESCRIPTORS 3

/* Filled in by binding.c before the process starts; the process owns it from then on, until it has ended. */
struct heir {
	/* what it was started with */
	int channel; /* a socket whose other end the keeper has; -1 once that has been closed */
	int keeper;  /* pidfd */
	int netlink; /* a generic-netlink socket */
	int lock;    /* the keeper's lock file, opened for the heir alone: flock(2) belongs to the open file */
	int backend; /* /sys/block/nbdN/backend; reading it fails once that attachment has ended */
	char backend_text[256];
	size_t backend_bytes;
	char request[512]; /* RECONFIGURE, complete but for the descriptor of the socket */
	size_t request_bytes;
	size_t request_descriptor_at;
	char option[64]; /* the client's NBD_OPT_GO */
	size_t option_bytes;
	uintptr_t heap;	 /* where the keeper's heap begins, brk(2); 0 where it is unknown */
	char command[16]; /* its name in /proc/PID/comm */
	char label[128];  /* how a line on stderr begins */

	/* what it was told last */
	int worker;  /* pidfd, or -1 */
	int standby; /* control socket, or -1 */
	char activation[HEIR_ACTIVATION_BYTES_MAX];
	size_t activation_bytes;

	/* what it has taken out of the standby's control socket; -1 before */
	int sock; /* the kernel's end of the NBD connection */
	int peer; /* the worker's end */
	int pidfd;
	char buffer[HEIR_ANCILLARY_BYTES_MAX]; /* the message of the control socket, then answers */
	char pid[16];			       /* of the standby, for people */
};

/* The process: guards until keeper and worker have ended, acts then, and exits. In a process that shares its memory
 * with the keeper. Returns its exit status. */
int heir_live(struct heir *heir);

/* The keeper and its worker have ended: connect the standby to the kernel, unless another process has the device. */
void heir_take_over(struct heir *heir);

/* Shake hands as an NBD client: nbd_handshake.py. NULL, or what is wrong. */
const char *heir_negotiate(struct heir *heir);

/* Whether an errno says only that there was no memory: the same call may go well the next time. */
bool heir_is_of_want(int error);

/* Whether our device is still attached. Where that cannot be read for want of memory, it is. */
bool heir_has_device(struct heir *heir);

/*
 * Send all of it at once, to the standby, over a socket that has room for it. Where the kernel has no memory for that,
 * it is sent again, as long as there is the standby, and the device. False where it has not been sent.
 */
bool heir_send(struct heir *heir, int socket, const void *data, size_t bytes);

/* Whether the lock of the keeper could be taken. Waits where there is no memory for that. */
bool heir_try_lock(struct heir *heir);

/* Whether a descriptor is readable within the time, -1 for no limit. A hang-up counts. */
bool heir_is_readable(int descriptor, int timeout_ms);

/* One line on stderr, which does not wait. */
void heir_say(struct heir *heir, const char *text, const char *more);

/* CLOCK_MONOTONIC. */
int64_t heir_now_ms(void);

#endif
