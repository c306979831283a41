/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What struct nfsio must say when no request is under way. */
#include "nfs/internal.h"

#include "sim.h"

bool nfs_knows_directory(const struct nfsio *io)
{
	return io->directory.length_bytes > 0;
}

void check_idle_nfs(struct nfsio *io, unsigned number)
{
	if (io->batches != 0)
		sim_fail("no request is under way, and connection %u counts %u batches", number, io->batches);
}
