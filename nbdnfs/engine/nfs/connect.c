/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A new connection to the file that was opened. The handle is the file: once one is known, a connection over NFSv3 is
 * made to it, whatever has become of its name or of mountd. Only where the server does not know it any more is the name
 * looked up again, by libnfs.
 */
#include "nfs/internal.h"

#include <errno.h>
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
	/* nothing is known of it before it has been opened, by this nfsio or by the one that it is like */
	bool known = io->place.handle_bytes > 0 || io->opened_once;
	/* a directory is its path */
	int same = known && !io->options.names_only ? is_same_file(io, made) : 1;

	if (same > 0)
		return true;
	if (same < 0)
		set_failure(why, NFSIO_CONNECT, same, made->nfs != NULL ? nfs_get_error(made->nfs) : strerror(-same));
	else
		set_failure(why, NFSIO_OPEN, -EINVAL, NULL);
	connection_close(io, made);
	return false;
}

/* A wire to the file whose name libnfs has just looked up. libnfs is not needed any more. */
static bool go_on_by_wire(struct nfsio *io, struct connection *made, struct nfsio_failure *why)
{
	struct place place = made->place;

	libnfs_destroy(made->nfs, made->fh);
	made->nfs = NULL;
	made->fh = NULL;
	if (place.peer_bytes == 0 || place.handle_bytes == 0) {
		set_failure(why, NFSIO_CONNECT, -ENOTCONN, NULL);
		return false;
	}
	return connect_to_handle(io, &place, made, why) == 0;
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

/* By name, whatever is known. Returns true and *made, which is the file that was opened, or false and *why. */
static bool connect_by_name(struct nfsio *io, struct connection *made, struct nfsio_failure *why)
{
	if (!connect_to_name(io, made, why))
		return false;
	if (io->transport_kind == NFSIO_OVER_WIRE && !go_on_by_wire(io, made, why))
		return false;
	return check_file(io, made, why);
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

/* One attempt. Returns true and *made, which is the file that was opened, or false and *why. */
bool connect_once(struct nfsio *io, struct connection *made, struct nfsio_failure *why)
{
	if (seeks_directory(io) && connect_by_name(io, made, why))
		return true;
	if (io->transport_kind == NFSIO_OVER_WIRE && io->place.handle_bytes > 0) {
		struct place place = io->place;
		int error;

		*made = (struct connection){ .deadline_ms = now_ms() + 1 + io->patience_ms, .st = io->opened };
		error = connect_to_handle(io, &place, made, why);
		if (error == 0 && check_file(io, made, why))
			return true;
		if (error == 0 && why->phase != NFSIO_OPEN)
			return false;
		if (error != 0 && error != -ESTALE && !may_have_moved(io, error))
			return false;
	}
	return connect_by_name(io, made, why);
}
