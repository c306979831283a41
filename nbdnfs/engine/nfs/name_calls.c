/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Operations on names over libnfs: calls and answers. */
#include "nfs/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

/*
 * The connection is given up for an operation that is not answered for so many times silence_ms. Some are several
 * calls, and the disks of a server may have to start first.
 */
#define NAME_REPEAT_FACTOR 2
/* A directory with more names is not one that files for swap lie in. */
#define NAMES_BYTES_MAX (64u << 20)

/* Did a call have a result? If not, the operation ends with the connection, or is sent again. */
static bool has_result(struct name_op *op, struct nfs_context *nfs, int error)
{
	if (op->io->discarding)
		return false; /* name_ops_interrupted() sees to it */
	if (is_transport_error(error) || (error < 0 && verdict4(nfs) == STATE_FORGOTTEN4)) {
		op->io->broken = true;
		return false;
	}
	note_received(op->io);
	return true;
}

static bool is_put_off(struct nfs_context *nfs, int error)
{
	return error == -EAGAIN || (error < 0 && verdict4(nfs) == NOT_NOW4);
}

/* Returns 0, -EFBIG or -ENOMEM. */
static int copy_names(struct nfsio_names *names, struct nfs_context *nfs, struct nfsdir *directory)
{
	const struct nfsdirent *entry;
	size_t room_bytes = 0;

	while ((entry = nfs_readdir(nfs, directory)) != NULL) {
		size_t bytes = strlen(entry->name) + 1;

		if (strcmp(entry->name, ".") == 0 || strcmp(entry->name, "..") == 0)
			continue;
		if (names->length_bytes + bytes > NAMES_BYTES_MAX)
			return -EFBIG;
		if (names->length_bytes + bytes > room_bytes) {
			char *text = realloc(names->text, room_bytes = 2 * (names->length_bytes + bytes));

			if (text == NULL)
				return -ENOMEM;
			names->text = text;
		}
		memcpy(names->text + names->length_bytes, entry->name, bytes);
		names->length_bytes += bytes;
	}
	return 0;
}

/* Returns 0, -EFBIG or -ENOMEM. */
static int take_names(struct nfsio_names *names, struct nfs_context *nfs, struct nfsdir *directory)
{
	int error = copy_names(names, nfs, directory);

	nfs_closedir(nfs, directory);
	if (error != 0) {
		free(names->text);
		*names = (struct nfsio_names){ 0 };
	}
	return error;
}

static void take_space(struct nfsio_space *space, const struct nfs_statvfs_64 *found)
{
	space->total_bytes = found->f_blocks * found->f_frsize;
	space->available_bytes = found->f_bavail * found->f_frsize;
}

/* Returns 0 or -errno. `data` is libnfs's. */
static int take_result(struct name_op *op, struct nfs_context *nfs, void *data)
{
	switch (op->call) {
	case CALL_STAT:
	case CALL_LSTAT:
	case CALL_FSTAT:
		copy_stat(op->argument, data);
		return 0;
	case CALL_SPACE:
		take_space(op->argument, data);
		return 0;
	case CALL_LIST:
		return take_names(op->argument, nfs, data);
	default:
		return 0;
	}
}

static void name_op_done(int error, struct nfs_context *nfs, void *data, void *arg)
{
	struct name_op *op = arg;

	if (!has_result(op, nfs, error))
		return;
	if (is_put_off(nfs, error)) {
		name_op_put_off(op);
	} else if (error < 0) {
		name_op_finish(op, error, nfs_get_error(nfs));
	} else {
		name_op_finish(op, take_result(op, nfs, data), NULL);
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

static void look_written(int error, struct nfs_context *nfs, void *data, void *arg)
{
	struct name_op *op = arg;

	if (!has_result(op, nfs, error))
		return;
	op->look->changed = error == (int)op->look->change_bytes;
	look_close(op, nfs, op->look->changed ? 0 : error < 0 ? error : -EIO);
}

static void look_read(int error, struct nfs_context *nfs, void *data, void *arg)
{
	struct name_op *op = arg;
	struct nfsio_look *look = op->look;

	if (!has_result(op, nfs, error))
		return;
	if (error < 0 || (uint32_t)error > look->room_bytes) {
		look_close(op, nfs, error < 0 ? error : -EPROTO);
		return;
	}
	look->found_bytes = (uint32_t)error;
	if (!DATA_LANDS_IN_PLACE)
		memcpy(look->data, data, look->found_bytes);
	look->step = "WRITE";
	if (look->wants_change == NULL || !look->wants_change(look))
		look_close(op, nfs, 0);
	else if (call_pwrite(nfs, op->fh, (void *)(uintptr_t)look->change, look->change_bytes, look->change_offset,
			     look_written, op) != 0)
		look_close(op, nfs, -ENOMEM);
}

static void look_opened(int error, struct nfs_context *nfs, void *data, void *arg)
{
	struct name_op *op = arg;

	if (!has_result(op, nfs, error))
		return;
	if (error < 0) {
		name_op_finish(op, error, nfs_get_error(nfs));
		return;
	}
	op->fh = data;
	op->look->step = "READ";
	if (call_pread(nfs, op->fh, op->look->data, op->look->room_bytes, 0, look_read, op) != 0)
		look_close(op, nfs, -ENOMEM);
}

static int call_libnfs(struct nfsio *io, struct name_op *op)
{
	switch (op->call) {
	case CALL_STAT:
		return nfs_stat64_async(io->nfs, op->path, name_op_done, op);
	case CALL_LSTAT:
		return nfs_lstat64_async(io->nfs, op->path, name_op_done, op);
	case CALL_FSTAT:
		return nfs_fstat64_async(io->nfs, io->fh, name_op_done, op);
	case CALL_LINK:
		return nfs_link_async(io->nfs, op->path, op->new_path, name_op_done, op);
	case CALL_RENAME:
		return nfs_rename_async(io->nfs, op->path, op->new_path, name_op_done, op);
	case CALL_UNLINK:
		return nfs_unlink_async(io->nfs, op->path, name_op_done, op);
	case CALL_CHMOD:
		return nfs_chmod_async(io->nfs, op->path, (int)*(uint32_t *)op->argument, name_op_done, op);
	case CALL_SPACE:
		return nfs_statvfs64_async(io->nfs, op->path, name_op_done, op);
	case CALL_LIST:
		nfs_set_dircache(io->nfs, 0);
		return nfs_opendir_async(io->nfs, op->path, name_op_done, op);
	case CALL_LOOK:
		op->look->step = "LOOKUP";
		return nfs_open_async(io->nfs, op->path, op->look->wants_change != NULL ? O_RDWR : O_RDONLY,
				      look_opened, op);
	}
	return -EINVAL;
}

/* The least recent first, as far as they may be sent now. */
static struct name_op *next_to_send(struct nfsio *io)
{
	struct name_op *found = NULL;
	int64_t now = now_ms();

	for (struct name_op *op = io->waiting_names; op != NULL; op = op->next)
		if (op->send_at_ms <= now)
			found = op;
	return found;
}

static void note_limits(struct nfsio *io, struct name_op *op)
{
	int64_t now = now_ms();
	int64_t repeat_after_ms = NAME_REPEAT_FACTOR * (int64_t)io->options.silence_ms;

	if (op->look != NULL && op->look->repeat_after_ms != 0)
		repeat_after_ms = op->look->repeat_after_ms;
	if (op->look != NULL)
		op->limit_at_ms = op->look->limit_ms != 0 ? op->fail_at_ms : INT64_MAX;
	else
		op->limit_at_ms = name_op_may_repeat(op) ? op->fail_at_ms : now + repeat_after_ms;
	op->give_up_at_ms = note_outstanding(io, now, repeat_after_ms, op->limit_at_ms);
}

/* Send those that wait, as far as the server has not put them off. There is a connection. */
void issue_names(struct nfsio *io)
{
	struct name_op *op;

	assert_locked(&io->lock);
	if (io->waiting_names == NULL)
		return;
	fail_late_names(io);
	while (!io->broken && io->nfs != NULL && (op = next_to_send(io)) != NULL) {
		int status;

		name_op_sent(op);
		note_limits(io, op);
		status = call_libnfs(io, op);
		/* it may be done by now; its caller keeps it in place while the lock is held */
		if (status != 0 && !op->done)
			name_op_finish(op, status < 0 ? status : -EIO, nfs_get_error(io->nfs));
	}
}
