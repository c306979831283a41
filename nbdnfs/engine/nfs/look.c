/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A look at a small file beside the one that is open. Over a wire it is LOOKUP, READ and perhaps WRITE, each a request
 * like any other, on another handle. Over libnfs it is an operation on names.
 */
#include "nfs/internal.h"

#include "base/thread.h"

#include <errno.h>
#include <string.h>

/* What waits for a request. */
struct look_wait {
	pthread_mutex_t lock;   /* guards `done`; taken with no other */
	pthread_cond_t answered;
	bool done;
};

static void look_answered(struct nfsio_req *req)
{
	struct look_wait *wait = req->context;

	pthread_mutex_lock(&wait->lock);
	wait->done = true;
	pthread_cond_signal(&wait->answered);
	pthread_mutex_unlock(&wait->lock);
}

static void wait_until_answered(struct look_wait *wait, struct nfsio_look *look)
{
	pthread_mutex_lock(&wait->lock);
	while (!wait->done) {
		struct timespec until = time_after_ms(WAITING_TICK_MS);

		if (pthread_cond_timedwait(&wait->answered, &wait->lock, &until) != ETIMEDOUT || wait->done ||
		    look->waiting == NULL)
			continue;
		pthread_mutex_unlock(&wait->lock);
		look->waiting(look);
		pthread_mutex_lock(&wait->lock);
	}
	pthread_mutex_unlock(&wait->lock);
}

/* Run one request and wait for it. Returns its error; -ECANCELED after nfsio_stop(). */
static int run(struct nfsio *io, struct nfsio_look *look, const char *step, struct nfsio_req *req)
{
	struct look_wait wait = { .done = false };
	bool stopped;

	look->step = step;
	req->done = look_answered;
	req->context = &wait;
	req->repeat_after_ms = look->repeat_after_ms;
	pthread_mutex_init(&wait.lock, NULL);
	condition_init(&wait.answered);
	pthread_mutex_lock(&io->lock);
	stopped = atomic_load(&io->stop); /* the I/O thread may have ended */
	if (!stopped)
		submit(io, req);
	pthread_mutex_unlock(&io->lock);
	if (!stopped)
		wait_until_answered(&wait, look);
	pthread_cond_destroy(&wait.answered);
	pthread_mutex_destroy(&wait.lock);
	return stopped ? -ECANCELED : req->error;
}

/* That there is no such file is LOOKUP's to say: from another procedure it is nonsense, and must not count as that. */
static int not_missing(int error)
{
	return error == -ENOENT ? -EIO : error;
}

static int look_over_wire(struct nfsio *io, const char *name, struct nfsio_look *look)
{
	int64_t fail_at_ms = look->limit_ms > 0 ? now_ms() + look->limit_ms : 0;
	struct nfsio_handle file;
	struct nfsio_req req = {
		.op = NFSIO_LOOKUP,
		.data = (uint8_t *)(uintptr_t)name,
		.length_bytes = (uint32_t)strlen(name),
		.handle = &io->directory,
		.found = &file,
		.fail_at_ms = fail_at_ms,
	};
	int error;

	look->step = "LOOKUP";
	if (req.length_bytes == 0 || req.length_bytes > WIRE_NAME_BYTES_MAX)
		return -ENAMETOOLONG;
	error = run(io, look, "LOOKUP", &req);
	if (error != 0)
		return error;
	req = (struct nfsio_req){
		.op = NFSIO_READ,
		.data = look->data,
		.length_bytes = look->room_bytes,
		.handle = &file,
		.fail_at_ms = fail_at_ms,
	};
	error = not_missing(run(io, look, "READ", &req));
	if (error != 0)
		return error;
	look->found_bytes = req.moved_bytes;
	if (look->wants_change == NULL || !look->wants_change(look))
		return 0;
	req = (struct nfsio_req){
		.op = NFSIO_WRITE,
		.data = (uint8_t *)(uintptr_t)look->change,
		.offset_bytes = look->change_offset,
		.length_bytes = look->change_bytes,
		.handle = &file,
		.fail_at_ms = fail_at_ms,
	};
	error = not_missing(run(io, look, "WRITE", &req));
	look->changed = error == 0;
	return error;
}

static int look_once(struct nfsio *io, const char *path, struct nfsio_look *look, struct nfsio_failure *why)
{
	struct name_op op = { .look = look };
	int error;

	look->found_bytes = 0;
	look->changed = false;
	if (nfsio_has_names(io))
		return name_call(io, &op, CALL_LOOK, path, NULL, why);
	error = look_over_wire(io, path + (path[0] == '/'), look);
	set_failure(why, NFSIO_NAME, error, error != 0 ? strerror(-error) : NULL);
	return error;
}

/*
 * Wait until the open file can be read. Where the server's disk is not mounted, its names are missing and its handles
 * stale, and only time tells that from a deletion (0010): a request for the file waits.
 */
static int wait_for_file(struct nfsio *io, struct nfsio_look *look)
{
	struct nfsio_req req = {
		.op = NFSIO_READ,
		.data = look->data,
		.length_bytes = 1,
		.fail_at_ms = look->limit_ms > 0 ? now_ms() + look->limit_ms : 0,
	};

	return not_missing(run(io, look, "READ of the file", &req));
}

int nfsio_look(struct nfsio *io, const char *path, struct nfsio_look *look, struct nfsio_failure *why)
{
	int error = look_once(io, path, look, why);

	if (error != -ENOENT || !look->asks_file)
		return error;
	error = wait_for_file(io, look);
	if (error == 0)
		return look_once(io, path, look, why);
	set_failure(why, NFSIO_NAME, error, strerror(-error));
	return error;
}
