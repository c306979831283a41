/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * struct transport over libnfs. NFSv3 with raw calls, so that the status and the stability of each are seen as the
 * server sent them; NFSv4 with libnfs's file API, which hides the state that NFSv4 needs.
 */
#include "nfs/internal.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

static void note_attributes3(struct nfsio *io, const post_op_attr *attributes)
{
	if (!attributes->attributes_follow)
		return;
	note_size(io, attributes->post_op_attr_u.attributes.size);
	note_links(io, attributes->post_op_attr_u.attributes.nlink);
}

/* The file before and after a write: the write may have made a truncated file long again. */
static void note_wcc3(struct nfsio *io, const wcc_data *wcc)
{
	if (wcc->before.attributes_follow)
		note_size(io, wcc->before.pre_op_attr_u.attributes.size);
	note_attributes3(io, &wcc->after);
}

static void read3_done(struct rpc_context *rpc, int status, void *data, void *arg)
{
	struct nfsio_req *req = arg;
	struct nfsio *io = req->io;
	READ3res *res = data;

	if (!counts_as_answer(io, status))
		return;
	if (res->status != NFS3_OK) {
		note_refused3(io, req, (int)res->status);
		return;
	}
	READ3resok *ok = &res->READ3res_u.resok;
	uint32_t count = ok->count;

	note_attributes3(io, &ok->file_attributes);
	if (!DATA_LANDS_IN_PLACE) {
		if (count > ok->data.data_len)
			count = ok->data.data_len;
		if (count <= req->length_bytes - req->moved_bytes)
			memcpy(req->data + req->moved_bytes, ok->data.data_val, count);
	}
	note_moved(io, req, count, ok->eof);
}

static uint64_t verifier_of(const char *bytes)
{
	uint64_t verifier;

	memcpy(&verifier, bytes, sizeof(verifier)); /* opaque: only ever compared */
	return verifier;
}

static void write3_done(struct rpc_context *rpc, int status, void *data, void *arg)
{
	struct nfsio_req *req = arg;
	struct nfsio *io = req->io;
	WRITE3res *res = data;

	if (!counts_as_answer(io, status))
		return;
	if (res->status != NFS3_OK) {
		note_refused3(io, req, (int)res->status);
		return;
	}
	WRITE3resok *ok = &res->WRITE3res_u.resok;

	note_wcc3(io, &ok->file_wcc);
	note_written3(io, req, ok->count, ok->committed == FILE_SYNC, verifier_of(ok->verf));
}

static void commit3_done(struct rpc_context *rpc, int status, void *data, void *arg)
{
	struct nfsio_req *req = arg;
	struct nfsio *io = req->io;
	COMMIT3res *res = data;

	if (!counts_as_answer(io, status))
		return;
	if (res->status != NFS3_OK) {
		note_refused3(io, req, (int)res->status);
		return;
	}
	note_committed3(io, req, verifier_of(res->COMMIT3res_u.resok.verf));
}

static void refused4(struct nfsio *io, struct nfsio_req *req, int error)
{
	enum verdict4 verdict = error == -EAGAIN ? NOT_NOW4 : verdict4(io->nfs);

	if (verdict == STATE_FORGOTTEN4 || error == -ESTALE) {
		io->broken = true; /* a new context opens the file again */
		return;
	}
	io->useful = true;
	if (verdict == NOT_NOW4)
		try_later(io, &io->inflight, req);
	else
		note_refused(io, req, verdict == OVER_QUOTA4 ? -EDQUOT : error);
}

static void file_call_done(int error, struct nfs_context *nfs, void *data, void *arg)
{
	struct nfsio_req *req = arg;
	struct nfsio *io = req->io;

	if (!counts_as_answer(io, is_transport_error(error) ? RPC_STATUS_ERROR : RPC_STATUS_SUCCESS))
		return;
	if (error < 0) {
		refused4(io, req, error);
	} else {
		uint32_t count = (uint32_t)error;

		if (!DATA_LANDS_IN_PLACE && req->op == NFSIO_READ && count <= req->length_bytes - req->moved_bytes)
			memcpy(req->data + req->moved_bytes, data, count);
		req->stable = true; /* the file was opened with O_SYNC */
		/* the file API does not report the end of the file: a read that moves nothing has met it */
		note_moved(io, req, count, req->op == NFSIO_READ && count == 0);
	}
}

static int issue(struct nfsio *io, struct nfsio_req *req)
{
	uint64_t offset = req->offset_bytes + req->moved_bytes;
	uint32_t length = req->length_bytes - req->moved_bytes;
	uint8_t *data = req->data + req->moved_bytes;

	assert(req->handle == NULL); /* nfsio_look() asks nfsio_has_names() */
	if (io->version != 3)
		return (req->op == NFSIO_READ ? call_pread : call_pwrite)(io->nfs, io->fh, data, length, offset,
									  file_call_done, req);
	if (req->op == NFSIO_READ) {
		READ3args args = { .file = io->fh3, .offset = offset, .count = length };

		return call_read3(nfs_get_rpc_context(io->nfs), read3_done, data, length, &args, req);
	}
	if (req->op == NFSIO_COMMIT) {
		COMMIT3args args = { .file = io->fh3 };

		return call_commit3(nfs_get_rpc_context(io->nfs), commit3_done, &args, req);
	}
	WRITE3args args = { .file = io->fh3, .offset = offset, .count = length };

	args.stable = req->op == NFSIO_WRITE ? FILE_SYNC : UNSTABLE;
	args.data.data_len = length;
	args.data.data_val = (char *)data;
	return call_write3(nfs_get_rpc_context(io->nfs), write3_done, &args, req);
}

static bool has_room(const struct nfsio *io)
{
	return true;
}

static void push(struct nfsio *io)
{
	if (nfs_which_events(io->nfs) & POLLOUT && nfs_service(io->nfs, POLLOUT) < 0)
		io->broken = true;
}

static void null_done(struct rpc_context *rpc, int status, void *data, void *arg)
{
	counts_as_answer(arg, status); /* which is all that was asked */
}

static int send_null(struct nfsio *io)
{
	return call_null(nfs_get_rpc_context(io->nfs), io->version, null_done, io);
}

static int socket_of(const struct nfsio *io)
{
	return nfs_get_fd(io->nfs);
}

static short events_of(const struct nfsio *io)
{
	return (short)nfs_which_events(io->nfs);
}

static void serve(struct nfsio *io, short revents)
{
	if (nfs_service(io->nfs, revents) < 0)
		io->broken = true;
}

static void close_context(struct nfsio *io)
{
	for (struct name_op *op = io->name_ops; op != NULL; op = op->next)
		if (op->fh != NULL)
			nfs_close_async(io->nfs, op->fh, libnfs_ignore, NULL);
	libnfs_destroy(io->nfs, io->fh);
	io->nfs = NULL;
	io->fh = NULL;
}

const struct transport transport_libnfs = {
	.issue = issue,
	.has_room = has_room,
	.push = push,
	.send_null = send_null,
	.socket = socket_of,
	.events = events_of,
	.serve = serve,
	.close = close_context,
};
