/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Create and destroy. */
#include "nfs/connecting.h"

#include "base/thread.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define SILENCE_MS 15000

static void free_all(struct nfsio *io)
{
	if (io->wake_fd >= 0)
		close(io->wake_fd);
	pthread_cond_destroy(&io->settled);
	pthread_cond_destroy(&io->io_work);
	pthread_mutex_destroy(&io->lock);
	free(io->url);
	free(io->address);
	free(io->url_directory);
	free(io->url_file);
	free(io->mount_path);
	free(io->prefix);
	free(io);
}

int nfsio_create(const struct nfsio_options *options, struct nfsio **out, struct nfsio_failure *why)
{
	struct nfsio *io = calloc(1, sizeof(*io));
	pthread_condattr_t monotonic;
	int error = 0;

	set_failure(why, NFSIO_CONNECT, 0, NULL);
	if (io == NULL)
		return set_failure(why, NFSIO_CONNECT, -ENOMEM, NULL), -ENOMEM;
	io->options = *options;
	io->options.url = io->options.address = NULL;
	io->url = strdup(options->url);
	io->address = strdup(options->address);
	io->version = (int)url_number(options->url, "version=", 3);
	io->transport_kind = io->version == 3 ? options->transport : NFSIO_OVER_LIBNFS;
	io->options.like = NULL;
	io->options.known = NULL;
	wire_init(&io->wire);
	io->patience_ms = (int64_t)options->connect_timeout_s * 1000;
	if (io->options.silence_ms == 0)
		io->options.silence_ms = SILENCE_MS;
	io->silence_ms = io->options.silence_ms;
	io->deadline_ms = INT64_MAX;
	probe_init(&io->probe, (uint32_t)io->version);
	io->state.condition = NFSIO_LINK_DOWN;
	atomic_init(&io->truncated_bytes, UINT64_MAX);
	io->first_failure = why;
	io->attendant_fd = -1;
	io->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pthread_mutex_init(&io->lock, NULL);
	pthread_cond_init(&io->settled, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&io->io_work, &monotonic);
	pthread_condattr_destroy(&monotonic);
	if (io->url == NULL || io->address == NULL)
		error = -ENOMEM;
	else if (io->wake_fd < 0)
		error = -errno;
	else
		error = url_take_path(io->url, &io->url_directory, &io->url_file);
	if (error == 0 && !begin_with(io, options))
		error = -ENOMEM;
	if (error == 0)
		error = thread_start(&io->thread, io_thread, io);
	if (error != 0) {
		set_failure(why, NFSIO_CONNECT, error, error == -EINVAL ? "it names no file" : NULL);
		free_all(io);
		return error;
	}
	pthread_mutex_lock(&io->lock);
	while (!io->first_done)
		pthread_cond_wait(&io->settled, &io->lock);
	io->first_failure = NULL;
	pthread_mutex_unlock(&io->lock);
	if (why->error != 0) {
		nfsio_destroy(io);
		return why->error;
	}
	*out = io;
	return 0;
}

void nfsio_stop(struct nfsio *io)
{
	atomic_store(&io->stop, true);
	pthread_mutex_lock(&io->lock);
	wake_io_thread(io);
	pthread_mutex_unlock(&io->lock);
}

void nfsio_join(struct nfsio *io)
{
	if (io->ended)
		return;
	nfsio_stop(io);
	pthread_join(io->thread, NULL);
	io->ended = true;
}

void nfsio_destroy(struct nfsio *io)
{
	nfsio_join(io);
	free_all(io);
}
