/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A new connection over NFSv3 to a file whose handle is known: TCP, NULL, GETATTR and FSINFO. Neither mountd nor a name
 * is asked. `io->wire` is the I/O thread's own until publish().
 */
#include "nfs/internal.h"

#include "nfs/reserved_port.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

/* Wait until `fd` is ready, or something else must be looked at. Returns its revents, 0, or -errno. */
static int wait_for(struct nfsio *io, int fd, short events, int64_t deadline_ms)
{
	struct pollfd fds[2] = { { .fd = fd, .events = events }, { .fd = io->wake_fd, .events = POLLIN } };
	int64_t left_ms = deadline_ms - now_ms();
	uint64_t kicks;

	if (atomic_load(&io->stop))
		return -ECANCELED;
	if (left_ms <= 0)
		return -ETIMEDOUT;
	if (poll(fds, 2, left_ms > AWAY_TICK_MS ? AWAY_TICK_MS : (int)left_ms) < 0)
		return errno == EINTR ? 0 : -errno;
	if (fds[1].revents != 0)
		(void)!read(io->wake_fd, &kicks, sizeof(kicks));
	tend_waiting(io);
	return fds[0].revents;
}

/* Returns 0 once the socket is connected, or -errno. */
static int await_connection(struct nfsio *io, int fd, int64_t deadline_ms)
{
	int64_t syn_deadline_ms = now_ms() + syn_limit_ms(io);
	int error = 0, ready = 0;
	socklen_t length = sizeof(error);

	while (ready == 0)
		ready = wait_for(io, fd, POLLOUT, syn_deadline_ms < deadline_ms ? syn_deadline_ms : deadline_ms);
	if (ready < 0)
		return ready == -ETIMEDOUT && syn_deadline_ms <= deadline_ms ? -ENOTCONN : ready;
	if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) < 0)
		return -errno;
	return -error;
}

/* Returns a connected socket, or -errno. */
static int connect_tcp(struct nfsio *io, const struct server_port *peer, int64_t deadline_ms)
{
	/* close(2) resets the connection: no port stays behind in TIME_WAIT */
	struct linger now = { .l_onoff = 1, .l_linger = 0 };
	int family = peer->address.ss_family, error = 0;
	int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return -errno;
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
	tune_socket(fd);
	reserved_port_bind(fd, family);
	if (connect(fd, (const struct sockaddr *)&peer->address, peer->address_bytes) < 0)
		error = errno == EINPROGRESS ? await_connection(io, fd, deadline_ms) : -errno;
	if (error < 0)
		close(fd);
	return error < 0 ? error : fd;
}

int wire_connect(struct nfsio *io, const struct server_port *peer, int64_t deadline_ms)
{
	int fd = connect_tcp(io, peer, deadline_ms);

	if (fd < 0)
		return fd;
	wire_open(&io->wire, fd, url_number(io->url, "uid=", getuid()), url_number(io->url, "gid=", getgid()));
	return 0;
}

/*
 * Make a call on the connection that is not published yet, and wait for its answer. Returns 0 or -errno. Where that is
 * not the server's word, the wire is closed.
 */
int call_and_wait(struct nfsio *io, struct wire_call *call, struct wire_answer *answer, int64_t deadline_ms)
{
	int status = wire_send(&io->wire, call);

	while (status == 0 && (status = wire_receive(&io->wire, answer)) == 0) {
		short events = wire_has_room(&io->wire) ? POLLIN : POLLIN | POLLOUT;
		int ready = wait_for(io, io->wire.fd, events, deadline_ms);

		status = ready < 0 ? ready : ready & POLLOUT ? wire_flush(&io->wire) : 0;
	}
	if (status < 0) {
		wire_close(&io->wire);
		return status;
	}
	assert(answer->call == call); /* the only one under way */
	switch (answer->status) {
	case NFS3_OK:
		return 0;
	case NFS3ERR_STALE:
	case NFS3ERR_BADHANDLE:
		return -ESTALE;
	case WIRE_NOT_NOW:
		return -EAGAIN;
	default:
		status = nfsstat3_to_errno((int)answer->status);
		return status < 0 ? status : -EIO;
	}
}

/* GETATTR and FSINFO over io->wire. Returns 0; -EISDIR: it is no regular file; or another -errno. */
static int ask_about_file(struct nfsio *io, const struct place *place, struct connection *made)
{
	struct wire_call call = { .handle = place->handle, .handle_bytes = place->handle_bytes };
	struct wire_answer answer;
	int error;

	call.procedure = WIRE_GETATTR;
	error = call_and_wait(io, &call, &answer, made->deadline_ms);
	if (error != 0)
		return error;
	if (answer.type != WIRE_REGULAR)
		return -EISDIR;
	made->st.mode = (made->st.mode & ~(uint32_t)S_IFMT) | S_IFREG;
	made->st.size_bytes = answer.size_bytes;
	made->st.fileid = answer.fileid;
	made->st.nlink = answer.links;
	made->fsid = answer.fsid;
	call.procedure = WIRE_FSINFO;
	error = call_and_wait(io, &call, &answer, made->deadline_ms);
	if (error == 0) {
		made->read_max_bytes = transfer_limit(answer.read_max_bytes);
		made->write_max_bytes = transfer_limit(answer.write_max_bytes);
	}
	return error;
}

const char *text_of_wire(int error)
{
	switch (error) {
	case -ENOTCONN:
		return "it does not answer";
	case -EAGAIN:
		return "it is not ready yet";
	case -EPROTO:
		return "its answer is not what the protocol allows";
	case -EACCES:
		return "it refuses our credentials";
	case -ENXIO:
		return "its portmapper does not know the service";
	default:
		return strerror(-error);
	}
}

int connect_to_server(struct nfsio *io, const struct server_port *peer, int64_t deadline_ms)
{
	struct wire_call call = { .procedure = WIRE_NULL };
	struct wire_answer answer;
	int error = wire_connect(io, peer, deadline_ms);

	return error != 0 ? error : call_and_wait(io, &call, &answer, deadline_ms);
}

int go_on_to_handle(struct nfsio *io, const struct place *place, struct connection *made)
{
	int error;

	assert(place->handle_bytes > 0 && place->handle_bytes <= WIRE_HANDLE_BYTES_MAX);
	error = ask_about_file(io, place, made);
	if (error == 0)
		made->place = *place;
	else
		wire_close(&io->wire);
	return error;
}

int connect_to_handle(struct nfsio *io, const struct place *place, struct connection *made, struct nfsio_failure *why)
{
	int error = connect_to_server(io, &place->peer, made->deadline_ms);

	if (error == 0)
		error = go_on_to_handle(io, place, made);
	else
		wire_close(&io->wire);
	if (error != 0)
		set_failure(why, NFSIO_CONNECT, error, text_of_wire(error));
	return error;
}

/* Read a page of the file over the connection that is not published yet. Returns 0, -ENODATA or -errno. */
int read_page_by_wire(struct nfsio *io, const struct connection *made, uint64_t offset_bytes, uint8_t *page,
		      uint32_t page_bytes)
{
	uint32_t done_bytes = 0;

	while (done_bytes < page_bytes) {
		struct wire_call call = {
			.procedure = WIRE_READ,
			.handle = made->place.handle,
			.handle_bytes = made->place.handle_bytes,
			.offset_bytes = offset_bytes + done_bytes,
			.length_bytes = page_bytes - done_bytes < made->read_max_bytes ? page_bytes - done_bytes
										       : made->read_max_bytes,
			.data = page + done_bytes,
		};
		struct wire_answer answer;
		int error = call_and_wait(io, &call, &answer, made->deadline_ms);

		if (error != 0)
			return error;
		if (answer.count_bytes == 0)
			return -ENODATA;
		done_bytes += answer.count_bytes;
	}
	return 0;
}
