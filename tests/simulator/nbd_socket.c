/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The stream socket between the kernel's NBD client (nbd_client.c) and the loop, with a buffer of limited size in each
 * direction. The worker's calls move less than was asked, find no memory, or are interrupted.
 */
#include "sim.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#include "wrapped.h"

#define BUFFER_BYTES_MAX (256u << 10)

/* One direction. */
struct half {
	uint8_t bytes[BUFFER_BYTES_MAX];
	uint32_t head, used;
};

static struct half to_worker, to_kernel;
static bool kernel_has_it, worker_has_it;
static bool peeks_behind;       /* SO_PEEK_OFF is set: each peek begins where the one before has ended */
static uint32_t peeked;         /* of to_worker */
static bool was_cut_off;        /* the kernel closed it with replies unread: the worker's next receive is told */
static uint64_t kernel_waits, worker_waits; /* threads, as bits */
static struct rng chances;

void nbd_socket_reset(void)
{
	kernel_has_it = worker_has_it = false;
	kernel_waits = worker_waits = 0;
	chances.state = options.seed ^ 0x50c4e7;
}

void nbd_socket_connect(void)
{
	to_worker.head = to_worker.used = to_kernel.head = to_kernel.used = 0;
	kernel_has_it = worker_has_it = true;
	was_cut_off = peeks_behind = false;
	peeked = 0;
	kernel_waits = worker_waits = 0;
}

static uint32_t room(const struct half *half)
{
	return options.client_buffer_bytes - half->used;
}

static void append(struct half *half, const uint8_t *bytes, uint32_t count)
{
	for (uint32_t done = 0; done < count;) {
		uint32_t at = (half->head + half->used) % BUFFER_BYTES_MAX, now = count - done;

		if (now > BUFFER_BYTES_MAX - at)
			now = BUFFER_BYTES_MAX - at;
		memcpy(half->bytes + at, bytes + done, now);
		half->used += now;
		done += now;
	}
}

static void copy_out(const struct half *half, uint32_t from, uint8_t *bytes, uint32_t count)
{
	for (uint32_t done = 0; done < count;) {
		uint32_t at = (half->head + from + done) % BUFFER_BYTES_MAX, now = count - done;

		if (now > BUFFER_BYTES_MAX - at)
			now = BUFFER_BYTES_MAX - at;
		memcpy(bytes + done, half->bytes + at, now);
		done += now;
	}
}

static void remove_first(struct half *half, uint8_t *bytes, uint32_t count)
{
	copy_out(half, 0, bytes, count);
	half->head = (half->head + count) % BUFFER_BYTES_MAX;
	half->used -= count;
}

/* ---- the kernel's end ---- */

bool nbd_socket_takes_bytes(void)
{
	return kernel_has_it && worker_has_it;
}

bool nbd_socket_brings_bytes(void)
{
	return kernel_has_it && (worker_has_it || to_kernel.used > 0);
}

bool nbd_socket_was_left(void)
{
	return !kernel_has_it;
}

static void wake_worker(short what)
{
	threads_wake(worker_waits);
	network_client_changed(what);
}

uint32_t nbd_socket_put(const uint8_t *bytes, uint32_t count)
{
	uint32_t now = count < room(&to_worker) ? count : room(&to_worker);

	append(&to_worker, bytes, now);
	if (now > 0)
		wake_worker(POLLIN);
	return now;
}

uint32_t nbd_socket_take(uint8_t *bytes, uint32_t count)
{
	uint32_t now = count < to_kernel.used ? count : to_kernel.used;

	remove_first(&to_kernel, bytes, now);
	if (now > 0)
		wake_worker(POLLOUT);
	return now;
}

void nbd_socket_hang_up(void)
{
	kernel_has_it = false;
	was_cut_off = to_kernel.used > 0;
	wake_worker(0);
	threads_wake(kernel_waits);
}

void nbd_socket_wait(void)
{
	kernel_waits |= thread_bit();
	thread_block(NEVER);
	kernel_waits &= ~thread_bit();
}

void nbd_socket_wake_kernel(void)
{
	threads_wake(kernel_waits);
}

/* ---- the worker's end ---- */

void nbd_socket_worker_closes(void)
{
	worker_has_it = false;
	threads_wake(kernel_waits);
}

/* The errno of a call that fails for no reason of the other end's. `failure` of 5: it moves little. */
static int call_error(uint32_t failure, int flags)
{
	static const int errors[] = { 0, EINTR, ENOMEM, ENOBUFS, EAGAIN };

	if (failure > 0 && failure <= 4)
		return errors[failure];
	/* one that waits, in the handshake, does not end with EAGAIN */
	if (rng_chance(&chances, options.client_errors))
		return errors[1 + rng_below(&chances, (flags & MSG_DONTWAIT) != 0 ? 4 : 3)];
	return 0;
}

/*
 * A call has ended as if there were no more, or no room, and there is: that has come since. epoll(7) tells of it, as
 * who has met the end waits for the next event.
 */
static void note_end(short what)
{
	network_client_changed(what);
}

static uint32_t some_of(uint32_t bytes, uint32_t failure)
{
	if (bytes > 1 && (failure == 5 || rng_chance(&chances, 16)))
		return 1 + rng_below(&chances, bytes - 1);
	return bytes;
}

static uint32_t total_of(const struct msghdr *message)
{
	size_t bytes = 0;

	for (size_t i = 0; i < message->msg_iovlen; i++)
		bytes += message->msg_iov[i].iov_len;
	return (uint32_t)bytes;
}

enum move { TO_KERNEL, TO_WORKER, PEEK };

/* Move `bytes` in or out of the message's pieces. */
static void move(const struct msghdr *message, struct half *half, uint32_t bytes, enum move how)
{
	uint32_t from = peeks_behind ? peeked : 0;

	for (size_t i = 0; bytes > 0; i++) {
		const struct iovec *piece = &message->msg_iov[i];
		uint32_t now = piece->iov_len < bytes ? (uint32_t)piece->iov_len : bytes;

		if (how == TO_KERNEL)
			append(half, piece->iov_base, now);
		else if (how == TO_WORKER)
			remove_first(half, piece->iov_base, now);
		else
			copy_out(half, from, piece->iov_base, now);
		from += now;
		bytes -= now;
	}
}

static void wait_for_kernel(void)
{
	worker_waits |= thread_bit();
	thread_block(NEVER);
	worker_waits &= ~thread_bit();
}

ssize_t nbd_socket_send(const struct msghdr *message, int flags)
{
	uint32_t failure = call_fails(5), total = total_of(message), bytes;
	int error = call_error(failure, flags);

	while (error == 0 && kernel_has_it && room(&to_kernel) == 0 && total > 0) {
		if (flags & MSG_DONTWAIT)
			error = EAGAIN;
		else
			wait_for_kernel();
	}
	if (error == 0 && !kernel_has_it)
		error = EPIPE;
	if (error != 0) {
		if (room(&to_kernel) > 0)
			note_end(POLLOUT);
		errno = error;
		return -1;
	}
	bytes = some_of(total < room(&to_kernel) ? total : room(&to_kernel), failure);
	move(message, &to_kernel, bytes, TO_KERNEL);
	threads_wake(kernel_waits);
	return (ssize_t)bytes;
}

void nbd_socket_peek_behind(void)
{
	peeks_behind = true;
}

ssize_t nbd_socket_receive(const struct msghdr *message, int flags)
{
	bool peeks = (flags & MSG_PEEK) != 0;
	uint32_t failure = call_fails(5), total = total_of(message), begin = peeks && peeks_behind ? peeked : 0, bytes;
	int error = call_error(failure, flags);

	while (error == 0 && to_worker.used == begin && kernel_has_it && total > 0) {
		if (flags & MSG_DONTWAIT)
			error = EAGAIN;
		else
			wait_for_kernel();
	}
	if (error == 0 && to_worker.used == begin && was_cut_off) {
		was_cut_off = false;
		error = ECONNRESET;
	}
	if (error != 0) {
		if (to_worker.used > begin)
			note_end(POLLIN);
		errno = error;
		return -1;
	}
	bytes = some_of(total < to_worker.used - begin ? total : to_worker.used - begin, failure);
	move(message, &to_worker, bytes, peeks ? PEEK : TO_WORKER);
	if (bytes < total && bytes < to_worker.used + (peeks ? 0 : bytes) - begin)
		note_end(POLLIN);
	if (peeks) {
		peeked += peeks_behind ? bytes : 0;
	} else {
		peeked -= bytes < peeked ? bytes : peeked;
		threads_wake(kernel_waits);
	}
	return (ssize_t)bytes;
}

/* As net/unix/af_unix.c: it is writable when three quarters of the buffer are free, whatever a send would take. */
short nbd_socket_ready(short wanted)
{
	short found = 0;

	if (to_worker.used > 0 || !kernel_has_it)
		found |= POLLIN;
	if (!kernel_has_it)
		found |= EPOLLRDHUP;
	if (to_kernel.used <= options.client_buffer_bytes / 4)
		found |= POLLOUT;
	found &= wanted;
	if (!kernel_has_it)
		found |= POLLHUP;
	return was_cut_off ? found | POLLERR : found;
}
