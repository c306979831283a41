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

/* At most a page of a file. */
static void step_read3_done(struct rpc_context *rpc, int status, void *data, void *arg)
{
	struct step *step = arg;
	READ3res *res = data;

	step->done = true;
	step->error = -EIO;
	if (status != RPC_STATUS_SUCCESS || res->status != NFS3_OK)
		return;
	step->error = 0;
	step->count = res->READ3res_u.resok.count;
	if (!DATA_LANDS_IN_PLACE && step->count <= SAMPLE_BYTES && step->count <= res->READ3res_u.resok.data.data_len)
		memcpy(step->page, res->READ3res_u.resok.data.data_val, step->count);
}

static void step_pread_done(int error, struct nfs_context *nfs, void *data, void *arg)
{
	struct step *step = arg;

	step->done = true;
	step->error = error < 0 ? error : 0;
	step->count = error < 0 ? 0 : (uint32_t)error;
	if (!DATA_LANDS_IN_PLACE && step->count <= SAMPLE_BYTES && error > 0)
		memcpy(step->page, data, step->count);
}

static bool has_same_handle(const struct nfsio *io, const struct connection *made)
{
	return made->place.handle_bytes > 0 && made->place.handle_bytes == io->place.handle_bytes &&
	       memcmp(made->place.handle, io->place.handle, made->place.handle_bytes) == 0;
}

static int read_sample(struct nfsio *io, const struct connection *made, uint64_t offset, uint8_t *page)
{
	struct step *step = new_step(io);
	int error = -EIO;

	if (made->nfs == NULL)
		return read_page_by_wire(io, made, offset, page, SAMPLE_BYTES);
	step->page = page;
	if (io->version == 3) {
		READ3args args = { .file = made->fh3, .offset = offset, .count = SAMPLE_BYTES };

		if (call_read3(nfs_get_rpc_context(made->nfs), step_read3_done, page, SAMPLE_BYTES, &args, step) == 0)
			error = pump(io, made->nfs, step, made->deadline_ms);
	} else if (call_pread(made->nfs, made->fh, page, SAMPLE_BYTES, offset, step_pread_done, step) == 0) {
		error = pump(io, made->nfs, step, made->deadline_ms);
	}
	return error != 0 ? error : step->count == SAMPLE_BYTES ? 0 : -ENODATA;
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
	unsigned known, right;  /* pages that were compared, and those that are as they should be */
	uint64_t offsets[SAMPLES]; /* of the pages that were compared */
};

/* The same page may be named several times, when few are known. */
static bool was_compared(const struct samples *samples, uint64_t offset)
{
	for (unsigned i = 0; i < samples->known; i++)
		if (samples->offsets[i] == offset)
			return true;
	return false;
}

/* Compare the file with what is known of its bytes. Returns 0, or -errno when that could not be done. */
static int compare_samples(struct nfsio *io, const struct connection *made, struct samples *found)
{
	const struct nfsio_samples *samples = io->options.samples;

	*found = (struct samples){ 0 };
	for (unsigned number = 0; number < SAMPLES; number++) {
		uint64_t offset;
		uint64_t proof;
		int right;

		if (samples == NULL || !samples->choose(io->options.sample_context, number, &offset, &proof))
			break;
		if (was_compared(found, offset))
			continue;
		right = is_sample_right(io, made, offset, proof);
		if (right < 0)
			return right;
		found->offsets[found->known++] = offset;
		found->right += (unsigned)right;
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
 * Returns 1, 0, or -errno when that could not be found out.
 */
int is_same_file(struct nfsio *io, const struct connection *made)
{
	bool same_number = made->st.fileid == io->fileid;
	struct samples found;
	int error;

	if (same_number && made->fsid == io->fsid && has_same_handle(io, made))
		return 1;
	if (made->st.size_bytes < io->opened.size_bytes)
		return 0;
	error = compare_samples(io, made, &found);
	if (error != 0)
		return error;
	if (same_number)
		return found.known == 0 || found.right > 0;
	return found.right >= SURE_SAMPLES && found.right == found.known;
}
