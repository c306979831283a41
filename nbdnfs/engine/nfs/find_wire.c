/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Where a file is, by its name and over the wire, once the server has forgotten the handle that was known: portmapper,
 * mountd, and LOOKUP of one name after the other. libnfs did the same for the first open; its parser is not for a
 * server that has had time to become hostile, or has broken down.
 */
#include "nfs/internal.h"

#include <errno.h>
#include <netinet/in.h>
#include <string.h>

#define PORTMAP_PORT 111
#define PROGRAM_NFS 100003u
#define PROGRAM_MOUNT 100005u
#define VERSION 3u
/* As the kernel's MAXSYMLINKS is 40; no path to a backing file needs a quarter of that. */
#define LINKS_MAX 10

static void set_port(struct server_port *peer, uint16_t port)
{
	if (peer->address.ss_family == AF_INET6)
		((struct sockaddr_in6 *)&peer->address)->sin6_port = htons(port);
	else
		((struct sockaddr_in *)&peer->address)->sin_port = htons(port);
}

/* Have *peer name the port of a program: the one that the URL has as `key`, or portmapper's answer. */
static int find_port(struct nfsio *io, struct server_port *peer, const char *key, uint32_t program, int64_t deadline_ms)
{
	struct wire_call call = {
		.procedure = peer->address.ss_family == AF_INET6 ? WIRE_GETADDR : WIRE_GETPORT,
		.program = program,
		.version = VERSION,
	};
	struct wire_answer answer = { .port = url_number(io->url, key, 0) };
	int error = 0;

	if (answer.port == 0) {
		set_port(peer, PORTMAP_PORT);
		error = wire_connect(io, peer, deadline_ms);
		if (error == 0)
			error = call_and_wait(io, &call, &answer, deadline_ms);
		wire_close(&io->wire);
		if (error == 0 && answer.port == 0)
			error = -ENXIO;
	}
	if (error == 0)
		set_port(peer, (uint16_t)answer.port);
	return error;
}

int find_server(struct nfsio *io, struct server_port *peer, int64_t deadline_ms)
{
	return find_port(io, peer, "nfsport=", PROGRAM_NFS, deadline_ms);
}

static void copy_found(struct nfsio_handle *handle, const struct wire_answer *answer)
{
	assert(answer->handle_bytes > 0 && answer->handle_bytes <= sizeof(handle->bytes));
	handle->length_bytes = answer->handle_bytes;
	memcpy(handle->bytes, answer->handle, answer->handle_bytes);
}

int find_root(struct nfsio *io, const struct server_port *peer, struct nfsio_handle *root, int64_t deadline_ms)
{
	struct server_port mountd = *peer;
	struct wire_call call = {
		.procedure = WIRE_MNT,
		.data = (uint8_t *)io->mount_path,
		.length_bytes = (uint32_t)strlen(io->mount_path),
	};
	struct wire_answer answer;
	int error;

	if (call.length_bytes > WIRE_PATH_BYTES_MAX)
		return -ENAMETOOLONG;
	error = find_port(io, &mountd, "mountport=", PROGRAM_MOUNT, deadline_ms);
	if (error == 0)
		error = wire_connect(io, &mountd, deadline_ms);
	if (error == 0)
		error = call_and_wait(io, &call, &answer, deadline_ms);
	if (error == 0)
		copy_found(root, &answer);
	wire_close(&io->wire);
	return error;
}

static struct wire_call call_on(const struct nfsio_handle *handle, enum wire_procedure procedure)
{
	return (struct wire_call){
		.procedure = procedure,
		.handle = handle->bytes,
		.handle_bytes = handle->length_bytes,
	};
}

/* LOOKUP, and what it is that was found: an answer need not say. */
static int look_up(struct nfsio *io, const struct nfsio_handle *directory, const char *name, size_t name_bytes,
		   struct nfsio_handle *found, bool *is_link, int64_t deadline_ms)
{
	struct wire_call call = call_on(directory, WIRE_LOOKUP);
	struct wire_answer answer;
	int error;

	if (name_bytes > WIRE_NAME_BYTES_MAX)
		return -ENAMETOOLONG;
	call.data = (uint8_t *)(uintptr_t)name;
	call.length_bytes = (uint32_t)name_bytes;
	error = call_and_wait(io, &call, &answer, deadline_ms);
	if (error != 0)
		return error;
	copy_found(found, &answer);
	if (!answer.has_attributes) {
		call = call_on(found, WIRE_GETATTR);
		error = call_and_wait(io, &call, &answer, deadline_ms);
	}
	*is_link = answer.type == WIRE_LINK;
	return error;
}

/* Put the target of the symbolic link `link` before `rest`, what is left of the path; room_bytes are from there on. */
static int follow_link(struct nfsio *io, const struct nfsio_handle *link, const struct nfsio_handle *root,
		       struct nfsio_handle *at, char *rest, size_t room_bytes, int64_t deadline_ms)
{
	char buffer[WIRE_PATH_BYTES_MAX + 1];
	struct wire_call call = call_on(link, WIRE_READLINK);
	struct wire_answer answer;
	const char *target = buffer;
	size_t bytes, mount_bytes = strlen(io->mount_path), rest_bytes = strlen(rest);
	int error;

	call.data = (uint8_t *)buffer;
	call.length_bytes = WIRE_PATH_BYTES_MAX;
	error = call_and_wait(io, &call, &answer, deadline_ms);
	if (error != 0)
		return error;
	buffer[answer.count_bytes] = '\0';
	if (target[0] == '/') { /* a path of the server's: only what is mounted can be reached */
		if (mount_bytes > 1) {
			if (strncmp(target, io->mount_path, mount_bytes) != 0 ||
			    (target[mount_bytes] != '/' && target[mount_bytes] != '\0'))
				return -ENOENT;
			target += mount_bytes;
		}
		if (root == NULL)
			return -ENOENT;
		*at = *root;
	}
	bytes = strlen(target);
	if (bytes + rest_bytes + 2 > room_bytes)
		return -ENAMETOOLONG;
	memmove(rest + bytes + 1, rest, rest_bytes + 1);
	memcpy(rest, target, bytes);
	rest[bytes] = '/';
	return 0;
}

int find_path(struct nfsio *io, const struct nfsio_handle *root, struct nfsio_handle *at, const char *path,
	      int64_t deadline_ms)
{
	char rest[2 * URL_PATH_BYTES_MAX];
	unsigned links = 0;

	assert(strlen(path) < sizeof(rest));
	memcpy(rest, path, strlen(path) + 1);
	for (;;) {
		const char *name = rest + strspn(rest, "/");
		size_t name_bytes = strcspn(name, "/");
		struct nfsio_handle found;
		bool is_link;
		int error;

		if (name_bytes == 0)
			return 0;
		if (name_bytes == 1 && name[0] == '.') {
			memmove(rest, name + 1, strlen(name + 1) + 1);
			continue;
		}
		error = look_up(io, at, name, name_bytes, &found, &is_link, deadline_ms);
		if (error != 0)
			return error;
		memmove(rest, name + name_bytes, strlen(name + name_bytes) + 1);
		if (!is_link) {
			*at = found;
			continue;
		}
		error = ++links > LINKS_MAX ? -ELOOP
					    : follow_link(io, &found, root, at, rest, sizeof(rest), deadline_ms);
		if (error != 0)
			return error;
	}
}
