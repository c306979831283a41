/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * owner_watch: does this machine still own the backing file? Decision 0009 has the protocol, nbdnfs/owner_record.py the
 * format.
 *
 * A record beside the backing file names the machine that owns it. A machine that takes the file over puts another
 * record in its place. A thread looks at the record every refresh_ms, and marks it as a sign of life. Each look
 * permits writes for two refresh_ms from its beginning. So a process that was stopped, a machine that slept, or one
 * whose server was away must look before it writes, and the next owner only has to wait.
 */
#ifndef NBDNFS_OWNER_WATCH_H
#define NBDNFS_OWNER_WATCH_H

#include <stdint.h>

#include "nfs/nfsio.h"

#define OWNER_RECORD_BYTES 512u
#define OWNER_REFRESH_MS 10000u

enum owner_state {
	OWNER_NONE,     /* ownership is not looked at */
	OWNER_HELD,
	OWNER_UNSURE,   /* the last good look was too long ago: writes wait for the next one */
	OWNER_STOLEN,   /* another machine owns the file, or there is no record: final */
};

struct owner_options {
	const char *path;       /* of the record, beside the backing file: "/.box.swap.owner" */
	const char *identity;   /* the line that makes a record this machine's: "\nboot ...\n" */
	uint32_t refresh_ms;
};

struct owner_watch;

/* NULL when there is no memory. No write is permitted before owner_watch_start(). */
struct owner_watch *owner_watch_create(const struct owner_options *options);

/*
 * Look for the first time, for limit_ms at most (-ETIMEDOUT), and start the thread, which uses `io` for its looks; the
 * io was created with `looks`. `changed` is called with each new state, the first of them before this returns. Returns
 * 0, also when the file is stolen, or -errno and *why.
 */
typedef void (*owner_changed_fn)(void *context, enum owner_state state);
int owner_watch_start(struct owner_watch *watch, struct nfsio *io, uint32_t limit_ms, owner_changed_fn changed,
		      void *context, struct nfsio_failure *why);

/* nfsio_options.may_write; the context is the watch. Returns 0, -EAGAIN, or -EIO when the file is stolen. */
int owner_watch_may_write(void *watch);

/* End the thread and free the watch, after nfsio_join(), which ends a look that waits for the server. */
void owner_watch_destroy(struct owner_watch *watch);

#endif
