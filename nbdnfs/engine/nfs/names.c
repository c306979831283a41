/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Operations on names, and on small files beside the backing file: what callers wait for. */
#include "nfs/internal.h"

#include "base/thread.h"

#include <errno.h>
#include <stdio.h>

/* What cannot be done, be it that there is no connection or no answer, fails after so many times silence_ms. */
#define NAME_LIMIT_FACTOR 4

/* Send it, and wait until it is done. Lock held; dropped while waiting. */
static void run(struct nfsio *io, struct name_op *op)
{
	op->next = io->waiting_names;
	io->waiting_names = op;
	io->detached++;
	issue_pending(io);
	wake_io_thread(io);
	while (!op->done) {
		struct timespec until = time_after_ms(WAITING_TICK_MS);

		if (op->look == NULL || op->look->waiting == NULL) {
			pthread_cond_wait(&op->finished, &io->lock);
			continue;
		}
		if (pthread_cond_timedwait(&op->finished, &io->lock, &until) == ETIMEDOUT && !op->done) {
			pthread_mutex_unlock(&io->lock);
			op->look->waiting(op->look);
			pthread_mutex_lock(&io->lock);
		}
	}
}

/* `call` with what is in *op already. */
int name_call(struct nfsio *io, struct name_op *op, enum name_call call, const char *path, const char *new_path,
	      struct nfsio_failure *why)
{
	char full[2][4096];

	set_failure(why, NFSIO_NAME, -ENAMETOOLONG, NULL);
	if (snprintf(full[0], sizeof(full[0]), "%s%s", io->prefix, path != NULL ? path : "") >= (int)sizeof(full[0]) ||
	    snprintf(full[1], sizeof(full[1]), "%s%s", io->prefix, new_path != NULL ? new_path : "") >=
		    (int)sizeof(full[1]))
		return -ENAMETOOLONG;
	if (!nfsio_has_names(io)) {
		set_failure(why, NFSIO_NAME, -EOPNOTSUPP, NULL);
		return -EOPNOTSUPP;
	}
	op->io = io;
	op->call = call;
	op->path = full[0];
	op->new_path = full[1];
	op->why = why;
	op->fail_at_ms = now_ms() + (op->look != NULL && op->look->limit_ms != 0
					     ? op->look->limit_ms
					     : NAME_LIMIT_FACTOR * (int64_t)io->options.silence_ms);
	condition_init(&op->finished);
	pthread_mutex_lock(&io->lock);
	if (atomic_load(&io->stop))
		set_failure(why, NFSIO_NAME, -ECANCELED, NULL);
	else if (call == CALL_LOOK && (!is_up(io) || io->broken))
		set_failure(why, NFSIO_NAME, -ENOTCONN, "there is no connection to the server");
	else
		run(io, op);
	pthread_mutex_unlock(&io->lock);
	pthread_cond_destroy(&op->finished);
	return why->error;
}

int nfsio_stat(struct nfsio *io, const char *path, struct nfsio_stat *st, struct nfsio_failure *why)
{
	struct name_op op = { .st = st };

	return name_call(io, &op, CALL_STAT, path, NULL, why);
}

int nfsio_lstat(struct nfsio *io, const char *path, struct nfsio_stat *st, struct nfsio_failure *why)
{
	struct name_op op = { .st = st };

	return name_call(io, &op, CALL_LSTAT, path, NULL, why);
}

int nfsio_fstat(struct nfsio *io, struct nfsio_stat *st, struct nfsio_failure *why)
{
	struct name_op op = { .st = st };

	if (io->options.names_only) {
		set_failure(why, NFSIO_NAME, -EBADF, NULL);
		return -EBADF;
	}
	return name_call(io, &op, CALL_FSTAT, NULL, NULL, why);
}

int nfsio_link(struct nfsio *io, const char *old_path, const char *new_path, struct nfsio_failure *why)
{
	struct name_op op = { 0 };

	return name_call(io, &op, CALL_LINK, old_path, new_path, why);
}

int nfsio_rename(struct nfsio *io, const char *old_path, const char *new_path, struct nfsio_failure *why)
{
	struct name_op op = { 0 };

	return name_call(io, &op, CALL_RENAME, old_path, new_path, why);
}

int nfsio_unlink(struct nfsio *io, const char *path, struct nfsio_failure *why)
{
	struct name_op op = { 0 };

	return name_call(io, &op, CALL_UNLINK, path, NULL, why);
}

int nfsio_chmod(struct nfsio *io, const char *path, uint32_t mode, struct nfsio_failure *why)
{
	struct name_op op = { .mode = mode };

	return name_call(io, &op, CALL_CHMOD, path, NULL, why);
}

int nfsio_space(struct nfsio *io, struct nfsio_space *space, struct nfsio_failure *why)
{
	struct name_op op = { .space = space };

	return name_call(io, &op, CALL_SPACE, "/", NULL, why);
}

int nfsio_list(struct nfsio *io, struct nfsio_names *names, struct nfsio_failure *why)
{
	struct name_op op = { .names = names };

	*names = (struct nfsio_names){ 0 };
	return name_call(io, &op, CALL_LIST, "/", NULL, why);
}
