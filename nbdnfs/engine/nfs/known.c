/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What one nfsio knows of a file, for another one: of the same engine, or of the next worker's. */
#include "nfs/connecting.h"

#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool remember_mount(struct nfsio *io, size_t mount_bytes)
{
	/* "/" is mounted, and not the start of a name */
	const char *rest = io->url_directory + (mount_bytes == 1 ? 0 : mount_bytes);

	io->mount_path = strndup(io->url_directory, mount_bytes);
	io->prefix = strdup(strcmp(rest, "/") == 0 ? "" : rest);
	return io->prefix != NULL && io->mount_path != NULL;
}

/* Expect the same file as `like`. Returns false if out of memory. */
static bool begin_like(struct nfsio *io, struct nfsio *like)
{
	pthread_mutex_lock(&like->lock);
	io->place = like->place;
	io->fsid = like->fsid;
	io->fileid = like->fileid;
	io->directory = like->directory;
	pthread_mutex_unlock(&like->lock);
	io->opened = like->opened;
	io->expects_file = true;
	return remember_mount(io, strlen(like->mount_path));
}

static void set_handle(struct place *place, const struct nfsio_handle *handle)
{
	place->handle_bytes = handle->length_bytes;
	memcpy(place->handle, handle->bytes, handle->length_bytes);
}

/*
 * Connect to the handle that is known, instead of looking the file up. What cannot be used is as if it were not known.
 * Returns false if out of memory.
 */
static bool begin_at_handle(struct nfsio *io, const struct nfsio_known *known)
{
	struct addrinfo hints = { .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM };
	struct server_port *peer = &io->place.peer;
	struct addrinfo *found;
	char port[16];

	if (known->directory.length_bytes > WIRE_HANDLE_BYTES_MAX || known->mount_bytes == 0 ||
	    known->mount_bytes > strlen(io->url_directory))
		return true;
	snprintf(port, sizeof(port), "%u", url_number(io->url, "nfsport=", known->port));
	if (getaddrinfo(io->address, port, &hints, &found) != 0)
		return true;
	memcpy(&peer->address, found->ai_addr, found->ai_addrlen);
	peer->address_bytes = found->ai_addrlen;
	freeaddrinfo(found);
	set_handle(&io->place, &known->file);
	io->directory = known->directory;
	return remember_mount(io, known->mount_bytes);
}

/* Expect the file that an earlier nfsio knew. Returns false if out of memory. */
static bool begin_known(struct nfsio *io, const struct nfsio_known *known)
{
	io->fsid = known->fsid;
	io->fileid = known->fileid;
	io->opened = (struct nfsio_stat){ .size_bytes = known->size_bytes, .fileid = known->fileid };
	io->expects_file = true;
	if (known->file.length_bytes == 0 || known->file.length_bytes > WIRE_HANDLE_BYTES_MAX)
		return true;
	if (io->transport_kind == NFSIO_OVER_WIRE)
		return begin_at_handle(io, known);
	set_handle(&io->place, &known->file);
	return true;
}

bool begin_with(struct nfsio *io, const struct nfsio_options *options)
{
	if (options->like != NULL)
		return begin_like(io, options->like);
	return options->known == NULL || begin_known(io, options->known);
}

void nfsio_known(struct nfsio *io, struct nfsio_known *known)
{
	const struct sockaddr_storage *address = &io->place.peer.address;

	memset(known, 0, sizeof(*known)); /* the padding, too: its bytes are kept */
	pthread_mutex_lock(&io->lock);
	known->size_bytes = io->opened.size_bytes;
	known->fsid = io->fsid;
	known->fileid = io->fileid;
	known->port = ntohs(address->ss_family == AF_INET6 ? ((const struct sockaddr_in6 *)address)->sin6_port
							   : ((const struct sockaddr_in *)address)->sin_port);
	if (io->place.handle_bytes <= sizeof(known->file.bytes)) {
		known->file.length_bytes = io->place.handle_bytes;
		memcpy(known->file.bytes, io->place.handle, io->place.handle_bytes);
	}
	if (io->transport_kind == NFSIO_OVER_WIRE) {
		known->mount_bytes = (uint32_t)strlen(io->mount_path);
		known->directory = io->directory;
	}
	pthread_mutex_unlock(&io->lock);
}
