/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Instead of nfs/connect_libnfs.c: the first open, which libnfs does by name over sockets of its own, hands over what
 * libnfs would have found. Everything after it is the engine's own wire.
 */
#include "sim.h"

#include "nfs/connecting.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* What such an attempt takes at least. */
#define OPEN_NS (2 * MS)

static int context;

void nfs_destroy_context(struct nfs_context *nfs)
{
	(void)nfs;
}

void step_done(int error, struct nfs_context *nfs, void *data, void *arg)
{
	(void)error, (void)nfs, (void)data, (void)arg;
	sim_fail("libnfs answers, and is not here");
}

struct step *new_step(struct nfsio *io)
{
	return &io->step;
}

int pump(struct nfsio *io, struct nfs_context *nfs, struct step *step, int64_t deadline_ms)
{
	(void)io, (void)nfs, (void)step, (void)deadline_ms;
	sim_fail("libnfs is waited for, and is not here");
	return -EIO;
}

static bool note_paths(struct nfsio *io)
{
	if (io->mount_path == NULL)
		io->mount_path = strdup("/export");
	if (io->prefix == NULL)
		io->prefix = strdup("/dir");
	return io->mount_path != NULL && io->prefix != NULL;
}

bool connect_to_name(struct nfsio *io, struct connection *made, struct nfsio_failure *why)
{
	struct sockaddr_in peer = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(0x0a000001),
				    .sin_port = htons(NAS_PORT) };

	*made = (struct connection){ .deadline_ms = now_ms() + 1 + io->patience_ms };
	if (!note_paths(io)) {
		set_failure(why, NFSIO_MOUNT, -ENOMEM, NULL);
		return false;
	}
	thread_sleep(OPEN_NS);
	if (worker_place_is_known && (options.faults >> FAULT_refuse & 1) == 0 && options.fail_at == 0)
		sim_fail("the file is looked for by its name, although its handle is known");
	if (!nas_is_listening() || fault_is_active(FAULT_partition)) {
		set_failure(why, NFSIO_MOUNT, -ENOTCONN, "no answer");
		return false;
	}
	made->nfs = (struct nfs_context *)(void *)&context;
	made->st = (struct nfsio_stat){ .size_bytes = (uint64_t)options.pages * PAGE_BYTES, .fileid = NAS_FILE_ID,
					.nlink = 1, .mode = S_IFREG | 0600 };
	if (fault_is_active(FAULT_replaced) && region_memory[0] == 0) {
		set_failure(why, NFSIO_OPEN, -ENOENT, "there is no such file");
		return false; /* what has the name when the device starts is the file */
	}
	memcpy(&made->place.peer.address, &peer, sizeof(peer));
	made->place.peer.address_bytes = sizeof(peer);
	if (fault_is_active(FAULT_replaced)) {
		made->st.fileid = nas_other_id();
		made->place.handle_bytes = nas_other_handle(made->place.handle);
	} else {
		made->place.handle_bytes = nas_file_handle(made->place.handle);
	}
	made->root.length_bytes = nas_root_handle(made->root.bytes);
	made->read_max_bytes = made->write_max_bytes = transfer_limit(0);
	return true;
}
