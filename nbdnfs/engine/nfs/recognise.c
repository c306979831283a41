/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* After a reconnect: is the file that has the name now the file that was opened? */
#include "nfs/internal.h"

#include "base/crc32c.h"

#include <errno.h>
#include <string.h>

/* How many pages are compared to recognise the file; one that matches is enough. */
#define SAMPLES 8
#define SAMPLE_BYTES 4096

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

void remember_handle(struct nfsio *io, const struct connection *made)
{
	const struct nfs_fh_bytes *bytes = (const struct nfs_fh_bytes *)nfs_get_fh(made->fh);

	if (bytes == NULL || bytes->len <= 0 || bytes->len > (int)sizeof(io->handle))
		return; /* without one, every later handle is another */
	io->handle_bytes = bytes->len;
	memcpy(io->handle, bytes->val, (size_t)bytes->len);
}

static bool has_same_handle(const struct nfsio *io, const struct connection *made)
{
	const struct nfs_fh_bytes *bytes = (const struct nfs_fh_bytes *)nfs_get_fh(made->fh);

	return bytes != NULL && bytes->len > 0 && bytes->len == io->handle_bytes &&
	       memcmp(bytes->val, io->handle, (size_t)bytes->len) == 0;
}

static int read_sample(struct nfsio *io, const struct connection *made, uint64_t offset, uint8_t *page)
{
	struct step *step = new_step(io);
	int error = -EIO;

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

/*
 * Does the file have the bytes that it should have? One page that matches is enough: a server that lost some writes
 * still has the file. Returns 1, 0, or -errno when that could not be found out.
 */
static int has_known_bytes(struct nfsio *io, const struct connection *made)
{
	nfsio_sample_fn sample;
	void *context;
	uint8_t *page;
	unsigned number;

	pthread_mutex_lock(&io->lock);
	sample = io->sample;
	context = io->sample_context;
	page = io->sample_page;
	pthread_mutex_unlock(&io->lock);
	for (number = 0; number < SAMPLES; number++) {
		uint64_t offset;
		uint32_t crc;
		int error;

		if (sample == NULL || !sample(context, number, &offset, &crc))
			break;
		error = read_sample(io, made, offset, page);
		if (error != 0 && error != -ENODATA)
			return error;
		if (error == 0 && crc32c(page, SAMPLE_BYTES) == crc)
			return 1;
	}
	return number == 0; /* no page is known: nothing can be overwritten that matters */
}

/*
 * Is this still the file that was opened first? Another file under its name must not be written to. The server may give
 * the same file another handle (its disk has another number after a boot), and file systems give a new file the number
 * of one that was deleted. Returns 1, 0, or -errno when that could not be found out.
 */
int is_same_file(struct nfsio *io, const struct connection *made)
{
	if (made->st.fileid != io->opened.fileid)
		return 0;
	if (has_same_handle(io, made))
		return 1;
	return made->st.size_bytes >= io->opened.size_bytes ? has_known_bytes(io, made) : 0;
}

void nfsio_recognise(struct nfsio *io, nfsio_sample_fn sample, void *context, uint8_t *page)
{
	pthread_mutex_lock(&io->lock);
	io->sample = sample;
	io->sample_context = context;
	io->sample_page = page;
	pthread_mutex_unlock(&io->lock);
}
