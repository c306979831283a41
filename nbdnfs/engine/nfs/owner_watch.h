/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * owner: whether the backing file is still ours. Decision 0009 has the protocol, nbdnfs/owner_record.py the format.
 *
 * A record beside the backing file names the machine that owns it. Whoever takes over puts another file in the
 * record's place. A thread of its own looks at the record every refresh_ms, and marks it as a sign of life. Each
 * such look permits writes for two refresh_ms from its beginning: a process that was stopped, a machine that slept
 * or a server that was away must look first, and the next owner only has to wait.
 */
#ifndef NBDNFS_OWNER_H
#define NBDNFS_OWNER_H

#include <stdint.h>

#include "nfs/nfsio.h"

#define OWNER_RECORD_BYTES 512u
#define OWNER_REFRESH_MS 10000u

enum owner_state {
	OWNER_NONE,     /* nobody asked for it */
	OWNER_HELD,
	OWNER_UNSURE,   /* the last look is too long ago: writes wait for the next one */
	OWNER_STOLEN,     /* somebody else has the file, or the record is gone: for good */
};

struct owner_options {
	const char *path;       /* of the record, beside the backing file: "/.box.swap.owner" */
	const char *identity;   /* the line by which a record is ours: "\nboot ...\n" */
	uint32_t refresh_ms;
};

struct owner_watch;

/* NULL when there is no memory. No write is permitted before owner_watch_start(). */
struct owner_watch *owner_watch_create(const struct owner_options *options);

/*
 * Look for the first time, and start the thread; `changed` is called with each new state, first of all with what
 * that look found. Returns 0, also when the file is not ours, or -errno and *why.
 */
int owner_watch_start(struct owner_watch *watch, struct nfsio *io, void (*changed)(void *context, enum owner_state state), void *context,
		struct nfsio_failure *why);

/* nfsio_options.may_write, with the owner as its judge: 0, -EAGAIN, or -EIO when the file is lost. */
int owner_watch_may_write(void *context);

/* Ends the thread. While it waits for the server, somebody must have called nfsio_stop(). */
void owner_watch_destroy(struct owner_watch *watch);

#endif
