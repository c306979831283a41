/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Sockets, eventfd, poll(2) and epoll(7), and a network that delays, cuts, resets, and swallows. */
#include "sim.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "wrapped.h"

#define CONNS_MAX 512u
#define UP_BYTES (3u << 20)
#define DOWN_BYTES (6u << 20)
#define FDS_MAX 64u
#define SPINNING 10000u
#define FIRST_FD 100
/* TCP_USER_TIMEOUT, and keepalive's 5 s and four times 5 s more: nfs/waiting.c */
#define DEAD_NS (25 * S)

/* One direction: bytes from head to tail, of which the first `ready` have arrived. */
struct stream {
	uint8_t *bytes;
	uint32_t room, head, tail, ready;
	int64_t last_at_ns;     /* what is sent next does not arrive before */
	int64_t retry_at_ns;    /* while nothing gets through */
};

struct sim_conn {
	bool used, established, client_open, server_open;
	bool blackhole;         /* what is sent is acknowledged, and goes nowhere */
	bool deliver_rest;      /* what was under way when the client closed it still arrives */
	unsigned cuts;          /* what was sent, did not arrive, and will be sent again */
	bool server_gone;       /* the server does not know it any more */
	bool eof;
	int error;              /* what the client's next call gets */
	bool is_timed;          /* the first thing that is sent into the hole begins the time of its silence */
	unsigned refs;          /* events and calls that have yet to be done */
	uint64_t number;        /* no other connection has it */
	uint16_t port;
	uint32_t fd;
	struct stream up, down;
	uint64_t sent_bytes, taken_bytes; /* by the client, and by the server */
	uint32_t sends_begin, sends_end; /* in sends[], counted on and on */
};

enum fd_kind { FD_NONE, FD_SOCKET, FD_EVENT, FD_CLIENT, FD_EPOLL };

struct fd {
	enum fd_kind kind;
	struct sim_conn *conn;  /* NULL: a socket that is not connected */
	uint64_t counter;
	uint64_t pollers;       /* threads, as bits */

	/* its registration with epoll(7), of which the simulator has one instance */
	bool watched;
	struct epoll_event wanted;
	bool changed;           /* since it was last told of, for EPOLLET */
};

static uint8_t *stream_bytes; /* CONNS_MAX times UP_BYTES and DOWN_BYTES, mapped: too much for a program */
static struct sim_conn conns[CONNS_MAX];
/* When the bytes of up_bytes were sent, call by call. */
#define SENDS_MAX 2048u
static struct sent {
	uint64_t end_bytes;     /* of this connection, with this call */
	int64_t at_ns;
} sends[CONNS_MAX][SENDS_MAX];
static struct fd fds[FDS_MAX];
static uint64_t conn_number;
static struct rng net, cuts;
/* Silent connections that the worker has given up; each doubles the limits, up to eight times. */
static uint32_t given_up;
int64_t lost_at_ns;
struct silence silence_now, silence_before;

/* Decision 0011: 15 s of silence, an answered probe, 5 s more; and a second for all that is in between. */
#define SILENT_NS (15 * S)
#define SILENT_GRACE_NS (6 * S)
#define SILENT_DOUBLED 3u

void network_reset(void)
{
	memset(conns, 0, sizeof(conns));
	memset(fds, 0, sizeof(fds));
	conn_number = 0;
	given_up = 0;
	lost_at_ns = -60 * S;
	silence_now = silence_before = (struct silence){ 0 };
	net.state = options.seed ^ 0x4e7;
	cuts.state = options.seed ^ 0xc075;
}

static int fails_with(int error)
{
	errno = error;
	return -1;
}

static int64_t travel_ns(void)
{
	return options.latency_ns / 8 + (int64_t)(rng_next(&net) % (uint64_t)(options.latency_ns / 4 + 1));
}

/* ---- connections ---- */

struct sim_conn *conn_hold(struct sim_conn *conn)
{
	conn->refs++;
	return conn;
}

void conn_let_go(struct sim_conn *conn)
{
	if (--conn->refs == 0 && !conn->client_open)
		conn->used = false;
}

bool conn_is_open(const struct sim_conn *conn)
{
	return conn->server_open && !conn->server_gone;
}

bool conn_has_client(const struct sim_conn *conn)
{
	return conn->client_open;
}

static void notify(struct sim_conn *conn)
{
	if (conn->client_open)
		threads_wake(fds[conn->fd].pollers);
}

static void tell(const struct sim_conn *conn, const char *what)
{
	if (options.verbose)
		fprintf(stderr, "%14.6f connection %llu %s\n", (double)now_ns / 1e9, (unsigned long long)conn->number,
			what);
}

/* Of connection i, in each direction. Only those are in memory that have been used. */
static uint8_t *bytes_of(unsigned i)
{
	const size_t each = UP_BYTES + DOWN_BYTES;

	if (stream_bytes == NULL) /* not by mmap(2), which is the simulated worker's */
		stream_bytes = (uint8_t *)syscall(SYS_mmap, NULL, CONNS_MAX * each, PROT_READ | PROT_WRITE,
						  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (stream_bytes == MAP_FAILED)
		abort();
	return stream_bytes + i * each;
}

static struct sim_conn *conn_new(uint32_t fd, uint16_t port)
{
	for (unsigned i = 0; i < CONNS_MAX; i++) {
		if (conns[i].used)
			continue;
		conns[i] = (struct sim_conn){
			.used = true, .client_open = true, .fd = fd, .port = port, .number = ++conn_number,
			.up = { .bytes = bytes_of(i), .room = UP_BYTES },
			.down = { .bytes = bytes_of(i) + UP_BYTES, .room = DOWN_BYTES },
		};
		return &conns[i];
	}
	sim_fail("more than %u connections", CONNS_MAX);
	abort();
}

static void conn_error(struct sim_conn *conn, int error)
{
	if (!conn->client_open || conn->error != 0)
		return;
	conn->error = error;
	notify(conn);
}

/* An event: a reset (b: its errno; 0: the end of the stream) reaches the client. */
static void reset_arrives(void *a, uint64_t b, uint64_t c)
{
	struct sim_conn *conn = a;

	(void)c;
	if (b == 0) {
		conn->eof = true;
		notify(conn);
	} else {
		conn_error(conn, (int)b);
	}
	conn_let_go(conn);
}

static void send_reset(struct sim_conn *conn, int64_t at_ns, int error)
{
	conn->server_open = false;
	event_at(at_ns, reset_arrives, conn_hold(conn), (uint64_t)error, 0);
}

void conn_reset_by_server(struct sim_conn *conn)
{
	send_reset(conn, now_ns + travel_ns(), ECONNRESET);
}

/* An event: the kernel of connection number b has asked the other end for a sign of life. */
static void keepalive_ends(void *a, uint64_t b, uint64_t c)
{
	struct sim_conn *conn = a;

	(void)c;
	if (conn->used && conn->number == b)
		conn_error(conn, nas_is_reachable() ? ECONNRESET : ETIMEDOUT);
}

void conns_server_down(bool silently)
{
	for (unsigned i = 0; i < CONNS_MAX; i++) {
		struct sim_conn *conn = &conns[i];

		if (!conn->used || !conn->server_open)
			continue;
		conn->server_gone = true;
		conn->server_open = false;
		if (silently)
			event_at(now_ns + DEAD_NS, keepalive_ends, conn, conn->number, 0);
		else
			send_reset(conn, now_ns + travel_ns(), rng_chance(&cuts, 512) ? ECONNRESET : 0);
	}
}

/*
 * An event: connection number b has swallowed what was asked over it for as long as a connection may while the server
 * answers. Only where it is the one thing that happens: a second hole may swallow the probe.
 */
static void check_silence(void *a, uint64_t b, uint64_t c)
{
	const struct sim_conn *conn = a;

	if (conn->used && conn->number == b && conn->client_open && conn->is_timed)
		sim_fail("a silent connection is still in use after %.3f s, and the server answers",
			 (double)(now_ns - (int64_t)c) / 1e9);
}

/* Something is sent over a connection. */
static void time_silence(struct sim_conn *conn)
{
	uint32_t doubled = given_up < SILENT_DOUBLED ? given_up : SILENT_DOUBLED;

	if (!conn->blackhole || conn->is_timed || !run_is_calm(1u << FAULT_blackhole))
		return;
	for (unsigned i = 0; i < CONNS_MAX; i++)
		if (&conns[i] != conn && conns[i].used && conns[i].client_open && conns[i].blackhole)
			return;
	conn->is_timed = true;
	tell(conn, "is silent");
	event_at(now_ns + (SILENT_NS << doubled) + SILENT_GRACE_NS, check_silence, conn, conn->number,
		 (uint64_t)now_ns);
}

static void forget_times(void)
{
	for (unsigned i = 0; i < CONNS_MAX; i++)
		conns[i].is_timed = false;
}

void network_fault(enum fault fault, bool begins)
{
	if (!begins)
		return;
	if (fault == FAULT_blackhole)
		forget_times();
	for (unsigned i = 0; i < CONNS_MAX; i++) {
		struct sim_conn *conn = &conns[i];

		if (!conn->used || !conn->server_open || rng_chance(&cuts, 512))
			continue;
		if (fault == FAULT_blackhole) {
			conn->blackhole = true;
			event_at(now_ns + 4 * DEAD_NS, keepalive_ends, conn, conn->number, 0);
		} else {
			conn->deliver_rest = rng_chance(&cuts, 512) && conn->cuts == 0;
			send_reset(conn, now_ns, ECONNRESET);
		}
	}
}

/* ---- bytes under way ---- */

/* Does nothing get through to the other end? Then *at_ns is when it is tried again. */
static bool is_cut(struct stream *stream, int64_t *at_ns)
{
	if (!fault_is_active(FAULT_partition) && nas_is_reachable())
		return false;
	if (stream->retry_at_ns <= now_ns)
		stream->retry_at_ns = now_ns + rng_between(&net, 200 * MS, 1600 * MS);
	*at_ns = stream->retry_at_ns;
	return true;
}

static uint8_t *stream_room(struct stream *stream, uint32_t bytes)
{
	if (stream->head == stream->tail)
		stream->head = stream->tail = 0;
	if (stream->tail + bytes > stream->room) {
		memmove(stream->bytes, stream->bytes + stream->head, stream->tail - stream->head);
		stream->tail -= stream->head;
		stream->head = 0;
	}
	if (stream->tail + bytes > stream->room) {
		fprintf(stderr, "simulate: a stream has more than %u bytes\n", stream->room);
		abort();
	}
	return stream->bytes + stream->tail;
}

static void note_sent(struct sim_conn *conn, uint32_t bytes)
{
	struct sent *all = sends[conn - conns];
	/* what a thread was about to send when the machine fell asleep leaves after it: decision 0030 */
	bool was_about_to = now_ns - woke_at_ns < 50 * MS;

	conn->sent_bytes += bytes;
	if (conn->sends_end - conn->sends_begin == SENDS_MAX)
		conn->sends_begin++; /* so many calls are never looked at one by one */
	all[conn->sends_end++ % SENDS_MAX] = (struct sent){ conn->sent_bytes, was_about_to ? 0 : servers_ns() };
}

int64_t conn_sent_ns(struct sim_conn *conn, uint32_t count)
{
	const struct sent *all = sends[conn - conns];

	while (conn->sends_begin + 1 != conn->sends_end &&
	       all[conn->sends_begin % SENDS_MAX].end_bytes < conn->taken_bytes + count)
		conn->sends_begin++;
	return all[conn->sends_begin % SENDS_MAX].at_ns;
}

static void arrive_up(void *a, uint64_t b, uint64_t c);

/* An event: b bytes, sent first at time c, are sent again. */
static void arrive_again(void *a, uint64_t b, uint64_t c)
{
	((struct sim_conn *)a)->cuts--;
	arrive_up(a, b, c);
}

/*
 * An event: b bytes, sent at time c, reach the server. What a partition has held up may come after what was sent later:
 * it is so many bytes of the stream, in its order.
 */
static void arrive_up(void *a, uint64_t b, uint64_t c)
{
	struct sim_conn *conn = a;
	struct stream *up = &conn->up;
	uint32_t bytes = (uint32_t)b, taken;
	int64_t again_ns;

	if (conn->client_open && !conn->blackhole && is_cut(up, &again_ns)) {
		if (servers_ns() - (int64_t)c < DEAD_NS) {
			conn->cuts++;
			event_at(again_ns, arrive_again, conn, b, c);
			return;
		}
		conn_error(conn, ETIMEDOUT);
	} else if (conn->server_gone && conn->client_open && !conn->blackhole) {
		conn_error(conn, ECONNRESET);
	} else if (conn->server_open && !conn->blackhole && (conn->client_open || conn->deliver_rest) &&
		   nas_is_listening()) {
		up->ready += bytes;
		taken = nas_receive(conn, up->bytes + up->head, up->ready);
		conn->taken_bytes += taken;
		up->head += taken;
		up->ready -= taken;
		notify(conn); /* there is room for more */
		conn_let_go(conn);
		return;
	}
	up->tail -= bytes; /* nothing that was sent after it arrives either */
	notify(conn); /* a hole acknowledges what it takes: there is room for more */
	conn_let_go(conn);
}

/* An event: b bytes, sent at time c, reach the client. */
static void arrive_down(void *a, uint64_t b, uint64_t c)
{
	struct sim_conn *conn = a;
	int64_t again_ns;

	if (!conn->client_open || conn->blackhole) {
		conn_let_go(conn);
		return;
	}
	if (is_cut(&conn->down, &again_ns)) {
		event_at(again_ns, arrive_down, conn, b, c);
		return;
	}
	conn->down.ready += (uint32_t)b;
	notify(conn);
	conn_let_go(conn);
}

/* `bytes` were appended: they arrive in pieces, one after the other. */
static void deliver(struct sim_conn *conn, struct stream *stream, event_fn arrive, uint32_t bytes)
{
	int64_t at_ns = now_ns + travel_ns();

	if (at_ns < stream->last_at_ns)
		at_ns = stream->last_at_ns;
	stream->tail += bytes;
	while (bytes > 0) {
		uint32_t piece = bytes;

		if (bytes > 1 && rng_chance(&net, 64))
			piece = 1 + rng_below(&net, bytes - 1);
		event_at(at_ns, arrive, conn_hold(conn), piece, (uint64_t)servers_ns());
		bytes -= piece;
		at_ns += rng_below(&net, 200 * US);
	}
	stream->last_at_ns = at_ns;
}

uint8_t *conn_room(struct sim_conn *conn, uint32_t bytes)
{
	return stream_room(&conn->down, bytes);
}

void conn_answer(struct sim_conn *conn, uint32_t bytes)
{
	deliver(conn, &conn->down, arrive_down, bytes);
}

/* An event: the c-th SYN of connection number b reaches the server. */
static void syn_arrives(void *a, uint64_t b, uint64_t c)
{
	struct sim_conn *conn = a;

	if (!conn->used || conn->number != b)
		return;
	if (conn->client_open && (fault_is_active(FAULT_partition) || !nas_is_reachable())) {
		event_at(now_ns + (S << (c < 6 ? c : 6)), syn_arrives, conn, b, c + 1);
		return;
	}
	if (conn->client_open && !nas_is_listening()) {
		conn_error(conn, ECONNREFUSED);
	} else if (conn->client_open) {
		conn->established = conn->server_open = true;
		tell(conn, "is made");
		result.connections++;
		notify(conn);
	}
}

/* ---- sockets ---- */

static int lowest_fd(enum fd_kind kind)
{
	for (unsigned i = 0; i < FDS_MAX; i++)
		if (fds[i].kind == FD_NONE) {
			fds[i] = (struct fd){ .kind = kind };
			return FIRST_FD + (int)i;
		}
	sim_fail("more than %u open files", FDS_MAX);
	return fails_with(EMFILE);
}

static int new_fd(enum fd_kind kind)
{
	static const int errors[] = { 0, EMFILE, ENFILE, ENOBUFS };
	uint32_t failure = call_fails(3);

	crash_point();
	return failure != 0 ? fails_with(errors[failure]) : lowest_fd(kind);
}

int network_client_fd(void)
{
	nbd_socket_connect();
	return lowest_fd(FD_CLIENT);
}

void network_client_changed(short what)
{
	for (unsigned i = 0; i < FDS_MAX; i++)
		if (fds[i].kind == FD_CLIENT) {
			fds[i].changed |= what == 0 || (fds[i].wanted.events & (uint32_t)what) != 0;
			threads_wake(fds[i].pollers);
		}
}

static bool is_client(int fd)
{
	return fd >= FIRST_FD && fd < FIRST_FD + (int)FDS_MAX && fds[fd - FIRST_FD].kind == FD_CLIENT;
}

static struct fd *fd_of(int fd, enum fd_kind kind)
{
	if (fd < FIRST_FD || fd >= FIRST_FD + (int)FDS_MAX || fds[fd - FIRST_FD].kind != kind) {
		sim_fail("a call on descriptor %d, which is not open", fd);
		abort();
	}
	return &fds[fd - FIRST_FD];
}

int __wrap_socket(int domain, int type, int protocol)
{
	(void)domain, (void)type, (void)protocol;
	return new_fd(FD_SOCKET);
}

int __wrap_eventfd(unsigned value, int flags)
{
	(void)value, (void)flags;
	return new_fd(FD_EVENT);
}

int __wrap_connect(int fd, const struct sockaddr *address, socklen_t bytes)
{
	static const int errors[] = { 0, EINTR, ENETUNREACH, EADDRNOTAVAIL, ECONNREFUSED };
	struct sockaddr_in peer;
	struct fd *socket = fd_of(fd, FD_SOCKET);
	uint32_t failure;

	(void)bytes;
	crash_point();
	if ((failure = call_fails(4)) != 0)
		return fails_with(errors[failure]);
	memcpy(&peer, address, sizeof(peer));
	socket->conn = conn_new((uint32_t)(socket - fds), ntohs(peer.sin_port));
	event_at(now_ns + travel_ns(), syn_arrives, socket->conn, socket->conn->number, 0);
	return fails_with(EINPROGRESS);
}

int __wrap_bind(int fd, const struct sockaddr *address, socklen_t bytes)
{
	static const int errors[] = { 0, EADDRINUSE, EACCES };
	uint32_t failure;

	(void)address, (void)bytes;
	fd_of(fd, FD_SOCKET);
	crash_point();
	if ((failure = call_fails(2)) != 0)
		return fails_with(errors[failure]);
	return 0;
}

int __wrap_setsockopt(int fd, int level, int name, const void *value, socklen_t bytes)
{
	(void)level, (void)value, (void)bytes;
	if (!is_client(fd))
		fd_of(fd, FD_SOCKET);
	if (call_fails(1))
		return fails_with(ENOBUFS);
	if (is_client(fd) && name == SO_PEEK_OFF)
		nbd_socket_peek_behind();
	return 0;
}

int __wrap_getsockopt(int fd, int level, int name, void *value, socklen_t *bytes)
{
	struct fd *socket = fd_of(fd, FD_SOCKET);

	(void)level, (void)name, (void)bytes;
	crash_point();
	if (call_fails(1))
		return fails_with(ENOBUFS);
	*(int *)value = socket->conn != NULL ? socket->conn->error : 0;
	return 0;
}

int __wrap_getpeername(int fd, struct sockaddr *address, socklen_t *bytes)
{
	struct fd *socket = fd_of(fd, FD_SOCKET);
	struct sockaddr_in peer = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(0x0a000001) };

	crash_point();
	if (call_fails(1) || socket->conn == NULL || !socket->conn->established)
		return fails_with(ENOTCONN);
	peer.sin_port = htons(socket->conn->port);
	memcpy(address, &peer, sizeof(peer));
	*bytes = sizeof(peer);
	return 0;
}

/* How much a call may send. As in the kernel, there is none before a third of the buffer is free. */
static size_t room_to_send(const struct sim_conn *conn)
{
	uint32_t used = conn->up.tail - conn->up.head - conn->up.ready, limit = options.send_buffer_bytes;

	return used + limit / 3 <= limit ? limit - used : 0;
}

static size_t total_of(const struct msghdr *message)
{
	size_t bytes = 0;

	for (size_t i = 0; i < message->msg_iovlen; i++)
		bytes += message->msg_iov[i].iov_len;
	return bytes;
}

/* The errno of a call on a socket that has none to move bytes with; 0: it has. */
static int socket_error(const struct fd *socket, uint32_t failure)
{
	static const int errors[] = { 0, EINTR, ENOMEM, EAGAIN };

	if (failure > 0 && failure <= 3)
		return errors[failure];
	if (socket->conn == NULL || (!socket->conn->established && socket->conn->error == 0))
		return ENOTCONN;
	return 0;
}

static ssize_t send_to_nas(int fd, const struct msghdr *message)
{
	struct fd *socket = fd_of(fd, FD_SOCKET);
	struct sim_conn *conn = socket->conn;
	size_t total = total_of(message), room, bytes, left;
	uint32_t failure;
	uint8_t *at;
	int error;

	failure = call_fails(4);
	error = socket_error(socket, failure);
	if (error == 0)
		error = conn->error;
	if (error != 0)
		return fails_with(error);
	room = room_to_send(conn);
	if (room == 0)
		return fails_with(EAGAIN);
	bytes = total < room ? total : room;
	/* the kernel takes a few bytes whole (net/ipv4/tcp.c: an skb has room for a page), unless the call fails so */
	if (bytes > 1 && (failure == 4 || (bytes > 64 && rng_chance(&net, 4))))
		bytes = 1 + rng_below(&net, (uint32_t)bytes - 1);
	at = stream_room(&conn->up, (uint32_t)bytes);
	left = bytes;
	for (size_t i = 0; left > 0; i++) {
		size_t part = message->msg_iov[i].iov_len < left ? message->msg_iov[i].iov_len : left;

		memcpy(at, message->msg_iov[i].iov_base, part);
		at += part;
		left -= part;
	}
	note_sent(conn, (uint32_t)bytes);
	deliver(conn, &conn->up, arrive_up, (uint32_t)bytes);
	time_silence(conn);
	return (ssize_t)bytes;
}

ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags)
{
	crash_point();
	thread_preempt();
	return is_client(fd) ? nbd_socket_send(message, flags) : send_to_nas(fd, message);
}

ssize_t __wrap_send(int fd, const void *buffer, size_t bytes, int flags)
{
	struct iovec part = { .iov_base = (void *)(uintptr_t)buffer, .iov_len = bytes };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };

	return __wrap_sendmsg(fd, &message, flags);
}

static void note_heard(void)
{
	if (now_ns - silence_now.from_ns > S) {
		silence_before = silence_now;
		silence_before.to_ns = now_ns;
	}
	silence_now.from_ns = now_ns;
	silence_now.has_twins |= lost_at_ns >= 0;
}

static ssize_t receive_from_nas(int fd, const struct msghdr *message)
{
	struct fd *socket = fd_of(fd, FD_SOCKET);
	struct sim_conn *conn = socket->conn;
	size_t total = total_of(message), bytes, left;
	uint32_t failure;
	int error;

	failure = call_fails(4);
	error = socket_error(socket, failure);
	if (error == 0 && conn->down.ready == 0)
		error = conn->error != 0 ? conn->error : conn->eof ? 0 : EAGAIN;
	if (error != 0)
		return fails_with(error);
	bytes = total < conn->down.ready ? total : conn->down.ready;
	if (bytes > 1 && (failure == 4 || rng_chance(&net, 4)))
		bytes = 1 + rng_below(&net, (uint32_t)bytes - 1);
	left = bytes;
	for (size_t i = 0; left > 0; i++) {
		size_t part = message->msg_iov[i].iov_len < left ? message->msg_iov[i].iov_len : left;

		memcpy(message->msg_iov[i].iov_base, conn->down.bytes + conn->down.head, part);
		conn->down.head += (uint32_t)part;
		left -= part;
	}
	conn->down.ready -= (uint32_t)bytes;
	if (bytes > 0)
		note_heard();
	return (ssize_t)bytes;
}

ssize_t __wrap_recvmsg(int fd, struct msghdr *message, int flags)
{
	crash_point();
	thread_preempt();
	return is_client(fd) ? nbd_socket_receive(message, flags) : receive_from_nas(fd, message);
}

ssize_t __wrap_recv(int fd, void *buffer, size_t bytes, int flags)
{
	struct iovec part = { .iov_base = buffer, .iov_len = bytes };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };

	return __wrap_recvmsg(fd, &message, flags);
}

/* ---- descriptors ---- */

ssize_t __wrap_write(int fd, const void *buffer, size_t bytes)
{
	struct fd *event;
	uint64_t amount;

	crash_point();
	if (fd == 2) {
		if (memmem(buffer, bytes, "protocol does not allow", 23) != NULL)
			sim_fail("an answer that the protocol allows is refused");
		if (options.verbose)
			fprintf(stderr, "%14.6f %.*s", (double)now_ns / 1e9, (int)bytes, (const char *)buffer);
		return (ssize_t)bytes;
	}
	event = fd_of(fd, FD_EVENT);
	memcpy(&amount, buffer, sizeof(amount));
	event->counter += amount;
	threads_wake(event->pollers);
	return (ssize_t)bytes;
}

ssize_t __wrap_read(int fd, void *buffer, size_t bytes)
{
	static const int errors[] = { 0, EINTR, EAGAIN };
	struct fd *event = fd_of(fd, FD_EVENT);
	uint32_t failure;

	crash_point();
	if ((failure = call_fails(2)) != 0)
		return fails_with(errors[failure]);
	if (event->counter == 0)
		return fails_with(EAGAIN);
	memcpy(buffer, &event->counter, sizeof(event->counter));
	event->counter = 0;
	return (ssize_t)bytes;
}

static void conn_close(struct sim_conn *conn)
{
	/* who is reset sends nothing again, and what came after it has a gap before it */
	conn->deliver_rest = rng_chance(&cuts, 512) && conn->cuts == 0;
	given_up += conn->blackhole;
	conn->client_open = false;
	if (conn->established)
		lost_at_ns = now_ns;
	tell(conn, "is closed");
	if (conn->refs == 0)
		conn->used = false;
}

int __wrap_close(int fd)
{
	struct fd *it;

	crash_point();
	if (close_region(fd))
		return 0;
	if (fd < FIRST_FD || fd >= FIRST_FD + (int)FDS_MAX || fds[fd - FIRST_FD].kind == FD_NONE) {
		sim_fail("descriptor %d is closed, and was not open", fd);
		abort();
	}
	it = &fds[fd - FIRST_FD];
	if (it->conn != NULL)
		conn_close(it->conn);
	if (it->kind == FD_CLIENT)
		nbd_socket_worker_closes();
	*it = (struct fd){ .kind = FD_NONE };
	return call_fails(1) ? fails_with(EINTR) : 0;
}

void network_close_all(void)
{
	for (unsigned i = 0; i < FDS_MAX; i++) {
		if (fds[i].conn != NULL)
			conn_close(fds[i].conn);
		if (fds[i].kind == FD_CLIENT)
			nbd_socket_worker_closes();
		fds[i] = (struct fd){ .kind = FD_NONE };
	}
}

static short ready(const struct fd *fd, short wanted)
{
	const struct sim_conn *conn = fd->conn;
	short found = 0;

	if (fd->kind == FD_EVENT)
		return fd->counter > 0 ? wanted & POLLIN : 0;
	if (fd->kind == FD_CLIENT)
		return nbd_socket_ready(wanted);
	if (conn == NULL)
		return POLLHUP;
	if (conn->error != 0)
		return (wanted & (POLLIN | POLLOUT)) | POLLERR | POLLHUP;
	if (!conn->established)
		return 0;
	if (conn->down.ready > 0 || conn->eof)
		found |= POLLIN;
	if (room_to_send(conn) > 0)
		found |= POLLOUT;
	return found & wanted;
}

static int look(struct pollfd *wanted, nfds_t count)
{
	int found = 0;

	for (nfds_t i = 0; i < count; i++) {
		wanted[i].revents = 0;
		if (wanted[i].fd < 0)
			continue;
		if (wanted[i].fd < FIRST_FD || fds[wanted[i].fd - FIRST_FD].kind == FD_NONE)
			wanted[i].revents = POLLNVAL;
		else
			wanted[i].revents = ready(&fds[wanted[i].fd - FIRST_FD], wanted[i].events);
		found += wanted[i].revents != 0;
	}
	return found;
}

/* A thread that polls again and again while nothing else happens would do so for ever: no time passes meanwhile. */
static void check_spinning(void)
{
	static int64_t polled_at_ns;
	static uint32_t times;

	times = polled_at_ns == now_ns ? times + 1 : 0;
	polled_at_ns = now_ns;
	if (times > SPINNING)
		sim_fail("poll(2) or epoll_wait(2) is called for the %uth time at one instant", times);
}

static int poll_until(struct pollfd *wanted, nfds_t count, int64_t until_ns)
{
	static const int errors[] = { 0, EINTR, ENOMEM };
	uint64_t me = thread_bit();
	uint32_t failure;
	int found;

	crash_point();
	thread_preempt();
	check_spinning();
	if ((failure = call_fails(2)) != 0) {
		errno = errors[failure];
		return -1;
	}
	while ((found = look(wanted, count)) == 0 && now_ns < until_ns) {
		for (nfds_t i = 0; i < count; i++)
			if (wanted[i].fd >= 0)
				fds[wanted[i].fd - FIRST_FD].pollers |= me;
		thread_block(until_ns);
		for (nfds_t i = 0; i < count; i++)
			if (wanted[i].fd >= 0)
				fds[wanted[i].fd - FIRST_FD].pollers &= ~me;
	}
	return found;
}

int __wrap_poll(struct pollfd *wanted, nfds_t count, int timeout_ms)
{
	return poll_until(wanted, count, timeout_ms < 0 ? NEVER : now_ns + timeout_ms * MS);
}

int __wrap_ppoll(struct pollfd *wanted, nfds_t count, const struct timespec *timeout, const sigset_t *mask)
{
	(void)mask;
	return poll_until(wanted, count, timeout == NULL ? NEVER : now_ns + timeout->tv_sec * S + timeout->tv_nsec);
}

/* ---- epoll(7) ---- */

int __wrap_epoll_create1(int flags)
{
	(void)flags;
	return new_fd(FD_EPOLL);
}

int __wrap_epoll_ctl(int fd, int operation, int of, struct epoll_event *event)
{
	static const int errors[] = { 0, ENOMEM, ENOSPC };
	uint32_t failure = call_fails(2);
	struct fd *it;

	fd_of(fd, FD_EPOLL);
	crash_point();
	if (of < FIRST_FD || of >= FIRST_FD + (int)FDS_MAX || fds[of - FIRST_FD].kind == FD_NONE)
		return fails_with(EBADF);
	it = &fds[of - FIRST_FD];
	if (it->watched != (operation != EPOLL_CTL_ADD)) {
		if (operation == EPOLL_CTL_MOD) /* the worker takes it for something else, which was closed */
			sim_fail("epoll(7) is to change descriptor %d, and does not know it", of);
		return fails_with(it->watched ? EEXIST : ENOENT);
	}
	if (failure != 0 && operation != EPOLL_CTL_DEL)
		return fails_with(errors[failure]);
	it->watched = it->changed = operation != EPOLL_CTL_DEL;
	if (it->watched)
		it->wanted = *event;
	return 0;
}

static int look_watched(struct epoll_event *found, int most)
{
	int count = 0;

	for (unsigned i = 0; i < FDS_MAX && count < most; i++) {
		struct fd *it = &fds[i];
		bool tells_once = it->wanted.events & EPOLLET;
		short events = it->watched ? ready(it, (short)(it->wanted.events & 0xffff)) : 0;

		if (events != 0 && (it->changed || !tells_once))
			found[count++] = (struct epoll_event){ (uint32_t)events, it->wanted.data };
		it->changed = false;
	}
	return count;
}

int __wrap_epoll_wait(int fd, struct epoll_event *found, int most, int timeout_ms)
{
	int64_t until_ns = timeout_ms < 0 ? NEVER : now_ns + timeout_ms * MS;
	uint64_t me = thread_bit();
	int count;

	fd_of(fd, FD_EPOLL);
	crash_point();
	thread_preempt();
	check_spinning();
	if (call_fails(1))
		return fails_with(EINTR);
	while ((count = look_watched(found, most)) == 0 && now_ns < until_ns) {
		for (unsigned i = 0; i < FDS_MAX; i++)
			if (fds[i].watched)
				fds[i].pollers |= me;
		thread_block(until_ns);
		for (unsigned i = 0; i < FDS_MAX; i++)
			fds[i].pollers &= ~me;
	}
	return count;
}
