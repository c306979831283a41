/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* struct transport over a wire (wire.h): NFSv3 without libnfs. */
#include "nfs/internal.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

static int issue_on_wire(struct nfsio *io, struct nfsio_req *req)
{
	/* by enum nfsio_op */
	static const enum wire_procedure procedures[] = {
		[NFSIO_READ] = WIRE_READ,
		[NFSIO_WRITE] = WIRE_WRITE,
		[NFSIO_WRITE_UNSTABLE] = WIRE_WRITE,
		[NFSIO_COMMIT] = WIRE_COMMIT,
		[NFSIO_LOOKUP] = WIRE_LOOKUP,
	};

	uint32_t limit_bytes = req->op == NFSIO_READ ? io->read_max_bytes : io->write_max_bytes;
	uint32_t left_bytes = req->length_bytes - req->moved_bytes;

	if (req->op == NFSIO_LOOKUP)
		limit_bytes = WIRE_NAME_BYTES_MAX;
	/* what does not fit into one call is asked for when that one is answered, as after a short transfer */
	req->call = (struct wire_call){
		.procedure = procedures[req->op],
		.handle = req->handle != NULL ? req->handle->bytes : io->place.handle,
		.handle_bytes = req->handle != NULL ? req->handle->length_bytes : io->place.handle_bytes,
		.offset_bytes = req->offset_bytes + req->moved_bytes,
		.length_bytes = left_bytes < limit_bytes ? left_bytes : limit_bytes,
		.data = req->data + req->moved_bytes,
		.stable = req->op == NFSIO_WRITE,
	};
	if (wire_send(&io->wire, &req->call) < 0)
		io->broken = true; /* the request counts as in flight until the connection is thrown away */
	return 0;
}

/* An answer to a call of nfsio_look(): it says nothing about the file that is open. */
static void wire_answered_elsewhere(struct nfsio *io, struct nfsio_req *req, const struct wire_answer *answer)
{
	if (answer->status != NFS3_OK) {
		note_refused_elsewhere3(io, req, (int)answer->status);
	} else if (answer->call->procedure == WIRE_LOOKUP) {
		io->useful = true;
		io->directory_seeks = 0;
		req->found->length_bytes = answer->handle_bytes;
		memcpy(req->found->bytes, answer->handle, answer->handle_bytes);
		req_finish(&io->inflight, req, 0);
	} else {
		note_moved(io, req, answer->count_bytes, answer->end_of_file);
	}
}

/* An answer was received. */
static void wire_answered(struct nfsio *io, const struct wire_answer *answer)
{
	struct nfsio_req *req = (struct nfsio_req *)((char *)answer->call - offsetof(struct nfsio_req, call));

	if (req->handle != NULL) {
		wire_answered_elsewhere(io, req, answer);
		return;
	}
	if (answer->has_size_before)
		note_size(io, answer->size_before_bytes);
	if (answer->has_attributes) {
		note_size(io, answer->size_bytes);
		note_links(io, answer->links);
	}
	if (answer->count_bytes > answer->call->length_bytes)
		io->broken = true; /* the connection is out of step: no server moves more than it was asked to */
	else if (answer->status != NFS3_OK)
		note_refused3(io, req, (int)answer->status);
	else if (answer->call->procedure == WIRE_READ)
		note_moved(io, req, answer->count_bytes, answer->end_of_file);
	else if (answer->call->procedure == WIRE_WRITE)
		note_written3(io, req, answer->count_bytes, answer->stable, answer->verifier);
	else
		note_committed3(io, req, answer->verifier);
}

static void serve_wire(struct nfsio *io, short revents)
{
	struct wire_answer answer;
	int status = 1;

	io->wire.has_received = false; /* answers from while it was being made do not count */
	if (revents & POLLOUT && wire_flush(&io->wire) < 0)
		io->broken = true;
	while (!io->broken && (status = wire_receive(&io->wire, &answer)) > 0)
		wire_answered(io, &answer);
	if (io->wire.has_received)
		note_received(io);
	if (status < 0)
		io->broken = true;
	if (status == -EPROTO || status == -EACCES)
		io->refused = status;
}

static bool has_room(const struct nfsio *io)
{
	return wire_has_room(&io->wire);
}

static int send_null(struct nfsio *io)
{
	if (wire_send_null(&io->wire) < 0)
		io->broken = true;
	return io->broken;
}

static int socket_of(const struct nfsio *io)
{
	return io->wire.fd;
}

static short events_of(const struct nfsio *io)
{
	return wire_has_room(&io->wire) ? POLLIN : POLLIN | POLLOUT;
}

static void close_wire(struct nfsio *io)
{
	wire_close(&io->wire);
}

const struct transport transport_wire = {
	.issue = issue_on_wire,
	.has_room = has_room,
	.push = NULL,
	.send_null = send_null,
	.socket = socket_of,
	.events = events_of,
	.serve = serve_wire,
	.close = close_wire,
};
