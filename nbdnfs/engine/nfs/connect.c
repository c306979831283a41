/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A new connection to the file that was opened. The handle is the file: once one is known, a connection over NFSv3 is
 * made to it, whatever has become of its name or of mountd. Only where the server does not know it any more is the name
 * looked up again: in its directory, whose handle is known as well, and where that is stale, too, from mountd on. That
 * goes over the wire. libnfs finds the file once.
 */
#include "nfs/connecting.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

void connection_close(struct nfsio *io, struct connection *made)
{
	if (made->nfs != NULL)
		libnfs_destroy(made->nfs, made->fh);
	made->nfs = NULL;
	wire_close(&io->wire);
}

/* Returns true, or closes the connection and returns false and *why. */
static bool check_file(struct nfsio *io, struct connection *made, struct nfsio_failure *why)
{
	/* a directory is its path */
	int same = io->expects_file && !io->options.names_only ? is_same_file(io, made) : 1;

	if (same > 0)
		return true;
	if (same < 0)
		set_failure(why, NFSIO_CONNECT, same,
			    same == -EIO ? "the server cannot read the pages by which the file is recognised"
					 : strerror(-same));
	else
		set_failure(why, NFSIO_RECOGNISE, -EINVAL, "it is another file");
	connection_close(io, made);
	return false;
}

/* A search for a directory that only the owner's record needs takes no longer: all requests wait meanwhile. */
#define SEEK_LIMIT_MS 3000

/*
 * The directory that the URL's file lies in, over io->wire, from what is mounted. That there is no directory is none of
 * the file's business. Returns 0, or -errno where the connection is of no use: the wire was closed, or the server puts
 * the answer off that nfsio_look() will need.
 */
static int note_directory(struct nfsio *io, struct connection *made)
{
	struct nfsio_handle at = made->root;
	int error = at.length_bytes > 0 ? find_path(io, &made->root, &at, io->prefix, made->deadline_ms) : -ENOENT;

	if (error == 0)
		made->directory = at;
	if (!wire_is_up(&io->wire))
		return -ENOTCONN;
	return error == -EAGAIN && io->options.looks ? -EAGAIN : 0;
}

/* A wire to the file whose name libnfs has just looked up. libnfs is not needed any more. */
static bool go_on_by_wire(struct nfsio *io, struct connection *made, struct nfsio_failure *why)
{
	struct place place = made->place;
	int error;

	libnfs_destroy(made->nfs, made->fh);
	made->nfs = NULL;
	made->fh = NULL;
	if (place.peer.address_bytes == 0 || place.handle_bytes == 0) {
		set_failure(why, NFSIO_CONNECT, -ENOTCONN, NULL);
		return false;
	}
	if (connect_to_handle(io, &place, made, why) != 0)
		return false;
	error = note_directory(io, made);
	if (error == 0)
		return true;
	wire_close(&io->wire);
	set_failure(why, NFSIO_CONNECT, error,
		    error == -EAGAIN ? "the server puts the look-up of the directory off"
				     : "the connection ended while the directory was looked up");
	return false;
}

/* By name and libnfs. Returns true and *made, which is the file that was opened, or false and *why. */
static bool connect_to_name_checked(struct nfsio *io, struct connection *made, struct nfsio_failure *why)
{
	if (!connect_to_name(io, made, why))
		return false;
	if (io->transport_kind == NFSIO_OVER_WIRE && !go_on_by_wire(io, made, why))
		return false;
	return check_file(io, made, why);
}

/*
 * Should the server be looked for again at portmapper's? When it has been started again without a port of its own, it
 * may listen on another one.
 */
static bool may_have_moved(struct nfsio *io, int error)
{
	bool again = error == -ECONNREFUSED && url_number(io->url, "nfsport=", 0) == 0 && !io->refused_port;

	io->refused_port = again;
	return again;
}

/* Does the server say that there is no such file, as opposed to nothing, or "later"? */
static bool is_about_the_name(int error)
{
	return error == -ENOENT || error == -ENOTDIR || error == -ESTALE || error == -EISDIR || error == -ELOOP ||
	       error == -ENAMETOOLONG;
}

static void fail_search(struct nfsio_failure *why, const char *step, int error)
{
	char text[128];

	snprintf(text, sizeof(text), "%s: %s", step, text_of_wire(error));
	set_failure(why, is_about_the_name(error) ? NFSIO_OPEN : NFSIO_CONNECT, error, text);
}

/* Look the file up in its directory, and connect to it. Returns true and *made, or false and *why. */
static bool connect_in_directory(struct nfsio *io, const struct server_port *peer, const struct nfsio_handle *root,
				 const struct nfsio_handle *directory, struct connection *made,
				 struct nfsio_failure *why)
{
	struct place place = { .peer = *peer };
	struct nfsio_handle file = *directory;
	int error = connect_to_server(io, peer, made->deadline_ms);

	if (error == 0)
		error = find_path(io, root, &file, io->url_file, made->deadline_ms);
	if (error == 0) {
		place.handle_bytes = file.length_bytes;
		memcpy(place.handle, file.bytes, file.length_bytes);
		error = go_on_to_handle(io, &place, made);
	}
	if (error == 0)
		return check_file(io, made, why);
	wire_close(&io->wire);
	fail_search(why, "LOOKUP", error);
	return false;
}

/* The URL's directory, from mountd on. Returns 0 and made->root and made->directory, or -errno and *why. */
static int find_directory(struct nfsio *io, const struct server_port *peer, int64_t deadline_ms,
			  struct connection *made, struct nfsio_failure *why)
{
	const char *step = "mountd";
	int error = find_root(io, peer, &made->root, deadline_ms);

	if (error == 0) {
		step = "LOOKUP of the directory";
		made->directory = made->root;
		error = connect_to_server(io, peer, deadline_ms);
	}
	if (error == 0)
		error = find_path(io, &made->root, &made->directory, io->prefix, deadline_ms);
	wire_close(&io->wire);
	if (error != 0) {
		made->directory.length_bytes = 0;
		fail_search(why, step, error);
	}
	return error;
}

/* The handle is stale: find the file again. Returns true and *made, or false and *why. */
static bool connect_by_name(struct nfsio *io, const struct server_port *peer, struct connection *made,
			    struct nfsio_failure *why)
{
	/* no lock: it changes in this thread */
	const struct nfsio_handle known = made->directory.length_bytes > 0 ? made->directory : io->directory;
	bool knows_directory = known.length_bytes > 0;
	struct nfsio_failure of_mountd;

	if (knows_directory && connect_in_directory(io, peer, NULL, &known, made, why))
		return true;
	if (knows_directory && !is_of_the_file(why))
		return false;
	/* the directory may be another by now, or stale like the file */
	if (find_directory(io, peer, made->deadline_ms, made, &of_mountd) != 0) {
		if (!knows_directory || is_of_the_file(&of_mountd) || why->error == -ESTALE)
			*why = of_mountd;
		return false;
	}
	return connect_in_directory(io, peer, &made->root, &made->directory, made, why);
}

/* Is the directory to be found by its name, too? Says so once. */
static bool seeks_directory(struct nfsio *io)
{
	bool seeks;

	pthread_mutex_lock(&io->lock);
	seeks = io->directory_is_stale;
	io->directory_is_stale = false;
	pthread_mutex_unlock(&io->lock);
	return seeks;
}

/* To the handle that is known, or to the file that has its name now. As connect_once(). */
static bool connect_again(struct nfsio *io, struct connection *made, struct nfsio_failure *why)
{
	struct place place = io->place;
	struct nfsio_failure ignored;
	int error;

	*made = (struct connection){ .deadline_ms = now_ms() + 1 + io->patience_ms, .st = io->opened };
	if (seeks_directory(io))
		find_directory(io, &place.peer, now_ms() + SEEK_LIMIT_MS, made, &ignored);
	error = connect_to_handle(io, &place, made, why);
	if (may_have_moved(io, error)) {
		error = find_server(io, &place.peer, made->deadline_ms);
		if (error == 0)
			error = connect_to_handle(io, &place, made, why);
		else
			set_failure(why, NFSIO_CONNECT, error, text_of_wire(error));
	}
	if (error == 0 && check_file(io, made, why))
		return true;
	/* another file has the handle, or none has */
	if (error == 0 ? is_of_the_file(why) : error == -ESTALE || error == -EISDIR)
		return connect_by_name(io, &place.peer, made, why);
	return false;
}

/* One attempt. Returns true and *made, which is the file that was opened, or false and *why. */
bool connect_once(struct nfsio *io, struct connection *made, struct nfsio_failure *why)
{
	if (io->transport_kind == NFSIO_OVER_WIRE && io->place.handle_bytes > 0)
		return connect_again(io, made, why);
	return connect_to_name_checked(io, made, why);
}
