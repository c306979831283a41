/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Operations on names: where they wait, and how they end.
 *
 * One that may be done twice (stat, chmod, a listing) is sent again over a new connection until its time is over. One
 * that may not (link, rename, unlink) fails as soon as it is uncertain whether the server has done it: only its caller
 * can find out.
 */
#include "nfs/internal.h"

#include <errno.h>

static void unlink_from(struct name_op **at, struct name_op *op)
{
	while (*at != op) {
		assert(*at != NULL);
		at = &(*at)->next;
	}
	*at = op->next;
}

static bool is_outstanding(const struct name_op *op)
{
	for (const struct name_op *other = op->io->name_ops; other != NULL; other = other->next)
		if (other == op)
			return true;
	return false;
}

void name_op_finish(struct name_op *op, int error, const char *text)
{
	assert_locked(&op->io->lock);
	assert(!op->done && op->io->detached > 0);
	unlink_from(is_outstanding(op) ? &op->io->name_ops : &op->io->waiting_names, op);
	op->done = true;
	op->io->detached--;
	set_failure(op->why, NFSIO_NAME, error, text);
	pthread_cond_signal(&op->finished);
}

/* It is outstanding from now on. */
void name_op_sent(struct name_op *op)
{
	unlink_from(&op->io->waiting_names, op);
	op->next = op->io->name_ops;
	op->io->name_ops = op;
	op->sent = true;
	op->put_off = false;
	op->look_error = 0;
}

/* It is not outstanding any more, and is to be sent again. */
static void wait_again(struct name_op *op)
{
	unlink_from(&op->io->name_ops, op);
	op->next = op->io->waiting_names;
	op->io->waiting_names = op;
}

/* The server has not done it, and asks for another try. */
void name_op_put_off(struct name_op *op)
{
	op->put_off = true;
	op->send_at_ms = now_ms() + RETRY_LATER_MS;
	if (op->put_off_since_ms == 0)
		op->put_off_since_ms = now_ms();
	wait_again(op);
}

/* May it be done twice? A look may, but counts from its beginning: its caller starts another. */
bool name_op_may_repeat(const struct name_op *op)
{
	switch (op->call) {
	case CALL_STAT:
	case CALL_LSTAT:
	case CALL_FSTAT:
	case CALL_CHMOD:
	case CALL_SPACE:
	case CALL_LIST:
		return true;
	case CALL_LINK:
	case CALL_RENAME:
	case CALL_UNLINK:
	case CALL_LOOK:
		return false;
	}
	return false;
}

/* The connection broke, or was given up. */
void name_ops_interrupted(struct nfsio *io)
{
	int64_t now = now_ms();

	while (io->name_ops != NULL) {
		struct name_op *op = io->name_ops;

		op->fh = NULL;
		if (name_op_may_repeat(op))
			wait_again(op);
		else if (now >= op->give_up_at_ms || now >= op->limit_at_ms)
			name_op_finish(op, -ETIMEDOUT, "the server has not answered");
		else
			name_op_finish(op, -ECONNRESET, "the connection broke");
	}
}

/* Fail those whose time is over. */
void fail_late_names(struct nfsio *io)
{
	int64_t now = now_ms();

	for (struct name_op *op = io->waiting_names, *next; op != NULL; op = next) {
		next = op->next;
		if (op->call == CALL_FSTAT && io->state.gone_too_long)
			name_op_finish(op, -ESTALE, NULL);
		else if (op->put_off && op->look == NULL && now >= op->put_off_since_ms + PUT_OFF_LIMIT_MS)
			name_op_finish(op, -EAGAIN, "the server puts it off");
		else if (now >= op->fail_at_ms && op->put_off)
			name_op_finish(op, -ETIMEDOUT, "the server puts it off");
		else if (now >= op->fail_at_ms && op->sent)
			name_op_finish(op, -ETIMEDOUT, "the server has not answered");
		else if (now >= op->fail_at_ms)
			name_op_finish(op, -ENOTCONN, "there is no connection to the server");
	}
}

void name_ops_finish_all(struct nfsio *io, int error)
{
	while (io->name_ops != NULL)
		name_op_finish(io->name_ops, error, NULL);
	while (io->waiting_names != NULL)
		name_op_finish(io->waiting_names, error, NULL);
}
