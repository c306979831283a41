/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Create and destroy. */
#include "nfs/connecting.h"

#include "base/thread.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define SILENCE_MS 15000

static void free_all(struct nfsio *io)
{
	if (io->wake_fd >= 0)
		close(io->wake_fd);
	pthread_cond_destroy(&io->settled);
	pthread_cond_destroy(&io->io_work);
	pthread_mutex_destroy(&io->lock);
	free(io->url);
	free(io->address);
	free(io->url_directory);
	free(io->url_file);
	free(io->mount_path);
	free(io->prefix);
	free(io);
}

bool remember_mount(struct nfsio *io, size_t mount_bytes)
{
	/* "/" is mounted, and not the start of a name */
	const char *rest = io->url_directory + (mount_bytes == 1 ? 0 : mount_bytes);

	io->mount_path = strndup(io->url_directory, mount_bytes);
	io->prefix = strdup(strcmp(rest, "/") == 0 ? "" : rest);
	return io->prefix != NULL && io->mount_path != NULL;
}

/* An earlier nfsio knew the file; what cannot be used of that is as if it had not. Returns false without memory. */
static bool begin_known(struct nfsio *io, const struct nfsio_known *known)
{
	struct addrinfo hints = { .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM };
	struct server_port *peer = &io->place.peer;
	struct addrinfo *found;
	char port[16];

	if (known->file.length_bytes == 0 || known->file.length_bytes > WIRE_HANDLE_BYTES_MAX ||
	    known->directory.length_bytes > WIRE_HANDLE_BYTES_MAX || known->mount_bytes == 0 ||
	    known->mount_bytes > strlen(io->url_directory))
		return true;
	snprintf(port, sizeof(port), "%u", url_number(io->url, "nfsport=", known->port));
	if (getaddrinfo(io->address, port, &hints, &found) != 0)
		return true;
	memcpy(&peer->address, found->ai_addr, found->ai_addrlen);
	peer->address_bytes = found->ai_addrlen;
	freeaddrinfo(found);
	io->place.handle_bytes = known->file.length_bytes;
	memcpy(io->place.handle, known->file.bytes, known->file.length_bytes);
	io->directory = known->directory;
	io->fsid = known->fsid;
	io->fileid = known->fileid;
	io->opened = (struct nfsio_stat){ .size_bytes = known->size_bytes, .fileid = known->fileid };
	io->was_known = true;
	return remember_mount(io, known->mount_bytes);
}

bool nfsio_was_known(const struct nfsio *io)
{
	return io->was_known;
}

bool nfsio_known(struct nfsio *io, struct nfsio_known *known)
{
	bool by_wire = io->transport_kind == NFSIO_OVER_WIRE;
	const struct sockaddr_storage *address = &io->place.peer.address;

	memset(known, 0, sizeof(*known)); /* the padding, too: its bytes are kept */
	pthread_mutex_lock(&io->lock);
	known->size_bytes = io->opened.size_bytes;
	known->fsid = io->fsid;
	known->fileid = io->fileid;
	known->port = ntohs(address->ss_family == AF_INET6 ? ((const struct sockaddr_in6 *)address)->sin6_port
							   : ((const struct sockaddr_in *)address)->sin_port);
	known->mount_bytes = (uint32_t)strlen(io->mount_path);
	if (by_wire) {
		known->file.length_bytes = io->place.handle_bytes;
		memcpy(known->file.bytes, io->place.handle, io->place.handle_bytes);
		known->directory = io->directory;
	}
	pthread_mutex_unlock(&io->lock);
	return by_wire && known->file.length_bytes > 0;
}

/* The file is known already: it need not be looked up again. Returns false when there is no memory. */
static bool begin_like(struct nfsio *io, struct nfsio *like)
{
	pthread_mutex_lock(&like->lock);
	if (like->place.peer.address_bytes > 0)
		io->place = like->place;
	io->fsid = like->fsid;
	io->fileid = like->fileid;
	io->directory = like->directory;
	pthread_mutex_unlock(&like->lock);
	io->opened = like->opened;
	return remember_mount(io, strlen(like->mount_path));
}

/* What is known of the file. Returns false without memory. */
static bool begin_with(struct nfsio *io, const struct nfsio_options *options)
{
	if (io->transport_kind != NFSIO_OVER_WIRE)
		return true;
	if (options->like != NULL)
		return begin_like(io, options->like);
	return options->known == NULL || begin_known(io, options->known);
}

int nfsio_create(const struct nfsio_options *options, struct nfsio **out, struct nfsio_failure *why)
{
	struct nfsio *io = calloc(1, sizeof(*io));
	pthread_condattr_t monotonic;
	int error = 0;

	set_failure(why, NFSIO_CONNECT, 0, NULL);
	if (io == NULL)
		return set_failure(why, NFSIO_CONNECT, -ENOMEM, NULL), -ENOMEM;
	io->options = *options;
	io->options.url = io->options.address = NULL;
	io->url = strdup(options->url);
	io->address = strdup(options->address);
	io->version = (int)url_number(options->url, "version=", 3);
	io->transport_kind = io->version == 3 ? options->transport : NFSIO_OVER_LIBNFS;
	io->options.like = NULL;
	io->options.known = NULL;
	wire_init(&io->wire);
	io->patience_ms = (int64_t)options->connect_timeout_s * 1000;
	if (io->options.silence_ms == 0)
		io->options.silence_ms = SILENCE_MS;
	io->silence_ms = io->options.silence_ms;
	io->deadline_ms = INT64_MAX;
	probe_init(&io->probe, (uint32_t)io->version);
	io->state.condition = NFSIO_LINK_DOWN;
	atomic_init(&io->truncated_bytes, UINT64_MAX);
	io->first_failure = why;
	io->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pthread_mutex_init(&io->lock, NULL);
	pthread_cond_init(&io->settled, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&io->io_work, &monotonic);
	pthread_condattr_destroy(&monotonic);
	if (io->url == NULL || io->address == NULL)
		error = -ENOMEM;
	else if (io->wake_fd < 0)
		error = -errno;
	else
		error = url_take_path(io->url, &io->url_directory, &io->url_file);
	if (error == 0 && !begin_with(io, options))
		error = -ENOMEM;
	if (error == 0)
		error = thread_start(&io->thread, io_thread, io);
	if (error != 0) {
		set_failure(why, NFSIO_CONNECT, error, error == -EINVAL ? "it names no file" : NULL);
		free_all(io);
		return error;
	}
	pthread_mutex_lock(&io->lock);
	while (!io->first_done)
		pthread_cond_wait(&io->settled, &io->lock);
	io->first_failure = NULL;
	pthread_mutex_unlock(&io->lock);
	if (why->error != 0) {
		nfsio_destroy(io);
		return why->error;
	}
	*out = io;
	return 0;
}

void nfsio_stop(struct nfsio *io)
{
	atomic_store(&io->stop, true);
	pthread_mutex_lock(&io->lock);
	wake_io_thread(io);
	pthread_mutex_unlock(&io->lock);
}

void nfsio_join(struct nfsio *io)
{
	if (io->ended)
		return;
	nfsio_stop(io);
	pthread_join(io->thread, NULL);
	io->ended = true;
}

void nfsio_destroy(struct nfsio *io)
{
	nfsio_join(io);
	free_all(io);
}
