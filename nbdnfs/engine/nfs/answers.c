/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the server's answers to READ, WRITE and COMMIT mean, whichever transport has received them. */
#include "nfs/internal.h"

#include "base/log.h"

#include <errno.h>
#include <string.h>

/* A read that is refused is logged, unless another was within this time. */
#define REFUSAL_LOG_MS 60000
/* So often a READ is asked again that met the end of the file before its own. */
#define ENDS_MAX 2
/* A write that the server has so often carried out in pieces under several verifiers asks for FILE_SYNC. */
#define RESTARTS_MAX 4
/* The directory is not sought again sooner, because that costs the connection: where it was found, and where not. */
#define SEEK_AGAIN_MS 1000
#define SEEK_IN_VAIN_MS 30000
/* So often it is sought although it was found, because the server calls the new handle stale as well. */
#define SEEKS_IN_ROW 3

/*
 * How long a READ that was refused with `error` is retried; UINT32_MAX: for ever. A denied permission is usually a
 * mistake in the server's configuration, which an administrator needs time to see and correct. A disk error stays.
 */
static uint32_t refusal_limit_ms(const struct nfsio *io, int error)
{
	if (io->options.soft_limit_ms > 0 || (error != -EACCES && error != -EPERM))
		return io->options.refused_read_ms;
	return io->options.gone_limit_ms > 0 ? io->options.gone_limit_ms : UINT32_MAX;
}

static void log_refusal(const struct nfsio *io, int error, uint32_t limit_ms)
{
	if (limit_ms == UINT32_MAX)
		log_line("server %s: it refuses to read (%s): asking again until it does not; mend that on the server",
			 io->address, strerror(-error));
	else
		log_line("server %s: it refuses to read (%s): asking again for %u s, and then a program that needs "
			 "such a page gets an I/O error; mend that on the server",
			 io->address, strerror(-error), limit_ms / 1000);
}

/*
 * The server has refused a request with `error`. A READ is asked again for a while, whatever the reason: an export, a
 * disk or a name service may not be there for a moment, and an error ends the process whose page it was. That time
 * begins again with each connection, and silence is not part of it.
 */
void note_refused(struct nfsio *io, struct nfsio_req *req, int error)
{
	uint32_t limit_ms = refusal_limit_ms(io, error);

	if (req->op != NFSIO_READ || req->handle != NULL || io->options.refused_read_ms == 0) {
		req_finish(&io->inflight, req, error);
		return;
	}
	if (req->refused.last_ms < io->connected_at_ms) {
		int64_t now = now_ms();

		req->refused = (struct nfsio_told){ 0 };
		if (io->refusal_told_ms == 0 || now - io->refusal_told_ms > REFUSAL_LOG_MS)
			log_refusal(io, error, limit_ms);
		io->refusal_told_ms = now;
	}
	if (note_told(&req->refused) < limit_ms)
		try_later(io, &io->inflight, req);
	else
		req_finish(&io->inflight, req, error);
}

/* `count` more bytes of an issued request have moved. */
void note_moved(struct nfsio *io, struct nfsio_req *req, uint32_t count, bool end_of_file)
{
	assert(req->moved_bytes <= req->length_bytes);
	if (count > req->length_bytes - req->moved_bytes) {
		io->broken = true; /* the connection is out of step: no server answers that */
		return;
	}
	io->useful = true;
	req->moved_bytes += count;
	/* the device ends where the file does: one answer is not enough for an error to the reader */
	if (end_of_file && req->moved_bytes < req->length_bytes && req->handle == NULL && req->ends < ENDS_MAX) {
		req->ends++;
		req->moved_bytes = 0; /* nor is the rest of it to be believed */
		req_list_remove(&io->inflight, req);
		req_list_push(&io->pending, req);
	} else if (req->moved_bytes == req->length_bytes || end_of_file) {
		req_finish(&io->inflight, req, 0);
	} else if (count == 0) {
		note_refused(io, req, -EIO); /* neither bytes nor the end: asking at once might never end */
	} else {
		req_list_remove(&io->inflight, req);
		req_list_push(&io->pending, req); /* a short transfer: ask for the rest */
	}
}

static bool is_worth_seeking(const struct nfsio *io)
{
	return io->directory_found && io->directory_seeks < SEEKS_IN_ROW;
}

/*
 * The handle of the URL's directory is stale, or not known: have it found by its name, over a new connection. Returns
 * false when that was done not long ago.
 */
bool seek_directory(struct nfsio *io)
{
	int64_t now = now_ms();

	if (io->directory_sought_ms != 0 &&
	    now - io->directory_sought_ms < (is_worth_seeking(io) ? SEEK_AGAIN_MS : SEEK_IN_VAIN_MS))
		return false;
	io->directory_seeks = io->directory_seeks < SEEKS_IN_ROW ? io->directory_seeks + 1 : 1;
	io->directory_sought_ms = now;
	io->directory_found = false;
	io->directory_is_stale = true;
	io->broken = true;
	return true;
}

/* A call on another file than the one that is open: a stale handle is its caller's, but for that of the directory. */
void note_refused_elsewhere3(struct nfsio *io, struct nfsio_req *req, int status)
{
	bool stale = status == NFS3ERR_STALE || status == NFS3ERR_BADHANDLE;

	io->useful = true;
	if (stale && req->op == NFSIO_LOOKUP && seek_directory(io))
		return; /* it goes over the new connection, with the new handle */
	if (status == NFS3ERR_JUKEBOX || (stale && req->op == NFSIO_LOOKUP && is_worth_seeking(io)))
		try_later(io, &io->inflight, req);
	else if (stale)
		req_finish(&io->inflight, req, -ESTALE);
	else if (status == NFS3ERR_DQUOT)
		note_refused(io, req, -EDQUOT); /* -ERANGE to libnfs (nfsstat3_to_errno) */
	else
		note_refused(io, req, nfsstat3_to_errno(status) < 0 ? nfsstat3_to_errno(status) : -EIO);
}

void note_refused3(struct nfsio *io, struct nfsio_req *req, int status)
{
	if (status == NFS3ERR_STALE || status == NFS3ERR_BADHANDLE)
		io->broken = true; /* a new context looks the file up again */
	else
		note_refused_elsewhere3(io, req, status);
}

/* An answer says how large the file is. */
void note_size(struct nfsio *io, uint64_t bytes)
{
	if (io->opened_once && bytes < io->opened.size_bytes && bytes < atomic_load(&io->truncated_bytes))
		atomic_store(&io->truncated_bytes, bytes);
}

/* An answer says how many names the file has. The last one counts: an earlier one may have been wrong. */
void note_links(struct nfsio *io, uint32_t links)
{
	if (atomic_load_explicit(&io->unlinked, memory_order_relaxed) != (links == 0))
		atomic_store(&io->unlinked, links == 0);
}

void note_heard(struct nfsio *io, int64_t at_ms)
{
	io->last_received_ms = at_ms;
	if (io->noted_received_ms != NULL)
		atomic_store_explicit(io->noted_received_ms, (uint64_t)at_ms, memory_order_relaxed);
}

void note_received(struct nfsio *io)
{
	note_heard(io, now_ms());
	io->silent_since_ms = io->last_received_ms;
}

/* Did this answer come from the server, over the context in use? */
bool counts_as_answer(struct nfsio *io, int rpc_status)
{
	if (io->discarding)
		return false;
	if (rpc_status != RPC_STATUS_SUCCESS) {
		io->broken = true;
		return false;
	}
	note_received(io);
	return true;
}

/*
 * A verifier says what the server has lost, and not of which file. What was written UNSTABLE by another handle may lie
 * in another file, which a COMMIT by this one does not cover although the server has not restarted.
 */
static uint64_t verifier_of(const struct nfsio *io, uint64_t verifier)
{
	return verifier ^ io->handles * 0x9e3779b97f4a7c15u;
}

/*
 * A short WRITE is followed by others for the rest, and the server may restart between two of the pieces. What it had
 * answered UNSTABLE or DATA_SYNC before is lost then, whatever it says of the pieces after: the write is done only when
 * all of its pieces that are not FILE_SYNC have one verifier, and no piece has come under another one since the first
 * of those. It is stable when all are FILE_SYNC, under whatever verifiers; else it has the verifier of those that are
 * not, and a COMMIT decides. Otherwise all of it is sent again.
 */
void note_written3(struct nfsio *io, struct nfsio_req *req, uint32_t count, bool stable, uint64_t verifier)
{
	bool is_first = req->moved_bytes == 0;

	verifier = verifier_of(io, verifier);
	if (count > req->length_bytes - req->moved_bytes) {
		note_moved(io, req, count, false); /* out of step: nothing in that answer counts */
	} else if (req->op == NFSIO_WRITE && !stable) {
		req_finish(&io->inflight, req, -EPROTO); /* RFC 1813, 3.3.7: FILE_SYNC is answered with FILE_SYNC */
	} else if (!is_first && !req->stable && verifier != req->verifier) {
		req->moved_bytes = 0; /* the server restarted between the pieces */
		if (++req->restarts >= RESTARTS_MAX)
			req->op = NFSIO_WRITE; /* or it changes its verifier each time: FILE_SYNC needs none */
		req_list_remove(&io->inflight, req);
		req_list_push(&io->pending, req);
	} else {
		req->stable = stable && (is_first || req->stable);
		req->verifier = verifier;
		note_moved(io, req, count, false);
	}
}

void note_committed3(struct nfsio *io, struct nfsio_req *req, uint64_t verifier)
{
	req->verifier = verifier_of(io, verifier);
	req_finish(&io->inflight, req, 0);
}
