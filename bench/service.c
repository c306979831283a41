/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A TCP proxy that makes the server's time a fixed one: service LISTEN_PORT PORT SERVICE_US rpc|nbd
 *
 * Both on loopback. A request goes to the server at once. Its reply is held until SERVICE_US after the request came,
 * whatever the server needed of that: its speed does not count, as long as it needs less. Replies are matched by the
 * xid of ONC RPC (RFC 5531, record marking of section 11), or by the cookie of NBD (doc/proto.md, simple replies), and
 * leave in the order in which they are due. What was late is counted, and printed to stderr when a connection ends.
 * Runs until it is killed.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BUFFER_BYTES (4u << 20)
/* More requests than a client has under way. */
#define CALLS 4096

#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_REPLY_MAGIC 0x67446698u
#define NBD_OPTION_MAGIC 0x49484156454F5054u /* IHAVEOPT */
#define NBD_READ 0
#define NBD_WRITE 1

static uint64_t service_ns;
static bool is_nbd;

struct call {
	uint64_t key, due_ns;
	size_t reply_bytes; /* NBD: of the data that follows a good reply */
	bool busy;
};

/* A whole reply, until it is due. */
struct reply {
	struct reply *next;
	uint64_t due_ns;
	size_t length;
	char data[];
};

struct connection {
	int client, server;
	pthread_mutex_t lock; /* guards `calls` and `transmits` */
	struct call calls[CALLS];
	bool transmits;       /* NBD: the handshake is over */
	/* of the thread that takes replies */
	struct reply *held;   /* by due_ns */
	uint64_t replies, late;
};

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static uint32_t be32_at(const char *at)
{
	uint32_t value;

	memcpy(&value, at, sizeof(value));
	return ntohl(value);
}

static uint64_t be64_at(const char *at)
{
	uint64_t value;

	memcpy(&value, at, sizeof(value));
	return be64toh(value);
}

static void note_call(struct connection *connection, uint64_t key, size_t reply_bytes)
{
	pthread_mutex_lock(&connection->lock);
	for (struct call *call = connection->calls; call < connection->calls + CALLS; call++)
		if (!call->busy) {
			*call = (struct call){ key, now_ns() + service_ns, reply_bytes, true };
			break;
		}
	pthread_mutex_unlock(&connection->lock);
}

/* The call that a reply answers; false where there is none, and the reply goes at once. */
static bool take_call(struct connection *connection, uint64_t key, struct call *found)
{
	bool is_known = false;

	pthread_mutex_lock(&connection->lock);
	for (struct call *call = connection->calls; call < connection->calls + CALLS && !is_known; call++)
		if (call->busy && call->key == key) {
			*found = *call;
			call->busy = false;
			is_known = true;
		}
	pthread_mutex_unlock(&connection->lock);
	return is_known;
}

/*
 * The length of the message that begins at `at`, 0 where more bytes must come first. A request is noted as soon as
 * its head is there: *noted says that it has been.
 */
static size_t request_bytes(struct connection *connection, const char *at, size_t have, bool *noted, bool first)
{
	size_t length, head = is_nbd ? 28 : 8;

	if (is_nbd && first)
		return have < 4 ? 0 : 4; /* the client's flags */
	if (is_nbd && have >= 16 && be64_at(at) == NBD_OPTION_MAGIC)
		return 16 + be32_at(at + 12);
	if (have < head)
		return 0;
	length = is_nbd ? 28 + (be32_at(at + 4) % 65536 == NBD_WRITE ? be32_at(at + 24) : 0)
			: 4 + (be32_at(at) & 0x7fffffffu);
	if (!*noted && is_nbd && be32_at(at) == NBD_REQUEST_MAGIC) {
		size_t data = be32_at(at + 4) % 65536 == NBD_READ ? be32_at(at + 24) : 0;

		pthread_mutex_lock(&connection->lock);
		connection->transmits = true;
		pthread_mutex_unlock(&connection->lock);
		note_call(connection, be64_at(at + 8), data);
	} else if (!*noted && !is_nbd) {
		note_call(connection, be32_at(at + 4), 0);
	}
	*noted = true;
	return length;
}

static bool send_all(int fd, const char *data, size_t length)
{
	while (length > 0) {
		ssize_t now = send(fd, data, length, MSG_NOSIGNAL);

		if (now < 0 && errno != EINTR)
			return false;
		data += now > 0 ? now : 0;
		length -= now > 0 ? (size_t)now : 0;
	}
	return true;
}

/* Requests pass at once, and are noted when their head has come. */
static void *take_requests(void *arg)
{
	struct connection *connection = arg;
	char *head = malloc(BUFFER_BYTES);
	size_t have = 0, skip = 0; /* bytes of a head that is not complete; of a message whose length is known */
	bool first = true;

	for (;;) {
		ssize_t got = recv(connection->client, head + have, BUFFER_BYTES - have, 0);
		size_t at = 0, end = have + (size_t)(got > 0 ? got : 0);

		if (got <= 0)
			break;
		while (at < end) {
			bool noted = false;
			size_t length, now;

			if (skip == 0) {
				length = request_bytes(connection, head + at, end - at, &noted, first);
				if (length == 0)
					break;
				first = false;
				skip = length;
			}
			now = skip < end - at ? skip : end - at;
			at += now;
			skip -= now;
		}
		/* what has come is passed on, also the beginning of a head */
		if (!send_all(connection->server, head + have, (size_t)got))
			break;
		memmove(head, head + at, end - at);
		have = end - at;
	}
	shutdown(connection->server, SHUT_WR);
	free(head);
	return NULL;
}

static void hold(struct connection *connection, const char *data, size_t length, uint64_t due_ns)
{
	struct reply *reply = malloc(sizeof(*reply) + length), **at = &connection->held;

	reply->due_ns = due_ns;
	reply->length = length;
	memcpy(reply->data, data, length);
	while (*at != NULL && (*at)->due_ns <= due_ns)
		at = &(*at)->next;
	reply->next = *at;
	*at = reply;
}

/* Take whole replies out of `data`; returns how many bytes they are. */
static size_t take_replies(struct connection *connection, const char *data, size_t have, struct call *call, bool *known)
{
	size_t at = 0, head = is_nbd ? 16 : 8;
	uint64_t now = now_ns();

	for (;;) {
		const char *reply = data + at;
		size_t length;

		if (have - at < head)
			return at;
		if (!*known && !take_call(connection, is_nbd ? be64_at(reply + 8) : be32_at(reply + 4), call))
			*call = (struct call){ .due_ns = now };
		*known = true;
		length = is_nbd ? 16 + (be32_at(reply + 4) == 0 ? call->reply_bytes : 0)
				: 4 + (be32_at(reply) & 0x7fffffffu);
		if (have - at < length)
			return at;
		connection->replies++;
		connection->late += call->due_ns < now;
		hold(connection, reply, length, call->due_ns);
		*known = false;
		at += length;
	}
}

/* Let go what is due. Returns ns until the next one is, UINT64_MAX without one; 0: the client is gone. */
static uint64_t release(struct connection *connection)
{
	while (connection->held != NULL) {
		struct reply *reply = connection->held;
		uint64_t now = now_ns();

		if (reply->due_ns > now)
			return reply->due_ns - now;
		if (!send_all(connection->client, reply->data, reply->length))
			return 0;
		connection->held = reply->next;
		free(reply);
	}
	return UINT64_MAX;
}

static bool is_handshake(struct connection *connection)
{
	bool transmits;

	pthread_mutex_lock(&connection->lock);
	transmits = connection->transmits;
	pthread_mutex_unlock(&connection->lock);
	return is_nbd && !transmits;
}

static void *take_answers(void *arg)
{
	struct connection *connection = arg;
	char *data = malloc(BUFFER_BYTES);
	size_t have = 0;
	struct call call = { 0 };
	bool known = false, ended = false;

	for (;;) {
		struct pollfd fd = { .fd = ended ? -1 : connection->server, .events = POLLIN };
		uint64_t left_ns = release(connection);
		struct timespec left = { (time_t)(left_ns / 1000000000u), (long)(left_ns % 1000000000u) };
		ssize_t got;

		if (left_ns == 0 || (ended && left_ns == UINT64_MAX))
			break;
		if (ppoll(&fd, 1, left_ns == UINT64_MAX ? NULL : &left, NULL) <= 0)
			continue;
		got = recv(connection->server, data + have, BUFFER_BYTES - have, 0);
		if (got <= 0) {
			ended = true;
			continue;
		}
		have += (size_t)got;
		if (is_handshake(connection)) {
			if (!send_all(connection->client, data, have))
				break;
			have = 0;
			continue;
		}
		got = (ssize_t)take_replies(connection, data, have, &call, &known);
		memmove(data, data + got, have - (size_t)got);
		have -= (size_t)got;
	}
	shutdown(connection->client, SHUT_WR);
	if (connection->late > 0)
		fprintf(stderr, "service: %llu of %llu replies came later than they were due\n",
			(unsigned long long)connection->late, (unsigned long long)connection->replies);
	free(data);
	return NULL;
}

static int tcp_socket(void)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	return fd;
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct sched_param priority = { .sched_priority = 1 };
	int listener = tcp_socket();

	if (argc != 5 || (strcmp(argv[4], "rpc") != 0 && strcmp(argv[4], "nbd") != 0)) {
		fprintf(stderr, "usage: service LISTEN_PORT PORT SERVICE_US rpc|nbd\n");
		return 64;
	}
	/* what else runs here must not make it late; without the permission it does without */
	(void)sched_setscheduler(0, SCHED_FIFO, &priority);
	(void)prctl(PR_SET_TIMERSLACK, 1000);
	service_ns = (uint64_t)atoll(argv[3]) * 1000;
	is_nbd = strcmp(argv[4], "nbd") == 0;
	address.sin_port = htons((uint16_t)atoi(argv[1]));
	if (bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(listener, 16) < 0) {
		perror("service");
		return 1;
	}
	for (;;) {
		struct connection *connection = calloc(1, sizeof(*connection)); /* as long as the program */
		pthread_t thread;
		int on = 1;

		connection->client = accept(listener, NULL, NULL);
		connection->server = tcp_socket();
		pthread_mutex_init(&connection->lock, NULL);
		address.sin_port = htons((uint16_t)atoi(argv[2]));
		if (connection->client < 0) {
			perror("service");
			return 1;
		}
		if (connect(connection->server, (struct sockaddr *)&address, sizeof(address)) < 0) {
			close(connection->server); /* the server is not there yet, or no more */
			close(connection->client);
			free(connection);
			continue;
		}
		setsockopt(connection->client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
		pthread_create(&thread, NULL, take_requests, connection);
		pthread_create(&thread, NULL, take_answers, connection);
	}
}
