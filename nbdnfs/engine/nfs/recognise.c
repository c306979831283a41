/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* After a reconnect: is the file that has the name now the file that was opened? */
#include "nfs/connecting.h"

#include <errno.h>
#include <string.h>

/* How many pages are compared to recognise the file. */
#define SAMPLES 8
/* So many that match, and none that does not, are more than a file number can say. */
#define SURE_SAMPLES 2
#define SAMPLE_BYTES 4096
/* A page that is not right is read so often: one wrong READ does not make it another file. */
#define SAMPLE_TRIES 3

/* The server's answer to a READ: `count` bytes, of which `data` has `length`, in place or to be copied. */
static void take_read(struct step *step, uint64_t count, const void *data, uint64_t length)
{
	if (count > step->room || (!DATA_LANDS_IN_PLACE && count > length)) {
		step->error = -EPROTO;
		return;
	}
	step->error = 0;
	step->count = (uint32_t)count;
	if (!DATA_LANDS_IN_PLACE && count > 0)
		memcpy(step->data_read, data, count);
}

/*
 * -EIO is the server's word for a page that it cannot read, which says nothing of the others; any other error is of the
 * connection, or of the whole file.
 */
static void step_read3_done(struct rpc_context *rpc, int status, void *data, void *arg)
{
	struct step *step = arg;
	READ3res *res = data;

	step->done = true;
	step->error = -ENOTCONN;
	if (status != RPC_STATUS_SUCCESS)
		return;
	if (res->status == NFS3_OK) {
		const READ3resok *ok = &res->READ3res_u.resok;

		take_read(step, ok->count, ok->data.data_val, ok->data.data_len);
		return;
	}
	step->error = res->status == NFS3ERR_JUKEBOX ? -EAGAIN : nfsstat3_to_errno((int)res->status);
	if (step->error >= 0)
		step->error = -EIO;
}

static void step_pread_done(int error, struct nfs_context *nfs, void *data, void *arg)
{
	struct step *step = arg;

	step->done = true;
	if (error >= 0)
		take_read(step, (uint64_t)error, data, (uint64_t)error);
	else
		step->error = verdict4(nfs) == NOT_NOW4 ? -EAGAIN : error;
}

static bool has_same_handle(const struct nfsio *io, const struct connection *made)
{
	return made->place.handle_bytes > 0 && made->place.handle_bytes == io->place.handle_bytes &&
	       memcmp(made->place.handle, io->place.handle, made->place.handle_bytes) == 0;
}

/* One READ. Returns how many bytes it moved, or -errno. */
static int read_some(struct nfsio *io, const struct connection *made, uint64_t offset, uint8_t *data, uint32_t length)
{
	struct step *step = new_step(io);
	int error = -ENOTCONN;

	step->data_read = data;
	step->room = length;
	if (io->version == 3) {
		READ3args args = { .file = made->fh3, .offset = offset, .count = length };

		if (call_read3(nfs_get_rpc_context(made->nfs), step_read3_done, data, length, &args, step) == 0)
			error = pump(io, made->nfs, step, made->deadline_ms);
	} else if (call_pread(made->nfs, made->fh, data, length, offset, step_pread_done, step) == 0) {
		error = pump(io, made->nfs, step, made->deadline_ms);
	}
	return error != 0 ? error : (int)step->count;
}

/* A server may move less than it was asked for. Returns 0, -ENODATA or -errno. */
static int read_sample(struct nfsio *io, const struct connection *made, uint64_t offset, uint8_t *page)
{
	uint32_t done_bytes = 0;

	if (made->nfs == NULL)
		return read_page_by_wire(io, made, offset, page, SAMPLE_BYTES);
	while (done_bytes < SAMPLE_BYTES) {
		int moved = read_some(io, made, offset + done_bytes, page + done_bytes, SAMPLE_BYTES - done_bytes);

		if (moved <= 0)
			return moved < 0 ? moved : -ENODATA;
		done_bytes += (uint32_t)moved;
	}
	return 0;
}

/* Returns 1, 0 or -errno. A page beyond the end of the file is not right. */
static int is_sample_right(struct nfsio *io, const struct connection *made, uint64_t offset, uint64_t proof)
{
	for (unsigned number = 0; number < SAMPLE_TRIES; number++) {
		int error = read_sample(io, made, offset, io->options.sample_page);

		if (error != 0 && error != -ENODATA)
			return error;
		if (error == 0 && io->options.samples->is_right(io->options.sample_context, offset, proof,
								io->options.sample_page))
			return 1;
	}
	return 0;
}

struct samples {
	unsigned tried;         /* pages that the server was asked for */
	unsigned unreadable;    /* of these: it cannot read them */
	unsigned right;         /* of these: they are as they should be; all others are not */
	uint64_t offsets[SAMPLES]; /* of those that were tried */
};

/* The same page may be named several times, when few are known. */
static bool was_tried(const struct samples *samples, uint64_t offset)
{
	for (unsigned i = 0; i < samples->tried; i++)
		if (samples->offsets[i] == offset)
			return true;
	return false;
}

/*
 * Compare the file with what is known of its bytes, until `enough` pages are right. Returns 0, or -errno when that
 * could not be done.
 */
static int compare_samples(struct nfsio *io, const struct connection *made, unsigned enough, struct samples *found)
{
	const struct nfsio_samples *samples = io->options.samples;

	*found = (struct samples){ 0 };
	for (unsigned number = 0; number < SAMPLES && found->right < enough; number++) {
		uint64_t offset;
		uint64_t proof;
		int right;

		if (samples == NULL || !samples->choose(io->options.sample_context, number, &offset, &proof))
			break;
		if (was_tried(found, offset))
			continue;
		right = is_sample_right(io, made, offset, proof);
		if (right < 0 && right != -EIO)
			return right;
		found->offsets[found->tried++] = offset;
		found->unreadable += right < 0;
		found->right += right > 0;
	}
	return 0;
}

/*
 * Is this still the file that was opened first? Another file in its place must not be written to. A server may give the
 * same file another handle, another file system number (its disk has another number after a boot) or even another file
 * number (those of FUSE file systems do not outlive a boot); and file systems give a new file the number of one that
 * was deleted. So the bytes decide where anything differs:
 *
 * - the file number is the same: one page that matches is enough, since a server that lost some writes still has the
 *   file. Where no page is known, nothing can be overwritten that matters.
 * - it is not: several pages must match, and all that are known.
 *
 * A page that the server cannot read, from a bad sector perhaps, counts neither way.
 *
 * Returns 1, 0, or -errno when that could not be found out.
 */
int is_same_file(struct nfsio *io, const struct connection *made)
{
	bool same_number = made->st.fileid == io->fileid;
	struct samples found;
	unsigned wrong;
	int error;

	if (same_number && made->fsid == io->fsid && has_same_handle(io, made))
		return 1;
	if (made->st.size_bytes < io->opened.size_bytes)
		return 0;
	error = compare_samples(io, made, same_number ? 1 : SAMPLES, &found);
	if (error != 0)
		return error;
	wrong = found.tried - found.unreadable - found.right;
	if (same_number ? found.tried == 0 || found.right > 0 : found.right >= SURE_SAMPLES && wrong == 0)
		return 1;
	return found.unreadable > 0 && (same_number || wrong == 0) ? -EIO : 0;
}
