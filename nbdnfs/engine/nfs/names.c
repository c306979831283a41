/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Operations on names, and on small files beside the backing file. Each fails when its connection breaks. */
#include "nfs/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

void name_op_finish(struct name_op *op, int error, const char *text)
{
	struct name_op **at = &op->io->name_ops;

	assert_locked(&op->io->lock);
	assert(!op->done && op->io->detached > 0);
	while (*at != op) {
		assert(*at != NULL);
		at = &(*at)->next;
	}
	*at = op->next;
	op->done = true;
	op->io->detached--;
	set_failure(op->why, NFSIO_NAME, error, text);
	pthread_cond_signal(&op->finished);
}

static void name_op_done(int error, struct nfs_context *nfs, void *data, void *arg)
{
	struct name_op *op = arg;

	if (op->io->discarding)
		return; /* discard() finishes it */
	note_received(op->io);
	if (is_transport_error(error))
		op->io->broken = true;
	else if (error < 0)
		name_op_finish(op, error, nfs_get_error(nfs));
	else {
		if (op->st != NULL)
			copy_stat(op->st, data);
		name_op_finish(op, 0, NULL);
	}
}

/* nfsio_look(), step by step: open, read, write if wanted, close. Each is the callback of the one before. */

static void look_closed(int error, struct nfs_context *nfs, void *data, void *arg)
{
	struct name_op *op = arg;

	if (!op->io->discarding)
		name_op_finish(op, op->look_error, op->look_error != 0 ? strerror(-op->look_error) : NULL);
}

static void look_close(struct name_op *op, struct nfs_context *nfs, int error)
{
	struct nfsfh *fh = op->fh;

	op->look_error = error;
	op->fh = NULL;
	if (nfs_close_async(nfs, fh, look_closed, op) != 0)
		op->io->broken = true;
}

/* Did a step have a result? discard() finishes operations whose connection broke. */
static bool look_goes_on(struct name_op *op, int error)
{
	if (op->io->discarding)
		return false;
	if (is_transport_error(error))
		op->io->broken = true;
	return !is_transport_error(error);
}

static void look_written(int error, struct nfs_context *nfs, void *data, void *arg)
{
	struct name_op *op = arg;

	if (!look_goes_on(op, error))
		return;
	op->look->changed = error == (int)op->look->change_bytes;
	look_close(op, nfs, op->look->changed ? 0 : error < 0 ? error : -EIO);
}

static void look_read(int error, struct nfs_context *nfs, void *data, void *arg)
{
	struct name_op *op = arg;
	struct nfsio_look *look = op->look;

	if (!look_goes_on(op, error))
		return;
	if (error < 0 || (uint32_t)error > look->room_bytes) {
		look_close(op, nfs, error < 0 ? error : -EPROTO);
		return;
	}
	look->found_bytes = (uint32_t)error;
	if (!DATA_LANDS_IN_PLACE)
		memcpy(look->data, data, look->found_bytes);
	if (look->wants_change == NULL || !look->wants_change(look))
		look_close(op, nfs, 0);
	else if (call_pwrite(nfs, op->fh, (void *)(uintptr_t)look->change, look->change_bytes, look->change_offset,
			     look_written, op) != 0)
		look_close(op, nfs, -ENOMEM);
}

static void look_opened(int error, struct nfs_context *nfs, void *data, void *arg)
{
	struct name_op *op = arg;

	if (!look_goes_on(op, error))
		return;
	if (error < 0) {
		name_op_finish(op, error, nfs_get_error(nfs));
		return;
	}
	op->fh = data;
	if (call_pread(nfs, op->fh, op->look->data, op->look->room_bytes, 0, look_read, op) != 0)
		look_close(op, nfs, -ENOMEM);
}

enum name_call { CALL_STAT, CALL_LSTAT, CALL_FSTAT, CALL_LINK, CALL_RENAME, CALL_UNLINK, CALL_LOOK };

static int name_call(struct nfsio *io, enum name_call call, const char *path, const char *new_path,
		     struct nfsio_stat *st, struct nfsio_look *look, struct nfsio_failure *why)
{
	struct name_op op = { .io = io, .why = why, .st = st, .look = look };
	char full[2][4096];
	int status = -ENOTCONN;

	set_failure(why, NFSIO_NAME, -ENAMETOOLONG, NULL);
	if (snprintf(full[0], sizeof(full[0]), "%s%s", io->prefix, path != NULL ? path : "") >= (int)sizeof(full[0]) ||
	    snprintf(full[1], sizeof(full[1]), "%s%s", io->prefix, new_path != NULL ? new_path : "") >=
		    (int)sizeof(full[1]))
		return -ENAMETOOLONG;
	if (!nfsio_has_names(io)) {
		set_failure(why, NFSIO_NAME, -EOPNOTSUPP, NULL);
		return -EOPNOTSUPP;
	}
	pthread_cond_init(&op.finished, NULL);
	pthread_mutex_lock(&io->lock);
	if (io->nfs != NULL && !io->broken) {
		if (io->inflight.head == NULL && io->name_ops == NULL)
			io->silent_since_ms = now_ms();
		op.next = io->name_ops;
		io->name_ops = &op;
		io->detached++;
		switch (call) {
		case CALL_STAT:
			status = nfs_stat64_async(io->nfs, full[0], name_op_done, &op);
			break;
		case CALL_LSTAT:
			status = nfs_lstat64_async(io->nfs, full[0], name_op_done, &op);
			break;
		case CALL_FSTAT:
			status = nfs_fstat64_async(io->nfs, io->fh, name_op_done, &op);
			break;
		case CALL_LINK:
			status = nfs_link_async(io->nfs, full[0], full[1], name_op_done, &op);
			break;
		case CALL_RENAME:
			status = nfs_rename_async(io->nfs, full[0], full[1], name_op_done, &op);
			break;
		case CALL_UNLINK:
			status = nfs_unlink_async(io->nfs, full[0], name_op_done, &op);
			break;
		case CALL_LOOK:
			status = nfs_open_async(io->nfs, full[0], look->wants_change != NULL ? O_RDWR : O_RDONLY,
						look_opened, &op);
			break;
		}
		if (status != 0 && !op.done)
			name_op_finish(&op, status < 0 ? status : -EIO, nfs_get_error(io->nfs));
		wake_io_thread(io);
		while (!op.done)
			pthread_cond_wait(&op.finished, &io->lock);
	} else {
		set_failure(why, NFSIO_NAME, status, "there is no connection to the server");
	}
	pthread_mutex_unlock(&io->lock);
	pthread_cond_destroy(&op.finished);
	return why->error;
}

int nfsio_stat(struct nfsio *io, const char *path, struct nfsio_stat *st, struct nfsio_failure *why)
{
	return name_call(io, CALL_STAT, path, NULL, st, NULL, why);
}

int nfsio_lstat(struct nfsio *io, const char *path, struct nfsio_stat *st, struct nfsio_failure *why)
{
	return name_call(io, CALL_LSTAT, path, NULL, st, NULL, why);
}

int nfsio_fstat(struct nfsio *io, struct nfsio_stat *st, struct nfsio_failure *why)
{
	return name_call(io, CALL_FSTAT, NULL, NULL, st, NULL, why);
}

int nfsio_link(struct nfsio *io, const char *old_path, const char *new_path, struct nfsio_failure *why)
{
	return name_call(io, CALL_LINK, old_path, new_path, NULL, NULL, why);
}

int nfsio_rename(struct nfsio *io, const char *old_path, const char *new_path, struct nfsio_failure *why)
{
	return name_call(io, CALL_RENAME, old_path, new_path, NULL, NULL, why);
}

int nfsio_unlink(struct nfsio *io, const char *path, struct nfsio_failure *why)
{
	return name_call(io, CALL_UNLINK, path, NULL, NULL, NULL, why);
}

int nfsio_look(struct nfsio *io, const char *path, struct nfsio_look *look, struct nfsio_failure *why)
{
	look->found_bytes = 0;
	look->changed = false;
	return name_call(io, CALL_LOOK, path, NULL, NULL, look, why);
}
