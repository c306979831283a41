/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The kernel's NBD client, as drivers/block/nbd.c: each request is sent by the thread that makes it, one after the
 * other, its head and each page with a send of its own; another thread receives the replies, in whatever order they
 * come. It disconnects when all requests are done. At a fault it hangs up in the middle of anything.
 *
 * What has no reply when the worker ends is asked of the next one (load_interrupted()). A killed worker's replies that
 * lie in the socket count, or do not: the kernel may have thrown the socket away before.
 */
#include "sim.h"

#include "nbd/protocol.h"

#include <stdio.h>
#include <string.h>
#include <sys/types.h>

#include "wrapped.h"

#define NOBODY UINT32_MAX

static struct ask {
	struct nbd_ask what;
	bool waits;             /* for its reply */
	uint64_t cookie;
	uint64_t thread;        /* that waits, as a bit */
	bool is_sent;
} asks[REQUESTERS_MAX];

/* The reply that is being received. */
static struct reply {
	uint8_t head[NBD_REPLY_BYTES];
	uint32_t head_bytes;
	uint32_t number;        /* whose it is, once the head is there */
	uint32_t data_bytes, data_left;
} reply;

static bool is_up, is_finishing, has_disconnected;
static uint32_t sender;         /* who sends; NOBODY */
static uint64_t waiting_to_send; /* threads, as bits */
static uint64_t cookies;
static uint32_t bytes_before_hang_up; /* 0: it does not */
static struct rng client;

static void forget(void)
{
	memset(asks, 0, sizeof(asks));
	memset(&reply, 0, sizeof(reply));
	is_up = is_finishing = has_disconnected = false;
	sender = NOBODY;
	waiting_to_send = 0;
}

void nbd_client_reset(void)
{
	forget();
	cookies = 0;
	bytes_before_hang_up = 0;
	client.state = options.seed ^ 0xc11e47;
	nbd_socket_reset();
}

static void tell(const char *what)
{
	if (options.verbose)
		fprintf(stderr, "%14.6f the NBD client %s\n", (double)now_ns / 1e9, what);
}

/* ---- sending and receiving, which wait ---- */

static void hang_up(void)
{
	tell("hangs up");
	bytes_before_hang_up = 0;
	is_up = false;
	nbd_socket_hang_up();
}

/* Returns false where the connection ends meanwhile. */
static bool put(const uint8_t *bytes, uint32_t count)
{
	thread_preempt();
	while (count > 0) {
		uint32_t most = count, now;

		if (!nbd_socket_takes_bytes())
			return false;
		if (bytes_before_hang_up > 0 && bytes_before_hang_up < most)
			most = bytes_before_hang_up;
		now = nbd_socket_put(bytes, most);
		if (bytes_before_hang_up > 0 && (bytes_before_hang_up -= now) == 0) {
			hang_up();
			return false;
		}
		bytes += now;
		count -= now;
		if (now == 0)
			nbd_socket_wait();
	}
	return true;
}

static bool take(uint8_t *bytes, uint32_t count)
{
	while (count > 0) {
		uint32_t now;

		if (!nbd_socket_brings_bytes())
			return false;
		now = nbd_socket_take(bytes, count);
		bytes += now;
		count -= now;
		if (now == 0)
			nbd_socket_wait();
	}
	return true;
}

/* ---- the handshake ---- */

static bool ask_option(uint32_t option, const uint8_t *data, uint32_t length)
{
	uint8_t head[16];

	put_be32(put_be32(put_be64(head, NBD_OPTION_MAGIC), option), length);
	return put(head, sizeof(head)) && put(data, length);
}

/* What the server says of the export. */
static void check_export(uint64_t size_bytes, uint16_t flags)
{
	uint16_t needed = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM;

	if (size_bytes != (uint64_t)options.pages * PAGE_BYTES || (flags & needed) != needed)
		sim_fail("the handshake says %llu bytes, and flags %x", (unsigned long long)size_bytes, flags);
}

/* Replies to an option, to the last of them. */
static bool take_replies(uint32_t option, uint32_t *kind)
{
	do {
		uint8_t head[20], data[64];
		uint32_t length;

		if (!take(head, sizeof(head)))
			return false;
		*kind = be32_at(head + 12);
		length = be32_at(head + 16);
		if (be64_at(head) != NBD_OPTION_REPLY_MAGIC || be32_at(head + 8) != option || length > sizeof(data)) {
			sim_fail("a reply to option %u is none", option);
			return false;
		}
		if (!take(data, length))
			return false;
		if (*kind == NBD_REP_INFO && be16_at(data) == NBD_INFO_EXPORT)
			check_export(be64_at(data + 2), be16_at(data + 10));
	} while (*kind == NBD_REP_INFO || *kind == NBD_REP_SERVER);
	return true;
}

static bool go_by_name(bool no_zeroes)
{
	uint8_t data[10 + 124];

	if (!ask_option(NBD_OPT_EXPORT_NAME, NULL, 0) || !take(data, no_zeroes ? 10 : sizeof(data)))
		return false;
	check_export(be64_at(data), be16_at(data + 8));
	return true;
}

static bool go(void)
{
	static const uint8_t no_name[6] = { 0 };
	uint32_t kind;

	if (rng_chance(&client, 512) &&
	    (!ask_option(NBD_OPT_LIST, NULL, 0) || !take_replies(NBD_OPT_LIST, &kind)))
		return false;
	if (!ask_option(NBD_OPT_GO, no_name, sizeof(no_name)) || !take_replies(NBD_OPT_GO, &kind))
		return false;
	if (kind != NBD_REP_ACK)
		sim_fail("option GO is refused");
	return true;
}

static bool shake_hands(void)
{
	uint8_t hello[18], flags[4];
	bool no_zeroes = rng_chance(&client, 512), by_name = rng_chance(&client, 512);

	if (!take(hello, sizeof(hello)))
		return false;
	if (be64_at(hello) != NBD_MAGIC || be64_at(hello + 8) != NBD_OPTION_MAGIC)
		sim_fail("the server's first bytes are not NBD's");
	put_be32(flags, NBD_FIXED_NEWSTYLE | (no_zeroes ? NBD_NO_ZEROES : 0));
	return put(flags, sizeof(flags)) && (by_name ? go_by_name(no_zeroes) : go());
}

/* ---- requests ---- */

static uint8_t *put_head(uint8_t *head, uint16_t flags, uint16_t type, uint64_t cookie, uint64_t offset_bytes,
			 uint32_t length_bytes)
{
	uint8_t *at = put_be16(put_be16(put_be32(head, NBD_REQUEST_MAGIC), flags), type);

	return put_be32(put_be64(put_be64(at, cookie), offset_bytes), length_bytes);
}

/* The kernel takes some time between two sends now and then. */
static void dawdle(void)
{
	if (rng_chance(&client, 24))
		thread_sleep(rng_between(&client, 0, 300 * US));
}

static void send_request(struct ask *ask, uint32_t number)
{
	const struct nbd_ask *what = &ask->what;
	uint8_t head[NBD_REQUEST_BYTES];
	uint32_t data_bytes = what->type == NBD_CMD_WRITE ? what->length_bytes : 0;

	ask->cookie = ++cookies << 8 | number;
	put_head(head, what->flags, what->type, ask->cookie, what->offset_bytes, what->length_bytes);
	if (!put(head, sizeof(head)))
		return;
	for (uint32_t at = 0; at < data_bytes; at += PAGE_BYTES) {
		dawdle();
		if (!put(what->data + at, PAGE_BYTES))
			return;
	}
	ask->is_sent = true; /* no other thread has run since the last byte */
}

void nbd_client_ask(uint32_t number, const struct nbd_ask *what)
{
	struct ask *ask = &asks[number];

	*ask = (struct ask){ .what = *what, .waits = true, .thread = thread_bit() };
	while (!is_up || sender != NOBODY) {
		waiting_to_send |= ask->thread;
		thread_block(NEVER);
	}
	waiting_to_send &= ~ask->thread;
	sender = number;
	send_request(ask, number);
	sender = NOBODY;
	threads_wake(waiting_to_send);
	while (ask->waits)
		thread_block(NEVER); /* where the connection has ended, for good: the worker ends, and all of this */
}

/* ---- replies ---- */

static void finish(void)
{
	struct ask *ask = &asks[reply.number];
	uint32_t number = reply.number, error = be32_at(reply.head + 4);
	uint64_t thread = ask->thread;

	memset(&reply, 0, sizeof(reply));
	ask->waits = false;
	load_ended(number, -(int)error); /* NBD's numbers are Linux's */
	threads_wake(thread);
}

static void take_head(void)
{
	uint64_t cookie = be64_at(reply.head + 8);
	uint32_t number = (uint32_t)cookie & 0xff;
	struct ask *ask = &asks[number < REQUESTERS_MAX ? number : 0];

	if (be32_at(reply.head) != NBD_REPLY_MAGIC)
		sim_fail("what should be a reply begins with %08x", be32_at(reply.head));
	else if (!ask->waits || !ask->is_sent || ask->cookie != cookie)
		sim_fail("a reply has the cookie %llx, which no request waits for", (unsigned long long)cookie);
	if (result.failed)
		return;
	reply.number = number;
	if (ask->what.type == NBD_CMD_READ && be32_at(reply.head + 4) == 0)
		reply.data_bytes = reply.data_left = ask->what.length_bytes;
	if (reply.data_left == 0)
		finish();
}

/* Some of what has come. Returns whether anything had. */
static bool take_reply(void)
{
	uint32_t now;

	if (reply.head_bytes < sizeof(reply.head)) {
		now = nbd_socket_take(reply.head + reply.head_bytes, (uint32_t)sizeof(reply.head) - reply.head_bytes);
		reply.head_bytes += now;
		if (reply.head_bytes == sizeof(reply.head))
			take_head();
		return now > 0;
	}
	now = nbd_socket_take(asks[reply.number].what.data + (reply.data_bytes - reply.data_left), reply.data_left);
	reply.data_left -= now;
	if (reply.data_left == 0)
		finish();
	return now > 0;
}

static void disconnect(void)
{
	uint8_t head[NBD_REQUEST_BYTES];

	put_head(head, 0, NBD_CMD_DISC, ++cookies << 8, 0, 0);
	if (!put(head, sizeof(head)))
		return;
	tell("disconnects");
	has_disconnected = true;
	is_up = false;
	nbd_socket_hang_up();
}

void *nbd_client_thread(void *argument)
{
	if (!shake_hands())
		return NULL;
	tell("has shaken hands");
	is_up = true;
	threads_wake(waiting_to_send);
	while (nbd_socket_brings_bytes()) {
		if (is_finishing) {
			disconnect();
			break;
		}
		if (!take_reply()) {
			nbd_socket_wait();
			continue;
		}
		thread_preempt();
		if (rng_chance(&client, options.client_pause))
			thread_sleep(rng_between(&client, 0, 5 * MS)); /* it does not receive */
	}
	is_up = false;
	return argument;
}

void nbd_client_finish(void)
{
	is_finishing = true;
	nbd_socket_wake_kernel();
}

/* ---- for the worker, and faults ---- */

bool nbd_client_is_up(void)
{
	return is_up;
}

bool nbd_client_has_disconnected(void)
{
	return has_disconnected;
}

void nbd_client_hang_up_soon(uint32_t bytes)
{
	bytes_before_hang_up = bytes;
}

void nbd_client_interrupted(bool was_killed)
{
	if (was_killed && is_up && rng_chance(&client, 512))
		while (nbd_socket_brings_bytes() && !result.failed && take_reply())
			;
	forget();
	nbd_socket_hang_up();
}
