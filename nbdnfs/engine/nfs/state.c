/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What is known of the file and of the connection. */
#include "nfs/internal.h"

void nfsio_opened_stat(const struct nfsio *io, struct nfsio_stat *st)
{
	*st = io->opened;
}

bool nfsio_has_commit(const struct nfsio *io)
{
	return io->version == 3;
}

bool nfsio_has_names(const struct nfsio *io)
{
	return io->version != 3 || io->options.transport == NFSIO_OVER_LIBNFS;
}

uint32_t nfsio_max_transfer_bytes(const struct nfsio *io)
{
	return io->max_transfer_bytes;
}

void nfsio_state(struct nfsio *io, struct nfsio_state *state)
{
	pthread_mutex_lock(&io->lock);
	*state = io->state;
	pthread_mutex_unlock(&io->lock);
}

void nfsio_watch(struct nfsio *io, nfsio_changed_fn changed, void *context)
{
	pthread_mutex_lock(&io->lock);
	io->changed = changed;
	io->changed_context = context;
	pthread_mutex_unlock(&io->lock);
	changed(context);
}

void nfsio_note_waits(struct nfsio *io, _Atomic uint64_t *last_received_ms, _Atomic uint64_t *waiting_since_ms)
{
	pthread_mutex_lock(&io->lock);
	io->noted_received_ms = last_received_ms;
	io->noted_waiting_ms = waiting_since_ms;
	note_heard(io, io->last_received_ms);
	io->waits = false;
	note_waiting(io);
	pthread_mutex_unlock(&io->lock);
}

void nfsio_note_twins(struct nfsio *io, _Atomic uint64_t *twins_until_ms, uint32_t limit_ms)
{
	pthread_mutex_lock(&io->lock);
	io->noted_twins_ms = twins_until_ms;
	io->twin_limit_ms = limit_ms;
	note_twins(io);
	pthread_mutex_unlock(&io->lock);
}

uint64_t nfsio_truncated_bytes(const struct nfsio *io)
{
	return atomic_load(&io->truncated_bytes);
}

bool nfsio_is_unlinked(const struct nfsio *io)
{
	return atomic_load(&io->unlinked);
}
