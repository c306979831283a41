/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A TCP proxy that adds a delay each way, for kernels without netem: delay LISTEN_PORT PORT DELAY_US
 *
 * Both on loopback. What comes in goes out DELAY_US later, whatever else is under way: requests that follow each
 * other closely are delayed together, not one after the other. Runs until it is killed.
 */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PIECE_BYTES (256 * 1024)
#define PIECES 64

static uint64_t delay_ns;

/* One direction of one connection: a ring of pieces between a thread that receives and one that sends. */
struct pipe {
	int from, to;
	pthread_mutex_t lock; /* guards head, tail and ended; the pieces between belong to the sender */
	pthread_cond_t changed;
	unsigned head, tail;
	int ended;
	struct {
		uint64_t due_ns;
		size_t length;
		char data[PIECE_BYTES];
	} pieces[PIECES];
};

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void *receiver(void *arg)
{
	struct pipe *pipe = arg;

	for (;;) {
		unsigned slot = pipe->head % PIECES;
		ssize_t got;

		pthread_mutex_lock(&pipe->lock);
		while (pipe->head - pipe->tail == PIECES)
			pthread_cond_wait(&pipe->changed, &pipe->lock);
		pthread_mutex_unlock(&pipe->lock);
		got = recv(pipe->from, pipe->pieces[slot].data, PIECE_BYTES, 0);
		pipe->pieces[slot].due_ns = now_ns() + delay_ns;
		pipe->pieces[slot].length = got > 0 ? (size_t)got : 0;
		pthread_mutex_lock(&pipe->lock);
		if (got > 0)
			pipe->head++;
		else
			pipe->ended = 1;
		pthread_cond_signal(&pipe->changed);
		pthread_mutex_unlock(&pipe->lock);
		if (got <= 0)
			return NULL;
	}
}

static void *sender(void *arg)
{
	struct pipe *pipe = arg;

	for (;;) {
		struct timespec due;
		unsigned slot;
		size_t sent = 0;

		pthread_mutex_lock(&pipe->lock);
		while (pipe->head == pipe->tail && !pipe->ended)
			pthread_cond_wait(&pipe->changed, &pipe->lock);
		if (pipe->head == pipe->tail) {
			pthread_mutex_unlock(&pipe->lock);
			shutdown(pipe->to, SHUT_WR);
			return NULL;
		}
		slot = pipe->tail % PIECES;
		pthread_mutex_unlock(&pipe->lock);
		due.tv_sec = (time_t)(pipe->pieces[slot].due_ns / 1000000000u);
		due.tv_nsec = (long)(pipe->pieces[slot].due_ns % 1000000000u);
		while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL) == EINTR)
			;
		while (sent < pipe->pieces[slot].length) {
			ssize_t now = send(pipe->to, pipe->pieces[slot].data + sent, pipe->pieces[slot].length - sent,
					   MSG_NOSIGNAL);

			if (now < 0)
				return NULL;
			sent += (size_t)now;
		}
		pthread_mutex_lock(&pipe->lock);
		pipe->tail++;
		pthread_cond_signal(&pipe->changed);
		pthread_mutex_unlock(&pipe->lock);
	}
}

static void start_pipe(int from, int to)
{
	struct pipe *pipe = calloc(1, sizeof(*pipe)); /* lives as long as the program: it serves a benchmark */
	pthread_t thread;

	pipe->from = from;
	pipe->to = to;
	pthread_mutex_init(&pipe->lock, NULL);
	pthread_cond_init(&pipe->changed, NULL);
	pthread_create(&thread, NULL, receiver, pipe);
	pthread_create(&thread, NULL, sender, pipe);
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
	int listener = tcp_socket();
	uint16_t port;

	if (argc != 4) {
		fprintf(stderr, "usage: delay LISTEN_PORT PORT DELAY_US\n");
		return 64;
	}
	address.sin_port = htons((uint16_t)atoi(argv[1]));
	port = (uint16_t)atoi(argv[2]);
	delay_ns = (uint64_t)atoll(argv[3]) * 1000;
	if (bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(listener, 16) < 0) {
		perror("delay");
		return 1;
	}
	for (;;) {
		int client = accept(listener, NULL, NULL), server = tcp_socket(), on = 1;

		address.sin_port = htons(port);
		if (client < 0 || connect(server, (struct sockaddr *)&address, sizeof(address)) < 0) {
			perror("delay");
			return 1;
		}
		setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
		start_pipe(client, server);
		start_pipe(server, client);
	}
}
